"""Intervals against an obvious bootstrap with the same draws, and against cases that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from extemb_core.errors import ConfigError
from extemb_core.evaluation import statistics
from extemb_core.evaluation.statistics import bootstrap_interval, mean_with_interval, share

GROUPS = np.array(["b", "a", "c", "b", "a", "d", "b"])  # of several sizes, in no order
GAINS = np.array([0.5, 1.5, 2.0, 0.25, 1.0, 3.0, 0.75])
ROOM = np.array([1.0, 2.0, 2.5, 1.5, 2.0, 3.5, 0.5])


def obvious_bootstrap(statistic, groups, seed, resamples):
    """`statistic` of the places of all values of as many groups as there are, drawn with replacement."""
    names = sorted(set(groups))
    draws = np.random.default_rng(seed).integers(0, len(names), (resamples, len(names)))
    found = []
    for draw in draws:
        places = [place for number in draw for place, group in enumerate(groups) if group == names[number]]
        found.append(statistic(places))
    found.sort()
    return [np.interp(q * (len(found) - 1), range(len(found)), found) for q in (0.025, 0.975)]


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(statistics, "_RESAMPLES", 301)
    return 301


@pytest.mark.parametrize("at_once", [2_000_000, 40, 1])
def test_the_interval_of_a_mean_is_an_obvious_bootstrap(few_resamples, monkeypatch, at_once):
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", at_once)
    expected = obvious_bootstrap(lambda places: GAINS[places].mean(), GROUPS, 5, few_resamples)
    assert list(bootstrap_interval(GAINS, GROUPS, seed=5)) == pytest.approx(expected)
    assert mean_with_interval(GAINS, GROUPS, seed=5) == {
        "mean": pytest.approx(9 / 7),
        "interval": pytest.approx(expected),
        "n": 7,
    }


def test_values_may_count_by_their_weights(few_resamples):
    def mean(places):
        return (GAINS[places] * ROOM[places]).sum() / ROOM[places].sum()

    expected = obvious_bootstrap(mean, GROUPS, 5, few_resamples)
    assert mean_with_interval(GAINS, GROUPS, seed=5, weights=ROOM) == {
        "mean": pytest.approx(mean(range(7))),
        "interval": pytest.approx(expected),
        "n": 7,
    }


def test_the_interval_of_a_share_is_an_obvious_bootstrap_of_the_ratio_of_means(few_resamples):
    expected = obvious_bootstrap(lambda places: GAINS[places].mean() / ROOM[places].mean(), GROUPS, 5, few_resamples)
    found = share(GAINS, ROOM, GROUPS, seed=5)
    assert found == {"mean": pytest.approx(9 / 13), "interval": pytest.approx(expected)}


def test_groups_are_resampled_not_values():
    values = np.array([1.0] * 50 + [3.0] * 50)
    assert bootstrap_interval(values, np.array([0] * 50 + [1] * 50)) == [1.0, 3.0]  # two draws alike: a quarter each
    low, high = bootstrap_interval(values, np.arange(100))
    assert 1.7 < low < 2 < high < 2.3
    whole = np.ones(100)
    assert share(values, whole, np.array([0] * 50 + [1] * 50))["interval"] == [1.0, 3.0]


def test_a_large_group_weighs_as_many_values_as_it_has():
    found = mean_with_interval(np.array([0.0, 0.0, 0.0, 4.0]), np.array([1, 1, 1, 0]))
    assert found == {"mean": 1.0, "interval": [0.0, 4.0], "n": 4}


def test_equal_values_have_no_spread():
    assert mean_with_interval(np.full(6, 2.5), np.arange(6)) == {"mean": 2.5, "interval": [2.5, 2.5], "n": 6}
    assert share(ROOM / 4, ROOM, GROUPS) == {"mean": 0.25, "interval": [0.25, 0.25]}


def test_one_group_has_no_interval():
    assert bootstrap_interval(GAINS, np.zeros(7)) is None
    assert mean_with_interval(GAINS, np.zeros(7)) == {"mean": pytest.approx(9 / 7), "interval": None, "n": 7}
    assert share(GAINS, ROOM, np.zeros(7)) == {"mean": pytest.approx(9 / 13), "interval": None}


def test_the_seed_and_the_order_of_the_groups():
    many = np.random.default_rng(0).normal(size=30)
    assert bootstrap_interval(many, np.arange(30), 1) == bootstrap_interval(many, np.arange(30), 1)
    assert bootstrap_interval(many, np.arange(30), 1) != bootstrap_interval(many, np.arange(30), 2)
    order = np.array([6, 2, 4, 0, 1, 5, 3])
    assert bootstrap_interval(GAINS[order], GROUPS[order]) == pytest.approx(bootstrap_interval(GAINS, GROUPS))


@pytest.mark.parametrize(
    ("denominator", "groups"),
    [
        ([1.0, -1.0, 1.0, -0.9], [0, 1, 2, 3]),  # above 0 on the whole, within noise
        ([0.0, 0.0, 3.0, 3.0], [0, 0, 1, 1]),  # the interval reaches 0
        ([-1.0, -2.0, -1.5, -1.0], [0, 1, 2, 3]),
        ([0.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
        ([1.0, -1.0, 1.0, -1.0], [0, 0, 0, 0]),  # one group: 0 itself
        ([1.0, -1.0, 1.0, -2.0], [0, 0, 0, 0]),
        ([1.0, math.nan, 1.0, 1.0], [0, 1, 2, 3]),
    ],
)
def test_a_share_of_what_may_be_nothing_is_refused(denominator, groups):
    found = share(np.ones(4), np.array(denominator), np.array(groups))
    assert list(found) == ["refused"]
    assert "not clearly above 0" in found["refused"]


def test_a_refusal_names_the_gain_and_its_interval():
    found = share(np.ones(4), np.array([0.0, 0.0, 3.0, 3.0]), np.array([0, 0, 1, 1]))
    assert found == {"refused": "what there was to gain, 1.5 (95% interval 0 to 3), is not clearly above 0"}


def test_one_group_is_refused_only_where_its_mean_is_not_above_0():
    denominator = np.array([1.0, -1.0, 1.0, -0.9])
    assert share(np.full(4, 0.05), denominator, np.zeros(4)) == {"mean": pytest.approx(2.0), "interval": None}


def test_resamples_without_anything_to_gain_have_no_share():
    # One group of seven lies so far below 0 that a few resamples, fewer than 2.5%, come out below it too.
    denominator, groups = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.2]), np.arange(7)
    draws = np.random.default_rng(0).integers(0, 7, (10_000, 7))
    wholes = denominator[draws].sum(1)
    assert 0 < (wholes <= 0).mean() < 0.025
    found = share(np.ones(7), denominator, groups)
    assert found["interval"] == pytest.approx(np.quantile(7 / wholes[wholes > 0], [0.025, 0.975]))


def test_no_values_have_no_mean():
    nothing = np.array([])
    assert bootstrap_interval(nothing, nothing) is None
    for call in (lambda: mean_with_interval(nothing, nothing), lambda: share(nothing, nothing, nothing)):
        with pytest.raises(ConfigError, match="0 values"):
            call()
