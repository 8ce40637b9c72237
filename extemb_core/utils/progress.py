"""One progress bar for all long work: shown on a terminal, silent in a pipe. Work can be stopped when it advances."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from contextvars import ContextVar

_cancelled: ContextVar[threading.Event | None] = ContextVar("cancelled", default=None)


@contextmanager
def stopped_by(cancelled: threading.Event) -> Iterator[None]:
    """Let an event stop the long work of this thread: its next step raises `CancelledError`."""
    token = _cancelled.set(cancelled)
    try:
        yield
    finally:
        _cancelled.reset(token)


def is_stopped() -> bool:
    """Return whether the long work of this thread is to stop."""
    cancelled = _cancelled.get()
    return cancelled is not None and cancelled.is_set()


@contextmanager
def progress(
    description: str, total: int | None, show: bool | Callable[[float], None] | None = None
) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances the bar by a number of units, or stops the work (see `stopped_by`).

    Args:
        description: Name of the work, e.g. "compress".
        total: Units of work in all; None if unknown.
        show: True shows the bar, False does not; None shows it if stderr is a terminal; a function yielded by an outer
            call advances that call's bar instead.
    """
    if callable(show):
        yield show
        return
    cancelled = _cancelled.get()

    def go_on(_units: float) -> None:
        if cancelled is not None and cancelled.is_set():
            raise CancelledError("nobody waits for this any more")

    if not (sys.stderr.isatty() if show is None else show):
        yield go_on
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)

        def advance(units: float) -> None:
            go_on(units)
            bar.advance(task, units)

        yield advance
