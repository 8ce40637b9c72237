"""Work on several items in threads, which ends soon once one of them failed or the caller was interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def at_once(work: Callable[[S, threading.Event], T], items: Sequence[S], max_workers: int) -> list[T]:
    """Run `work(item, cancelled)` for each item, in threads; a single item in the caller's thread.

    Args:
        work: Function of an item and an event, which is set once another item failed or the caller was interrupted:
            it should then end soon.
        items: Items to work on.
        max_workers: Maximum number of threads.

    Returns:
        The results, in the order of the items.

    Raises:
        Exception: The first error of `work`, once all threads have ended.
    """
    cancelled = threading.Event()
    if len(items) < 2:
        return [work(item, cancelled) for item in items]

    def one(item: S) -> T:
        if cancelled.is_set():
            raise CancelledError("nobody waits for this any more")
        try:
            return work(item, cancelled)
        except BaseException:
            cancelled.set()
            raise

    with ThreadPoolExecutor(min(len(items), max_workers)) as pool:
        try:
            return list(pool.map(one, items))
        except BaseException:
            cancelled.set()  # before the pool waits for its threads
            raise
