"""Work for several things at once, which ends soon where nobody waits for it any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def at_once(work: Callable[[S, threading.Event], T], items: Sequence[S], most: int) -> list[T]:
    """Run `work(item, left)` for each of some items, `most` of them at once; one alone in the caller's thread.

    Args:
        work: Its event is set once another of them failed, or the caller was interrupted: it is to end soon then.
        items: What it is run for.
        most: Threads at most.

    Returns:
        What came of each, in order.
    """
    left = threading.Event()
    if len(items) < 2:
        return [work(item, left) for item in items]

    def one(item: S) -> T:
        if left.is_set():
            raise CancelledError("nobody waits for this any more")
        try:
            return work(item, left)
        except BaseException:
            left.set()
            raise

    with ThreadPoolExecutor(min(len(items), most)) as pool:
        try:
            return list(pool.map(one, items))
        except BaseException:
            left.set()  # before the pool waits for its threads
            raise
