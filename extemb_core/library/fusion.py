"""Fuse several rankings into one."""

from __future__ import annotations

from collections.abc import Sequence

RANK_OFFSET = 60  # of reciprocal rank fusion, as its authors set it (Cormack et al., 2009)


def fuse(rankings: Sequence[Sequence[int]], weights: Sequence[float] | None = None) -> list[tuple[int, float]]:
    """Fuse rankings by reciprocal rank: an item's score is the sum of weight / (60 + rank), ranks from 1.

    Args:
        rankings: Items, best first, of each ranking.
        weights: Of each ranking; all 1 when not given.

    Returns:
        (item, score), best first; equal scores in the order of the items.
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + weight / (RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
