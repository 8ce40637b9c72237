"""Convert LlamaIndex's chat messages to ours: texts, and the documents in them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    MessageRole,
    TextBlock,
)
from pydantic import BaseModel

from extemb_core.documents import Document, without_lone_surrogates
from extemb_core.errors import DocumentError
from extemb_core.loaders import read_document

if TYPE_CHECKING:
    from extemb_core.frameworks.refs import Refs

logger = logging.getLogger(__name__)

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.FUNCTION: "tool",
}
_SILENT = {"cache", "thinking", "tool_call"}  # by name: not all versions have the classes


def to_messages(messages: Iterable[ChatMessage], refs: Refs) -> list[dict[str, Any]]:
    """Return messages with "role", "content", a list of texts and documents, and "tool_calls" where there are any.

    Raises:
        DocumentError: A block holds something else than text, unless the message is the assistant's; or a ref's
            document is not kept any more.
    """
    converted: list[dict[str, Any]] = []
    for message in messages:
        role = _ROLES.get(message.role, message.role.value)
        content = [part for block in message.blocks for part in _parts(block, refs, lenient=role == "assistant")]
        converted.append({"role": role, "content": content})
        if calls := _calls(message):
            converted[-1]["tool_calls"] = [
                {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
            ]
    return converted


def _calls(message: ChatMessage) -> list[tuple[str, Any]]:
    """Return name and arguments of each call: from blocks, or from where LlamaIndex 0.13 and some LLMs keep calls."""
    calls = [(block.tool_name, block.tool_kwargs) for block in message.blocks if block.block_type == "tool_call"]
    if calls:
        return calls
    for call in message.additional_kwargs.get("tool_calls") or ():
        fields = call.model_dump() if isinstance(call, BaseModel) else call
        function = fields.get("function", fields) if isinstance(fields, Mapping) else {}
        if isinstance(function, Mapping) and function.get("name"):  # OpenAI's form, or Anthropic's, which has "input"
            calls.append((str(function["name"]), function.get("arguments", function.get("input", {}))))
        else:
            logger.debug("a call of type %s in the assistant's turn is left out", type(call).__name__)
    return calls


def _parts(block: Any, refs: Refs, *, lenient: bool) -> list[str | Document]:
    if isinstance(block, TextBlock):
        return refs.find(block.text)
    if block.block_type in _SILENT:
        return []
    if isinstance(block, CitableBlock):
        texts = [_text_of(one) for one in block.content]
        return [_document("\n".join(texts), block.title, block.source)]
    if isinstance(block, CitationBlock):
        return [_text_of(block.cited_content)]
    if isinstance(block, DocumentBlock):
        return [_document(_text_of(block), block.title, str(block.path or block.title))]
    if lenient:  # such as a picture that another model made
        logger.debug("a %s in the assistant's turn is left out", type(block).__name__)
        return []
    raise _no_text(block)


def _document(text: str, title: str | None, source: str | None) -> Document:
    return Document(text, title=title and without_lone_surrogates(title), metadata={"source": source})


def _text_of(block: Any) -> str:
    if isinstance(block, TextBlock):
        return without_lone_surrogates(block.text)
    if not isinstance(block, DocumentBlock):
        raise _no_text(block)
    if block.path is not None and block.data is None:
        return read_document(str(block.path)).text
    if block.data is None:
        raise DocumentError(f"the document {block.title!r} is a URL, and nothing is fetched; pass its text or a path")
    try:
        return str(block.resolve_document().read(), "utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"the document {block.title!r} ({block.document_mimetype}) is not UTF-8 text; pass path= for files of "
            "other formats"
        ) from error


def _no_text(block: Any) -> DocumentError:
    return DocumentError(
        f"a {type(block).__name__} holds no text that can be read here; pass text, document and citable blocks"
    )
