"""From chat messages with documents in them to what the LLM reads: token ids and embeddings in one row.

The model's own chat template is rendered with placeholders where embeddings go, then split at them. So a prompt
without embeddings is, id for id, what the tokenizer's template gives. Control tokens inside users' and documents'
text get placeholders too, and are put back as the ids of their characters: data, never obeyed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.tools import require_tools, written_call
from extemb_core.documents import Document, valid_texts
from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.entry import AnchoredPrompt, AnchoredStates, PromptInputs
from extemb_core.models.llm import LLM

Segment = np.ndarray[Any, Any] | Tensor | AnchoredStates
Part = str | Segment

DOCUMENT_SEPARATOR = "\n\n"  # after each document of a message
_CUT = np.empty(0, dtype=np.int32)  # empty: the texts on its two sides are tokenised separately
# A placeholder's number stands between two private-use characters; the first that no text contains is taken.
_FENCES = [chr(point) for point in range(0xF0000, 0xF0100)]


@dataclass(frozen=True)
class Slot:
    """Place of a document in a prompt, and the number by which it is filled."""

    number: int
    document: Document

    def __len__(self) -> int:
        return len(self.document.text)


@dataclass(frozen=True)
class Prompt:
    """Segments in reading order: (T,) integer ids, or extensible embeddings: (N, D), or states with their anchors."""

    segments: tuple[Segment, ...]

    def __len__(self) -> int:
        """Return the positions it takes in the LLM's window."""
        return sum(len(segment) for segment in self.segments)

    @property
    def text_only(self) -> bool:
        return all(isinstance(segment, np.ndarray) for segment in self.segments)

    def inputs(self, llm: LLM) -> PromptInputs:
        """Return what an `LLM` reads: ids if there is only text, else (T, D) embeddings, or ids with states.

        Raises:
            MismatchError: An anchor is a control token or not a token, which cannot come from text; or the prompt holds
                embeddings of several entry layers.
        """
        if self.text_only:
            return [int(index) for segment in self.segments for index in segment]  # type: ignore[union-attr]
        if any(isinstance(segment, Tensor) for segment in self.segments):
            return self.embeddings(llm)
        size = int(llm.model.get_input_embeddings().num_embeddings)
        for anchors in (segment.anchors for segment in self.segments if isinstance(segment, AnchoredStates)):
            wrong = np.isin(anchors, llm.control_ids) | (anchors < 0) | (anchors >= size)
            if wrong.any():
                raise MismatchError(
                    f"anchor {anchors[wrong][0]} is a control token of {llm.name} or none of its tokens, which no text "
                    "of documents becomes; compress the document again"
                )
        segments: Any = self.segments
        return AnchoredPrompt.of(segments, llm.hidden_size, llm.device, llm.dtype)

    def embeddings(self, llm: LLM) -> Tensor:
        """Return (T, D) in the LLM's dtype and device, for entry layer 0; positions are contiguous from 0.

        Raises:
            MismatchError: A segment enters at a later layer.
        """
        if any(isinstance(segment, AnchoredStates) for segment in self.segments):
            raise MismatchError(
                "states for an entry layer above 0 stand in a prompt that is read from layer 0; compress its documents "
                "with one embedder, and hand the LLM Prompt.inputs"
            )
        pieces = [
            segment.to(llm.device, llm.dtype) if isinstance(segment, Tensor) else llm.embed(segment)  # type: ignore[arg-type]
            for segment in self.segments
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, llm.hidden_size, device=llm.device, dtype=llm.dtype)


def document_heading(index: int, title: str | None = None) -> str:
    """Return the heading of document number `index`, from 0; line breaks in the title become spaces."""
    return f"[{index + 1}] {' '.join((title or '').split()) or 'Document'}\n"


