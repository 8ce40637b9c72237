"""Share a budget out among sentences: which are read in full, which at a ratio, and which not at all.

What an answer loses when a sentence is read in less detail was measured (`pretrained/focus.json`): most for the
sentence that is most like the question, next to nothing for one that shares no word with it. Every sentence starts
dropped and rises along the convex hull of its options; each step taken is the one, of all sentences, that saves most
loss per position. A sentence may rise from a ratio straight to its full text, if the ratios between save too little.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from extemb_core.context.spans import Array

_DIGITS = 12  # claims that agree in so many digits are equal
_MAX_TRIES = 64  # steps to try after the first that no longer fits


def convex_steps(costs: Sequence[float], losses: Sequence[float]) -> list[tuple[int, float]]:
    """List the options on the lower convex hull after the first, each with the loss that it saves per cost.

    Args:
        costs: Cost of each option, rising.
        losses: Loss of each option.

    Returns:
        (option, saved loss per cost), by falling savings; options that save nothing are left out.
    """
    hull = [0]
    for option in range(1, len(costs)):
        while len(hull) > 1 and _slope(costs, losses, hull[-1], option) >= _slope(costs, losses, *hull[-2:]):
            hull.pop()
        if losses[option] < losses[hull[-1]]:
            hull.append(option)
    return [(option, _slope(costs, losses, before, option)) for before, option in itertools.pairwise(hull)]


def _slope(costs: Sequence[float], losses: Sequence[float], before: int, after: int) -> float:
    return (losses[before] - losses[after]) / (costs[after] - costs[before])


def allocate(
    lengths: Array,
    losses: Array,
    costs: Sequence[float],
    budget: int,
    positions: Callable[[Array], int],
) -> Array:
    """Choose an option for each sentence so that the whole fits the budget.

    Args:
        lengths: (U,) tokens of each sentence, in the order in which equal claims are granted.
        losses: (U, F) what each option costs the answer.
        costs: (F,) positions per token of each option, rising from 0.
        budget: Positions.
        positions: Counts the positions that a choice, (U,), takes.

    Returns:
        (U,) option of each sentence.
    """
    rows, first = np.unique(losses, axis=0, return_inverse=True)
    steps = [convex_steps(costs, row.tolist()) for row in rows]
    claims = [
        (round(-slope / length, _DIGITS), at, option)
        for at, (kind, length) in enumerate(zip(first.ravel().tolist(), lengths.tolist(), strict=True))
        for option, slope in steps[kind]
    ]
    claims.sort()
    chosen = np.zeros(len(lengths), np.int64)

    def after(count: int) -> Array:
        risen: Array = chosen.copy()
        for _, at, option in claims[:count]:
            risen[at] = option
        return risen

    low, high = 0, len(claims)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if positions(after(middle)) <= budget else (low, middle - 1)
    chosen = after(low)
    for _, at, option in claims[low : low + _MAX_TRIES]:
        before = chosen[at]
        chosen[at] = option
        if positions(chosen) > budget:
            chosen[at] = before
    return chosen
