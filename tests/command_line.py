"""The command line as tests call it: in this process, as one of its own, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import typer.main
from processes import Process
from typer.testing import CliRunner

from extemb_core.cli.main import app
from extemb_core.cli.output import ExitCode

TEXT = "The lighthouse keeper counted forty-one ships before the fog came in. " * 12
ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Models:
    """Folders of a tiny LLM and an embedder for it, and the options that name them."""

    llm: Path
    embedder: Path

    @property
    def options(self) -> list[str]:
        return ["--llm", str(self.llm), "--embedder", str(self.embedder)]


def run(*args: str | Path, stdin: str | bytes | None = None) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)


def answer_of(*args: str | Path, stdin: str | bytes | None = None) -> dict[str, Any]:
    result = run(*args, "--json", "--max-new-tokens", "4", stdin=stdin)
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def refused(code: ExitCode, *args: str | Path, stdin: str | bytes | None = None) -> str:
    """The message of a refusal, after checking that it is one line, on stderr alone; and the same as JSON."""
    result = run(*args, stdin=stdin)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    first, *others = result.stderr.strip().splitlines()
    assert first.startswith("error: ")
    assert not others
    as_json = run(*args, "--json", stdin=stdin)
    assert as_json.exit_code == code
    (line,) = as_json.stdout.splitlines()
    error = json.loads(line)["error"]
    assert error["type"].endswith("Error")
    assert error["message"] == first.removeprefix("error: ")
    return str(error["message"])


def misused(*args: str | Path, stdin: str | None = None) -> str:
    result = run(*args, stdin=stdin)
    assert result.exit_code == ExitCode.USAGE, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


@cache
def commands() -> dict[str, Any]:
    """Every command that does something, by the words that call it."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            inner_commands = {inner: own for inner, own in command.commands.items() if not own.hidden}
            found |= {name if inner == name else f"{name} {inner}": own for inner, own in inner_commands.items()}
        else:
            found[name] = command
    return found


def ask_about(models: Models, file: Path, *options: str) -> list[str | Path]:
    return ["ask", "Who?", "--documents", file, "--max-new-tokens", "2", *models.options, *options]


def noted(stderr: str, folder: Path) -> None:
    """What was left out of the folder `mixed` is told."""
    assert f"warning: not read: {folder / 'latin.txt'} is not valid UTF-8 at byte 1" in stderr
    assert f"links to folders: {folder / 'README'}, {folder / 'report.docx'}\n" in stderr


MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from extemb_core.cli.main import main; main()"
)


def interruptible(*args: str | Path) -> Process:
    """A process as a shell would start it: a background job of a shell may ignore Ctrl-C, and hand that down."""
    return Process(MAIN, *args, env={**os.environ, "EXTEMB_DEBUG": ""})
