"""Fewer combinations of parameters: what depends on three of them at once is no promise of ours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose rows, a value of each axis, so that every two values of different axes stand in one of them."""

    def pairs(row: tuple[Any, ...]) -> set[Any]:
        return set(combinations(enumerate(row), 2))

    rows: list[tuple[Any, ...]] = []
    everything = list(product(*axes))
    missing = set().union(*map(pairs, everything))
    while missing:
        rows.append(max(everything, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows
