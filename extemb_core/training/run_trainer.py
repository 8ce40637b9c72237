"""The Trainer of a run: losses, optimiser and rates, logs, and marks of whole checkpoints."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from extemb_core.errors import TrainingError
from extemb_core.models.lora import read_tensors
from extemb_core.training.checkpoints import OPTIMIZER, mark_complete, named_if_damaged, step_of
from extemb_core.training.config import TrainingConfig
from extemb_core.training.data import Samples
from extemb_core.training.trainable import TrainableModel
from extemb_core.utils.files import disk_errors

logger = logging.getLogger(__name__)

LOG = "log.jsonl"


class RunTrainer(Trainer):
    """transformers' Trainer for a `TrainableModel`, over `Batches` in their order."""

    model: TrainableModel
    eval_dataset: Samples | None
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        config: TrainingConfig,
        optimizer_from: Path | None = None,
        eval_collators: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._optimizer_from = optimizer_from
        self._config = config
        self._eval_collators = eval_collators
        self.model_accepts_loss_kwargs = False  # the loss is a mean; accumulation averages it
        self._parts: dict[str, list[Tensor]] = {}  # losses of each objective and each ratio since the last log

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.SequentialSampler:
        dataset: Any = train_dataset or self.train_dataset
        return torch.utils.data.SequentialSampler(dataset)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        objective = inputs.get("objective")
        output = model(**{name: value for name, value in inputs.items() if name != "objective"})
        loss = output["loss"]
        if model.training and objective is not None:
            parts = {objective: loss.detach()} | {f"ratio_{ratio}": part for ratio, part in output["by_ratio"].items()}
            for name, part in parts.items():
                self._parts.setdefault(name, []).append(part)
        if model.training and not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {float(loss.detach())} at step {self.state.global_step}; "
                "resume from the last checkpoint with a lower learning rate"
            )
        return (loss, {"loss": loss}) if kwargs.get("return_outputs") else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to the log the mean loss of each objective and each ratio since the last log: one can hide another."""
        if "loss" in logs:
            logs |= {f"loss_{name}": float(torch.stack(losses).mean()) for name, losses in sorted(self._parts.items())}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a schedule that warms up, stays constant, and falls to 0 over the last steps."""
        if self.lr_scheduler is None:
            steps: dict[str, Any] = {"warmup_steps": self.args.warmup_steps, "decay_steps": self._config.decay_steps}
            rate = partial(learning_rate_factor, last=num_training_steps, **steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
            self.optimizer = make_optimizer(
                named, self.args.learning_rate, self._config.connector_lr_factor, self.args.weight_decay
            )
            if self._optimizer_from is not None:
                fresh, whole = self._take_optimizer(self._optimizer_from)
                logger.info("the optimiser goes on for %d of %d tensors", whole - fresh, whole)
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the held-out loss at every ratio, over the same samples: eval_ratio_K."""
        if self.eval_dataset is None:
            return {}
        metrics: dict[str, float] = {}
        self.model.train(False)
        for name, collator in self._eval_collators.items():
            losses = []
            with torch.no_grad(), self.compute_loss_context_manager():
                for at in range(len(self.eval_dataset)):
                    item = self.eval_dataset[at]
                    inputs = collator([{"sample": torch.from_numpy(item["input_ids"]), "index": at}])
                    losses.append(float(self.compute_loss(self.model, inputs)))
            metrics[f"eval_{name}"] = sum(losses) / len(losses)
        metrics["eval_loss"] = sum(metrics.values()) / len(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            self.model.save(Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        with named_if_damaged(checkpoint):
            self.model.load(checkpoint)
            file = checkpoint / TRAINER_STATE_NAME  # the Trainer reads it next
            if TrainerState.load_from_json(str(file)).global_step != step_of(checkpoint):
                raise ValueError(f"{file} is of another step")

    def _rates(self, step: int) -> list[float]:
        """Return the learning rate of each group of parameters at a step."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        return [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimiser's state as safetensors, by parameter name; the schedule follows from the step."""
        state = {
            f"{name}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
            for name, parameter in self.model.trainable().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        if self.args.should_save and state:
            file = Path(output_dir) / OPTIMIZER
            with disk_errors(file):
                save_file(state, file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimiser's state, and set the schedule to the checkpoint's step."""
        if checkpoint is None:
            return
        with named_if_damaged(Path(checkpoint)):
            fresh, whole = self._take_optimizer(Path(checkpoint))
        if fresh:
            logger.warning("the optimiser begins anew for %d of %d tensors", fresh, whole)
        step = self.state.global_step
        rates = self._rates(step)
        state = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
        self.lr_scheduler.load_state_dict(self.lr_scheduler.state_dict() | state)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _take_optimizer(self, checkpoint: Path) -> tuple[int, int]:
        """Load the optimiser's state of each parameter that a checkpoint has, by name.

        Returns:
            Number of parameters that begin anew, and number of all parameters.
        """
        file = checkpoint / OPTIMIZER
        saved: dict[str, dict[str, Tensor]] = {}
        for key, value in (read_tensors(file) if file.is_file() else {}).items():
            name, _, what = key.rpartition("/")
            saved.setdefault(name, {})[what] = value
        parameters = self.model.trainable()
        for name, parameter in parameters.items():
            state = saved.get(name, {})
            if state and all(value.shape in ((), parameter.shape) for value in state.values()):
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device, parameter.dtype)
                    for key, value in state.items()
                }
        return sum(parameter not in self.optimizer.state for parameter in parameters.values()), len(parameters)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save nothing: all random draws follow from the seed and the batch's number."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing: see `_save_rng_state`."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, connector_lr_factor: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make the optimiser for parameters, given by name; those of the connector have a rate of their own."""
    rates = {False: learning_rate, True: learning_rate * connector_lr_factor}
    groups = [
        {"params": [p for name, p in parameters.items() if (".connector." in name) == connector], "lr": rate}
        for connector, rate in rates.items()
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=False)


def learning_rate_factor(step: float, *, last: float, warmup_steps: float, decay_steps: float | None) -> float:
    """Return the factor of the rates at a step: it rises, stays at 1, and falls to 0 over the last steps."""
    fall = last - warmup_steps if decay_steps is None else decay_steps
    rising = step / warmup_steps if warmup_steps else 1.0
    return min(1.0, rising, (last - step) / fall if fall > 0 else 1.0)


class RunCallback(TrainerCallback):
    """Marks whole checkpoints, writes the log as JSON Lines, advances the progress bar, and stops in time."""

    def __init__(
        self, config: TrainingConfig, advance: Callable[[int], None], lag: int, outdated: Sequence[Path]
    ) -> None:
        self._config = config
        self._advance = advance
        self._outdated = outdated
        self._lag = lag  # tokens by which steps with earlier settings exceeded today's
        self._start = self._saved = time.monotonic()
        self._logged: tuple[float, int] | None = None  # when, and at which step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "tokens": self._tokens(state.global_step), **logs}
            now = time.perf_counter()
            if self._logged is not None and state.global_step > self._logged[1]:
                tokens = (state.global_step - self._logged[1]) * self._config.tokens_per_step
                row["tokens_per_second"] = round(tokens / (now - self._logged[0]), 1)
            self._logged = now, state.global_step
            append_log(self._config, row)

    def _tokens(self, step: int) -> int:
        return step * self._config.tokens_per_step + self._lag

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # otherwise the Trainer keeps the checkpoint's intervals
        self._advance(state.global_step)
        self._logged = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)
        limit, every = self._config.max_minutes, self._config.save_minutes
        due = every is not None and time.monotonic() - self._saved > 60 * every
        over = limit is not None and time.monotonic() - self._start > 60 * limit
        if self._config.processes > 1 and (every or limit):  # decided by one clock, or some would wait for others
            decided = [due, over]
            torch.distributed.broadcast_object_list(decided, src=0)
            due, over = decided
        control.should_save |= due or over
        control.should_training_stop |= over

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            mark_complete(folder, self._tokens(state.global_step), self._config, self._outdated)


def mend_log(output: Path) -> None:
    """Cut off an incomplete last line, left in a run's log by a full disk or a kill."""
    file = output / LOG
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


def append_log(config: TrainingConfig, row: dict[str, Any]) -> None:
    """Append a line to a run's log."""
    with (Path(config.output) / LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")
