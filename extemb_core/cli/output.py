"""How every command ends: an exit code, and for a failure one sentence instead of a traceback."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from enum import IntEnum
from typing import Any, ParamSpec

import typer

from extemb_core.errors import (
    BudgetError,
    ConfigError,
    DocumentError,
    ExtembError,
    MismatchError,
    StoreCorruptError,
    StoreNotFoundError,
    WeightsError,
)

P = ParamSpec("P")


class ExitCode(IntEnum):
    """What the shell gets; documented in docs/cli.md and at the end of `extemb --help`."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    INPUT = 3
    WEIGHTS = 4
    SETTINGS = 5
    INTERRUPTED = 130
    CLOSED_PIPE = 141


EXIT_CODES: dict[ExitCode, str] = {
    ExitCode.OK: "done",
    ExitCode.FAILURE: "failed while running: memory, disk, training, a missing extra",
    ExitCode.USAGE: "a command line that cannot be understood",
    ExitCode.INPUT: "a document, data file or store that is missing or cannot be read",
    ExitCode.WEIGHTS: "weights that are missing or damaged",
    ExitCode.SETTINGS: "settings that are not legal or do not fit together: ratio, budget, LLM and embedder",
    ExitCode.INTERRUPTED: "interrupted with Ctrl-C",
    ExitCode.CLOSED_PIPE: "the reader of the output has gone (as in: extemb ... | head -1)",
}

# The first that fits; everything else is a FAILURE.
_CODES: tuple[tuple[type[ExtembError], ExitCode], ...] = (
    (DocumentError, ExitCode.INPUT),
    (StoreNotFoundError, ExitCode.INPUT),
    (StoreCorruptError, ExitCode.INPUT),
    (WeightsError, ExitCode.WEIGHTS),
    (ConfigError, ExitCode.SETTINGS),
    (BudgetError, ExitCode.SETTINGS),
    (MismatchError, ExitCode.SETTINGS),
)


def debugging() -> bool:
    """Whether tracebacks are shown: `extemb --debug ...`, or `EXTEMB_DEBUG=1`."""
    return os.environ.get("EXTEMB_DEBUG", "") not in ("", "0")


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Make a command end with its exit code; its parameter `as_json` decides where a failure is told."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError as error:
            _discard_stdout()
            raise typer.Exit(ExitCode.CLOSED_PIPE) from error
        except KeyboardInterrupt as error:
            print_error(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(ExitCode.INTERRUPTED) from error
        except Exception as error:
            print_error(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(code_of(error)) from error

    return run


def code_of(error: BaseException) -> ExitCode:
    """The exit code that stands for an error."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILURE)


def print_error(error: BaseException, *, as_json: bool) -> None:
    """Say what went wrong: one line on stderr, or one JSON object on stdout."""
    if debugging():
        traceback.print_exception(error)
    kind, message = _described(error)
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
    else:
        print_note(f"error: {message}")


def strip_control_chars(text: str) -> str:
    """Text that an LLM or a file's name gave, without what a terminal would obey."""
    return "".join(char for char in text if char in "\n\t" or not ("\0" <= char < " " or "\x7f" <= char < "\xa0"))


def print_json(value: Any) -> None:
    """Print one JSON object on one line of stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def print_note(message: str) -> None:
    """Say something that is not the result: on stderr."""
    typer.echo(strip_control_chars(message), err=True)


@contextmanager
def library_output() -> Iterator[None]:
    """Send what libraries print on stdout to stderr: stdout is for the result alone."""
    with redirect_stdout(sys.stderr):
        yield


def _described(error: BaseException) -> tuple[str, str]:
    """The type to name in JSON, and one line of text."""
    kind = type(error).__name__
    text = " ".join(str(error).split())
    if isinstance(error, ExtembError):
        return kind, text
    if isinstance(error, KeyboardInterrupt):
        return kind, text or "interrupted"
    if _is_out_of_memory(error, text):
        remedy = "close other programs, or pass a smaller --budget, a coarser --ratio or a smaller --batch-size"
        return "OutOfMemoryError", f"out of memory ({_short(text) or kind}); {remedy}"
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return kind, f"{error.strerror}{where}"
    return kind, f"unexpected {kind} ({_short(text)}); `extemb --debug ...` shows where it comes from"


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return True
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "not enough memory" in text)


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _discard_stdout() -> None:
    """Let the interpreter flush what is left into nothing, or it complains at exit."""
    try:
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, sys.stdout.fileno())
        os.close(handle)
    except (OSError, ValueError):  # stdout is not a file: a test's, or a notebook's
        pass
