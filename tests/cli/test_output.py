"""What is printed, and how a command ends: one line for every failure, and nothing that a terminal would obey."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from command_line import refused, run

from extemb_core.cli import output as reporting
from extemb_core.cli.output import ExitCode
from extemb_core.errors import DocumentError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make loading fail with an exception."""
    from extemb_core.lm import ExtensibleLM

    def fail_with(error: BaseException) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(ExtensibleLM, "from_pretrained", fail)

    return fail_with


def test_out_of_memory(failing: Callable[[BaseException], None]) -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):
        failing(error)
        assert refused(ExitCode.FAILURE, "ask", "Who?").startswith("out of memory")


def test_a_bug_is_one_line_and_debugging_shows_it(failing: Callable[[BaseException], None]) -> None:
    failing(ZeroDivisionError("of\nall things"))
    assert "unexpected ZeroDivisionError (of all things)" in refused(ExitCode.FAILURE, "ask", "Who?")
    result = run("--debug", "ask", "Who?")
    assert result.exit_code == ExitCode.FAILURE
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_disk_errors_name_the_file(failing: Callable[[BaseException], None]) -> None:
    failing(OSError(28, "No space left on device", "out.safetensors"))
    assert refused(ExitCode.FAILURE, "ask", "Who?") == "No space left on device: out.safetensors"


def test_interruption(failing: Callable[[BaseException], None]) -> None:
    failing(KeyboardInterrupt())
    result = run("ask", "Who?")
    assert (result.exit_code, result.stderr) == (ExitCode.INTERRUPTED, "error: interrupted\n")
    assert json.loads(run("ask", "Who?", "--json").stdout)["error"]["message"] == "interrupted"


def test_every_error_of_the_library_has_its_code() -> None:
    from extemb_core import errors

    codes = {
        kind.__name__: reporting.code_of(kind("a", "b", "c") if kind is errors.MissingExtraError else kind("a"))
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ExtembError)
    }
    assert codes == {
        "ExtembError": ExitCode.FAILURE,
        "ConfigError": ExitCode.SETTINGS,
        "RatioError": ExitCode.SETTINGS,
        "BudgetError": ExitCode.SETTINGS,
        "DocumentError": ExitCode.INPUT,
        "DocumentNotFoundError": ExitCode.INPUT,
        "WeightsError": ExitCode.WEIGHTS,
        "WeightsNotFoundError": ExitCode.WEIGHTS,
        "WeightsCorruptError": ExitCode.WEIGHTS,
        "StoreError": ExitCode.FAILURE,
        "StoreNotFoundError": ExitCode.INPUT,
        "StoreFormatError": ExitCode.INPUT,
        "StoreCorruptError": ExitCode.INPUT,
        "MismatchError": ExitCode.SETTINGS,
        "EngineError": ExitCode.FAILURE,
        "TrainingError": ExitCode.FAILURE,
        "MissingExtraError": ExitCode.FAILURE,
    }


def test_a_terminal_is_not_told_what_to_do_by_text() -> None:
    assert reporting.strip_control_chars("a\x1b[2Jb\tc\nd\x07\x9bé\udcff") == "a[2Jb\tc\ndé\\udcff"


UNSEEN = "\xad\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202d\u202e\u2060\u2066\u2068\u2069\ufeff\U000e0041"


@pytest.mark.parametrize("unseen", UNSEEN, ids=lambda one: f"U+{ord(one):04X}")
def test_what_turns_or_hides_text_reaches_no_terminal_and_json_keeps_it(
    unseen: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"moss{unseen}txt.exe"
    for write in (
        reporting.print_line,
        reporting.print_note,
        lambda text: reporting.print_table(("source",), [(text,)]),
    ):
        write(text)
    reporting.print_error(DocumentError(f"{text} is no text"), as_json=False)
    with monkeypatch.context() as patched:
        patched.setattr(sys.stdout, "isatty", lambda: True)
        reporting.print_piece(text)
    out, err = capsys.readouterr()
    assert unseen not in out + err
    err = err.replace("moss txt", "mosstxt")  # of a line end an error makes a space
    assert (out.count("mosstxt.exe"), err.count("mosstxt.exe")) == (3, 2)
    reporting.print_json({"text": text})
    line = capsys.readouterr().out
    assert json.loads(line) == {"text": text}
    assert unseen not in line


def test_joiners_and_letters_of_all_scripts_are_written_as_they_are() -> None:
    text = "👩‍🚀 نمی‌خواهم שלום สวัสดี क्ष é"
    assert reporting.strip_control_chars(text) == text
