"""Tools, for chat templates that have a place for them: parse the calls that an LLM writes, and make it write one.

The form understood is that of Hermes and Qwen, `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extemb_core.documents import valid_texts
from extemb_core.errors import ConfigError
from extemb_core.utils.files import parse_json

if TYPE_CHECKING:
    from extemb_core.models.llm import LLM

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CLOSE = re.compile(rf"\s*(?:{CLOSE}|\Z)")
_ARGUMENTS = re.compile(r'\\?"arguments\\?"')  # found in templates whose calls are JSON; some LLMs use XML

Tool = Mapping[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A call that an LLM wrote. `arguments` is None if what it wrote, `text`, is not a valid call."""

    name: str
    arguments: Mapping[str, Any] | None
    text: str


def takes_tools(llm: LLM) -> bool:
    """Return whether an LLM's chat template has a place for tools, in the form that is understood here."""
    template = llm.tokenizer.chat_template or ""
    return "tools" in template and OPEN in template and _ARGUMENTS.search(template) is not None


def written_call(call: Tool) -> str:
    """Write a message's call as an LLM would write it."""
    return f"\n{OPEN}\n{json.dumps(valid_texts(call.get('function', call)), ensure_ascii=False)}\n{CLOSE}"


def require_tools(llm: LLM) -> None:
    """Check that an LLM's chat template has a place for tools.

    Raises:
        ConfigError: It has none.
    """
    if not takes_tools(llm):
        raise ConfigError(
            f"the chat template of {llm.name} has no place for tools in the form {OPEN}; take an LLM whose template "
            "has one, such as qwen2.5-coder-0.5b-instruct, or leave the tools out"
        )


def tool_name(choice: str | bool | Mapping[str, Any] | None) -> str | None:
    """Convert a tool choice, in any of the usual forms, to the one that `prefix_of_call` takes."""
    if isinstance(choice, Mapping):  # {"type": "function", "function": {"name": ...}}, {"type": "tool", "name": ...}
        function = choice.get("function", choice)
        return str((function.get("name") if isinstance(function, Mapping) else function) or choice.get("type"))
    return ("any" if choice else None) if isinstance(choice, bool) else choice


def prefix_of_call(tools: Sequence[Tool], choice: str | None) -> str:
    """Return the beginning of a turn that makes the LLM call a tool; empty if it is free not to.

    Args:
        tools: Functions in OpenAI's form.
        choice: The name of a tool, "any", "required", "auto", "none" or None.

    Raises:
        ConfigError: No tool has that name.
    """
    names = [str(tool["function"]["name"]) for tool in tools]
    if choice in (None, "auto", "none"):
        return ""
    if choice in ("any", "required") and names:
        choice = names[0] if len(names) == 1 else None
    elif choice not in names:
        known = ", ".join(names) or "of a call that has none"
        raise ConfigError(f"tool_choice={choice!r:.80} is none of the tools {known}; pass one of them, or 'any'")
    start = f'{OPEN}\n{{"name": '
    return start + (f'{json.dumps(choice)}, "arguments": ' if choice else '"')


def parse_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Split what an LLM wrote into text and calls, in order."""
    calls, rest, at = [], [], 0
    while (start := text.find(OPEN, at)) >= 0:
        rest.append(text[at:start])
        call, at = _whole_call(text, start + len(OPEN)) or _cut_call(text, start + len(OPEN))
        try:
            written = valid_texts(parse_json(call))  # an escape may be half of a surrogate pair
            name, arguments = written["name"], written.get("arguments", written.get("parameters", {}))
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise TypeError("a name and arguments belong there")
        except (ValueError, KeyError, TypeError, AttributeError):
            name, arguments = "", None
        calls.append(ToolCall(name, arguments, call))
    return "".join([*rest, text[at:]]).strip() if calls else text, calls


def _whole_call(text: str, start: int) -> tuple[str, int] | None:
    """Return the JSON that begins at `start`, and where its closing tag ends; a text inside may hold that tag too."""
    start += len(text[start:]) - len(text[start:].lstrip())
    with suppress(ValueError, RecursionError):
        end = json.JSONDecoder().raw_decode(text, start)[1]
        if (close := _CLOSE.match(text, end)) is not None:
            return text[start:end], close.end()
    return None


def _cut_call(text: str, start: int) -> tuple[str, int]:
    """Return the text from `start` to the nearest closing tag, or to the end, and where that ends."""
    end = text.find(CLOSE, start)
    return (text[start:].strip(), len(text)) if end < 0 else (text[start:end].strip(), end + len(CLOSE))
