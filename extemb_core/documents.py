"""A document: the text that is compressed, and what an answer cites as its source."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from extemb_core.errors import DocumentError

TEXT_KEYS = ("text", "page_content", "content")
"""Keys under which a dict may hold its text, in the order in which they are tried."""

_ACCEPTED = (
    f"pass a str, a Document, a dict with one of {', '.join(map(repr, TEXT_KEYS))}, or an object with .page_content, "
    ".get_content() or .text (for a file: read_document(path))"
)


_TEXT_ATTRIBUTES = ("page_content", "get_content", "text")  # an object with one of these is a single document
FILE_KEYS = ("file_path", "file_name", "url")
"""Keys of a LlamaIndex node's metadata that may name its file, in the order in which they are tried."""
REF_PREFIX = "ext:"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which is not a character
_MAX_PATH_CHARS = 256  # longer texts were not meant as a path

logger = logging.getLogger(__name__)


def text_ref(text: str) -> str:
    """Return `ext:` and 32 hex digits of the text's sha256: what names a document everywhere."""
    return REF_PREFIX + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def without_lone_surrogates(text: str) -> str:
    """Join surrogate pairs, and replace lone surrogates, which broken font tables of PDF files leave, by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def valid_texts(value: Any) -> Any:
    """Apply `without_lone_surrogates` to every text in nested lists and mappings."""
    if isinstance(value, str):
        return without_lone_surrogates(value)
    if isinstance(value, Mapping):
        return {valid_texts(key): valid_texts(item) for key, item in value.items()}
    return [valid_texts(item) for item in value] if isinstance(value, list | tuple) else value


def refuse_lone_surrogates(text: str, name: str = "text") -> None:
    """Raise `DocumentError` for a text that no tokenizer can read; `name` is what the error calls it."""
    if lone := LONE_SURROGATE.search(text):
        raise DocumentError(
            f"the {name} holds a lone surrogate (U+{ord(lone[0]):04X}) at character {lone.start()}, which is "
            "not valid Unicode; decode its bytes again with errors='replace'"
        )


@dataclass(frozen=True)
class Document:
    """Text with an optional title and metadata; two documents with equal text share one `ref`.

    Args:
        text: The content; may be empty (an empty document is reported, and takes no position).
        title: Title by which a reader would know it.
        metadata: Anything else worth keeping; `metadata["source"]` is what an answer cites.

    Raises:
        DocumentError: text or title is not a str, metadata not a mapping, or text or title holds a
            lone surrogate, which no tokenizer can read.

    >>> Document("A clerk was hired.", title="Clerks").source
    'Clerks'
    """

    text: str
    title: str | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Any] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise DocumentError(f"a document's text is a str, not a {type(self.text).__name__}; {_ACCEPTED}")
        if self.title is not None and not isinstance(self.title, str):
            raise DocumentError(f"title={self.title!r} is a {type(self.title).__name__}, not a str; pass a str or None")
        if not isinstance(self.metadata, Mapping):
            raise DocumentError(
                f"metadata={self.metadata!r} is a {type(self.metadata).__name__}, not a mapping; pass a dict"
            )
        for name, value in (("text", self.text), ("title", self.title or "")):
            refuse_lone_surrogates(value, name)
        # A copy: what the caller does to its dict later does not reach a frozen document.
        object.__setattr__(self, "metadata", dict(self.metadata))

    @cached_property
    def ref(self) -> str:
        """`ext:` and 32 hex digits of the sha256 of the text alone: all that the embeddings depend on."""
        return text_ref(self.text)

    @property
    def source(self) -> str:
        """Name to cite: `metadata["source"]`, else the title, else the ref."""
        return str(self.metadata.get("source") or self.title or self.ref)

    def page_of(self, character: int) -> int | None:
        """Return the page that a character of the text is on, from 1; None where the document's pages are not known.

        `metadata["page_starts"]` holds the character at which each page begins; a page without text begins where the
        next one does.
        """
        return bisect_right(self.metadata.get("page_starts", ()), character) or None

    @classmethod
    def from_any(cls, value: Any, *, lenient: bool = False) -> Document:
        """Make a document of what frameworks and callers hand over.

        Taken: a str; a Document (returned as it is); a dict with its text under one of `TEXT_KEYS`, an
        optional "title" and "metadata" (other keys join the metadata); an object with `.page_content`
        (LangChain), `.get_content()` (LlamaIndex) or `.text`, with its `.metadata`. Where no title is
        given, `metadata["title"]` is the title. A LlamaIndex node with neither a title nor a source cites its file.
        If `lenient`, lone surrogates are repaired (see `without_lone_surrogates`); otherwise they are an error.

        Raises:
            DocumentError: value is none of these, or its text is not a str.
        """
        if isinstance(value, Document):
            return value
        if isinstance(value, str):
            # Network shares are not looked for: that would contact the server.
            if len(value) < _MAX_PATH_CHARS and not value.startswith(("//", "\\\\")) and os.path.exists(value):
                logger.warning("the text %r is the name of a file; to read that, pass read_document(%r)", value, value)
            return cls(without_lone_surrogates(value) if lenient else value)
        title, metadata = None, getattr(value, "metadata", None)
        if isinstance(value, Mapping):
            key = next((key for key in TEXT_KEYS if key in value), None)
            if key is None:
                keys = ", ".join(map(repr, value)) or "none"
                raise DocumentError(f"a dict without text (its keys: {keys}) is not a document; {_ACCEPTED}")
            text, title, metadata = value[key], value.get("title"), value.get("metadata")
            if metadata is None or isinstance(metadata, Mapping):
                others = {name: item for name, item in value.items() if name not in (key, "title", "metadata")}
                metadata = {**others, **(metadata or {})}
        elif hasattr(value, "page_content"):
            text = value.page_content
        elif callable(getattr(value, "get_content", None)):
            text = value.get_content()
        elif hasattr(value, "text"):
            text = value.text
        else:
            pair = "of pairs with scores the first of each; " if isinstance(value, tuple) else ""
            raise DocumentError(f"a {type(value).__name__} is not a document; {pair}{_ACCEPTED}")
        metadata = {} if metadata is None else metadata
        if title is None and isinstance(metadata, Mapping) and isinstance(metadata.get("title"), str):
            title = metadata["title"]
        if not title and isinstance(metadata, Mapping) and (place := _place(value, metadata)):
            metadata = {**metadata, "source": place}
        if lenient:
            text, title = (without_lone_surrogates(p) if isinstance(p, str) else p for p in (text, title))
        return cls(text, title=title, metadata=metadata)


def _place(value: Any, metadata: Mapping[str, Any]) -> str:
    """Name the file, page and characters that a LlamaIndex node was made from; "" if unknown."""
    keys = FILE_KEYS if hasattr(value, "get_content") and not metadata.get("source") else ()
    named = next((str(metadata[key]) for key in keys if metadata.get(key)), "")
    if named and metadata.get("page_label"):
        named += f", page {metadata['page_label']}"
    node = getattr(value, "node", value)  # unwrap a node with a score
    start, stop = getattr(node, "start_char_idx", None), getattr(node, "end_char_idx", None)
    return f"{named}:{start}-{stop}" if named and start is not None else named


@dataclass(frozen=True)
class ReferencedDocument(Document):
    """A document found behind a ref in a framework's text.

    Attributes:
        finest: The finest ratio at which it may be read; None is no limit.
        spans: (start, stop, fidelity) in tokens, as planned for a question (see `context.planning.Span`); None if it
            is still to be planned.
    """

    finest: int | None = field(default=None, kw_only=True)
    spans: tuple[tuple[int, int, int | str], ...] | None = field(default=None, kw_only=True)


Documents = str | Document | Mapping[str, Any] | Iterable[Any]
"""One document or several, of any kind that `Document.from_any` takes."""


def as_documents(documents: Documents) -> list[Document]:
    """Convert one document or several to a list of `Document`."""
    return [Document.from_any(document) for document in several(documents)]


def is_open_file(value: Any) -> bool:
    """Return whether a value is an open file or reads like one: taken as a list, it would be its lines."""
    return isinstance(value, io.IOBase) or hasattr(value, "readline")


def several(documents: Documents, name: str = "documents") -> list[Any]:
    """Return one document or several as a list; warn of an iterator that is already exhausted.

    `name` is what messages call the argument.
    """
    if isinstance(documents, str | bytes | Mapping) or any(hasattr(documents, name) for name in _TEXT_ATTRIBUTES):
        return [documents]
    if is_open_file(documents):
        raise DocumentError(
            f"{name} is a {type(documents).__name__}, an open file; pass its text, or what read_document(path) returns"
        )
    if not isinstance(documents, Iterable):
        raise DocumentError(f"{name} is a {type(documents).__name__}; pass texts, Documents, or a list of them")
    listed = list(documents)
    if not listed and isinstance(documents, Iterator):
        logger.warning(
            "%s is a %s that gives none: what was read before gives nothing again; pass a list to read it twice",
            name,
            type(documents).__name__,
        )
    return listed
