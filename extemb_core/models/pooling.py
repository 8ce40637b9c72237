"""Pool the states of a group's tokens into one state that stands for them (entry layers above 0).

A group's state is the norm-keeping weighted mean of its tokens' states h: with weights w, the mean
m = sum(w h) / sum(w), rescaled to the weighted mean of the norms, s = sum(w |h|) / sum(w). A plain mean of states is
shorter than any of them, and the layers that read it expect states of the usual length. Rare tokens say more than
frequent ones, so w falls with a token's frequency.

Groups *nest*: m, sum(w) and s at a coarser ratio are weighted means of those at a finer one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from extemb_core.errors import ConfigError
from extemb_core.models.downscaling import span_means

_MIN_WEIGHT = 0.01  # of a token that makes up nearly all of the text: no group may have weight 0
# H, the sum of 1/rank over a vocabulary of some 50,000: by Zipf's law, a token of rank r has a share of 1/(r H).
_HARMONIC = 11.4


class Groups(NamedTuple):
    """N groups of consecutive tokens.

    Attributes:
        means: (N, D) float32, sum(w h) / sum(w).
        weights: (N,) float32, sum(w).
        norms: (N,) float32, sum(w |h|) / sum(w).
    """

    means: Tensor
    weights: Tensor
    norms: Tensor

    @property
    def states(self) -> Tensor:
        """(N, D) float32: the means, rescaled to `norms`; a zero mean stays zero."""
        return rescaled(self.means, self.norms)


def rescaled(means: Tensor, norms: Tensor) -> Tensor:
    """Scale each row of `means`, (N, D), to the length in `norms`, (N,); a row of zeros stays zero."""
    largest = means.detach().abs().amax(-1, keepdim=True)  # very small values squared would be zero
    shaped = means / torch.where(largest > 0, largest, 1)
    return torch.mul(shaped, norms[:, None] / shaped.norm(dim=-1, keepdim=True).clamp_min(1))


def token_groups(states: Tensor, weights: Tensor) -> Groups:
    """Make a group of each token, in float32. states: (L, D); weights: (L,), above 0."""
    h = states.float()
    return Groups(h, weights.float(), h.norm(dim=-1))


def pool(states: Tensor, weights: Tensor, ratio: int) -> Groups:
    """Pool every `ratio` consecutive states of one chunk; a tail is a group like any other.

    Sums are taken inside each group, not as differences of running sums: a state far longer than the others, such as a
    sequence's first, would cost the groups after it their precision.

    Args:
        states: (L, D).
        weights: (L,), above 0.
        ratio: Tokens per group.
    """
    return coarsen_groups(token_groups(states, weights), ratio)


def pool_groups(groups: Groups, lengths: Tensor) -> Groups:
    """Pool consecutive groups, as many together as `lengths` says; equal to `coarsen_groups` if all lengths are equal.

    Args:
        groups: L groups; of one token each to pool tokens (see `token_groups`).
        lengths: (N,) groups to pool into each, 1 or more, L in all; on the CPU.
    """
    count = len(lengths)
    group = torch.arange(count).repeat_interleave(lengths).to(groups.weights.device)
    total = groups.weights.new_zeros(count).index_add(0, group, groups.weights)
    share = groups.weights / total[group]
    means = groups.means.new_zeros(count, groups.means.shape[1]).index_add(0, group, share[:, None] * groups.means)
    return Groups(means, total, groups.norms.new_zeros(count).index_add(0, group, share * groups.norms))


def coarsen_groups(groups: Groups, times: int) -> Groups:
    """Pool every `times` consecutive groups of one chunk; equal, up to rounding, to `pool` at the coarser ratio."""
    padding = -len(groups.weights) % times
    total = nn.functional.pad(groups.weights, (0, padding)).view(-1, times).sum(1)
    norms = span_means(groups.norms[:, None], groups.weights, times)[:, 0]
    return Groups(span_means(groups.means, groups.weights, times), total, norms)


def uniform_weights(vocab_size: int, counts: Tensor | None = None) -> Tensor:
    """Weigh all tokens alike."""
    return torch.ones(vocab_size)


def rank_weights(vocab_size: int, counts: Tensor | None = None) -> Tensor:
    """Weigh tokens by log(N / count), with counts estimated by Zipf's law from a token's id as its rank.

    A BPE vocabulary lists its merges by frequency.
    """
    return (_HARMONIC * torch.arange(1, vocab_size + 1, dtype=torch.float32)).log()


def frequency_weights(vocab_size: int, counts: Tensor | None = None) -> Tensor:
    """Weigh tokens by log(N / count) of the given counts; tokens that were not seen count as seen once."""
    if counts is None or counts.shape != (vocab_size,) or not (counts >= 0).all() or not counts.sum() > 0:
        given = "none" if counts is None else f"counts of shape {tuple(counts.shape)}"
        raise ConfigError(
            f"token_weighting='frequency' needs how often each of {vocab_size} tokens occurs, and got {given}; count "
            "them in text of the kind that will be compressed, or pass token_weighting='rank'"
        )
    seen = counts.double().clamp_min(1)
    return (seen.sum() / seen).log().clamp_min(_MIN_WEIGHT).float()


TOKEN_WEIGHTINGS: dict[str, Callable[[int, Tensor | None], Tensor]] = {
    "uniform": uniform_weights,
    "rank": rank_weights,
    "frequency": frequency_weights,
}


def token_weights(weighting: str, vocab_size: int, counts: Tensor | None = None) -> Tensor:
    """Weigh every token of a vocabulary.

    Args:
        weighting: One of `TOKEN_WEIGHTINGS`.
        vocab_size: V.
        counts: (V,) how often each token was seen, for "frequency".

    Returns:
        (V,) float32 above 0.

    Raises:
        ConfigError: "frequency" without counts of every token.
    """
    return TOKEN_WEIGHTINGS[weighting](vocab_size, counts)


def digest_of(weights: Tensor) -> str:
    """Return the sha256 (32 hex digits) of a table of weights, rounded to float16 as in files."""
    return hashlib.sha256(weights.to("cpu", torch.float16).contiguous().numpy().tobytes()).hexdigest()[:32]
