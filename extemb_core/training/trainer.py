"""Train with `transformers.Trainer`: resume, accumulation, evaluation, logs and devices are its work.

Only what is particular to this method stands here: the losses, the order of the batches, two learning
rates, and checkpoints that hold what is trained alone and count as whole only once everything is on disk.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from extemb_core.errors import ConfigError, TrainingError
from extemb_core.models.chunks import chunk_lengths
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import reading_model
from extemb_core.models.llm import LLM, choose_device
from extemb_core.models.lora import read_tensors
from extemb_core.models.reader_lora import add_reader, load_reader, reader_adapters, save_reader
from extemb_core.questions import read_questions
from extemb_core.training.attention import training_attention
from extemb_core.training.batches import Batches, Collator
from extemb_core.training.config import TrainingConfig
from extemb_core.training.data import Samples, TokenFile
from extemb_core.training.objectives import QuestionReadings
from extemb_core.training.reading_loss import Reading, reading_losses
from extemb_core.training.two_stream import plan_passes, two_stream_losses
from extemb_core.utils.files import atomic_write_text, disk_errors, fsync, parse_json
from extemb_core.utils.progress import progress

logger = logging.getLogger(__name__)

READER, COMPLETE, OPTIMIZER = "reader", "complete.json", "optimizer.safetensors"
_LOG = "log.jsonl"
# What a checkpoint's tensors depend on; all else may change when a run goes on, and the log says so.
_SAME_FOR_TRAINER = ("max_steps", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "save_steps",
                     "eval_steps", "logging_steps", "seed", "dataloader_num_workers")  # fmt: skip
_OF_QUESTIONS = ("most_per_source", "raw_share", "mixed_share", "focus_share", "most_distractors", "seed")
_FIXED = ("llm", "embedder", "trained", "reader_rank", "reader_first_layer", "start_from")


class TrainableModel(nn.Module):
    """Trained parts with their losses: an embedder, a reader (adapters on the LLM), or both.

    An LLM without a reader is not a submodule, so that it is neither moved nor saved. Above entry layer 0, a reader's
    adapters are put on a reading model of their own (see `models/entry.py`), and `llm` is that.
    """

    def __init__(
        self,
        llm: LLM,
        embedder: ExtensibleEmbedder | None = None,
        reader: LoraConfig | None = None,
        distillation: float = 0.0,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.embedder = embedder
        self.reader = reader
        self.adapted = llm.model if reader is not None else None
        self.distillation = distillation

    def forward(
        self,
        ratios: Sequence[Sequence[int]],
        chunk_size: int,
        samples: Sequence[Tensor] | None = None,
        readings: Sequence[Reading] | None = None,
    ) -> dict[str, Any]:
        """Compute the loss with gradient, and that of each ratio without."""
        distillation = self.distillation if self.training else 0.0
        if samples is not None:
            assert self.embedder is not None
            losses = two_stream_losses(
                self.embedder, samples, ratios, chunk_size, llm=self.llm, distillation=distillation
            )
        else:
            losses = reading_losses(
                self.llm,
                readings or (),
                embedder=self.embedder,
                ratios=ratios,
                chunk_size=chunk_size,
                distillation=distillation,
            )
        loss = losses.mean()
        if self.training and not loss.requires_grad:  # nothing but raw text in this batch, and an embedder alone learns
            loss = loss + 0 * next(iter(self.trainable().values())).sum()
        return {"loss": loss, "by_ratio": losses.by_ratio()}

    def train(self, mode: bool = True) -> TrainableModel:
        super().train(mode)
        self.llm.model.train(False)  # its dropout stays off
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by the names that it has in the files: other versions of the code have the same."""
        embedder, reader = {}, {}
        if self.embedder is not None:
            embedder = {f"embedder.{n}": self.embedder.get_parameter(n) for n in self.embedder.trainable_names}
        if self.reader is not None:
            reader = {f"reader.{name}": parameter for name, parameter in reader_adapters(self.llm).items()}
        return {name: parameter for name, parameter in (embedder | reader).items() if parameter.requires_grad}

    def transformers(self) -> list[Any]:
        """List the models of transformers that a step goes through."""
        models: list[Any] = [self.llm.model]
        if self.embedder is not None:
            models.append(self.embedder.stack)
            if layer := self.embedder.config.entry_layer:  # embeddings are read by a model of their own
                models.append(self.llm.reading_model(layer))
        return models

    def save(self, folder: Path) -> None:
        if self.embedder is not None:
            self.embedder.save_pretrained(folder)
        if self.reader is not None:
            save_reader(self.llm, self.reader, folder / READER)

    def load(self, folder: Path) -> None:
        if self.embedder is not None:
            self.embedder.load_own(folder / "model.safetensors")
        if self.reader is not None:
            load_reader(self.llm, folder / READER)


