"""Tables for a reader, on stdout or stderr; values are shown as they are, never read as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from extemb_core.cli.output import strip_control_chars

if TYPE_CHECKING:
    from extemb_core.answers import Answer


def show_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[str] = (), stderr: bool = False
) -> None:
    """Print rows under their column names; the columns in `numbers` are set to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(strip_control_chars(cell)) for cell in row))
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = 200  # a log or a pipe has no edge to wrap at
    console.print(table)


def show_context(answer: Answer) -> None:
    """What became of each document, on stderr."""
    if not answer.context:
        return
    rows = [
        (
            entry.source,
            f"{entry.n_tokens:,}",
            f"{entry.positions:,}",
            str(entry.fidelity),
            entry.reason,
        )
        for entry in answer.context
    ]
    show_table(
        ("source", "tokens", "positions", "fidelity", "reason"), rows, numbers=("tokens", "positions"), stderr=True
    )
