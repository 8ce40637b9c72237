"""Train an embedder with `transformers.Trainer`: resume, accumulation, evaluation, logs and devices are its work.

Only what is particular to this method stands here: the loss, the ratio drawn per sample, two learning rates, and
checkpoints that hold the embedder alone and count as whole only once everything is on disk.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from extemb_core.errors import ConfigError, TrainingError
from extemb_core.models.downscaling import chunk_lengths, is_count
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM, choose_device
from extemb_core.progress import progress
from extemb_core.training.data import Samples, TokenFile
from extemb_core.training.objectives import plan_passes, two_stream_loss

logger = logging.getLogger(__name__)

_COMPLETE = "complete.json"


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run. Lengths are in tokens, times in minutes.

    Attributes:
        llm: Name, path or hub id of the frozen LLM.
        data: Text files (.jsonl[.zst] with a "text" field, .txt, .md).
        output: Folder for checkpoints, logs and the finished embedder.
        eval_data: Held-out text files; none, no evaluation during training.
        embedder: Settings of `ExtensibleEmbedderConfig` for a new embedder.
        start_from: An embedder's folder to go on from instead of a new one.
        sample_length: Tokens of a training sample.
        chunk_sizes: Chunk lengths in training, one drawn per batch; the embedder's own when empty.
        ratios: Ratios drawn per sample; the embedder's own when empty.
        total_tokens: Tokens to train on; steps follow from it.
        max_minutes: Stop cleanly after this long; the next run resumes.
        connector_lr_factor: The connector's learning rate over the layers'.
        eval_samples: Held-out samples used.
        device: "auto" or a torch device.
        dtype: What the frozen LLM runs in: "auto" (bfloat16 on CUDA, float32 elsewhere), "float32" or "bfloat16". The
            trained tensors stay float32. Ask `extemb doctor` before bfloat16 on a CPU: some end the process.
    """

    llm: str
    data: tuple[str, ...]
    output: str
    eval_data: tuple[str, ...] = ()
    embedder: Mapping[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    sample_length: int = 1536
    chunk_sizes: tuple[int, ...] = ()
    ratios: tuple[int, ...] = ()
    total_tokens: int = 1_500_000
    batch_size: int = 4
    accumulation_steps: int = 1
    learning_rate: float = 3e-4
    connector_lr_factor: float = 5.0
    warmup_steps: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 50
    eval_steps: int = 50
    eval_samples: int = 16
    logging_steps: int = 10
    max_minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            if isinstance(getattr(self, name), str):  # else each of its letters would be a file
                raise ConfigError(f"{name}={getattr(self, name)!r} is one str; pass a tuple of files")
        if not self.data:
            raise ConfigError("data is empty; pass at least one text file to train on")
        for name in ("sample_length", "total_tokens", "batch_size", "accumulation_steps", "save_steps", "eval_steps",
                     "eval_samples", "logging_steps"):  # fmt: skip
            if not is_count(getattr(self, name)):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a positive whole number; pass 1 or more")
        for name in ("chunk_sizes", "ratios"):
            if not all(is_count(number) for number in getattr(self, name)):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} must be positive whole numbers; pass e.g. (256, 512)"
                )
        for name in ("warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is below 0; pass 0 or more")
        for name in ("connector_lr_factor", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not above 0; pass e.g. 1.0")
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ConfigError(f"max_minutes={self.max_minutes} is not above 0; pass minutes, or None for no limit")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r} is not auto, float32 or bfloat16; pass one of them")
        if not (0 < self.learning_rate < 1):
            raise ConfigError(f"learning_rate={self.learning_rate} is not between 0 and 1; pass e.g. 3e-4")

    @property
    def max_steps(self) -> int:
        """Optimiser steps that `total_tokens` come to."""
        return math.ceil(self.total_tokens / self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Over all processes that train together."""
        return self.batch_size * self.accumulation_steps * self.sample_length * int(os.environ.get("WORLD_SIZE", "1"))


class TwoStream(nn.Module):
    """The embedder with its loss; the frozen LLM is not a submodule, so that it is neither trained nor saved."""

    def __init__(self, embedder: ExtensibleEmbedder) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, samples: Sequence[Tensor], ratios: Sequence[int], chunk_size: int) -> dict[str, Tensor]:
        return {"loss": two_stream_loss(self.embedder, self.embedder.llm, samples, ratios, chunk_size)}


class RatioCollator:
    """Draws a ratio per sample and a chunk size per batch, from the samples' own places, so that a resumed run
    draws what an uninterrupted one would have."""

    def __init__(self, ratios: Sequence[int], chunk_sizes: Sequence[int], seed: int) -> None:
        self.ratios = list(ratios)
        self.chunk_sizes = list(chunk_sizes)
        self.seed = seed

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        draw = np.random.default_rng([self.seed, *(item["index"] for item in items)])
        return {
            "samples": [torch.from_numpy(item["input_ids"]) for item in items],
            "ratios": [int(r) for r in draw.choice(self.ratios, size=len(items))],
            "chunk_size": int(draw.choice(self.chunk_sizes)),
        }


class EmbedderTrainer(Trainer):
    """`transformers.Trainer` for a `TwoStream` model."""

    model: TwoStream
    eval_dataset: Samples | None

    def __init__(self, *args: Any, connector_lr_factor: float, eval_collators: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._connector_lr_factor = connector_lr_factor
        self._eval_collators = eval_collators
        self.model_accepts_loss_kwargs = False  # the loss is a mean; accumulation averages it

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = model(**inputs)["loss"]
        if model.training and not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {float(loss.detach())} at step {self.state.global_step}; "
                "resume from the last checkpoint with a lower learning rate"
            )
        return (loss, {"loss": loss}) if kwargs.get("return_outputs") else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            rates = {False: self.args.learning_rate, True: self.args.learning_rate * self._connector_lr_factor}
            groups = [
                {"params": [p for name, p in named if (".connector." in name) == connector], "lr": rate}
                for connector, rate in rates.items()
            ]
            self.optimizer = torch.optim.AdamW(
                groups, betas=(0.9, 0.95), weight_decay=self.args.weight_decay, fused=False
            )
        return self.optimizer

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Held-out loss at every ratio, each over the same samples: eval_ratio_K."""
        if self.eval_dataset is None:
            return {}
        metrics: dict[str, float] = {}
        self.model.train(False)
        for name, collator in self._eval_collators.items():
            losses = []
            with torch.no_grad(), self.compute_loss_context_manager():
                for at in range(len(self.eval_dataset)):
                    inputs = collator([self.eval_dataset[at]])
                    losses.append(float(self.compute_loss(self.model, inputs)))
            metrics[f"eval_{name}"] = sum(losses) / len(losses)
        metrics["eval_loss"] = sum(metrics.values()) / len(metrics)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.embedder.save_pretrained(str(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.embedder.load_own(Path(resume_from_checkpoint) / "model.safetensors")


class _RunCallback(TrainerCallback):
    """Marks whole checkpoints, writes the log as JSON Lines, moves the progress bar, and stops in time."""

    def __init__(self, config: TrainingConfig, advance: Callable[[int], None]) -> None:
        self._config = config
        self._advance = advance
        self._log = Path(config.output) / "log.jsonl"
        self._start = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            row = {"step": state.global_step, "tokens": state.global_step * self._config.tokens_per_step, **logs}
            with self._log.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance(1)
        limit = self._config.max_minutes
        if limit is not None and time.monotonic() - self._start > 60 * limit:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for file in folder.iterdir():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            mark = {"step": state.global_step, "config": _identity(self._config)}
            temporary = folder / f"{_COMPLETE}.tmp"
            temporary.write_text(json.dumps(mark, indent=2), encoding="utf-8")
            temporary.replace(folder / _COMPLETE)


def train(config: TrainingConfig, *, resume: bool = True) -> ExtensibleEmbedder:
    """Train an embedder and leave it in `config.output`.

    Args:
        config: The run.
        resume: Go on from the last whole checkpoint in `config.output`, if there is one of this run.

    Raises:
        ConfigError: The settings do not go together.
        TrainingError: The loss is not finite, there is nothing to train on, or the checkpoints in the output folder
            belong to another run.
    """
    checkpoint = _last_checkpoint(config) if resume else None
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    llm = LLM.from_pretrained(config.llm, device=_device(config), dtype=config.dtype)
    embedder = _starting_point(config, llm)
    chunk_sizes = config.chunk_sizes or (embedder.config.chunk_size,)
    embedder.own_to(torch.float32)  # in bfloat16 a small update would round to none
    ratios = config.ratios or tuple(embedder.config.ratios)
    for ratio in ratios:
        embedder.config.require_ratio(ratio)
    if checkpoint is not None and int(checkpoint.name.rsplit("-", 1)[1]) >= config.max_steps:
        embedder.load_own(checkpoint / "model.safetensors")  # finished before; the Trainer would take one more step
        embedder.save_pretrained(output)
        return embedder
    shortest = max(chunk_sizes) + 1
    if config.sample_length < shortest:
        raise ConfigError(
            f"sample_length={config.sample_length} leaves nothing to predict after a chunk of {max(chunk_sizes)}; "
            f"pass at least {2 * max(chunk_sizes)}"
        )
    for size in chunk_sizes:  # that the longest sample fits the window is known now, not at some step
        plan_passes(chunk_lengths(config.sample_length, size), min(ratios), llm.window, 0, llm.bos_token_id is not None)
    cache = output / "data"
    tokens = TokenFile.build([Path(file) for file in config.data], llm, cache)
    samples = Samples(tokens, config.sample_length, shortest)
    if not len(samples):
        raise TrainingError(
            f"none of the {len(tokens)} documents has {shortest} tokens, the shortest sample; pass longer documents"
        )
    held_out = None
    if config.eval_data:
        held_out = Samples(
            TokenFile.build([Path(file) for file in config.eval_data], llm, cache),
            config.sample_length, config.sample_length, config.eval_samples,
        )  # fmt: skip
        if not len(held_out):
            raise TrainingError(
                f"no document in eval_data has {config.sample_length} tokens, the length of a sample; "
                "pass longer documents or a smaller sample_length"
            )
    logger.info("%d samples, %d tokens left out, %d steps", len(samples), samples.left_out, config.max_steps)
    with progress("train", config.max_steps) as advance:
        trainer = EmbedderTrainer(
            model=TwoStream(embedder),
            args=_arguments(config, llm, evaluate=held_out is not None),
            train_dataset=samples,
            eval_dataset=held_out,
            data_collator=RatioCollator(ratios, chunk_sizes, config.seed),
            callbacks=[_RunCallback(config, advance), *_tensorboard(output)],
            connector_lr_factor=config.connector_lr_factor,
            eval_collators={f"ratio_{r}": RatioCollator([r], [max(chunk_sizes)], 0) for r in ratios},
        )
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            _write_config(config, output)
        if held_out is not None and checkpoint is None:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    embedder.train(False)
    if trainer.is_world_process_zero():
        embedder.save_pretrained(output)
    return embedder


def _device(config: TrainingConfig) -> str:
    """Where the Trainer will put the model: with several processes, each takes the GPU of its local rank."""
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


def _starting_point(config: TrainingConfig, llm: LLM) -> ExtensibleEmbedder:
    if config.start_from is not None:
        return ExtensibleEmbedder.from_pretrained(config.start_from, llm=llm)
    torch.manual_seed(config.seed)
    return ExtensibleEmbedder.from_llm(llm, **config.embedder)


def _arguments(config: TrainingConfig, llm: LLM, *, evaluate: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=config.output,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        save_steps=config.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=config.eval_steps,
        logging_steps=config.logging_steps,
        report_to="none",  # the callbacks write the logs
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        use_cpu=llm.device.type == "cpu",
        bf16=llm.dtype == torch.bfloat16,
        dataloader_pin_memory=llm.device.type == "cuda",
        label_names=[],
    )
    if arguments.n_gpu > 1:  # several GPUs are for several processes (torchrun); DataParallel cannot split samples
        arguments._n_gpu = 1
    return arguments


def _tensorboard(output: Path) -> list[TrainerCallback]:
    if not importlib.util.find_spec("tensorboard") or int(os.environ.get("RANK", "0")):
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(output / "tensorboard")))]


