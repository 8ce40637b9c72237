"""Refs: marks that stand for documents in the text that a framework handles, and find the documents again.

A framework formats prompts, caches them and writes them to logs. What passes through it in a document's place is a
mark, `[[ext:REF:SEAL]]`, of characters that templates and splitters leave alone; `[[ext:REF/8:SEAL]]` where the text
is to be read at ratio 8 or coarser. REF is a hash of text, title and source, so that documents with equal texts are
cited separately, and of the spans, if the document was planned sentence by sentence. The seal is made with a secret of
the store that keeps the document, so that nobody can forge a mark: what merely looks like one, in a user's or a
document's text, is text.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
import secrets
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from extemb_core.documents import REF_PREFIX, Document, ReferencedDocument, text_ref, without_lone_surrogates
from extemb_core.errors import DocumentError, StoreCorruptError
from extemb_core.store.base import Store
from extemb_core.store.format import ref_bytes
from extemb_core.store.lmdb_env import Environment
from extemb_core.store.store import EmbeddingStore
from extemb_core.utils.files import parse_json

logger = logging.getLogger(__name__)

MARK = re.compile(r"\[\[ext:([0-9a-f]{32}(?:/[1-9][0-9]{0,3})?):([0-9a-f]{32})\]\]")
"""Pattern of a mark; only the store that made it can tell whether it is genuine."""

Spans: TypeAlias = tuple[tuple[int, int, int | str], ...]

_SECRET = b"refs"
_SECRET_BYTES = 32
_SEAL_DIGITS = 32
_MAX_CHARS = 2**28  # of all documents in memory
_MAX_BYTES = 2**28  # of one document on disk, as JSON
_MAX_NAMES = 2**14  # remembered: names of documents already on disk, and lists of spans in memory


class Refs:
    """Keeps the documents behind marks; in a store on disk, for later processes too.

    Args:
        store: Store of the documents' embeddings: a writable `EmbeddingStore` keeps the documents too; with any other
            store they are kept in memory.
    """

    def __init__(self, store: Store) -> None:
        self._keepers: list[_InMemory | _OnDisk] = [_InMemory()]  # new documents go to the first
        if isinstance(store, EmbeddingStore):
            self._keepers.insert(1 if store.readonly else 0, _OnDisk(store.environment))

    def put(
        self,
        *documents: Document,
        finest: Sequence[int | None] | None = None,
        spans: Sequence[Spans | None] | None = None,
    ) -> list[str]:
        """Keep documents. Returns the mark of each; documents of equal text, title, source and spans have equal marks.

        Args:
            documents: Documents that the marks will stand for.
            finest: For each, the finest ratio at which it may be read, or None.
            spans: For each, the spans in which it is read if there is room (see `ReferencedDocument`), or None.

        Raises:
            StoreError: The disk refuses.
        """
        if spans is not None:
            documents = tuple(_referenced(*pair) for pair in zip(documents, spans, strict=True))
        keeper = self._keepers[0]
        keeper.put(documents)
        marks = []
        for document, limit in zip(documents, finest or [None] * len(documents), strict=True):
            name = _name(document) if limit is None else f"{_name(document)}/{limit}"
            marks.append(f"[[{name}:{_seal(keeper.secret(), name)}]]")
        return marks

    def find(self, text: str) -> list[str | Document]:
        """Split a text into texts and the documents that marks in it stand for, in order.

        Raises:
            DocumentError: A mark's document is not kept any more.
            StoreCorruptError: The document is not what was put.
        """
        text = without_lone_surrogates(text)  # one bad page must not make all that was found an error
        parts: list[str | Document] = []
        start = 0
        for match in MARK.finditer(text):
            document = self._document(match)
            if document is not None:
                parts += [text[start : match.start()], document]
                start = match.end()
        parts.append(text[start:])
        return [part for part in parts if part != ""]

    def _document(self, match: re.Match[str]) -> Document | None:
        """Return the document of a mark; None if the mark is not ours."""
        sealed = REF_PREFIX + match[1]
        name, _, limit = sealed.partition("/")
        for keeper in self._keepers:
            if not hmac.compare_digest(match[2], _seal(keeper.secret(), sealed)):
                continue
            document = keeper.get(name)
            if document is None:
                raise DocumentError(
                    f"{match[0]} stands for a document that is not kept any more; compress the document again, or use "
                    "a store on disk"
                )
            return _referenced(document, _spans_of(document), finest=int(limit) if limit else None)
        logger.warning(
            "%s looks like a ref, and was not made by this store; it is read as text: what makes refs and what reads "
            "them need the same lm, or the same model and store",
            match[0],
        )
        return None


class _InMemory:
    """Keeps recent documents; the least recently used go first."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        self._documents: OrderedDict[str, Document] = OrderedDict()
        self._spans: OrderedDict[str, tuple[str, Spans]] = OrderedDict()  # with the name of the document without spans
        self._chars = 0
        self._lock = threading.Lock()

    def secret(self) -> bytes:
        return self._secret

    def put(self, documents: tuple[Document, ...]) -> None:
        with self._lock:
            for document in documents:
                name = _name_of_text(document)
                if self._documents.pop(name, None) is None:
                    self._chars += len(document.text)
                self._documents[name] = document
                if (spans := _spans_of(document)) is not None:
                    self._spans[_name(document)] = name, spans
                    self._spans.move_to_end(_name(document))
            while len(self._spans) > _MAX_NAMES:
                self._spans.popitem(last=False)
            while self._chars > _MAX_CHARS and len(self._documents) > 1:
                _, oldest = self._documents.popitem(last=False)
                self._chars -= len(oldest.text)

    def get(self, name: str) -> Document | None:
        with self._lock:
            if name in self._spans:
                self._spans.move_to_end(name)
            name, spans = self._spans.get(name, (name, None))
            if name not in self._documents:
                return None
            self._documents.move_to_end(name)
            return _referenced(self._documents[name], spans)


