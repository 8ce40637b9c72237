"""Print a command's output, and end it with an exit code; a failure prints one sentence instead of a traceback."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, is_dataclass
from enum import IntEnum
from typing import Any, ParamSpec, TextIO

import typer

from extemb_core import errors
from extemb_core.errors import ExtembError
from extemb_core.utils.text import UNSEEN
from extemb_core.utils.text import one_line as one_line
from extemb_core.utils.text import strip_control_chars as strip_control_chars

P = ParamSpec("P")

_MAX_QUOTED_CHARS = 200  # of an error that is not this library's
_ESCAPED_IN_JSON = re.compile(rf"[\x7f-\x9f\ud800-\udfff{UNSEEN}]")
_LOG_COLUMNS = 200  # width of tables in a log or pipe


class ExitCode(IntEnum):
    """Exit codes; documented in docs/cli.md and at the end of `extemb --help`."""

    meaning: str

    OK = 0, "done"
    FAILURE = 1, "failed while running: memory, disk, training, a missing extra"
    USAGE = 2, "a command line that cannot be understood"
    INPUT = 3, "a document, data file or store that is missing or cannot be read"
    WEIGHTS = 4, "weights that are missing or damaged"
    SETTINGS = 5, "settings that are not legal or do not fit together: ratio, budget, LLM and embedder"
    INTERRUPTED = 130, "interrupted with Ctrl-C"
    CLOSED_PIPE = 141, "the reader of the output has gone (as in: extemb ... | head -1)"

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        code = int.__new__(cls, value)
        code._value_, code.meaning = value, meaning
        return code


EXIT_CODES = {code: code.meaning for code in ExitCode}

# The first that matches is used; everything else is a FAILURE.
_CODES: tuple[tuple[Any, ExitCode], ...] = (
    (
        (errors.DocumentError, errors.StoreNotFoundError, errors.StoreFormatError, errors.StoreCorruptError),
        ExitCode.INPUT,
    ),
    (errors.WeightsError, ExitCode.WEIGHTS),
    (KeyboardInterrupt, ExitCode.INTERRUPTED),
    ((errors.ConfigError, errors.BudgetError, errors.MismatchError), ExitCode.SETTINGS),
)


def debugging() -> bool:
    """Return whether tracebacks are shown: `extemb --debug ...`, or `EXTEMB_DEBUG=1`."""
    return os.environ.get("EXTEMB_DEBUG", "") not in ("", "0")


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with its exit code; its parameter `as_json` decides how a failure is printed."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError as error:
            discard_stdout()
            raise typer.Exit(ExitCode.CLOSED_PIPE) from error
        except (KeyboardInterrupt, Exception) as error:
            print_error(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(code_of(error)) from error

    return run


def code_of(error: BaseException) -> ExitCode:
    """Choose the exit code for an error."""
    return next((code for kinds, code in _CODES if isinstance(error, kinds)), ExitCode.FAILURE)


def library_output() -> redirect_stdout[TextIO]:
    """Redirect what libraries print on stdout to stderr: stdout is for the result alone."""
    return redirect_stdout(sys.stderr)


def goes_on_from(where: object, *, resume: bool) -> str:
    """Say how to go on with a stopped command."""
    return f"the same command{'' if resume else ' without --no-resume'} goes on from {where}"


@contextmanager
def explain_interrupt(explain: Callable[[], str]) -> Iterator[None]:
    """Say, after an interruption, what a command has done, or how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {explain()}") from None


def writes_unicode() -> bool:
    """Return whether stdout can write all characters, which a pipe on Windows cannot."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().startswith("utf")


def print_json(value: Any) -> None:
    """Print an object, or a dataclass as one, on one line of stdout."""
    fields = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    line = json.dumps(fields, ensure_ascii=not writes_unicode())  # escapes control characters below the space
    typer.echo(_ESCAPED_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], line))


def print_note(message: str) -> None:
    """Print a line that is not part of the result, on stderr."""
    typer.echo(one_line(message), err=True)


def print_line(text: str) -> None:
    """Print a line of the result, without characters that a terminal would obey."""
    typer.echo(one_line(text))


def print_piece(text: str) -> None:
    """Print a part of an answer: unchanged to a file, without characters that it would obey to a terminal."""
    typer.echo(strip_control_chars(text) if sys.stdout.isatty() else text, nl=False)


def print_result(value: Any, message: str, *, as_json: bool) -> None:
    """Print the result of a command: as JSON on stdout, or in words on stderr."""
    if as_json:
        print_json(value)
    else:
        print_note(message)


def print_error(error: BaseException, *, as_json: bool) -> None:
    """Print an error: one line on stderr, or one JSON object on stdout."""
    if debugging():
        traceback.print_exception(error)
    kind, message = _describe(error)
    print_result({"error": {"type": kind, "message": message}}, f"error: {message}", as_json=as_json)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = (), stderr: bool = False
) -> None:
    """Print rows under their column names, without reading cells as markup.

    Columns with numbers, and those in `right`, are aligned to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        to_the_right = column in right or any(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if to_the_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_format_cell(value)) for value in row))
    console = Console(stderr=stderr)
    if not console.is_terminal:
        console.width = _LOG_COLUMNS
    with console.capture() as captured:  # printed directly, rich would end the program if a pipe has no reader
        console.print(table)
    typer.echo(captured.get(), nl=False, err=stderr)


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else one_line(str(value))


def _describe(error: BaseException) -> tuple[str, str]:
    """Return the name of an error's type for JSON, and its message on one line."""
    kind = type(error).__name__
    text = strip_control_chars(" ".join(str(error).split()))
    quoted = text if len(text) <= _MAX_QUOTED_CHARS else text[:_MAX_QUOTED_CHARS] + "..."
    if isinstance(error, ExtembError):
        return kind, text
    if isinstance(error, KeyboardInterrupt):
        return kind, text or "interrupted"
    out_of_memory = isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text)
    if out_of_memory or isinstance(error, MemoryError) or kind == "OutOfMemoryError":  # torch's, not imported here
        remedy = "close other programs, or pass a smaller --budget, a coarser --ratio or a smaller --batch-size"
        return "OutOfMemoryError", f"out of memory ({quoted or kind}); {remedy}"
    if isinstance(error, OSError) and error.strerror:
        return kind, f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return kind, f"unexpected {kind} ({quoted}); `extemb --debug ...` shows where it comes from"


def discard_stdout() -> None:
    """Redirect stdout to the null device, or the interpreter would complain at exit about what it cannot flush."""
    with suppress(OSError, ValueError), open(os.devnull, "wb") as nothing:  # stdout may not be a file, as in a notebook
        os.dup2(nothing.fileno(), sys.stdout.fileno())