def _identity(config: TrainingConfig) -> dict[str, Any]:
    """What must be the same for a checkpoint to be gone on from."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    for free in ("output", "max_minutes", "device", "save_steps", "eval_steps", "logging_steps", "eval_samples",
                 "eval_data"):  # fmt: skip
        values.pop(free)
    return values


def _write_config(config: TrainingConfig, output: Path) -> None:
    temporary = output / "training.json.tmp"
    temporary.write_text(json.dumps(asdict(config), indent=2), encoding="utf-8")
    temporary.replace(output / "training.json")


def _last_checkpoint(config: TrainingConfig) -> Path | None:
    output = Path(config.output)
    whole = sorted(
        (folder for folder in output.glob("checkpoint-*") if (folder / _COMPLETE).is_file()),
        key=lambda folder: int(folder.name.rsplit("-", 1)[1]),
    )
    if not whole:
        return None
    before = _config_of(whole[-1])
    now = _identity(config)
    changed = [key for key, value in now.items() if before.get(key) != value]
    if changed:
        raise TrainingError(
            f"{output} holds checkpoints of a run with another {changed[0]} ({before.get(changed[0])!r}, now "
            f"{now[changed[0]]!r}); use another output folder, or train without resuming"
        )
    return whole[-1]


def _config_of(checkpoint: Path) -> dict[str, Any]:
    """The settings a checkpoint was made with: in its own mark, in those of the first versions in the run's file."""
    for file in (checkpoint / _COMPLETE, checkpoint.parent / "training.json"):
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            config = values["config"] if file.name == _COMPLETE else values
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(config, dict):
            return config
    raise TrainingError(f"{checkpoint} does not say what run it is of; use another output folder, or remove it")