class _OnDisk:
    """Keeps documents in the environment of a store, as compressed JSON.

    name -> text, title and source; for a document with spans, name -> its name without spans, and the spans.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._known_secret: bytes | None = None
        self._written: OrderedDict[str, None] = OrderedDict()  # recently, by this process

    def secret(self) -> bytes:
        """Return the secret, which is made with the first document; before that, one that no mark was sealed with."""
        if self._known_secret is None:
            with self._environment.read() as transaction:
                stored = self._environment.get(transaction, "settings", _SECRET)
                if stored is None:
                    return secrets.token_bytes(_SECRET_BYTES)
                self._known_secret = bytes(stored)
        return self._known_secret

    def put(self, documents: tuple[Document, ...]) -> None:
        named: dict[str, list[Any]] = {}
        for document in documents:
            named[_name_of_text(document)] = [document.text, document.title, document.source]
            if (spans := _spans_of(document)) is not None:
                named[_name(document)] = [_name_of_text(document), spans]
        if not named or self._are_there(named):
            return  # usually known; a write would wait for the disk
        rows = {ref_bytes(name): _packed(values) for name, values in named.items()}

        def work(transaction: Any) -> None:
            settings, handed = map(self._environment.database, ("settings", "handed"))
            transaction.put(_SECRET, secrets.token_bytes(_SECRET_BYTES), overwrite=False, db=settings)
            for key, value in rows.items():
                transaction.put(key, value, db=handed)

        self._environment.write(work)
        self._written.update(dict.fromkeys(named))
        while len(self._written) > _MAX_NAMES:
            self._written.popitem(last=False)

    def _are_there(self, names: Iterable[str]) -> bool:
        if not all(name in self._written for name in names):
            return False
        with self._environment.read() as transaction:
            stored = (self._environment.get(transaction, "handed", ref_bytes(name)) for name in names)
            return all(data is not None for data in stored)

    def get(self, name: str) -> Document | None:
        try:
            if (values := self._read(name)) is None:
                return None
            spans = None
            if len(values) == 2:
                spans = tuple((start, stop, fidelity) for start, stop, fidelity in values[1])
                if (values := self._read(values[0])) is None:
                    return None
            text, title, source = values
            document = Document(text, title=title, metadata={"source": source})
            document = document if spans is None else _referenced(document, spans)
        except (ValueError, TypeError, zlib.error, DocumentError) as error:
            raise StoreCorruptError(f"the text of {name} cannot be read ({error}); add the document again") from error
        if name != _name(document) and (spans is not None or name != document.ref):  # the ref, before version 0.2
            raise StoreCorruptError(f"the text of {name} is not what was put; add the document again")
        return document

    def _read(self, name: str) -> Any:
        with self._environment.read() as transaction:
            value = self._environment.get(transaction, "handed", ref_bytes(name))
            data = None if value is None else bytes(value)
        # Limits the size also if little compressed data unpacks to a lot.
        return None if data is None else parse_json(zlib.decompressobj().decompress(data, _MAX_BYTES))


def _name(document: Document) -> str:
    """Return a document's name in marks: a hash of its text, title, source and spans. 32 hex digits."""
    name, spans = _name_of_text(document), _spans_of(document)
    return name if spans is None else text_ref(json.dumps([name, spans]))


def _name_of_text(document: Document) -> str:
    """Return a hash of a document's text, title and source, which answers cite."""
    return text_ref(json.dumps([document.ref, document.title, document.source]))


def _spans_of(document: Document) -> Spans | None:
    return document.spans if isinstance(document, ReferencedDocument) else None


def _referenced(document: Document, spans: Spans | None, finest: int | None = None) -> ReferencedDocument:
    return ReferencedDocument(
        document.text, title=document.title, metadata=document.metadata, finest=finest, spans=spans
    )


def _packed(values: list[Any]) -> bytes:
    data = json.dumps(values).encode()
    if len(data) > _MAX_BYTES:
        raise DocumentError(f"{values[-1]} has {len(data):,} bytes, and at most {_MAX_BYTES:,} are handed; split it")
    return zlib.compress(data)


def _seal(secret: bytes, name: str) -> str:
    return hmac.new(secret, name.encode(), hashlib.sha256).hexdigest()[:_SEAL_DIGITS]
