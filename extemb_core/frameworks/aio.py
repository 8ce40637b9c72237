"""Answers for event loops: work runs in threads, and stops when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

from extemb_core.answers import Answer, AnswerStream
from extemb_core.utils.progress import stopped_by

MAX_CONCURRENCY = 32

T = TypeVar("T")


@cache
def _pool_of(_process: int) -> ThreadPoolExecutor:
    """Return the thread pool of a process, shared by all models; a forked process gets a new one."""
    return ThreadPoolExecutor(MAX_CONCURRENCY, thread_name_prefix="extemb")


def _submit(work: Callable[..., T], *args: Any) -> Future[T]:
    return _pool_of(os.getpid()).submit(work, *args)


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Run work in a thread and await it; it goes on to its end even if nobody waits any more."""
    return await asyncio.wrap_future(_submit(work, *args))


async def until_cancelled(work: Callable[[threading.Event], T]) -> T:
    """Run work in a thread, and set its event when the awaiting task is cancelled; compressing stops then too."""
    cancelled = threading.Event()
    try:
        return await in_thread(_stoppable, cancelled, work, cancelled)
    except asyncio.CancelledError:
        cancelled.set()
        raise


class AsyncAnswerStream:
    """Streams an answer, piece by piece: `async with AsyncAnswerStream(open) as stream: async for piece in stream`.

    Leaving the block stops the LLM after the current step.

    Args:
        opened: Returns the stream; called in a thread, as it may load and compress.
    """

    def __init__(self, opened: Callable[[], AnswerStream]) -> None:
        self._left = threading.Event()
        self._opening: Future[AnswerStream] = _submit(_stoppable, self._left, opened)
        self._working: Future[Any] = self._opening

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._left.set()
        _submit(_close, self._opening, self._working)

    async def __aiter__(self) -> AsyncIterator[str]:
        stream = await asyncio.wrap_future(self._opening)
        while True:
            self._working = _submit(next, stream, None)
            piece = await asyncio.wrap_future(self._working)
            if piece is None:
                return
            yield piece

    @property
    def answer(self) -> Answer:
        """The answer, once all pieces are read."""
        return self._opening.result().answer


def _stoppable(cancelled: threading.Event, work: Callable[..., T], *args: Any) -> T:
    with stopped_by(cancelled):
        return work(*args)


def _close(opening: Future[AnswerStream], working: Future[Any]) -> None:
    wait([opening, working])
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
