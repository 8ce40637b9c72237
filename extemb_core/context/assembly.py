"""From chat messages with documents in them to what the LLM reads: token ids and embeddings in one row.

The model's own chat template is rendered with placeholders where embeddings go, then split at them. So a prompt
without embeddings is, id for id, what the tokenizer's template gives. Control tokens inside users' and documents'
text get placeholders too, and are put back as the ids of their characters: data, never obeyed.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.tools import require_tools
from extemb_core.documents import Document
from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.entry import AnchoredPrompt, AnchoredStates, PromptInputs
from extemb_core.models.llm import LLM

Segment = np.ndarray[Any, Any] | Tensor | AnchoredStates
Part = str | Segment

DOCUMENT_SEPARATOR = "\n\n"  # after each document of a message
_FENCE = "\U000f0000{}\U000f0001"  # beside a placeholder's number; with digits that no text contains


@dataclass(frozen=True)
class Slot:
    """Where a document will stand in a prompt, and the number that it is filled by."""

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
            MismatchError: An anchor is a control token or none, which no text becomes; or embeddings of several entry
                layers stand in the prompt.
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
    """Return the line before document number `index`, from 0."""
    return f"[{index + 1}] {title or 'Document'}\n"


def assemble_chat(llm: LLM, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Prompt:
    """Render messages without documents through the LLM's chat template; see `render_chat`."""
    return render_chat(llm, messages, **settings).fill({})


def render_chat(
    llm: LLM,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] = (),
    assistant_prefix: str = "",
) -> ChatPrompt:
    """Render messages through the LLM's chat template.

    Args:
        llm: Whose template and tokenizer are used.
        messages: Each with "role" and "content": a str, or a sequence of str, (T,) token ids, embeddings (see `Prompt`)
            and `Slot`s. An assistant's may have "tool_calls": [{"function": {"name": ..., "arguments": {...}}}].
        add_generation_prompt: End with the opening of the assistant's turn.
        tools: Functions in OpenAI's form, for templates that have a place for them.
        assistant_prefix: What the assistant's turn begins with.

    Raises:
        ConfigError: A message is not of that form, or the template refuses or drops it.
    """
    contents = [_checked_content(message) for message in messages]
    if tools:
        require_tools(llm)
    called = [message.get("tool_calls", []) for message in messages]
    placeholders = _Placeholders(llm, [*contents, list(_texts_in([called, tools]))])
    plain = [
        {**message, "content": "".join(map(placeholders.mark, parts))}
        for message, parts in zip(messages, contents, strict=True)
    ]
    for message, calls in zip(plain, called, strict=True):
        if calls:
            message["tool_calls"] = placeholders.mark_within(calls)
    rendered = _render(llm, plain, add_generation_prompt, placeholders.mark_within(list(tools)))
    return ChatPrompt(llm, placeholders, rendered + assistant_prefix)


class ChatPrompt:
    """Messages that went through a chat template, with slots for documents: rendered once, filled as often as wanted.

    Raises:
        ConfigError: The template left out part of a message.
    """

    def __init__(self, llm: LLM, placeholders: _Placeholders, rendered: str) -> None:
        self._encode = cache(llm.encode_template)  # each of the template's pieces once
        self._placeholders = placeholders
        self._rendered = rendered
        numbers = set(map(int, rendered.split(placeholders.fence)[1::2]))
        if any(number not in numbers and len(part) for number, part in enumerate(placeholders.parts)):
            raise ConfigError(
                f"the chat template of {llm.name} left out part of a message; "
                "check the order of the roles (system, then user and assistant in turn)"
            )

    def fill(self, contents: Mapping[int, Sequence[Part]]) -> Prompt:
        """Put each slot's content, by its number, in its place; a slot without one is empty."""
        fence, parts = self._placeholders.fence, self._placeholders.parts
        pieces = self._rendered.split(fence)
        for at in range(1, len(pieces), 2):  # between two fences stands a number
            part = parts[int(pieces[at])]
            if isinstance(part, Slot):
                pieces[at] = "".join(map(self._placeholders.mark, contents.get(part.number, ())))
            else:
                pieces[at] = f"{fence}{pieces[at]}{fence}"
        segments: list[Segment] = []
        for at, piece in enumerate("".join(pieces).split(fence)):
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
    """Numbers what does not pass through the template as text.

    Attributes:
        fence: Stands before and after each number.
        parts: What the numbers stand for.
    """

    def __init__(self, llm: LLM, contents: Sequence[Sequence[Part | Slot]]) -> None:
        parts = [part.document if isinstance(part, Slot) else part for content in contents for part in content]
        texts = [text for part in parts if isinstance(part, Document) for text in (part.text, part.title or "")]
        texts += [part for part in parts if isinstance(part, str)]
        fences = (_FENCE.format(secrets.randbits(64)) for _ in itertools.count())
        self.fence = next(fence for fence in fences if not any(fence in text for text in texts))
        self.parts: list[Segment | Slot] = []
        self._llm = llm
        tokens = sorted(llm.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def mark(self, part: Part | Slot) -> str:
        """Put placeholders for what is no text, and for control tokens in what is."""
        if not isinstance(part, str):
            return self._number(part)
        if self._control is None:
            return part
        return self._control.sub(lambda match: self._number(self._llm.encode(match[0])), part)

    def mark_within(self, value: Any) -> Any:
        """Mark all texts in lists and mappings."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, Mapping):
            return {self.mark_within(key): self.mark_within(item) for key, item in value.items()}
        return [self.mark_within(item) for item in value] if isinstance(value, list | tuple) else value

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


def _render(llm: LLM, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: list[Any]) -> str:
    if not llm.tokenizer.chat_template:  # a base model: the contents alone
        bos = str(llm.tokenizer.decode([llm.bos_token_id])) if llm.bos_token_id is not None else ""
        return bos + "".join(f"{message['content']}\n\n" for message in messages)
    import jinja2

    try:
        rendered = llm.tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template of {llm.name} refuses these messages: {error}") from error
    return str(rendered)
