"""One progress bar for all long work: shown on a terminal, silent in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(
    description: str, total: int | None, show: bool | Callable[[float], None] | None = None
) -> Iterator[Callable[[float], None]]:
    """Yield a function that advances the bar by a number of units.

    Args:
        description: What is being done, e.g. "compress".
        total: Units of work in all; None where that is not known.
        show: True or False to force; None shows it when stderr is a terminal; a function that was yielded advances the
            bar of the longer work that this is a part of.
    """
    if callable(show):
        yield show
        return
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda _units: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda units: bar.advance(task, units)
