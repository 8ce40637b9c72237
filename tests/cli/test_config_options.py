"""Options that are read off a dataclass: types, defaults and help as it states them, values as it takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from extemb_core.cli.config_options import options_from
from extemb_core.cli.options import CommandGroup, JsonOption


@dataclass(frozen=True, kw_only=True)
class Base:
    """What is inherited.

    Attributes:
        name: A name that
            goes on. This is not shown.
        steps: Steps (.txt, .md). Nor this.
    """

    name: str
    steps: int = 3


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    """More.

    Attributes:
        steps: Steps, said again.
        rate: Rate.
        sizes: Sizes.
        files: Files.
        limit: Limit.
        generate: Generate.
    """

    rate: float = 0.5
    sizes: tuple[int, ...] = (4, 8)
    files: tuple[str, ...] | None = None
    limit: int | None = None
    generate: bool = True
    hidden: int = 0


NAMES = ("name", "steps", "rate", "sizes", "files", "limit", "generate")


@pytest.fixture
def call() -> Any:
    """Run a command with these options; what it was given, or its output."""
    app, given = CommandGroup(), {}

    @app.command()
    @options_from(Settings, *NAMES[:3])
    @options_from(Settings, *NAMES[3:], panel="Others", sizes="all", files=...)
    def command(as_json: JsonOption = False, **settings: Any) -> None:
        given.update(settings, as_json=as_json)

    def run(*args: str) -> Any:
        result = CliRunner().invoke(app, args, env={"COLUMNS": "200", "NO_COLOR": "1"})
        return given if result.exit_code == 0 and not result.output else result

    return run


def test_values_are_those_of_the_fields(call: Any) -> None:
    assert call("--name", "a", "--files", "x", "y", "--sizes", "1,2", "4", "--loss-only", "--json") == {
        "name": "a", "steps": 3, "rate": 0.5, "sizes": (1, 2, 4), "files": ("x", "y"), "generate": False,
        "as_json": True,
    }  # fmt: skip


def test_what_is_none_or_empty_is_left_to_the_dataclass(call: Any) -> None:
    settings = call("--name", "a", "--files", "x")
    settings.pop("as_json")
    assert Settings(**settings) == Settings(name="a", files=("x",))
    assert not {"sizes", "limit"} & set(settings)


def test_the_help_is_the_first_sentence_with_the_default(call: Any) -> None:
    lines = [" ".join(line.strip("│ *").split()) for line in call("--help").output.splitlines()]
    assert "--name NAME A name that goes on. [required]" in lines
    assert "--steps N Steps, said again. [default: 3]" in lines
    assert "--rate X Rate. [default: 0.5]" in lines
    assert "--sizes N... Sizes. [default: (all)]" in lines
    assert "--files NAME... Files. [required]" in lines
    assert "--limit N Limit." in lines
    assert "--hidden" not in " ".join(lines)


@pytest.mark.parametrize("args", [(), ("--name", "a"), ("--name", "a", "--files", "x", "--sizes", "4", "four")])
def test_what_is_missing_or_no_number_is_refused(call: Any, args: tuple[str, ...]) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_tuple_without_words_shows_its_values() -> None:
    app = CommandGroup()

    @app.command()
    @options_from(Settings)
    def command(**settings: Any) -> None: ...

    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "[default: (4 8)]" in text
    assert "--hidden" in text
