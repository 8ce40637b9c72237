"""Refs: marks that stand for documents in the text that a framework handles, and find the documents again.

A framework formats prompts, caches them and writes them to logs. What passes through it in a document's place is a
mark, `[[ext:REF:SEAL]]`, of characters that templates and splitters leave alone; `[[ext:REF/8:SEAL]]` where the text
is to be read at ratio 8 or coarser. REF is a hash of text, title and source: who cites one of two documents with equal
texts cites no other. The seal is made with a secret of the store that keeps the document, so that nobody
can write a mark who was not handed it: what merely looks like one, in a user's or a document's text, is text.
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
from typing import Any

from extemb_core.documents import REF_PREFIX, Document, ReferencedDocument, text_ref, without_lone_surrogates
from extemb_core.errors import DocumentError, StoreCorruptError
from extemb_core.store.base import Store
from extemb_core.store.format import ref_bytes
from extemb_core.store.lmdb_env import Environment
from extemb_core.store.store import EmbeddingStore
from extemb_core.utils.files import parse_json

logger = logging.getLogger(__name__)

MARK = re.compile(r"\[\[ext:([0-9a-f]{32}(?:/[1-9][0-9]{0,3})?):([0-9a-f]{32})\]\]")
"""Pattern of a mark; only its store can tell a real one."""

_SECRET = b"refs"
_SECRET_BYTES = 32
_SEAL_DIGITS = 32
_MAX_CHARS = 2**28  # of documents in memory
_MAX_BYTES = 2**28  # of a document on disk, as JSON
_MAX_NAMES = 2**14  # of documents on disk that need not be written again


class Refs:
    """Keeps the documents that were handed out as marks. Those of a store on disk are there for later processes too.

    Args:
        store: Where the documents' embeddings are kept: an `EmbeddingStore` that can be written keeps the documents
            too, beside any other store they are kept in memory.
    """

    def __init__(self, store: Store) -> None:
        self._keepers: list[_InMemory | _OnDisk] = [_InMemory()]  # the first is put to
        if isinstance(store, EmbeddingStore):
            self._keepers.insert(1 if store.readonly else 0, _OnDisk(store.environment))

    def put(self, *documents: Document, finest: Sequence[int | None] | None = None) -> list[str]:
        """Keep documents. Returns the mark of each; documents of equal text, title and source have equal marks.

        Args:
            documents: What the marks will stand for.
            finest: For each, the finest ratio that it is to be read at, or None.

        Raises:
            StoreError: The disk refuses.
        """
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
            StoreCorruptError: It is not what was put.
        """
        text = without_lone_surrogates(text)  # of one page, which would make all that was found an error
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
        """Return the document of a mark; None if the mark is none of ours."""
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
            finest = int(limit) if limit else None
            return ReferencedDocument(document.text, title=document.title, metadata=document.metadata, finest=finest)
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
        self._chars = 0
        self._lock = threading.Lock()

    def secret(self) -> bytes:
        return self._secret

    def put(self, documents: tuple[Document, ...]) -> None:
        with self._lock:
            for document in documents:
                name = _name(document)
                if self._documents.pop(name, None) is None:
                    self._chars += len(document.text)
                self._documents[name] = document
            while self._chars > _MAX_CHARS and len(self._documents) > 1:
                _, oldest = self._documents.popitem(last=False)
                self._chars -= len(oldest.text)

    def get(self, name: str) -> Document | None:
        with self._lock:
            if name in self._documents:
                self._documents.move_to_end(name)
            return self._documents.get(name)


class _OnDisk:
    """Keeps documents in the environment of a store: name -> text, title and source as compressed JSON."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._known_secret: bytes | None = None
        self._written: OrderedDict[str, None] = OrderedDict()  # recently, by this process

    def secret(self) -> bytes:
        """Return the secret, made with the first document; until then, one that seals nothing."""
        if self._known_secret is None:
            with self._environment.read() as transaction:
                stored = self._environment.get(transaction, "settings", _SECRET)
                if stored is None:
                    return secrets.token_bytes(_SECRET_BYTES)
                self._known_secret = bytes(stored)
        return self._known_secret

    def put(self, documents: tuple[Document, ...]) -> None:
        named = {_name(document): document for document in documents}
        if not named or self._are_there(named):
            return  # most often; a write waits for the disk
        rows = {ref_bytes(name): _packed(document) for name, document in named.items()}

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
        with self._environment.read() as transaction:
            value = self._environment.get(transaction, "handed", ref_bytes(name))
            if value is None:
                return None
            data = bytes(value)
        try:
            unpacking = zlib.decompressobj()
            text, title, source = parse_json(unpacking.decompress(data, _MAX_BYTES))  # however much is packed in it
            document = Document(text, title=title, metadata={"source": source})
        except (ValueError, TypeError, zlib.error, DocumentError) as error:
            raise StoreCorruptError(f"the text of {name} cannot be read ({error}); add the document again") from error
        if name not in (_name(document), document.ref):  # the latter before version 0.2
            raise StoreCorruptError(f"the text of {name} is not what was put; add the document again")
        return document


def _name(document: Document) -> str:
    """Name a document as refs do: its text with its title and source, which an answer cites. 32 hex digits."""
    return text_ref(json.dumps([document.ref, document.title, document.source]))


def _packed(document: Document) -> bytes:
    data = json.dumps([document.text, document.title, document.source]).encode()
    if len(data) > _MAX_BYTES:
        raise DocumentError(
            f"{document.source} has {len(data):,} bytes, and at most {_MAX_BYTES:,} are handed; split it"
        )
    return zlib.compress(data)


def _seal(secret: bytes, name: str) -> str:
    return hmac.new(secret, name.encode(), hashlib.sha256).hexdigest()[:_SEAL_DIGITS]