class RunTrainer(Trainer):
    """Trainer of transformers for a `TrainableModel`, over `Batches` in their order."""

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
        """Log with the mean loss of each objective and each ratio since the last log: one can hide the other."""
        if "loss" in logs:
            logs |= {f"loss_{name}": float(torch.stack(losses).mean()) for name, losses in sorted(self._parts.items())}
            self._parts.clear()
        super().log(logs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm up, stay, and fall to 0 over the last steps."""
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
        """Measure the held-out loss at every ratio, each over the same samples: eval_ratio_K."""
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
        self.model.load(Path(resume_from_checkpoint))

    def _rates(self, step: int) -> list[float]:
        """Return the learning rate of each group of parameters at a step."""
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        return [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Keep the optimiser's state as safetensors, by parameter name; the schedule follows from the step."""
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
        """Go on with the optimiser's state and the schedule."""
        if checkpoint is None:
            return
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
        """Take what a checkpoint knows of each parameter, by its name.

        Returns:
            How many parameters begin anew, and of how many.
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
        """Save nothing: all that is drawn follows from the seed and the batch's number."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load nothing: see `_save_rng_state`."""


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], learning_rate: float, connector_lr_factor: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Make the optimiser of parameters by name; the connector's have a rate of their own."""
    rates = {False: learning_rate, True: learning_rate * connector_lr_factor}
    groups = [
        {"params": [p for name, p in parameters.items() if (".connector." in name) == connector], "lr": rate}
        for connector, rate in rates.items()
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=False)


def learning_rate_factor(step: float, *, last: float, warmup_steps: float, decay_steps: float | None) -> float:
    """Return by what the rates are multiplied at a step: it rises, stays, and falls to 0 over the last steps."""
    fall = last - warmup_steps if decay_steps is None else decay_steps
    rising = step / warmup_steps if warmup_steps else 1.0
    return min(1.0, rising, (last - step) / fall if fall > 0 else 1.0)


class _RunCallback(TrainerCallback):
    """Marks whole checkpoints, writes the log as JSON Lines, moves the progress bar, and stops in time."""

    def __init__(
        self, config: TrainingConfig, advance: Callable[[int], None], lag: int, outdated: Sequence[Path]
    ) -> None:
        self._config = config
        self._advance = advance
        self._outdated = outdated
        self._lag = lag  # tokens by which the steps of earlier settings were larger than today's
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
            _append_log(self._config, row)

    def _tokens(self, step: int) -> int:
        return step * self._config.tokens_per_step + self._lag

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # the Trainer goes on with the intervals of the checkpoint
        self._advance(state.global_step)
        self._logged = time.perf_counter(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)
        limit, every = self._config.max_minutes, self._config.save_minutes
        due = every is not None and time.monotonic() - self._saved > 60 * every
        over = limit is not None and time.monotonic() - self._start > 60 * limit
        if self._config.processes > 1 and (every or limit):  # one that stops by its own clock leaves the others waiting
            decided = [due, over]
            torch.distributed.broadcast_object_list(decided, src=0)
            due, over = decided
        control.should_save |= due or over
        control.should_training_stop |= over

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in filter(Path.is_file, folder.rglob("*")):
                fsync(file)
            _discard_checkpoints(*self._outdated)
            step = state.global_step
            mark = {"step": step, "tokens": self._tokens(step), "config": _settings(self._config)}
            atomic_write_text(folder / COMPLETE, json.dumps(mark, indent=2))


