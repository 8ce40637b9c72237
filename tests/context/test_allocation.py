"""A budget goes to the steps that save most per position, and is never exceeded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extemb_core.context.allocation import allocate, convex_steps

COSTS = (0.0, 0.25, 0.5, 1.0)


def whole_positions(lengths):
    return lambda chosen: int(sum(np.ceil(length * COSTS[c]) for length, c in zip(lengths, chosen, strict=True)))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1, 0.5, 0.25, 0], [1, 2, 3]),  # falling less and less: every step
        ([1, 0.9, 0.8, 0], [3]),  # the first steps buy too little: straight to the last
        ([1, 0.2, 0.2, 0.2], [1]),  # nothing more to gain
        ([1, 1, 1, 1], []),
        ([1, 0.3, np.inf, np.inf], [1]),  # what may not be chosen
        ([1, np.inf, 0.3, np.inf], [2]),
    ],
)
def test_steps_are_those_of_the_lower_convex_hull(losses, expected):
    steps = convex_steps(COSTS, losses)
    assert [option for option, _ in steps] == expected
    slopes = [slope for _, slope in steps]
    assert slopes == sorted(slopes, reverse=True)
    assert all(slope > 0 for slope in slopes)


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    budget=st.integers(0, 120),
    seed=st.integers(0, 999),
)
def test_the_budget_holds_and_no_step_that_would_fit_is_left(lengths, budget, seed):
    losses = np.sort(np.random.default_rng(seed).random((len(lengths), 4)), axis=1)[:, ::-1].copy()
    positions = whole_positions(lengths)
    chosen = allocate(np.array(lengths), losses, COSTS, budget, positions)
    assert positions(chosen) <= budget
    assert (chosen == allocate(np.array(lengths), losses, COSTS, budget, positions)).all()
    for at, row in enumerate(losses):
        later = [option for option, _ in convex_steps(COSTS, row.tolist()) if option > chosen[at]]
        if later:
            risen = chosen.copy()
            risen[at] = later[0]
            assert positions(risen) > budget


def test_where_all_cost_the_same_it_is_the_best_that_can_be_had():
    losses = np.array([[0.9, 0.5, 0.3, 0.0], [0.8, 0.7, 0.2, 0.1], [0.4, 0.1, 0.1, 0.0]])
    lengths = np.array([8, 8, 8])
    positions = whole_positions(lengths)
    for budget in range(0, 25, 2):
        chosen = allocate(lengths, losses, COSTS, budget, positions)
        total = losses[range(3), chosen].sum()
        spent = positions(chosen)
        best = min(
            losses[range(3), list(options)].sum()
            for options in itertools.product(range(4), repeat=3)
            if positions(options) <= spent
        )
        assert total == pytest.approx(best)


def test_equal_claims_are_granted_in_order():
    losses = np.tile([1.0, 0.4, 0.2, 0.0], (5, 1))
    chosen = allocate(np.full(5, 4), losses, COSTS, 3, whole_positions([4] * 5))
    assert chosen.tolist() == [1, 1, 1, 0, 0]


def test_losses_in_proportion_to_lengths_are_equal_claims():
    lengths = np.array([7, 30, 11, 23, 19, 3])
    losses = lengths[:, None] * np.array([0.0534, 0.0123, 0.0061, 0.0]) / 100
    for count in range(7):
        budget = whole_positions(lengths)((np.arange(6) < count).astype(int))  # what the first few take
        assert allocate(lengths, losses, COSTS, budget, whole_positions(lengths)).tolist() == [1] * count + [0] * (
            6 - count
        )
