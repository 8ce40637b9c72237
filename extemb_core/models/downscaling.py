"""Down-scaling: which of a chunk's L outputs become its ceil(L / ratio) extensible embeddings.

Every method is *nested*: the embeddings at a coarse ratio can be derived from those at any finer
ratio that divides it, without another forward pass. That is what lets one stored copy serve all ratios.

    strided   the last output of every `ratio` consecutive ones (the paper's choice; section 2.2)
    mean      the mean of every `ratio` consecutive outputs
    random    one output of every `ratio` consecutive ones, drawn once and for all by position
    terminal  the chunk's last ceil(L / ratio) outputs

A tail shorter than `ratio` is a span like any other: no token is without an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError, RatioError
from extemb_core.utils.validation import is_count

Downscaling = Literal["strided", "mean", "random", "terminal"]

# One fixed score for every position of a chunk; the highest of a span represents it. Being the maximum of
# maxima, the choice at a coarse ratio is always among the choices at a finer one.
_RANDOM_SEED = 2402_11577


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


def n_embeddings(n_tokens: int, ratio: int) -> int:
    """How many extensible embeddings a chunk of `n_tokens` tokens has: ceil(n_tokens / ratio)."""
    return -(-n_tokens // ratio)


def chunk_lengths(n_tokens: int, chunk_size: int) -> list[int]:
    """The lengths of a document's chunks: full ones, then the tail."""
    full, tail = divmod(n_tokens, chunk_size)
    return [chunk_size] * full + ([tail] if tail else [])


def picks(method: Downscaling, length: int, ratio: int) -> Tensor:
    """The positions whose outputs are taken, for the methods that select.

    Args:
        method: "strided", "random" or "terminal".
        length: L, the tokens of the chunk.
        ratio: Tokens per embedding.

    Returns:
        (ceil(L / ratio),) positions within the chunk, ascending.
    """
    count = n_embeddings(length, ratio)
    if method == "terminal":
        return torch.arange(length - count, length)
    ends = torch.clamp((torch.arange(count) + 1) * ratio, max=length)
    if method == "strided":
        return ends - 1
    scores = np.random.default_rng(_RANDOM_SEED).random(length)
    starts = range(0, length, ratio)
    return torch.tensor([start + int(scores[start : start + ratio].argmax()) for start in starts], dtype=torch.long)


def downscale(outputs: Tensor, ratio: int, method: Downscaling) -> Tensor:
    """Turn one chunk's outputs into its extensible embeddings.

    Args:
        outputs: (L, D).
        ratio: Tokens per embedding.
        method: One of `Downscaling`.

    Returns:
        (ceil(L / ratio), D).
    """
    if method != "mean":
        return outputs[picks(method, outputs.shape[0], ratio).to(outputs.device)]
    return span_means(outputs, torch.ones(outputs.shape[0], device=outputs.device), ratio)


def coarsen(embeddings: Tensor, length: int, fine: int, coarse: int, method: Downscaling) -> Tensor:
    """Derive a chunk's embeddings at `coarse` from those at `fine`.

    Args:
        embeddings: (ceil(length / fine), D).
        length: Tokens of the chunk.
        fine: The ratio at hand.
        coarse: The ratio wanted, a multiple of `fine`.
        method: One of `Downscaling`.

    Returns:
        (ceil(length / coarse), D), equal to `downscale` at `coarse`.

    Raises:
        RatioError: `coarse` is not a multiple of `fine`.
    """
    if coarse % fine:
        raise RatioError(
            f"ratio={coarse} is not a multiple of {fine}, the ratio at hand; compress the text again at {coarse}"
        )
    if coarse == fine or not length:
        return embeddings
    if method == "mean":
        sizes = torch.full((embeddings.shape[0],), float(fine), device=embeddings.device)
        sizes[-1] = length - fine * (embeddings.shape[0] - 1)
        return span_means(embeddings, sizes, coarse // fine)
    kept = torch.isin(picks(method, length, fine), picks(method, length, coarse))
    return embeddings[kept.to(embeddings.device)]


def span_means(vectors: Tensor, weights: Tensor, span: int) -> Tensor:
    """Take weighted means over consecutive spans; the last may be shorter.

    Args:
        vectors: (N, D).
        weights: (N,), above 0.
        span: Vectors of a mean.

    Returns:
        (ceil(N / span), D); over spans of one, the vectors themselves.
    """
    count = n_embeddings(vectors.shape[0], span)
    padding = count * span - vectors.shape[0]
    weights = torch.nn.functional.pad(weights, (0, padding)).to(vectors.dtype).view(count, span)
    vectors = torch.nn.functional.pad(vectors, (0, 0, 0, padding)) if padding else vectors  # which would be a copy
    shares = weights / weights.sum(1, keepdim=True)
    return torch.bmm(shares[:, None], vectors.reshape(count, span, -1))[:, 0]