@contextmanager
def full_disk_error() -> Iterator[None]:
    """Say of a full disk that the run goes on once there is room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = f"{error.filename} could not be written ({error.strerror})" if error.filename else error.strerror
        raise TrainingError(f"{what}; make room, and the same run goes on from its last whole checkpoint") from error


@full_disk_error()
def train(config: TrainingConfig, *, resume: bool = True, outdated: Sequence[Path] = ()) -> TrainableModel:
    """Train an embedder, or a reader, or both, and leave them in `config.output` (a reader in `reader/` there).

    Args:
        config: The run.
        resume: Go on from the last whole checkpoint in `config.output`, if there is one of this run. Without it, those
            that are there count no longer.
        outdated: Folders of runs that go on from this one. With a new checkpoint here, those there count no longer.

    Raises:
        ConfigError: The settings do not go together.
        TrainingError: The loss is not finite, there is nothing to train on, the checkpoints in the output folder
            belong to another run, or the disk is full.
    """
    checkpoint = _last_checkpoint(config) if resume else None
    output = Path(config.output)
    with _tidy_after_failure(output, config.token_cache):
        output.mkdir(parents=True, exist_ok=True)
        llm = LLM.from_pretrained(config.llm, device=_device(config), dtype=config.dtype)
        model = starting_point(config, llm, checkpoint)
        if checkpoint is not None and is_finished(config):
            model.load(checkpoint)  # finished before; the Trainer would take one more step
            model.save(output)
            return model
        settings = model.embedder.config if model.embedder is not None else ExtensibleEmbedderConfig(ratios=(1,))
        ratios, chunk_sizes = drawn_from(config, settings)
        # Steps are counted on from the checkpoint's, which may have been of another size.
        lag = 0
        if checkpoint is not None:
            lag = _tokens_of(checkpoint, config) - _step_of(checkpoint) * config.tokens_per_step
        counted = replace(config, total_tokens=config.total_tokens - lag)
        batches = plan_batches(counted, llm, min(ratios), chunk_sizes)
        held_out = _held_out(config, llm)
        longest = max(_short_chunks(config, chunk_sizes)) if held_out is not None else 0
    if checkpoint is None and is_first_process():  # not before it is known that this run can begin
        _discard_checkpoints(output)
    elif is_first_process():  # what a kill left of one counts for nothing, but would push a whole one out
        for folder in _checkpoints(output):
            if not (folder / COMPLETE).is_file():
                shutil.rmtree(folder)
    logger.info("%d steps of %d tokens at most", counted.max_steps, config.tokens_per_step)
    before = None  # the checkpoint that holds the optimiser's state of the run that this one goes on from
    if checkpoint is None and config.start_from is not None:
        before = last_checkpoint(Path(config.start_from))
    with progress("train", counted.max_steps) as advance:
        trainer = RunTrainer(
            model=model,
            args=_arguments(counted, llm, evaluate=held_out is not None),
            train_dataset=batches,
            eval_dataset=held_out,
            data_collator=Collator(ratios, chunk_sizes, config.seed, config.ratios_per_sample),
            callbacks=[_RunCallback(config, advance, lag, outdated), *_tensorboard(output)],
            config=config,
            optimizer_from=before,
            eval_collators={f"ratio_{r}": Collator([r], [longest], 0) for r in ratios},
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            if checkpoint is not None and (changed := changed_settings(checkpoint, config)):
                _append_log(config, {"step": _step_of(checkpoint), "changed": changed})
            atomic_write_text(output / "training.json", json.dumps(asdict(config), indent=2))
        with training_attention(*model.transformers()):
            if held_out is not None and checkpoint is None:
                trainer.evaluate()
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.train(False)
    if trainer.is_world_process_zero():
        model.save(output)
    trainer.accelerator.wait_for_everyone()  # else another process would look for what is not written yet
    return model


@contextmanager
def _tidy_after_failure(*folders: Path) -> Iterator[None]:
    """Remove the folders that a run made which could not begin; whole files of tokens stay, for the next to use."""
    made = {folder for one in folders for folder in (one, *one.parents) if not folder.exists()}
    try:
        yield
    except BaseException:
        for folder in sorted(made, key=lambda folder: -len(folder.parts)) if is_first_process() else ():
            with suppress(OSError):  # not there, or something is in it
                if all(file.suffix == ".lock" for file in folder.iterdir()):
                    shutil.rmtree(folder)
        raise


def _discard_checkpoints(*outputs: Path) -> None:
    """Have no run go on from what is in these folders."""
    for output in outputs:
        for folder in _checkpoints(output):
            (folder / COMPLETE).unlink(missing_ok=True)


def _append_log(config: TrainingConfig, row: dict[str, Any]) -> None:
    with (Path(config.output) / _LOG).open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")


def is_first_process() -> bool:
    """Tell whether this is the one of those that train together that writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def is_finished(config: TrainingConfig) -> bool:
    """Tell whether the run's last checkpoint has seen all of its tokens."""
    checkpoint = _last_checkpoint(config)
    return checkpoint is not None and _tokens_of(checkpoint, config) >= config.total_tokens


