"""Make docs/cli.md anew from the commands, and docs/settings.md from the docstrings of what takes them: `make docs`.

The text before the first heading and the notes below each table are written by hand, and are kept.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main

import langchain_extemb
from extemb_core.cli.main import app
from extemb_core.cli.output import EXIT_CODES
from extemb_core.library.library import Library
from extemb_core.lm import ExtensibleLM
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.training.config import TrainingConfig
from llama_index.llms.extemb import ExtensibleLLM as LlamaIndexLLM
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor, ExtensibleTransform

DOCS = Path(__file__).parent
_TAKE_SETTINGS = {
    "`ExtensibleLM.from_pretrained`": ExtensibleLM.from_pretrained,
    "`ExtensibleLM.ask`": ExtensibleLM.ask,
    "`Library`": Library,
    "`Library.ask`": Library.ask,
    "`ChatExtensible` and `ExtensibleLLM` (LangChain)": langchain_extemb.ChatExtensible,
    "`ExtensibleCompressor` (LangChain)": langchain_extemb.ExtensibleCompressor,
    "`ExtensibleRetriever` (LangChain)": langchain_extemb.ExtensibleRetriever,
    "`ExtensibleLLM` (LlamaIndex)": LlamaIndexLLM,
    "`ExtensibleEmbeddingPostprocessor` (LlamaIndex)": ExtensibleEmbeddingPostprocessor,
    "`ExtensibleTransform` (LlamaIndex)": ExtensibleTransform,
    "`ExtensibleEmbedderConfig`": ExtensibleEmbedderConfig,
    "`TrainingConfig`": TrainingConfig,
}


def render_cli(page: str) -> str:
    """Return docs/cli.md as the commands are now, with the hand-written text of `page`."""
    root: Any = typer.main.get_command(app)
    codes = _table(("code", "meaning"), [(str(code.value), meaning) for code, meaning in EXIT_CODES.items()])
    sections = {"Exit codes": codes, "`extemb`": _describe(root)}
    sections |= {f"`extemb {name}`": _describe(command) for name, command in commands(root).items()}
    return _render(page, sections)


def render_settings(page: str) -> str:
    """Return docs/settings.md as the docstrings are now, with the hand-written text of `page`."""
    sections = {}
    for heading, thing in _TAKE_SETTINGS.items():
        summary, *_ = inspect.cleandoc(thing.__doc__).split("\n\n")
        rows = [(f"`{name}`", text, default) for name, text, default in settings(thing)]
        sections[heading] = summary + "\n\n" + _table(("setting", "meaning", "default"), rows)
    return _render(page, sections)


def _render(page: str, generated: Mapping[str, str]) -> str:
    introduction, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    notes = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        *_, below = re.split(r"^\|.*\|\n", body, flags=re.MULTILINE)
        notes[heading] = below.strip()
    parts = [
        f"## {heading}\n\n{text}\n" + (f"\n{notes[heading]}\n" if notes.get(heading) else "")
        for heading, text in generated.items()
    ]
    return "\n".join([introduction.rstrip() + "\n", *parts])


def settings(thing: Any) -> Iterator[tuple[str, str, str]]:
    """Yield the name, the meaning and the default of what a function takes, or a class."""
    if fields := getattr(thing, "model_fields", None):  # a pydantic model says what a field means below it
        texts = {name: text for base in reversed(thing.__mro__) for name, text in _attribute_docstrings(base)}
        for name, text in texts.items():
            if not fields[name].exclude:
                yield name, text, "required" if fields[name].is_required() else f"`{fields[name].default!r}`"
        return
    factories = {name: field.default_factory for name, field in getattr(thing, "__dataclass_fields__", {}).items()}
    parameters = {str(parameter).split(":")[0]: parameter for parameter in inspect.signature(thing).parameters.values()}
    for name, text in _documented(thing.__doc__):
        parameter = parameters[name]
        default = factories[name]() if callable(factories.get(name)) else parameter.default
        needed = default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        yield name, text, "required" if needed else "" if default is parameter.empty else f"`{default!r}`"


def _documented(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield names and texts of the `Args:` or `Attributes:` of a docstring."""
    listed = re.split(r"\n(?:Args|Attributes):\n", inspect.cleandoc(docstring) + "\n")[-1].split("\n\n")[0]
    for name, text in re.findall(r"^ {4}([*\w]+): (.+(?:\n {8}.+)*)", listed, flags=re.MULTILINE):
        yield name, " ".join(text.split())


def _attribute_docstrings(model: type) -> Iterator[tuple[str, str]]:
    if "extemb" not in model.__module__:  # a framework's own
        return
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    for statement, after in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            if not statement.target.id.startswith("_"):
                yield statement.target.id, " ".join(text.split())


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
    for name, render in (("cli.md", render_cli), ("settings.md", render_settings)):
        page = DOCS / name
        page.write_text(render(page.read_text(encoding="utf-8")), encoding="utf-8")
