"""Work at once: in order, in threads, and ended soon where nobody waits."""

from __future__ import annotations

import threading

import pytest
from passes import PATIENCE
from processes import interruptible

from extemb_core.utils.threads import at_once


def test_several_are_done_at_the_same_time_in_order_and_one_in_the_callers_thread():
    meet = threading.Barrier(3)
    assert at_once(lambda item, left: (meet.wait(PATIENCE), item)[1], "abc", 3) == ["a", "b", "c"]
    assert at_once(lambda item, left: threading.current_thread(), [1], 3) == [threading.current_thread()]
    assert at_once(lambda item, left: item, [], 3) == []


def test_where_one_fails_the_others_are_told_and_none_begins():
    begun, meet = [], threading.Barrier(2)

    def work(item, left):
        begun.append(item)
        meet.wait(PATIENCE)
        if item == 1:
            raise KeyError("no")
        assert left.wait(PATIENCE)

    with pytest.raises(KeyError):
        at_once(work, range(9), 2)
    assert sorted(begun) == [0, 1]


def test_who_is_interrupted_does_not_wait_for_all_of_it():
    meet, told = threading.Barrier(2), []

    def work(item, left):
        if meet.wait(PATIENCE) == 0:
            interrupt()
        told.append(left.wait(PATIENCE))

    with interruptible() as interrupt, pytest.raises(KeyboardInterrupt):
        at_once(work, "ab", 2)
    assert told == [True, True]