def drawn_from(config: TrainingConfig, settings: ExtensibleEmbedderConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ratios and the chunk sizes that a run draws from; `RatioError` where the embedder lacks a ratio."""
    ratios = config.ratios or tuple(settings.ratios)
    for ratio in ratios:
        settings.require_ratio(ratio)
    return ratios, config.chunk_sizes or (settings.chunk_size,)


def plan_batches(config: TrainingConfig, llm: LLM, finest: int, chunk_sizes: Sequence[int]) -> Batches:
    """Plan what the run trains on, batch by batch."""
    wanted = {name: share for name, share in config.objectives.items() if share}
    samples = questions = None
    if "two_stream" in wanted:
        short = _short_chunks(config, chunk_sizes)
        shortest = max(short) + 1
        for size in short:  # that the longest sample fits the window is known now, not at some step
            lengths = chunk_lengths(config.sample_length, size)
            plan_passes(lengths, finest, llm.context_window, int(llm.bos_token_id is not None))
    else:
        shortest = min(config.spans)
    if wanted.keys() - {"questions"}:
        tokens = _token_file(config, llm, config.data)
        samples = Samples(tokens, config.sample_length, shortest)
        if not len(samples):
            raise TrainingError(
                f"none of the {len(tokens)} documents has {shortest} tokens, the shortest sample; pass longer documents"
            )
        logger.info("%d samples, %d tokens left out", len(samples), samples.left_out)
    if "questions" in wanted:
        rows, settings = read_questions(config.questions, unique=False), {n: getattr(config, n) for n in _OF_QUESTIONS}
        questions = QuestionReadings(rows, llm, max_tokens=config.sample_length, **settings)
    return Batches(
        wanted,
        n_batches=config.max_steps * config.accumulation_steps * config.processes,
        batch_size=config.batch_size,
        seed=config.seed,
        llm=llm,
        samples=samples,
        questions=questions,
        spans=config.spans,
    )


def _short_chunks(config: TrainingConfig, chunk_sizes: Sequence[int]) -> list[int]:
    """List those that leave something of a sample to predict after a chunk: what two streams are made of."""
    short = [size for size in chunk_sizes if size < config.sample_length]
    if not short:
        raise ConfigError(
            f"sample_length={config.sample_length} leaves nothing to predict after a chunk of {min(chunk_sizes)}; "
            f"pass at least {2 * min(chunk_sizes)}, or smaller chunk_sizes"
        )
    return short


def _held_out(config: TrainingConfig, llm: LLM) -> Samples | None:
    if not config.eval_data:
        return None
    tokens = _token_file(config, llm, config.eval_data)
    samples = Samples(tokens, config.sample_length, config.sample_length, config.eval_samples)
    if not len(samples):
        raise TrainingError(
            f"no document in eval_data has {config.sample_length} tokens, the length of a sample; "
            "pass longer documents or a smaller sample_length"
        )
    return samples


def _device(config: TrainingConfig) -> str:
    """Choose the device of the Trainer: with several processes, each takes the GPU of its local rank."""
    chosen = choose_device(config.device)
    if chosen.type != "cuda":
        return str(chosen)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.index not in (None, rank):
        raise ConfigError(
            f"device={config.device!r}: training takes the visible GPUs in order; pass device='cuda' and choose with "
            "CUDA_VISIBLE_DEVICES"
        )
    return f"cuda:{rank}"


def starting_point(config: TrainingConfig, llm: LLM, checkpoint: Path | None = None) -> TrainableModel:
    """Make what a run trains, as it is before the first step.

    With a checkpoint, an embedder that weighs tokens by counts has its weights: the text may be another one by now.
    """
    embedder: ExtensibleEmbedder | None = None
    reader: LoraConfig | None = None
    layer = int(config.embedder.get("entry_layer", 0))
    before = Path(config.start_from) if config.start_from is not None else None
    torch.manual_seed(config.seed)
    if config.trained != "reader":
        reader_alone = before is not None and holds_reader_alone(before)
        if reader_alone and config.trained != "both":
            raise ConfigError(
                f"start_from={config.start_from!r} holds a reader and no embedder; pass "
                f"llm={f'{config.start_from}/{READER}'!r} for an embedder that is trained for it"
            )
        if before is None or reader_alone:
            embedder = _new_embedder(config, llm, checkpoint, config.embedder)
        else:
            embedder = ExtensibleEmbedder.from_pretrained(before, llm=llm, adapt=True)
        embedder.trainable_to(torch.float32)  # in bfloat16 a small update would round to none
        layer = embedder.config.entry_layer
    elif layer:  # a reader of what the LLM's first layers give as they are
        settings = {**config.embedder, "adaptation": "none", "has_reader": True}
        embedder = _new_embedder(config, llm, checkpoint, settings)
    for name in ("mixed_share", "focus_share"):
        if getattr(config, name) and not layer:
            raise ConfigError(
                f"{name}={getattr(config, name)} needs an embedder with an entry_layer above 0, and this one's is 0; "
                "leave it out"
            )
    if config.trained == "connector" and embedder is not None:
        embedder.stack.requires_grad_(False)
    if config.trained in ("reader", "both"):
        shared = embedder.config.num_layers if embedder is not None else 0
        if layer:
            llm = LLM(reading_model(llm.model, layer, llm.name), llm.tokenizer, name=llm.name)
        reader = add_reader(llm, config.reader_rank, max(shared, config.reader_first_layer))
        if before is not None and (before / READER).is_dir():
            load_reader(llm, before / READER)
    return TrainableModel(llm, embedder, reader, config.distillation)


def _new_embedder(
    config: TrainingConfig, llm: LLM, checkpoint: Path | None, settings: Mapping[str, Any]
) -> ExtensibleEmbedder:
    if settings.get("token_weighting") != "frequency":
        return ExtensibleEmbedder.from_llm(llm, **settings)
    if checkpoint is not None:
        return ExtensibleEmbedder.from_pretrained(checkpoint, llm=llm)
    return ExtensibleEmbedder.from_llm(llm, token_counts=_token_counts(config, llm), **settings)


def _token_counts(config: TrainingConfig, llm: LLM) -> Tensor:
    """Count how often each token occurs in the training text."""
    if not config.data:
        raise ConfigError("token_weighting='frequency' counts tokens in data, and data is empty; pass text files")
    tokens = _token_file(config, llm, config.data).tokens
    size = int(llm.model.get_input_embeddings().num_embeddings)
    parts = (tokens[at : at + 2**24] for at in range(0, len(tokens), 2**24))
    return torch.from_numpy(sum(np.bincount(part, minlength=size) for part in parts))


def _token_file(config: TrainingConfig, llm: LLM, files: Sequence[str]) -> TokenFile:
    return TokenFile.build([Path(file) for file in files], llm, config.token_cache)


def holds_reader_alone(folder: Path) -> bool:
    """Tell whether a run's folder has a reader, and no embedder beside it."""
    return (folder / READER).is_dir() and not (folder / "config.json").is_file()


def _arguments(config: TrainingConfig, llm: LLM, *, evaluate: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        **{name: getattr(config, name) for name in _SAME_FOR_TRAINER},
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        lr_scheduler_type="linear",
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        report_to="none",  # the callbacks write the logs
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=llm.device.type == "cpu",
        bf16=llm.dtype == torch.bfloat16,
        dataloader_pin_memory=llm.device.type == "cuda",
        label_names=[],
    )
    if arguments.n_gpu > 1:  # several GPUs are for several processes (torchrun); DataParallel cannot split samples
        arguments._n_gpu = 1
    return arguments


def _tensorboard(output: Path) -> list[TrainerCallback]:
    if not importlib.util.find_spec("tensorboard") or not is_first_process():
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(output / "tensorboard")))]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings of a run as JSON has them."""
    return dict(json.loads(json.dumps(asdict(config))))


def _checkpoints(output: Path) -> list[Path]:
    """List a run's checkpoints, whole or not; a folder of another name, a copy that was put aside, is none."""
    return [folder for folder in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-[0-9]+", folder.name)]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _tokens_of(checkpoint: Path, config: TrainingConfig) -> int:
    """Read how many tokens a checkpoint has seen; earlier versions did not say, and had steps of one size."""
    mark = parse_json((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    if "tokens" in mark:
        return int(mark["tokens"])
    sizes = ("batch_size", "accumulation_steps", "sample_length")
    before = {name: value for name, value in _config_of(checkpoint).items() if name in sizes}
    return _step_of(checkpoint) * replace(config, **before).tokens_per_step


def last_checkpoint(output: Path) -> Path | None:
    """Find the last whole checkpoint in a run's folder, of whatever run."""
    whole = [folder for folder in _checkpoints(output) if (folder / COMPLETE).is_file()]
    return max(whole, key=_step_of, default=None)


def _last_checkpoint(config: TrainingConfig) -> Path | None:
    """Find that of this run; raise `TrainingError` if it is another's."""
    output = Path(config.output)
    last = last_checkpoint(output)
    if last is None:
        return None
    changed = changed_settings(last, config)
    other = next((name for name in changed if name in _FIXED), None)
    if other is not None:
        before, now = changed[other]
        raise TrainingError(
            f"{output} holds checkpoints of a run with another {other} ({before!r}, now {now!r}); use another output "
            "folder, or train without resuming"
        )
    return last


def changed_settings(checkpoint: Path, config: TrainingConfig) -> dict[str, tuple[Any, Any]]:
    """Compare the settings with those that a checkpoint was made with: changed name -> (then, now).

    One that the checkpoint's version did not know was its default. A folder is the same however its path is typed, and
    a stage of a recipe goes on from the one beside it wherever the recipe's folder was moved.
    """
    defaults = _settings(TrainingConfig(llm="", data=("",), output=""))
    before = defaults | {"data": [], "llm": ""} | _config_of(checkpoint)
    changed = {name: (before[name], now) for name, now in _settings(config).items() if before[name] != now}
    for name in changed.keys() & {"llm", "start_from", "output"}:
        if None not in changed[name] and _same_place(*changed[name], before["output"], config.output):
            del changed[name]
    return changed


def _same_place(then: str, now: str, output_then: str, output_now: str) -> bool:
    """Tell whether two paths are one, or lead to one place beside a run's folder before and after that was moved."""
    one, other, beside_then, beside_now = (
        Path(os.path.abspath(path)) for path in (then, now, Path(output_then).parent, Path(output_now).parent)
    )
    if one == other:
        return True
    inside = one.is_relative_to(beside_then) and other.is_relative_to(beside_now)
    return inside and one.relative_to(beside_then) == other.relative_to(beside_now)


def _config_of(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's settings: in its own mark, in those of the first versions in the run's file."""
    for file in (checkpoint / COMPLETE, checkpoint.parent / "training.json"):
        try:
            values = parse_json(file.read_text(encoding="utf-8"))
            config = values["config"] if file.name == COMPLETE else values
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(config, dict):
            return config
    raise TrainingError(f"{checkpoint} does not say what run it is of; use another output folder, or remove it")
