"""Settings of one training run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extemb_core.errors import ConfigError
from extemb_core.utils.validation import (
    check_seed,
    is_count,
    paths_as_text,
    require_number,
    require_one_of,
    whole_number,
)

OBJECTIVES = ("two_stream", "reconstruction", "recall", "questions")
TRAINED = ("embedder", "connector", "reader", "both")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run. Lengths are in tokens, times in minutes.

    The command line shows the first sentence on each attribute that it has an option for.

    Attributes:
        llm: The frozen LLM: a known name, a folder or a Hugging Face id.
        data: Training text: .jsonl[.zst] with a "text" field, .txt, .md.
        output: Folder for checkpoints, logs and what was trained.
        questions: Training questions: .jsonl[.zst] with "id", "context", "question" and "answers".
        eval_data: Held-out text, for the loss at every ratio. Without any there is no evaluation during training.
        embedder: Settings of `ExtensibleEmbedderConfig` for a new embedder.
        start_from: Start from what was trained in this folder, instead of a new embedder. It is an embedder, a reader
            or both, with the optimiser's state in the last checkpoint.
        cache: Folder for tokenised text; "data" in `output` when not given.
        objectives: Share of the batches of each of `OBJECTIVES`; they add up to 1 after scaling.
        distillation: Weight, 0 to 1, of the divergence from the LLM when it reads the text itself.
        trained: "embedder"; "connector", which is a part of it; "reader", adapters on the LLM that teach it to
            answer from text; or "both" the embedder and a reader on the layers above the embedder's.
        reader_rank: Rank of a reader's adapters.
        reader_first_layer: First decoder layer that gets a reader's adapters. An embedder shares the layers without
            adapters; 0 takes all layers, or all above those of an embedder that is trained with the reader.
        most_per_source: Maximum questions of each source (the id up to its number) in one round over them.
        raw_share: Share of a question's documents that stays text, so that the LLM does not forget how to read text.
        mixed_share: Share of documents compressed around a part left as text, above entry layer 0. It is a share of
            the documents that do not stay text by `raw_share`.
        focus_share: Share of questions that read their documents by a plan: the sentences nearest to the question stay
            text, above entry layer 0.
        most_distractors: Maximum documents of other questions beside a question's own, if they fit `sample_length`.
        sample_length: Tokens per training sample. A question's documents take no more together.
        spans: Tokens of the spans to reconstruct, at the start of the run and at its end: short ones first.
        chunk_sizes: Chunk lengths in training, one drawn per batch. Without any it is the embedder's own;
            "two_stream" uses those shorter than a sample.
        ratios: Ratios drawn per sample; the embedder's own when empty.
        ratios_per_sample: Ratios per sample; one pass of the embedder serves them all.
        total_tokens: Tokens to train on. Steps follow from it.
        batch_size: Samples per batch and device.
        accumulation_steps: Gradient accumulation steps.
        learning_rate: Peak learning rate.
        connector_lr_factor: Learning rate of the connector, as a multiple of the layers'.
        warmup_steps: Warm-up steps of the learning rate.
        decay_steps: Last steps, in which the learning rate falls to 0; 0 keeps it constant. None is all steps after
            the warm-up. With 0 the run may be resumed later with more tokens, or with a decay.
        weight_decay: Weight decay of the optimiser.
        max_grad_norm: Norm that gradients are clipped to.
        save_steps: Steps between checkpoints.
        eval_steps: Steps between evaluations.
        eval_samples: Maximum number of held-out samples.
        logging_steps: Steps between log entries.
        dataloader_num_workers: Processes that make the batches; 0 makes them between the steps, while a GPU
            waits.
        save_minutes: Minutes between checkpoints. They are saved in addition to those of `save_steps`.
        max_minutes: Save and stop after this many minutes; the same run resumes.
        seed: Random seed.
        device: auto (CUDA, then CPU), cpu, cuda or cuda:N.
        dtype: Data type of the frozen LLM: auto (bfloat16 on CUDA, float32 elsewhere), float32 or bfloat16; `extemb
            doctor` says whether bfloat16 is safe here. The trained tensors stay float32. Some CPUs end the process in
            bfloat16.
    """

    llm: str
    output: str
    data: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    embedder: Mapping[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    cache: str | None = None
    objectives: Mapping[str, float] = field(default_factory=lambda: {"two_stream": 1.0})
    distillation: float = 0.0
    trained: str = "embedder"
    reader_rank: int = 8
    reader_first_layer: int = 0
    most_per_source: int = 4000
    raw_share: float = 0.15
    mixed_share: float = 0.0
    focus_share: float = 0.0
    most_distractors: int = 3
    sample_length: int = 1536
    spans: tuple[int, int] = (32, 256)
    chunk_sizes: tuple[int, ...] = ()
    ratios: tuple[int, ...] = ()
    ratios_per_sample: int = 1
    total_tokens: int = 1_500_000
    batch_size: int = 4
    accumulation_steps: int = 1
    learning_rate: float = 3e-4
    connector_lr_factor: float = 5.0
    warmup_steps: int = 20
    decay_steps: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    save_steps: int = 50
    eval_steps: int = 50
    eval_samples: int = 16
    logging_steps: int = 10
    dataloader_num_workers: int = 0
    save_minutes: float | None = None
    max_minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        paths_as_text(self, "llm", files=("data", "questions", "eval_data"), folders=("output", "start_from", "cache"))
        if not isinstance(self.embedder, Mapping):
            raise ConfigError(
                f"embedder={self.embedder!r:.80} is no mapping of settings; pass e.g. entry_layer=12 in one"
            )
        self._check_objectives()
        for name in ("sample_length", "total_tokens", "batch_size", "accumulation_steps", "save_steps", "eval_steps",
                     "eval_samples", "logging_steps", "ratios_per_sample", "reader_rank",
                     "most_per_source", "most_distractors"):  # fmt: skip
            whole_number(getattr(self, name), name)
        for name in ("chunk_sizes", "ratios", "spans"):
            numbers = getattr(self, name)
            if not isinstance(numbers, tuple | list) or not all(map(is_count, numbers)):
                raise ConfigError(f"{name}={numbers!r} must be positive whole numbers; pass e.g. (256, 512)")
        if len(self.spans) != 2:
            raise ConfigError(f"spans={self.spans!r} has {len(self.spans)} lengths; pass that at the start and the end")
        check_seed(self.seed)
        for name in ("warmup_steps", "reader_first_layer", "dataloader_num_workers"):
            whole_number(getattr(self, name), name, 0)
        require_number(self.weight_decay, "weight_decay", lambda decay: decay >= 0, "at least 0; pass e.g. 0.1")
        for name in ("connector_lr_factor", "max_grad_norm"):
            require_number(getattr(self, name), name, lambda factor: factor > 0, "above 0; pass e.g. 1.0")
        for name in ("max_minutes", "save_minutes"):
            if (minutes := getattr(self, name)) is not None:
                require_number(minutes, name, lambda m: m > 0, "above 0; pass minutes, or None for no limit")
        if self.decay_steps is not None:
            whole_number(self.decay_steps, "decay_steps", 0, remedy="steps, or None")
        require_one_of(self.trained, "trained", TRAINED)
        require_one_of(self.dtype, "dtype", ("auto", "float32", "bfloat16"))
        rule = "between 0 and 1; pass e.g. 0.0003"  # YAML reads 3e-4 as text
        require_number(self.learning_rate, "learning_rate", lambda rate: 0 < rate < 1, rule)

    def _check_objectives(self) -> None:
        if not isinstance(self.objectives, Mapping):
            raise ConfigError(f"objectives={self.objectives!r:.80} is no mapping; pass shares by name, e.g. recall=1")
        for name, share in self.objectives.items():
            require_one_of(name, "objectives", OBJECTIVES)
            require_number(share, f"objectives: {name}", lambda s: 0 <= s < math.inf, "at least 0; pass e.g. 1")
        if not any(self.objectives.values()):
            raise ConfigError(f"objectives={dict(self.objectives)!r}: shares are at least 0 and not all 0; pass e.g. 1")
        for name in ("distillation", "raw_share", "mixed_share", "focus_share"):
            require_number(getattr(self, name), name, lambda s: 0 <= s <= 1, "between 0 and 1; pass e.g. 0.5")
        wanted = {name for name, share in self.objectives.items() if share}
        if wanted - {"questions"} and not self.data:
            raise ConfigError("data is empty; pass at least one text file to train on")
        if self.trained == "reader" and wanted != {"questions"} and not self.embedder.get("entry_layer"):
            raise ConfigError(
                'a reader of text learns from questions alone; pass objectives={"questions": 1}, or an embedder with '
                "an entry_layer, whose embeddings it then reads"
            )
        if self.trained == "reader" and self.eval_data and not self.embedder.get("entry_layer"):
            raise ConfigError("eval_data is text for an embedder's loss, and a reader of text has none; leave it out")
        if "questions" in wanted and not self.questions:
            raise ConfigError("questions is empty; pass at least one question file to train on")

    @property
    def token_cache(self) -> Path:
        """Folder for tokenised text."""
        return Path(self.cache) if self.cache is not None else Path(self.output) / "data"

    @property
    def max_steps(self) -> int:
        """Optimiser steps for `total_tokens`."""
        return math.ceil(self.total_tokens / self.tokens_per_step)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, over all processes that train together."""
        return self.batch_size * self.accumulation_steps * self.sample_length * self.processes

    @property
    def processes(self) -> int:
        """Number of processes that train together, according to torchrun."""
        return torchrun_number("WORLD_SIZE", 1)


def torchrun_number(name: str, at_least: int = 0) -> int:
    """Read a number that torchrun sets for a process; `at_least` without torchrun.

    Raises:
        ConfigError: The variable does not hold such a number.
    """
    text = os.environ.get(name) or str(at_least)
    if not text.isdecimal() or int(text) < at_least:
        raise ConfigError(f"the environment has {name}={text!r:.80}, no whole number from {at_least} up; unset it")
    return int(text)
