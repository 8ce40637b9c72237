"""Down-scaling: which of a chunk's L outputs become its ceil(L / ratio) embeddings (twin paper, section 2.2).

Every method is *nested*: the embeddings at a coarse ratio can be derived from those at any finer
ratio that divides it, without another forward pass. That is what lets one stored copy serve all ratios.

A tail shorter than `ratio` is a span like any other, so that every token has an embedding. To add a method, write a
subclass of `Downscaling` and name it in `DOWNSCALINGS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.chunks import n_embeddings
from extemb_core.utils.validation import is_count


def check_ratios(ratios: Sequence[int], chunk_size: int) -> tuple[int, ...]:
    """Return the ratios sorted; raise `ConfigError` unless each divides the next and none exceeds the chunk."""
    given = list(ratios) if isinstance(ratios, Sequence) else []
    if not given or not all(is_count(ratio) for ratio in given):
        raise ConfigError(f"ratios={ratios!r} must be positive whole numbers; pass e.g. (2, 4, 8, 16, 32)")
    ordered = tuple(sorted(set(given)))
    for fine, coarse in pairwise(ordered):
        if coarse % fine:
            raise ConfigError(
                f"ratios={ordered}: {coarse} is not a multiple of {fine}, so it could not be derived from it; "
                "pass ratios that divide one another, e.g. (2, 4, 8, 16, 32)"
            )
    if ordered[-1] > chunk_size:
        raise ConfigError(f"ratio={ordered[-1]} is above chunk_size={chunk_size}; pass ratios within one chunk")
    return ordered


def span_means(vectors: Tensor, weights: Tensor, span: int) -> Tensor:
    """Take weighted means over consecutive spans; the last may be shorter.

    Args:
        vectors: (N, D).
        weights: (N,), above 0.
        span: Number of vectors in a mean.

    Returns:
        (ceil(N / span), D); over spans of one, the vectors themselves.
    """
    count = n_embeddings(vectors.shape[0], span)
    padding = count * span - vectors.shape[0]
    weights = torch.nn.functional.pad(weights, (0, padding)).to(vectors.dtype).view(count, span)
    vectors = torch.nn.functional.pad(vectors, (0, 0, 0, padding)) if padding else vectors  # pad by 0 would copy
    shares = weights / weights.sum(1, keepdim=True)
    return torch.bmm(shares[:, None], vectors.reshape(count, span, -1))[:, 0]


class Downscaling:
    """Selects some of a chunk's outputs. Subclasses that do more than select override `reduce` and `coarsen`."""

    def select(self, length: int, ratio: int) -> Tensor:
        """Choose the positions whose outputs are used.

        Args:
            length: L, the tokens of the chunk.
            ratio: Tokens per embedding.

        Returns:
            Positions within the chunk, ascending, of int64; (ceil(L / ratio),) where `reduce` changes nothing.
        """
        raise NotImplementedError

    def reduce(self, selected: Tensor, ratio: int) -> Tensor:
        """Reduce the selected outputs, after the connector, to embeddings: (S, D) -> (ceil(L / ratio), D)."""
        return selected

    def coarsen(self, embeddings: Tensor, length: int, fine: int, coarse: int) -> Tensor:
        """Derive a chunk's embeddings at ratio `coarse`, a multiple of `fine`, from those at `fine`.

        Args:
            embeddings: (ceil(length / fine), D).
            length: Tokens of the chunk, 1 or more.
            fine: The ratio at hand.
            coarse: The ratio wanted.

        Returns:
            (ceil(length / coarse), D).
        """
        selected = torch.isin(self.select(length, fine), self.select(length, coarse))
        return embeddings[selected.to(embeddings.device)]


class Strided(Downscaling):
    """Takes the last output of every `ratio` consecutive ones: the paper's choice."""

    def select(self, length: int, ratio: int) -> Tensor:
        return torch.clamp((torch.arange(n_embeddings(length, ratio)) + 1) * ratio, max=length) - 1


class Random(Downscaling):
    """Takes one output of every `ratio` consecutive ones, drawn once and for all by position.

    There is one fixed score for every position of a chunk, and the highest of a span represents it. Being the maximum
    of maxima, the choice at a coarse ratio is always among the choices at a finer one.
    """

    seed = 2402_11577

    def select(self, length: int, ratio: int) -> Tensor:
        scores = np.random.default_rng(self.seed).random(length)
        starts = range(0, length, ratio)
        return torch.tensor([start + int(scores[start : start + ratio].argmax()) for start in starts], dtype=torch.long)


class Terminal(Downscaling):
    """Takes the chunk's last ceil(L / ratio) outputs."""

    def select(self, length: int, ratio: int) -> Tensor:
        return torch.arange(length - n_embeddings(length, ratio), length)


class Mean(Downscaling):
    """Takes the mean of every `ratio` consecutive outputs."""

    def select(self, length: int, ratio: int) -> Tensor:
        return torch.arange(length)

    def reduce(self, selected: Tensor, ratio: int) -> Tensor:
        return span_means(selected, torch.ones(len(selected), device=selected.device), ratio)

    def coarsen(self, embeddings: Tensor, length: int, fine: int, coarse: int) -> Tensor:
        sizes = torch.full((len(embeddings),), float(fine), device=embeddings.device)
        sizes[-1] = length - fine * (len(embeddings) - 1)
        return span_means(embeddings, sizes, coarse // fine)


DOWNSCALINGS: dict[str, Downscaling] = {
    "strided": Strided(),
    "mean": Mean(),
    "random": Random(),
    "terminal": Terminal(),
}


def coarsen(embeddings: Tensor, length: int, fine: int, coarse: int, downscaling: str) -> Tensor:
    """Derive a chunk's embeddings at `coarse` from those at `fine`; see `Downscaling.coarsen`.

    Raises:
        RatioError: `coarse` is not a multiple of `fine`.
    """
    if coarse % fine:
        raise RatioError(f"ratio={coarse} is not a multiple of {fine}, the one at hand; compress again at {coarse}")
    if coarse == fine or not length:
        return embeddings
    return DOWNSCALINGS[downscaling].coarsen(embeddings, length, fine, coarse)
