"""Chat messages with documents in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from extemb_core.context.assembly import Slot
from extemb_core.documents import Document
from extemb_core.errors import ConfigError
from extemb_core.utils.validation import require_text

Messages = Sequence[Mapping[str, Any]]
"""Each with "role" and "content": a text, or a list of texts, embeddings and `Document`s."""


def as_messages(question: str | Messages) -> Messages:
    """Convert a question to messages; messages stay as they are.

    Raises:
        ConfigError: The question is empty, or something in it is not a message.
    """
    if isinstance(question, str):
        require_text(question, "question")
        return [{"role": "user", "content": question}]
    if isinstance(question, Mapping) or not isinstance(question, Iterable):
        raise ConfigError(f"{question!r:.80} is no list of messages; pass a question, or messages in a list")
    messages = list(question)
    if not messages:
        raise ConfigError("there are no messages; pass at least one of role user")
    for message in messages:
        if not isinstance(message, Mapping):
            raise ConfigError(
                f"a message is {message!r:.80}; pass mappings, such as {{'role': 'user', 'content': 'Why?'}}"
            )
    return messages


def content_parts(message: Mapping[str, Any]) -> list[Any]:
    """List the parts of a message's content."""
    content = message.get("content")
    return [content] if isinstance(content, str) else list(content or ())


def inline_documents(messages: Messages) -> list[Document]:
    """List the documents inside messages, in order."""
    return [part for message in messages for part in content_parts(message) if isinstance(part, Document)]


def question_in(messages: Messages) -> str:
    """Return what is asked: the texts of the last two user messages, in order."""
    users = [message for message in messages if message.get("role") == "user"]
    return "\n".join(part for message in users[-2:] for part in content_parts(message) if isinstance(part, str))


def with_slots(messages: Messages, joined: Sequence[Document] = ()) -> list[dict[str, Any]]:
    """Replace documents by slots, and put those of `joined` before the content of the last user message.

    Slots are numbered as documents are ranked: those of `joined` first, then those inside messages in order.

    Raises:
        ConfigError: There are documents to join, but no user message.
    """
    last = max((at for at, message in enumerate(messages) if message.get("role") == "user"), default=None)
    if joined and last is None:
        raise ConfigError("documents join the last user message, and there is none; add one")
    numbers = itertools.count()
    joined_slots = [Slot(next(numbers), document) for document in joined]
    slotted: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        content = message.get("content")
        before = joined_slots if at == last else []
        if isinstance(content, Sequence) and (before or not isinstance(content, str)):
            parts = content_parts(message)
            content = [*before, *(Slot(next(numbers), part) if isinstance(part, Document) else part for part in parts)]
        slotted.append({**message, "content": content})
    return slotted
