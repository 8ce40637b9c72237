"""Make docs/cli.md anew from the commands: `make docs`.

The text before the first heading and the notes below each table are written by hand, and are kept.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import typer.main

from extemb_core.cli.main import app
from extemb_core.cli.output import EXIT_CODES

PAGE = Path(__file__).parent / "cli.md"


def render(page: str) -> str:
    """Return the page as the commands are now, with the hand-written text of `page`."""
    introduction, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    notes = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        *_, below = re.split(r"^\|.*\|\n", body, flags=re.MULTILINE)
        notes[heading] = below.strip()
    root: Any = typer.main.get_command(app)
    codes = _table(("code", "meaning"), [(str(code.value), meaning) for code, meaning in EXIT_CODES.items()])
    generated = {"Exit codes": codes, "`extemb`": _describe(root)}
    generated |= {f"`extemb {name}`": _describe(command) for name, command in commands(root).items()}
    parts = [
        f"## {heading}\n\n{text}\n" + (f"\n{notes[heading]}\n" if notes.get(heading) else "")
        for heading, text in generated.items()
    ]
    return "\n".join([introduction.rstrip() + "\n", *parts])


def commands(group: Any) -> dict[str, Any]:
    """Find the commands by the words that call them; one that has its group's name comes before the others."""
    names: dict[str, Any] = {}
    for name, command in group.commands.items():
        subcommands = getattr(command, "commands", {name: command})
        names |= {name: subcommands[name]} if name in subcommands else {}
        names |= {f"{name} {inner}": subcommand for inner, subcommand in subcommands.items() if inner != name}
    return {name: command for name, command in names.items() if not command.hidden}


def _describe(command: Any) -> str:
    """Return what a command's own help says: its text, its arguments and a table of its options."""
    params = [param for param in command.params if param.name != "help"]
    arguments = [f"`{param.metavar}`: {param.help}" for param in params if not param.opts[0].startswith("-")]
    rows = [(_names(param), param.help, _default(param)) for param in params if param.opts[0].startswith("-")]
    text = inspect.cleandoc(command.help)
    return "\n\n".join([text, *arguments, _table(("option", "meaning", "default"), rows)])


def _names(option: Any) -> str:
    names = [f"`{name}`" for name in (*option.opts, *option.secondary_opts)]
    return " or ".join(names) if option.is_flag else f"`{option.opts[0]} {option.metavar}`"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default
    if option.is_flag:
        chosen = option.opts if option.default else option.secondary_opts
        return f"`{chosen[0]}`" if option.secondary_opts else ""
    return "" if option.default is None else f"`{option.default}`"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    head, *lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (columns, *rows))
    return "\n".join([head, "|" + "---|" * len(columns), *lines])


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
