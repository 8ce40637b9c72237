"""Plan what each batch of a run trains on, item by item.

Every batch is of one objective. Which one, and which of its samples, follows from the seed and the batch's number
alone, so that a resumed run, and each of several processes, trains on what one uninterrupted process would have.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extemb_core.errors import ConfigError, TrainingError
from extemb_core.models.chunks import chunk_lengths
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.models.llm import LLM
from extemb_core.questions import read_questions
from extemb_core.training.config import TrainingConfig
from extemb_core.training.data import Samples, TokenFile
from extemb_core.training.objectives import QuestionReadings, recall, reconstruction, shuffled
from extemb_core.training.reading_loss import Reading
from extemb_core.training.two_stream import pass_window, plan_passes

logger = logging.getLogger(__name__)

_OF_QUESTIONS = ("most_per_source", "raw_share", "mixed_share", "focus_share", "most_distractors", "seed")


@dataclass(eq=False, repr=False)
class Batches:
    """Map-style dataset in training order: `batch_size` consecutive items are one batch.

    Attributes:
        shares: Share of the batches for each objective.
        n_batches: Number of batches in the whole run, over all processes.
        batch_size: Samples per batch.
        seed: Random seed of everything drawn.
        llm: LLM whose tokenizer is used.
        samples: Text, for every objective but "questions".
        questions: Readings for the objective "questions".
        spans: Tokens of the longest span to reconstruct, at the start and at the end of the run.
        objectives: Objective of each batch.
    """

    shares: Mapping[str, float]
    _: KW_ONLY
    n_batches: int
    batch_size: int
    seed: int
    llm: LLM
    samples: Samples | None = None
    questions: QuestionReadings | None = None
    spans: tuple[int, int] = (32, 256)

    def __post_init__(self) -> None:
        names = sorted(self.shares)
        shares = np.array([self.shares[name] for name in names], dtype=float)
        drawn = np.random.default_rng([self.seed, 0]).choice(len(names), size=self.n_batches, p=shares / shares.sum())
        self.objectives = [names[int(at)] for at in drawn]
        self._before = np.zeros(self.n_batches, dtype=np.int64)  # earlier batches of each one's objective
        for which in range(len(names)):
            self._before[drawn == which] = np.arange((drawn == which).sum())

    def __len__(self) -> int:
        return len(self.objectives) * self.batch_size

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, row = divmod(index, self.batch_size)
        objective = self.objectives[batch]
        number = int(self._before[batch]) * self.batch_size + row  # among the samples of this objective
        item: dict[str, Any] = {"objective": objective, "index": index}
        if objective == "questions":
            assert self.questions is not None
            return item | {"readings": [self.questions.reading(number)]}
        ids = self._text(number)
        if objective == "two_stream":
            return item | {"sample": torch.from_numpy(ids)}
        draw = np.random.default_rng([self.seed, 2, index])
        return item | {
            "readings": [recall(self.llm, ids, draw)] if objective == "recall" else self._spans_of(ids, batch, draw)
        }

    def _text(self, number: int) -> np.ndarray[Any, Any]:
        """Return sample `number` of an endless stream, in which each round over the samples has another order."""
        assert self.samples is not None
        rounds, at = divmod(number, len(self.samples))
        return self.samples[int(shuffled(len(self.samples), self.seed, 1, rounds)[at])]["input_ids"]  # type: ignore[no-any-return]

    def _spans_of(self, ids: np.ndarray[Any, Any], batch: int, draw: np.random.Generator) -> list[Reading]:
        """Cut adjacent spans at a random place; each is read twice, so together they take half the sample's length."""
        first, last = self.spans
        longest = round(first + (last - first) * batch / max(1, len(self.objectives) - 1))
        length = min(int(draw.integers(min(first, longest), longest + 1)), len(ids))
        count = max(1, len(ids) // (2 * length))
        start = int(draw.integers(len(ids) - count * length + 1))
        return [reconstruction(self.llm, ids[at : at + length]) for at in range(start, start + count * length, length)]


class Collator:
    """Draws the ratios of each sample and the chunk size of the batch, from the index of its first item.

    A ratio that is named twice is drawn twice as often, but never twice for one sample. The objective "two_stream" only
    gets chunk sizes that leave something to predict.
    """

    def __init__(
        self, ratios: Sequence[int], chunk_sizes: Sequence[int], seed: int, ratios_per_sample: int = 1
    ) -> None:
        self.ratios = sorted(set(ratios))
        self._shares = np.array([list(ratios).count(ratio) for ratio in self.ratios]) / len(ratios)
        self.chunk_sizes = list(chunk_sizes)
        self.seed = seed
        self.ratios_per_sample = min(ratios_per_sample, len(self.ratios))

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        draw = np.random.default_rng([self.seed, 3, items[0]["index"]])
        sizes = self.chunk_sizes
        if "sample" in items[0]:
            inputs: dict[str, Any] = {"samples": [item["sample"] for item in items]}
            sizes = [size for size in sizes if size < min(map(len, inputs["samples"]))] or sizes
        else:
            inputs = {"readings": [reading for item in items for reading in item["readings"]]}
        (rows,) = inputs.values()
        count, shares = self.ratios_per_sample, self._shares
        ratios = [sorted(map(int, draw.choice(self.ratios, count, replace=False, p=shares))) for _ in rows]
        named = {"objective": items[0]["objective"]} if "objective" in items[0] else {}
        return inputs | named | {"ratios": ratios, "chunk_size": int(draw.choice(sizes))}


def plan_batches(config: TrainingConfig, llm: LLM, finest: int, chunk_sizes: Sequence[int]) -> Batches:
    """Plan what the run trains on, batch by batch."""
    wanted = {name: share for name, share in config.objectives.items() if share}
    samples = questions = None
    if "two_stream" in wanted:
        short = short_chunks(config, chunk_sizes)
        shortest = max(short) + 1
        for size in short:  # fail now, not at some step, if the longest sample does not fit the window
            lengths = chunk_lengths(config.sample_length, size)
            plan_passes(lengths, finest, pass_window(llm), int(llm.bos_token_id is not None))
    else:
        shortest = min(config.spans)
    if wanted.keys() - {"questions"}:
        tokens = token_file(config, llm, config.data)
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


def short_chunks(config: TrainingConfig, chunk_sizes: Sequence[int]) -> list[int]:
    """List the chunk sizes that leave something of a sample to predict after a chunk, as "two_stream" needs."""
    short = [size for size in chunk_sizes if size < config.sample_length]
    if not short:
        raise ConfigError(
            f"sample_length={config.sample_length} leaves nothing to predict after a chunk of {min(chunk_sizes)}; "
            f"pass at least {2 * min(chunk_sizes)}, or smaller chunk_sizes"
        )
    return short


def held_out_samples(config: TrainingConfig, llm: LLM) -> Samples | None:
    """Return the held-out samples on which the loss is measured, all of one length; None without held-out text."""
    if not config.eval_data:
        return None
    tokens = token_file(config, llm, config.eval_data)
    samples = Samples(tokens, config.sample_length, config.sample_length, config.eval_samples)
    if not len(samples):
        raise TrainingError(
            f"no document in eval_data has {config.sample_length} tokens, the length of a sample; "
            "pass longer documents or a smaller sample_length"
        )
    return samples


def drawn_from(config: TrainingConfig, settings: ExtensibleEmbedderConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ratios and chunk sizes that a run draws from; raise `RatioError` if the embedder lacks a ratio."""
    ratios = config.ratios or tuple(settings.ratios)
    for ratio in ratios:
        settings.require_ratio(ratio)
    return ratios, config.chunk_sizes or (settings.chunk_size,)


def token_file(config: TrainingConfig, llm: LLM, files: Sequence[str]) -> TokenFile:
    """Tokenise a run's files, or open the tokens of an earlier call."""
    return TokenFile.build([Path(file) for file in files], llm, config.token_cache)