def assemble_chat(llm: LLM, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Prompt:
    """Render messages without documents through the LLM's chat template; see `render_chat`."""
    return render_chat(llm, messages, **settings).fill({})


def render_chat(
    llm: LLM,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    assistant_prefix: str = "",
) -> ChatPrompt:
    """Render messages through the LLM's chat template.

    Args:
        llm: LLM whose template and tokenizer are used.
        messages: Each with "role" and "content": a str, or a sequence of str, (T,) token ids, embeddings (see `Prompt`)
            and `Slot`s. An assistant's may have "tool_calls": [{"function": {"name": ..., "arguments": {...}}}], which
            become text if the template has no place for them or refuses them. If it refuses the order of the roles,
            neighbouring messages of one role are joined, and an empty user turn is put before an assistant's that
            comes first; if it refuses a system message, that is put before the user's first text.
        tools: Functions in OpenAI's form, for templates that have a place for them.
        assistant_prefix: Text that begins the assistant's turn; the prompt ends with it. Its control tokens
            are obeyed, except those in the name of a tool.

    Raises:
        ConfigError: A message does not have that form, or the template refuses or drops it.
    """
    if tools:
        require_tools(llm)
    refused: _RefusedError | None = None
    for form in _forms(llm, [{**message, "content": _checked_content(message)} for message in messages]):
        try:
            return _rendered(llm, form, tools, assistant_prefix)
        except _RefusedError as error:  # noqa: PERF203 - one more form is the exception
            refused = refused or error
    raise ConfigError(str(refused)) from refused


class _RefusedError(Exception):
    """A chat template refuses messages."""


def _forms(llm: LLM, messages: Sequence[Mapping[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages, with checked content, in the forms that a template might accept, best first."""
    # A template may ask only whether a field is there, not what is in it.
    plain = [{name: message[name] for name in message if name != "tool_calls" or message[name]} for message in messages]
    forms = [plain] if "tool_calls" in (llm.tokenizer.chat_template or "") else []
    if not forms or any("tool_calls" in message for message in plain):
        forms.append([_with_written_calls(message) for message in plain])
    yield from forms
    in_turn = [turns for form in forms if _roles(turns := _in_turn(form)) != _roles(form)]
    yield from in_turn
    if messages and messages[0]["role"] == "system":
        for form in [*forms, *in_turn]:
            yield _with_system_in_turn(form)


def _in_turn(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which user and assistant alternate, the user first, after the system's."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant" and all(turn["role"] == "system" for turn in turns):
            turns.append({"role": "user", "content": []})
        before = turns[-1] if turns else {"role": None}
        if message["role"] == before["role"] != "tool" and "tool_calls" not in before:
            turns[-1] = {**before, **message, "content": _joined([before, message])}
        else:
            turns.append(message)
    return turns


def _with_system_in_turn(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in which the system's text stands in the user's first turn, before the user's text."""
    first = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    end = first + 1 if _roles(messages[first : first + 1]) == ["user"] else first
    return [{"role": "user", "content": _joined(messages[:end])}, *messages[end:]]


def _roles(messages: Sequence[dict[str, Any]]) -> list[str]:
    return [message["role"] for message in messages]


def _joined(messages: Sequence[dict[str, Any]]) -> list[Part | Slot]:
    """Join the contents of messages, with blank lines between them."""
    return [part for message in messages if message["content"] for part in ("\n\n", *message["content"])][1:]


def _with_written_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with its calls as text, as an LLM writes them."""
    others = {name: message[name] for name in message if name != "tool_calls"}
    return {**others, "content": [*message["content"], *map(written_call, message.get("tool_calls", ()))]}


def _rendered(
    llm: LLM, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], assistant_prefix: str
) -> ChatPrompt:
    """Render messages of checked content."""
    contents = [message["content"] for message in messages]
    # A template may show any field of a message: names, calls, reasoning. Roles are what it compares.
    fields = [
        {name: valid_texts(message[name]) for name in message if name not in ("role", "content")}
        for message in messages
    ]
    placeholders = _Placeholders(llm, [*contents, [*_texts_in([fields, tools]), assistant_prefix]])
    for role in (message["role"] for message in messages):
        if placeholders.mark(role) != role:
            raise ConfigError(
                f"role={role!r} holds a control token of {llm.name}; pass system, user, assistant or tool"
            )
    plain: list[dict[str, Any]] = [
        {"role": message["role"], "content": placeholders.mark_all(parts)}
        for message, parts in zip(messages, contents, strict=True)
    ]
    n_required = len(placeholders.parts)
    plain = [{**message, **placeholders.mark_within(others)} for message, others in zip(plain, fields, strict=True)]
    rendered = _render(llm, plain, placeholders.mark_within(list(tools)))
    numbers = set(map(int, rendered.split(placeholders.fence)[1::2]))
    if any(len(placeholders.parts[number]) for number in range(n_required) if number not in numbers):
        raise ConfigError(
            f"the chat template of {llm.name} left out part of a message; "
            "check the order of the roles (system, then user and assistant in turn)"
        )
    for name in {json.dumps(text) for text in _texts_in(tools)}:  # as `prefix_of_call` writes one; the rest is obeyed
        if name in assistant_prefix:
            assistant_prefix = assistant_prefix.replace(name, placeholders.mark(name))
    return ChatPrompt(llm, placeholders, rendered + assistant_prefix)


class ChatPrompt:
    """Messages rendered once through a chat template, with slots for documents that can be filled repeatedly."""

    def __init__(self, llm: LLM, placeholders: _Placeholders, rendered: str) -> None:
        self._llm = llm
        self._encode = cache(llm.encode_template)  # tokenises each piece of the template once
        self._placeholders = placeholders
        self._rendered = rendered

    @cached_property
    def n_around(self) -> int:
        """Positions of everything around the slots, tokenised as if embeddings stood in them."""
        slots = [part for part in self._placeholders.parts if isinstance(part, Slot) and len(part)]
        return len(self.fill({slot.number: [_CUT] for slot in slots}))

    def fill_within(self, contents: Mapping[int, Sequence[Part]], room: int) -> Prompt:
        """Fill the slots as `fill` does, in `room` positions.

        If text merges with its surroundings into more tokens than `room` holds, it is tokenised separately.
        """
        prompt = self.fill(contents)
        if len(prompt) <= self.n_around + room:
            return prompt
        cut = {
            number: [_CUT, *(self._llm.encode(part) if isinstance(part, str) else part for part in parts)]
            for number, parts in contents.items()
        }
        return min(prompt, self.fill(cut), key=len)

    def fill(self, contents: Mapping[int, Sequence[Part]]) -> Prompt:
        """Put each slot's content, by its number, in its place; a slot without one is empty."""
        fence, parts = self._placeholders.fence, self._placeholders.parts
        pieces, edges, end = self._rendered.split(fence), set(), 0
        for at, piece in enumerate(pieces):
            if at % 2:  # every second piece is a placeholder's number
                part = parts[int(piece)]
                if isinstance(part, Slot):
                    pieces[at] = self._placeholders.mark_all(contents.get(part.number, ()))
                    edges |= {end, end + len(pieces[at])}
                else:
                    pieces[at] = f"{fence}{piece}{fence}"
            end += len(pieces[at])
        segments: list[Segment] = []
        for at, piece in enumerate(self._placeholders.mark_across(edges, "".join(pieces)).split(fence)):
            if at % 2:
                segments.append(self._placeholders.parts[int(piece)])  # type: ignore[arg-type]
            elif piece:
                segments.append(np.array(self._encode(piece), dtype=np.int32))
        return Prompt(tuple(segment for segment in segments if len(segment)))


def assemble_text(llm: LLM, parts: Sequence[Part]) -> Prompt:
    """Assemble a plain prompt, no chat template: the LLM's BOS if it has one, then the parts in order, text as data."""
    start: list[Segment] = [np.array([llm.bos_token_id])] if llm.bos_token_id is not None else []
    rest = [llm.encode(part) if isinstance(part, str) else part for part in parts]
    return Prompt(tuple(segment for segment in start + rest if len(segment)))


class _Placeholders:
    """Replaces by numbered placeholders what does not pass through the template as text.

    Attributes:
        fence: Character before and after each number.
        parts: Contents that the numbers stand for, in order.
    """

    def __init__(self, llm: LLM, contents: Sequence[Sequence[Part | Slot]]) -> None:
        parts = [part.document if isinstance(part, Slot) else part for content in contents for part in content]
        texts = [text for part in parts if isinstance(part, Document) for text in (part.text, part.title or "")]
        texts += [part for part in parts if isinstance(part, str)]
        self.fence = next((fence for fence in _FENCES if not any(fence in text for text in texts)), _FENCES[0])
        self.parts: list[Segment | Slot] = []
        self._llm = llm
        # The fence is escaped too, in case the texts hold every character that it could be.
        tokens = sorted([*llm.control_tokens, self.fence], key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens)))

    def mark(self, text: str) -> str:
        """Replace the control tokens in a text by placeholders."""
        return self._control.sub(self._as_data, text)

    def mark_all(self, parts: Sequence[Part | Slot]) -> str:
        """Join parts, with placeholders for all but text and for control tokens, also those that span two texts."""
        return "".join(
            self.mark("".join(run)) if texts else "".join(map(self._number, run))  # type: ignore[arg-type]
            for texts, run in itertools.groupby(parts, lambda part: isinstance(part, str))
        )

    def mark_across(self, edges: Set[int], text: str) -> str:
        """Replace the control tokens that span one of the edges by placeholders; the others are the template's own."""
        return self._control.sub(
            lambda match: match[0] if edges.isdisjoint(range(match.start() + 1, match.end())) else self._as_data(match),
            text,
        )

    def mark_within(self, value: Any) -> Any:
        """Apply `mark` to every text in nested lists and mappings."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark_within(key): self.mark_within(item) for key, item in value.items()}
        return [self.mark_within(item) for item in value] if isinstance(value, list | tuple) else value

    def _as_data(self, match: re.Match[str]) -> str:
        return self._number(self._llm.encode(match[0]))

    def _number(self, part: Segment | Slot) -> str:
        self.parts.append(part)
        return f"{self.fence}{len(self.parts) - 1}{self.fence}"


def _checked_content(message: Mapping[str, Any]) -> list[Part | Slot]:
    role, content = message.get("role"), message.get("content")
    parts = [content] if isinstance(content, str) else content
    if not isinstance(role, str) or not isinstance(parts, Sequence):
        raise ConfigError(f"a message is {dict(message)!r:.80}; it must have a role and a content of text")
    for part in parts:
        if not isinstance(part, str | np.ndarray | Tensor | AnchoredStates | Slot):
            raise ConfigError(f"a message's content holds a {type(part).__name__}; pass str, token ids or embeddings")
    return list(parts)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in itertools.chain(*value.items()) if isinstance(value, Mapping) else value:
            yield from _texts_in(item)


def _render(llm: LLM, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    if not llm.tokenizer.chat_template:  # a base model: the contents alone
        bos = str(llm.tokenizer.decode([llm.bos_token_id])) if llm.bos_token_id is not None else ""
        return bos + "".join(f"{message['content']}\n\n" for message in messages)
    import jinja2

    try:
        rendered = llm.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise _RefusedError(
            f"the chat template of {llm.name} refuses these messages: {error}; pass them in an order that it takes"
        ) from error
    return str(rendered)
