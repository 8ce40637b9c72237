"""A library: documents kept compressed, found by what they say, and asked for ever after.

In the folder of an `EmbeddingStore`, in the same LMDB file, so that a process killed at any moment leaves documents
that are there or not, never half:

    documents   source -> its record as JSON        texts     source -> the text, UTF-8
    passages    id -> document, ref, offsets        vectors   id -> the text encoder's vector, float16
    refs        ref, id -> nothing                  settings  the text encoder, the length of passages, the next id

The FAISS index beside it is made from the vectors: one that is lost, damaged or late is brought up to date.
"""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xxhash

from extemb_core.answers import Answer, AnswerStream
from extemb_core.documents import Document, text_ref
from extemb_core.errors import ConfigError, DocumentError, MismatchError
from extemb_core.progress import progress
from extemb_core.readers import read_documents
from extemb_core.retrieval.encoders import SENTENCE_TRANSFORMERS, TextEncoder, as_encoder
from extemb_core.retrieval.fusion import fuse
from extemb_core.retrieval.index import VectorIndex, choose_factory
from extemb_core.retrieval.lexical import WordIndex
from extemb_core.retrieval.splitting import split_passages
from extemb_core.store.store import EmbeddingStore

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

PASSAGE_TOKENS = 256
INDEX_FILE = "passages.faiss"
_BATCH_TOKENS = 32_768  # compressed and written together
_PASSAGE = struct.Struct("<16s16sQQQQ")  # document, ref, first and last byte, first and last character
_ID = struct.Struct(">Q")
_SETTINGS = b"library"
_FETCHED = 4  # times k, from each ranking before they are fused


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document that was found.

    Attributes:
        id: Its number in the library.
        text: Its text.
        source: The document's.
        title: The document's.
        start, end: Characters of the document's text that it is.
        score: Of the search; larger is better, comparable within one search only.
        ref: Content hash of the text.
    """

    id: int
    text: str
    source: str
    title: str | None
    start: int
    end: int
    score: float
    ref: str

    def to_document(self) -> Document:
        """To ask about it; an answer cites it as `source:start-end`."""
        return Document(
            self.text,
            title=self.title or self.source,
            metadata={"source": f"{self.source}:{self.start}-{self.end}", "score": self.score},
        )


@dataclass(frozen=True, kw_only=True)
class Added:
    """What an `add` did.

    Attributes:
        added, updated, unchanged: Documents.
        n_passages: New ones.
        n_tokens: Of the new passages.
        compressed_tokens: Of those whose embeddings were not there already.
        seconds: That it took.
    """

    added: int = 0
    updated: int = 0
    unchanged: int = 0
    n_passages: int = 0
    n_tokens: int = 0
    compressed_tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Prepared:
    """A document that is ready to be written."""

    source: str
    document: Document
    spans: list[tuple[int, int]]
    known: bool
    texts: list[str]


class Library:
    """Documents in a folder: add them once, search and ask them in any later process.

    Args:
        path: Its folder, which is made if it is not there.
        lm: Compresses the passages and answers. None to search and look after a library without a model.
        encoder: Finds passages: the name of a sentence-transformers model, or a function from texts to vectors. A
            library stays with the one it was made with; None is that one, or the default in a new library.
        mode: "a" to add, "r" to read.
        passage_tokens: Tokens of a passage at most, by the LLM's tokenizer.
        ratio: The finest ratio that will be asked for; the finest trained one when not given.
        dtype: Of the embeddings on disk: see `EmbeddingStore.open`.
        index: What FAISS calls the index, such as "HNSW32"; by the number of passages when not given.

    Raises:
        StoreError: The folder cannot be opened, or is something else.
        MismatchError: It was made with another text encoder.
        WeightsNotFoundError, MissingExtraError: The text encoder is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        lm: ExtensibleLM | None = None,
        *,
        encoder: TextEncoder | str | Callable[[list[str]], Any] | None = None,
        mode: Literal["r", "a"] = "a",
        passage_tokens: int = PASSAGE_TOKENS,
        ratio: int | None = None,
        dtype: Literal["float32", "float16", "int8"] = "float16",
        index: str | None = None,
    ) -> None:
        if passage_tokens < 1:
            raise ConfigError(f"passage_tokens={passage_tokens} is below 1; pass e.g. {PASSAGE_TOKENS}")
        if lm is not None and ratio is not None:
            lm.embedder.config.require_ratio(ratio)
        self._given_encoder = encoder
        self.store = EmbeddingStore.open(path, mode, dtype=dtype)
        self.lm = None if lm is None else type(lm)(lm.llm, lm.embedder, self.store)
        self.ratio = ratio
        self.passage_tokens = passage_tokens
        self._factory = index
        self._lock = threading.RLock()
        self._vectors: VectorIndex | None = None
        self._words: tuple[int, WordIndex] | None = None
        self._synced = -1  # the generation that the index is of
        if encoder is not None:
            try:
                _ = self.encoder  # whether it is that of the library is to be known now
            except BaseException:
                self.store.close()
                raise

    @cached_property
    def encoder(self) -> TextEncoder:
        """What finds passages.

        Raises:
            MismatchError: Another one than the library was made with was passed.
        """
        with self.store.environment.read() as transaction:
            known = self._settings(transaction)["encoder"]
        given = self._given_encoder
        if given is None and known is not None and known.startswith(SENTENCE_TRANSFORMERS):
            given = known.removeprefix(SENTENCE_TRANSFORMERS)
        encoder = as_encoder(given)
        if known not in (None, encoder.name):
            raise MismatchError(
                f"{self.path} was made with the text encoder {known!r}, and this is {encoder.name!r}; pass that one as "
                "encoder=, or make a new library"
            )
        return encoder

    @property
    def path(self) -> Path:
        return self.store.path

    def close(self) -> None:
        """Give the files back."""
        self.store.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Documents."""
        return self._count("documents")

    # -- documents --------------------------------------------------------------------------------------------

    def add(self, documents: Any, *, show_progress: bool | None = None) -> Added:
        """Add documents, or replace those of the same source; what has not changed costs nothing.

        Every few thousand tokens what is done is on disk: after Ctrl-C, or worse, the same call goes on.

        Args:
            documents: Files and folders (`pathlib.Path`), texts, `Document`s, or what `Document.from_any` takes. A
                document is known by its `source`: a path, metadata["source"], or its title; without one, by its text.
            show_progress: Show a bar; None shows it on a terminal.

        Raises:
            ConfigError: The library has no `lm`.
            DocumentError: A document cannot be read.
            StoreError: The library is read-only, or the disk refuses.
        """
        start = time.perf_counter()
        lm = self._need_lm()
        counts = dict.fromkeys(("added", "updated", "unchanged", "n_passages", "n_tokens", "compressed_tokens"), 0)
        every = _as_documents(documents)
        with progress("add", len(every), show_progress) as advance:
            batch: list[_Prepared] = []
            taken = 0
            for document in every:
                record = self._record(_source_of(document))
                if record is not None and (record["ref"], record["title"]) == (document.ref, document.title):
                    counts["unchanged"] += 1
                    advance(1)
                    continue
                spans = split_passages(document.text, self.passage_tokens, self._n_tokens)
                texts = [document.text[start:end] for start, end in spans]
                batch.append(_Prepared(_source_of(document), document, spans, record is not None, texts))
                taken += len(document.text) // 3
                if taken >= _BATCH_TOKENS:
                    self._write_batch(lm, batch, counts)
                    advance(len(batch))
                    batch, taken = [], 0
            self._write_batch(lm, batch, counts)
            advance(len(batch))
        if counts["added"] or counts["updated"]:
            self._save_index()
        return Added(**counts, seconds=time.perf_counter() - start)

    def remove(self, sources: Iterable[str]) -> int:
        """Remove documents by their sources. Returns how many were there.

        Raises:
            StoreError: The library is read-only, or the disk refuses.
        """
        wanted = [sources] if isinstance(sources, str) else list(sources)

        def work(transaction: Any) -> int:
            found = [refs for source in wanted if (refs := self._forget(transaction, source)) is not None]
            self._drop_orphans(transaction, set().union(*found))
            if found:
                settings = self._settings(transaction)
                settings["generation"] += 1
                database = self.store.environment.database("settings")
                transaction.put(_SETTINGS, json.dumps(settings).encode(), db=database)
            return len(found)

        gone = self.store.write(work)
        if gone:
            self._save_index()
        return gone

    def documents(self) -> Iterator[dict[str, Any]]:
        """The record of every document: source, title, ref, n_chars, n_passages, metadata."""
        last: bytes | None = None
        while True:
            with self.store.environment.read() as transaction:
                database = self.store.environment.database("documents")
                if database is None:
                    return
                cursor = transaction.cursor(db=database)
                found = cursor.first() if last is None else cursor.set_range(last + b"\0")
                page: list[dict[str, Any]] = []
                while found and len(page) < 1000:
                    page.append(json.loads(bytes(cursor.value())))
                    last = bytes(cursor.key())
                    found = cursor.next()
            if not page:
                return
            for record in page:
                yield {name: value for name, value in record.items() if name != "passages"} | {
                    "n_passages": len(record["passages"])
                }

    def text(self, source: str) -> str:
        """The text of a document.

        Raises:
            DocumentError: There is no document of that source.
        """
        with self.store.environment.read() as transaction:
            database = self.store.environment.database("texts")
            data = None if database is None else transaction.get(_key(source), db=database)
            if data is None:
                raise DocumentError(f"{self.path} has no document {source!r}; library.documents() lists them")
            return bytes(data).decode()

    # -- questions --------------------------------------------------------------------------------------------

    def search(self, question: str, k: int = 8, *, hybrid: bool = True) -> list[Passage]:
        """The passages nearest to a question, best first.

        Args:
            question: In the user's words.
            k: Passages at most.
            hybrid: By vectors and by words (BM25), fused by reciprocal rank; else by vectors alone.

        Raises:
            ConfigError: The question is empty, or `k` is not positive.
        """
        if not question.strip():
            raise ConfigError("the question is empty; ask something")
        if k < 1:
            raise ConfigError(f"k={k} is below 1; pass e.g. 8")
        with self._lock:
            index = self._index()
            if not index.ids:
                return []
            vector = self.encoder.encode([question], query=True)[0]
            near = index.search(vector, _FETCHED * k if hybrid else k)
            if hybrid:
                named = self._word_index().search(question, _FETCHED * k)
                near = fuse([[found for found, _ in near], [found for found, _ in named]])
        return self._passages(near)[:k]

    def ask(self, question: str, *, k: int = 8, hybrid: bool = True, **settings: Any) -> Answer:
        """Answer from the passages nearest to the question: `search`, then `ExtensibleLM.ask`.

        Args:
            question: In the user's words.
            k: Passages at most; those that the budget has no room for are reported as dropped.
            hybrid: See `search`.
            **settings: Of `ExtensibleLM.ask`: budget, ratio, max_new_tokens, ...
        """
        return self.stream(question, k=k, hybrid=hybrid, **settings).finish()

    def stream(self, question: str, *, k: int = 8, hybrid: bool = True, **settings: Any) -> AnswerStream:
        """`ask`, piece by piece."""
        lm = self._need_lm()
        found = [passage.to_document() for passage in self.search(question, k, hybrid=hybrid)]
        return lm.stream(question, found, **settings)

    # -- inside: writing --------------------------------------------------------------------------------------

    def _write_batch(self, lm: ExtensibleLM, batch: list[_Prepared], counts: dict[str, int]) -> None:
        """Compress the passages of some documents, then write the documents: all at once."""
        if not batch:
            return
        texts = [text for one in batch for text in one.texts]
        vectors = self.encoder.encode(texts).astype("<f2")
        finest = min(lm.embedder.config.ratios) if self.ratio is None else self.ratio
        wanted = {text_ref(text): text for text in texts}
        fingerprint = lm.embedder.fingerprint
        missing = [ref for ref in wanted if not self._is_kept(ref, fingerprint, finest)]
        made = lm.embedder.compress_ids(
            [lm.llm.encode(wanted[ref]) for ref in missing], refs=missing, ratio=finest, show_progress=False
        )
        self.store.put(*made)
        tokens = self._n_tokens(texts)
        self.store.write(lambda transaction: self._write_documents(transaction, batch, vectors))
        counts["updated"] += sum(one.known for one in batch)
        counts["added"] += sum(not one.known for one in batch)
        counts["n_passages"] += len(texts)
        counts["n_tokens"] += sum(tokens)
        counts["compressed_tokens"] += sum(one.n_tokens for one in made)

    def _is_kept(self, ref: str, fingerprint: str, ratio: int) -> bool:
        kept = self.store.finest(ref, fingerprint)
        return kept is not None and ratio % kept.ratio == 0

    def _write_documents(self, transaction: Any, batch: Sequence[_Prepared], vectors: np.ndarray[Any, Any]) -> None:
        database = self.store.environment.database
        settings = self._settings(transaction)
        number = int(settings["next_id"])
        row = 0
        orphans: set[bytes] = set()
        for one in batch:
            orphans |= self._forget(transaction, one.source) or set()
            key = _key(one.source)
            first = number
            offset = 0
            for (start, end), text in zip(one.spans, one.texts, strict=True):
                size = len(text.encode())
                ref = bytes.fromhex(text_ref(text).removeprefix("ext:"))
                name = _ID.pack(number)
                transaction.put(
                    name, _PASSAGE.pack(key, ref, offset, offset + size, start, end), db=database("passages")
                )
                transaction.put(name, vectors[row].tobytes(), db=database("vectors"))
                transaction.put(ref + name, b"", db=database("refs"))
                offset += size
                number += 1
                row += 1
            record = {
                "source": one.source,
                "title": one.document.title,
                "ref": one.document.ref,
                "n_chars": len(one.document.text),
                "metadata": _plain(one.document.metadata),
                "passages": list(range(first, number)),
            }
            transaction.put(key, json.dumps(record).encode(), db=database("documents"))
            transaction.put(key, one.document.text.encode(), db=database("texts"))
        self._drop_orphans(transaction, orphans)
        settings |= {"encoder": self.encoder.name, "width": self.encoder.width}
        settings |= {"next_id": number, "generation": settings["generation"] + 1}
        transaction.put(_SETTINGS, json.dumps(settings).encode(), db=database("settings"))

    def _forget(self, transaction: Any, source: str) -> set[bytes] | None:
        """Drop a document and its passages; the refs of those, or None when there is no such document."""
        database = self.store.environment.database
        key = _key(source)
        data = transaction.get(key, db=database("documents"))
        if data is None:
            return None
        refs = set()
        for number in json.loads(bytes(data))["passages"]:
            name = _ID.pack(number)
            ref = _PASSAGE.unpack(transaction.get(name, db=database("passages")))[1]
            refs.add(ref)
            transaction.delete(ref + name, db=database("refs"))
            transaction.delete(name, db=database("passages"))
            transaction.delete(name, db=database("vectors"))
        transaction.delete(key, db=database("documents"))
        transaction.delete(key, db=database("texts"))
        return refs

    def _drop_orphans(self, transaction: Any, refs: set[bytes]) -> None:
        """Drop the embeddings of passages that no document has any more."""
        for ref in refs:
            cursor = transaction.cursor(db=self.store.environment.database("refs"))
            if not cursor.set_range(ref) or bytes(cursor.key())[:16] != ref:
                self.store.forget(transaction, "ext:" + ref.hex())

    # -- inside: reading --------------------------------------------------------------------------------------

    def _passages(self, found: Sequence[tuple[int, float]]) -> list[Passage]:
        """What is known of passages by their ids; those that went meanwhile are left out."""
        database = self.store.environment.database
        passages = []
        with self.store.environment.read() as transaction:
            for number, score in found:
                data = transaction.get(_ID.pack(number), db=database("passages"))
                if data is None:
                    continue
                key, ref, first, last, start, end = _PASSAGE.unpack(data)
                record = json.loads(bytes(transaction.get(key, db=database("documents"))))
                text = bytes(transaction.get(key, db=database("texts"))[first:last]).decode()
                passages.append(
                    Passage(
                        id=number,
                        text=text,
                        source=record["source"],
                        title=record["title"],
                        start=start,
                        end=end,
                        score=score,
                        ref="ext:" + ref.hex(),
                    )
                )
        return passages

    def _index(self) -> VectorIndex:
        """The FAISS index, with what was added and removed since it was last looked at."""
        with self.store.environment.read() as transaction:
            settings = self._settings(transaction)
            width, generation = int(settings["width"]), int(settings["generation"])
            if self._vectors is not None and generation == self._synced:
                return self._vectors
            database = self.store.environment.database("passages")
            keys = [] if database is None else list(transaction.cursor(db=database).iternext(values=False))
            ids = {int(_ID.unpack(key)[0]) for key in keys}
        index = self._vectors or VectorIndex.load(
            self.path / INDEX_FILE, width, self._factory, encoder=settings["encoder"]
        )
        if index is not None:
            index.remove(index.ids - ids)
            self._add_vectors(index, sorted(ids - index.ids))
        if index is None or index.should_be_made_anew():
            index = VectorIndex(width, self._factory or choose_factory(len(ids)))
            index.wanted = self._factory
            self._add_vectors(index, sorted(ids))
        self._vectors, self._synced = index, generation
        return index

    def _add_vectors(self, index: VectorIndex, ids: Sequence[int]) -> None:
        with self.store.environment.read() as transaction:
            database = self.store.environment.database("vectors")
            found = [(number, transaction.get(_ID.pack(number), db=database)) for number in ids]
            rows = [(number, np.frombuffer(bytes(data), "<f2")) for number, data in found if data is not None]
        if rows:
            index.add([number for number, _ in rows], np.stack([vector for _, vector in rows]).astype(np.float32))

    def _save_index(self) -> None:
        with self._lock:
            index = self._index()
            with self.store.environment.read() as transaction:
                settings = self._settings(transaction)
            index.save(self.path / INDEX_FILE, encoder=settings["encoder"])

    def _word_index(self) -> WordIndex:
        if self._words is None or self._words[0] != self._synced:
            index = self._index()
            passages = self._passages([(number, 0.0) for number in sorted(index.ids)])
            made = WordIndex([passage.id for passage in passages], [passage.text for passage in passages])
            self._words = self._synced, made
        return self._words[1]

    # -- inside: settings -------------------------------------------------------------------------------------

    def _settings(self, transaction: Any) -> dict[str, Any]:
        database = self.store.environment.database("settings")
        data = None if database is None else transaction.get(_SETTINGS, db=database)
        if data is None:  # a store, to which no library was added yet
            return {"encoder": None, "width": 1, "next_id": 0, "generation": 0}
        settings: dict[str, Any] = json.loads(bytes(data))
        return settings

    def _need_lm(self) -> ExtensibleLM:
        if self.lm is None:
            raise ConfigError("this library was opened without an LLM; pass lm=ExtensibleLM.from_pretrained(...)")
        return self.lm

    def _n_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(self._need_lm().llm.encode(text)) for text in texts]

    def _record(self, source: str) -> dict[str, Any] | None:
        with self.store.environment.read() as transaction:
            database = self.store.environment.database("documents")
            data = None if database is None else transaction.get(_key(source), db=database)
            record: dict[str, Any] | None = None if data is None else json.loads(bytes(data))
            return record

    def _count(self, name: str) -> int:
        with self.store.environment.read() as transaction:
            database = self.store.environment.database(name)
            return 0 if database is None else int(transaction.stat(database)["entries"])


def _as_documents(documents: Any) -> list[Document]:
    """Paths are read, everything else is a document."""
    several = documents if isinstance(documents, Iterable) and not isinstance(documents, str | Mapping) else [documents]
    found: list[Document] = []
    for one in several:
        found += read_documents(one) if isinstance(one, Path) else [Document.from_any(one)]
    return found


def _source_of(document: Document) -> str:
    return document.source


def _key(source: str) -> bytes:
    return xxhash.xxh3_128(source.encode()).digest()


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What of a document's metadata JSON can hold; the rest as text."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(metadata), default=str))
    return plain
