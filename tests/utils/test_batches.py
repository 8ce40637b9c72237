"""Batches hold all items once, and no more than they may."""

from __future__ import annotations

from extemb_core.utils.batches import padded_batches

LENGTHS = {"a": 9, "b": 2, "c": 10, "d": 3, "e": 10, "f": 60}


def test_a_padded_batch_stays_within_its_limit_and_what_is_longer_is_alone():
    assert list(padded_batches(LENGTHS, 50)) == [["b", "d", "a", "c", "e"], ["f"]]
    assert list(padded_batches(LENGTHS, 20)) == [["b", "d"], ["a", "c"], ["e"], ["f"]]
    assert list(padded_batches(LENGTHS, 50, batch_size=2)) == [["b", "d"], ["a", "c"], ["e"], ["f"]]


def test_a_batch_may_be_of_like_lengths_only():
    assert list(padded_batches(LENGTHS, 1000, at_least=0.8)) == [["b"], ["d"], ["a", "c", "e"], ["f"]]
    assert list(padded_batches(LENGTHS, 1000, at_least=0.6)) == [["b", "d"], ["a", "c", "e"], ["f"]]
