"""Make a command's options from a configuration, so that a setting's name, type, default and help are stated once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from extemb_core.cli.options import option, parse_whole_numbers

# Types that the command line shows differently.
_METAVARS = {
    **dict.fromkeys(("output", "store", "library"), "DIR"),
    **dict.fromkeys(("embedder", "start_from"), "PATH"),
    "ray_address": "ADDRESS",
    **dict.fromkeys(("data", "documents", "questions", "eval_data", "text", "counts"), "FILE..."),
}
_FLAGS = {"generate": "--generate/--loss-only", "one_per_text": "--one-per-text/--all-questions"}
_LETTERS = {int: "N", float: "X", str: "NAME"}


def options_from(
    config: type[Any], *names: str, panel: str | None = None, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's `**settings` by an option for each of these fields of a dataclass.

    Type and default are those of the field, and the help is the first sentence on it in the `Attributes:` of the
    docstring: for a new option, add the field and name it here. A tuple takes several values. Options that were not
    given and have the default None or () are left out of `settings`.

    Args:
        config: The dataclass. Its module is imported with the command line and must not import torch.
        names: Fields, in the order of the help, which lists required ones first; all fields when none is named.
        panel: Heading of the options in the help.
        **defaults: By field: `...` if the command requires it, or the words that the help shows for a default of None
            or (). The field's own `metadata` may hold these words too, as "default", and its "metavar".
    """
    hints, texts = get_type_hints(config), _read_field_docs(config)
    fields = {field.name: field for field in dataclasses.fields(config)}
    names = names or tuple(fields)
    types = {name: _item_type(hints[name]) for name in names}

    def parameter(name: str) -> inspect.Parameter:
        default, shown = fields[name].default, fields[name].metadata
        words = defaults.get(name, shown.get("default", True))
        item_type, takes_several = types[name]
        type_metavar = _LETTERS.get(item_type, "") + "..." * takes_several
        metavar = shown.get("metavar") or _METAVARS.get(name) or type_metavar or None
        annotation: Any = list[str] if takes_several else item_type
        if words is ... or default is dataclasses.MISSING:
            default, words = inspect.Parameter.empty, True
        elif default is None or takes_several:  # the help describes the default in words
            words = " ".join(map(str, default or ())) or True if words is True else words
            default, annotation = None, annotation | None
        annotation = Annotated[annotation, option(_flag(name), metavar, texts.get(name, ""), words, panel)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            for name in names:
                value, (item_type, takes_several) = values.pop(name), types[name]
                if takes_several:
                    words = tuple(value or ())
                    value = parse_whole_numbers(_flag(name), words) if item_type is int else words
                if value not in (None, ()):
                    values[name] = value
            command(**values)

        signature = inspect.signature(command, eval_str=True)
        others = [
            param.replace(kind=param.KEYWORD_ONLY)
            for param in signature.parameters.values()
            if param.kind is not param.VAR_KEYWORD
        ]
        parameters = sorted([*map(parameter, names), *others], key=lambda param: param.default is not param.empty)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _item_type(hint: Any) -> tuple[Any, bool]:
    """Return X of `X`, `X | None`, `tuple[X, ...]` or `tuple[X, ...] | None`, and whether it is in a tuple."""
    if type(None) in get_args(hint):
        (hint,) = (arg for arg in get_args(hint) if arg is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is tuple else (hint, False)


def _read_field_docs(config: type[Any]) -> dict[str, str]:
    """Read the first sentence on each field in the `Attributes:` of a class and of its base classes."""
    texts = {}
    for base in reversed(config.__mro__):
        attributes = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
        for name, text in re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", attributes, flags=re.MULTILINE):
            texts[name] = re.split(r"(?<=\.)\s", " ".join(text.split()))[0]
    return texts
