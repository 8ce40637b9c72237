"""Convert LangChain's messages to ours: texts, and documents, wherever LangChain puts them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.documents.base import BaseMedia
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from extemb_core.context.tools import CLOSE, OPEN
from extemb_core.documents import TEXT_KEYS, Document, several, without_lone_surrogates
from extemb_core.errors import DocumentError
from extemb_core.utils.files import parse_json

if TYPE_CHECKING:
    from extemb_core.frameworks.refs import Refs

logger = logging.getLogger(__name__)

_TEXTS = {"text", "input_text", "output_text"}

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}

Part = str | Document


def to_messages(messages: Iterable[BaseMessage], refs: Refs) -> list[dict[str, Any]]:
    """Return messages with "role" and "content", a list of texts and documents.

    Documents are found in `text-plain`, `document` and `search_result` blocks, behind refs in text, and in a tool's
    message, if its text contains that of documents in its artifact.

    Raises:
        DocumentError: A block holds something else than text, unless the message is the assistant's; or a ref's
            document is not kept any more.
    """
    converted: list[dict[str, Any]] = []
    for message in messages:
        content: list[Part] = []
        for part in _parts(message):
            content += refs.find(part) if isinstance(part, str) else [part]
        converted.append({"role": _role(message), "content": content})
        if isinstance(message, AIMessage):
            for invalid in message.invalid_tool_calls:  # as the LLM wrote it
                written = filter(None, (invalid["name"], _as_written(invalid["args"])))
                content.append(f"\n{OPEN}\n{' '.join(written)}\n{CLOSE}")
        if isinstance(message, AIMessage) and message.tool_calls:
            converted[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
                for call in message.tool_calls
            ]
    return converted


def _as_written(arguments: str | None) -> str | None:
    """Return the text that an LLM wrote instead of a valid call; our streams pass it on as a JSON string."""
    with suppress(ValueError):
        whole = parse_json(arguments or "")
        return whole if isinstance(whole, str) else arguments
    return arguments


def to_documents(documents: Any) -> list[Document]:
    """Convert the value of `documents=`: one document or several, of LangChain or ours, dicts or texts.

    Raises:
        DocumentError: The value is none of these.
    """
    if documents is None:
        return []
    return [_document(one) for one in ([documents] if isinstance(documents, BaseMedia) else several(documents))]


def _document(one: Any) -> Document:
    if isinstance(one, Mapping) and "data" in one and not any(key in one for key in TEXT_KEYS):
        one = {**one, "text": _text_of(one["data"])}  # Cohere's form: {"id": ..., "data": ...}
        del one["data"]
    return Document.from_any(one, lenient=True)


def _text_of(data: Any) -> Any:
    if isinstance(data, Mapping):  # fields of a document
        return "\n".join(f"{name}: {value}" if name not in ("text", "snippet") else str(value)
                         for name, value in data.items() if value is not None)  # fmt: skip
    return data


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise DocumentError(f"a {type(message).__name__} has no role that an LLM knows; pass it as one that has")


def _parts(message: BaseMessage) -> list[Part]:
    content = message.content
    blocks = [content] if isinstance(content, str) else content
    # Other blocks in the assistant's turns come from other models: reasoning, refusals, calls on a server.
    parts = [part for block in blocks for part in _of_block(block, lenient=isinstance(message, AIMessage))]
    parts = [without_lone_surrogates(part) if isinstance(part, str) else part for part in parts]
    documents = list(_retrieved(getattr(message, "artifact", None)))
    if not documents:
        return parts
    return [piece for part in parts for piece in (_replaced(part, documents) if isinstance(part, str) else [part])]


def _retrieved(artifact: Any) -> Iterator[Document]:
    """Yield the documents of a tool's artifact; restored from a checkpoint, they are mappings."""
    for item in artifact if isinstance(artifact, Sequence) and not isinstance(artifact, str | bytes) else [artifact]:
        # The object, its form in a checkpoint, or that of langchain_core.load.dumpd.
        fields = item.get("kwargs", item) if isinstance(item, Mapping) else None
        if isinstance(item, LangChainDocument):
            yield _document(item)
        elif isinstance(fields, Mapping) and isinstance(fields.get("page_content"), str):
            yield _document(fields)


def _replaced(text: str, documents: Sequence[Document]) -> list[Part]:
    """Replace the text of each document by the document, once each, longest first; other text of the tool stays."""
    parts: list[Part] = [text]
    with_text = [document for document in documents if document.text.strip()]
    for document in sorted(with_text, key=lambda document: -len(document.text)):
        pattern = re.compile(rf"(?<!\w){re.escape(document.text.strip())}(?!\w)")
        for at, part in enumerate(parts):
            if isinstance(part, str) and (match := pattern.search(part)):
                parts[at : at + 1] = [part[: match.start()], document, part[match.end() :]]
                break
    return [part for part in parts if part]


def _of_block(block: Any, *, lenient: bool = False) -> list[Part]:
    """Return the texts and documents of a content block; if `lenient`, none for an unknown block."""
    if isinstance(block, str):
        return [block]
    kind = block.get("type")
    text = block.get("text", "" if kind in _TEXTS else None)
    if isinstance(text, str) and (kind is None or kind in _TEXTS):
        return [text]
    if text is None and kind in _TEXTS:  # as other models leave it beside a call
        return []
    if kind == "text-plain" and isinstance(block.get("text"), str):
        return [_titled(block["text"], block)]
    if kind == "document":
        source = block.get("source")
        if isinstance(source, Mapping) and source.get("type") == "text":
            return [_titled(source.get("data"), block)]
        if isinstance(source, Mapping) and source.get("type") == "content":
            return [_titled(_joined(source.get("content")), block)]
    if kind == "search_result":
        return [_titled(_joined(block.get("content")), block)]
    if lenient:
        logger.debug("a content block of type %r in the assistant's turn is left out", kind)
        return []
    raise DocumentError(
        f"a content block of type {kind!r} holds no text that can be read here; pass text, text-plain, document (of "
        "text) and search_result blocks"
    )


def _joined(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = [part for block in content or () for part in _of_block(block)]
    return "\n".join(part if isinstance(part, str) else part.text for part in parts)


def _titled(text: Any, block: Mapping[str, Any]) -> Document:
    source = block.get("source")
    metadata = {"source": source} if isinstance(source, str) else {}
    title = block.get("title")
    return _document({"text": text, "title": title if isinstance(title, str) else None, "metadata": metadata})
