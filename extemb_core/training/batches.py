"""Plan which batch of a run trains what, item by item.

Every batch is of one objective. Which one, and which of its samples, follows from the seed and the batch's number
alone, so that a resumed run, and each of several processes, trains on what one uninterrupted process would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch

from extemb_core.models.llm import LLM
from extemb_core.training.data import Samples
from extemb_core.training.objectives import QuestionReadings, recall, reconstruction, shuffled
from extemb_core.training.reading_loss import Reading


@dataclass(eq=False, repr=False)
class Batches:
    """Map-style dataset in training order: `batch_size` consecutive items are one batch.

    Attributes:
        shares: Share of the batches of each objective.
        n_batches: Of the whole run, over all processes.
        batch_size: Samples of a batch.
        seed: Of all that is drawn.
        llm: Whose tokenizer is used.
        samples: Text, for every objective but "questions".
        questions: For "questions".
        spans: Tokens of the longest span to reconstruct, at the start and at the end of the run.
        objectives: That of each batch.
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
        self._before = np.zeros(self.n_batches, dtype=np.int64)  # batches of the same objective before each
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
        """Return sample `number` of an endless stream; each round over the samples is another order."""
        assert self.samples is not None
        rounds, at = divmod(number, len(self.samples))
        return self.samples[int(shuffled(len(self.samples), self.seed, 1, rounds)[at])]["input_ids"]  # type: ignore[no-any-return]

    def _spans_of(self, ids: np.ndarray[Any, Any], batch: int, draw: np.random.Generator) -> list[Reading]:
        """Cut spans side by side, from anywhere in the sample: a span is read twice, so they take half its length."""
        first, last = self.spans
        longest = round(first + (last - first) * batch / max(1, len(self.objectives) - 1))
        length = min(int(draw.integers(min(first, longest), longest + 1)), len(ids))
        count = max(1, len(ids) // (2 * length))
        start = int(draw.integers(len(ids) - count * length + 1))
        return [reconstruction(self.llm, ids[at : at + length]) for at in range(start, start + count * length, length)]


class Collator:
    """Draws the ratios of each sample and the chunk size of the batch, from the index of its first item.

    A ratio that is named twice is drawn twice as often, but never twice for one sample. Two streams take a chunk size
    that leaves something to predict.
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
