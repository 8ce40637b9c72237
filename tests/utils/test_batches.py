"""Batches hold all items once, and no more than they may."""

from __future__ import annotations

from functools import partial

from extemb_core.models.bulk import POSITIONS_AT_ONCE
from extemb_core.utils.batches import padded_batches

LENGTHS = {"a": 9, "b": 2, "c": 10, "d": 3, "e": 10, "f": 60}


def test_a_padded_batch_stays_within_its_limit_and_what_is_longer_is_alone():
    assert list(padded_batches(LENGTHS, 50)) == [["b", "d", "a", "c", "e"], ["f"]]
    assert list(padded_batches(LENGTHS, 20)) == [["b", "d"], ["a", "c"], ["e"], ["f"]]
    assert list(padded_batches(LENGTHS, 50, batch_size=2)) == [["b", "d"], ["a", "c"], ["e"], ["f"]]


def test_a_batch_may_be_of_like_lengths_only():
    assert list(padded_batches(LENGTHS, 1000, at_least=0.8)) == [["b"], ["d"], ["a", "c", "e"], ["f"]]
    assert list(padded_batches(LENGTHS, 1000, at_least=0.6)) == [["b", "d"], ["a", "c", "e"], ["f"]]


def test_short_prompts_are_read_together_and_long_ones_apart():
    lengths = {"none": 50, "truncated/32": 82, "full": 1074, "truncated/4": 306, "extensible/4": 306}
    four = [["none", "truncated/32", "truncated/4", "extensible/4"], ["full"]]
    batches = partial(padded_batches, limit=POSITIONS_AT_ONCE)
    assert list(batches(lengths, batch_size=8)) == list(batches(lengths)) == four
    assert list(batches(lengths, batch_size=2)) == [four[0][:2], four[0][2:], ["full"]]
    assert list(batches({"a": 9000, "b": 3000})) == [["b"], ["a"]]
