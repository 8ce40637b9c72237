"""Convert LangChain's messages to ours: texts, and the documents in them wherever LangChain puts any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.documents import Document as LangChainDocument
from langchain_core.documents.base import BaseMedia
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from extemb_core.documents import TEXT_KEYS, Document
from extemb_core.errors import DocumentError

if TYPE_CHECKING:
    from extemb_core.frameworks.refs import Refs

_SILENT = {"reasoning", "tool_call", "tool_call_chunk", "invalid_tool_call", "tool_use", "thinking"}
_TEXTS = {"text", "input_text", "output_text"}

_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
}

Part = str | Document


def to_messages(messages: Iterable[BaseMessage], refs: Refs) -> list[dict[str, Any]]:
    """Return messages with "role" and "content", a list of texts and documents.

    Documents are found in `text-plain`, `document` and `search_result` blocks, in the artifact of a tool's message, and
    behind refs in text.

    Raises:
        DocumentError: A block holds what is no text, or a ref's document is not kept any more.
    """
    converted: list[dict[str, Any]] = []
    for message in messages:
        content: list[Part] = []
        for part in _parts(message):
            content += refs.find(part) if isinstance(part, str) else [part]
        converted.append({"role": _role(message), "content": content})
        if isinstance(message, AIMessage) and message.tool_calls:
            converted[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": call["name"], "arguments": call["args"]}}
                for call in message.tool_calls
            ]
    return converted


def to_documents(documents: Any) -> list[Document]:
    """Convert the value of `documents=`: one document or several, of LangChain or ours, dicts or texts.

    Raises:
        DocumentError: It is none of these.
    """
    if documents is None:
        return []
    several = [documents] if isinstance(documents, str | Document | Mapping | BaseMedia) else documents
    if not isinstance(several, Iterable):
        raise DocumentError(f"documents is a {type(documents).__name__}; pass Documents, dicts or texts")
    return [_document(one) for one in several]


def _document(one: Any) -> Document:
    if isinstance(one, Mapping) and "data" in one and not any(key in one for key in TEXT_KEYS):
        one = {**one, "text": _text_of(one["data"])}  # the shape of Cohere: {"id": ..., "data": ...}
        del one["data"]
    return Document.from_any(one)


def _text_of(data: Any) -> Any:
    if isinstance(data, Mapping):  # fields of a document
        return "\n".join(f"{name}: {value}" if name not in ("text", "snippet") else str(value)
                         for name, value in data.items())  # fmt: skip
    return data


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise DocumentError(f"a {type(message).__name__} has no role that an LLM knows; pass it as one that has")


def _parts(message: BaseMessage) -> list[Part]:
    artifact = getattr(message, "artifact", None)
    if isinstance(artifact, Sequence) and artifact and all(isinstance(one, LangChainDocument) for one in artifact):
        # What the tool retrieved; the content is the same once more, as one text.
        parts: list[Part] = []
        for one in artifact:
            parts += ["\n\n", Document.from_any(one)] if parts else [Document.from_any(one)]
        return parts
    content = message.content
    if isinstance(content, str):
        return [content]
    return [part for block in content for part in _of_block(block)]


def _of_block(block: Any) -> list[Part]:
    if isinstance(block, str):
        return [block]
    kind = block.get("type")
    if kind in _SILENT:
        return []
    if kind in _TEXTS or (kind is None and isinstance(block.get("text"), str)):
        return [str(block.get("text", ""))]
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
    return Document(text, title=title if isinstance(title, str) else None, metadata=metadata)
