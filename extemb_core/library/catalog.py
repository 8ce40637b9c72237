"""Store a library's documents and passages, transaction by transaction, for `Library`.

documents   source -> its record as JSON        texts     source -> the text, UTF-8
passages    id -> document, ref, offsets        vectors   id -> the text encoder's vector, float16
refs        ref, id -> nothing                  settings  the text encoder, its width, the next id, the generation,
                                                          how many documents each embedder compressed

All that is read is checked: texts against their refs, JSON against a checksum in it.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import xxhash

from extemb_core.documents import Document, text_ref, without_lone_surrogates
from extemb_core.errors import MismatchError, StoreCorruptError
from extemb_core.library.encoders import TextEncoder
from extemb_core.store.format import ref_bytes, ref_of
from extemb_core.store.lmdb_env import Environment
from extemb_core.utils.files import parse_json

_PASSAGE = struct.Struct("<16s16sQQQQ")  # document, ref, first and last byte, first and last character
_ID = struct.Struct(">Q")
_SETTINGS, _MARK = b"library", b"mark"
_NO_SETTINGS = {"encoder": None, "width": 1, "next_id": 0, "generation": 0}  # for a library without documents


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Part of a document, found by a search.

    Attributes:
        id: Its number in the library.
        text: Its text.
        source: Source of the document.
        title: Title of the document.
        start, end: Its first character in the document's text, and the one after the last.
        score: Score in the search; larger is better, comparable within one search only.
        ref: Content hash of its text.
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
        """Convert it to a document; an answer cites it as `source:start-end`."""
        return Document(
            self.text,
            title=without_lone_surrogates(self.title or self.source),  # file names need not be valid Unicode
            metadata={"source": f"{self.source}:{self.start}-{self.end}", "score": self.score},
        )


@dataclass(frozen=True)
class Split:
    """Document with its passages: (start, end) characters, and the text of each."""

    document: Document
    spans: Sequence[tuple[int, int]]
    texts: Sequence[str]


class Catalogue:
    """Databases of a library. Every method but `records` works within a transaction of its environment."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def settings(self, transaction: Any) -> dict[str, Any]:
        """Read encoder (None if there are no documents), width, next_id, and generation (new after every change)."""
        data = self._environment.get(transaction, "settings", _SETTINGS)
        return self._parsed(data) if data is not None else dict(_NO_SETTINGS)

    def check_encoder(self, transaction: Any, encoder: TextEncoder) -> None:
        """Raise `MismatchError` if the vectors were made by another text encoder: such vectors cannot be compared."""
        settings = self.settings(transaction)
        name, width = settings["encoder"], settings["width"]
        if name is not None and (name, width) != (encoder.name, encoder.width):
            raise MismatchError(
                f"{self._environment.folder} was made with the text encoder {name!r} of width {width}, and this is "
                f"{encoder.name!r} of width {encoder.width}; pass that one as encoder=, or make a new library"
            )

    def embedders(self, transaction: Any) -> dict[str, int]:
        """Count the documents that each embedder compressed, by its fingerprint."""
        counted: dict[str, int] | None = self.settings(transaction).get("embedders")
        if counted is None:  # version 1 did not count them
            rows = self._environment.rows(transaction, "documents")
            counted = Counter(self._parsed(value)["fingerprint"] for _, value in rows)
        return counted

    def change(self, transaction: Any, **settings: Any) -> None:
        """Write settings with a new generation, to show that something has changed."""
        now = self.settings(transaction)
        data = _sealed(now | settings | {"generation": now["generation"] + 1})
        transaction.put(_SETTINGS, data, db=self._environment.database("settings"))

    def index_mark(self, transaction: Any) -> str | None:
        """Return the mark of the index files that belong to these passages; None if there are none."""
        data = self._environment.get(transaction, "settings", _MARK)
        return None if data is None else bytes(data).decode(errors="replace")

    def set_index_mark(self, transaction: Any, mark: str) -> None:
        """Note which index files belong to these passages: in a copied database, their ids may mean other passages."""
        transaction.put(_MARK, mark.encode(), db=self._environment.database("settings"))

    def put(
        self,
        transaction: Any,
        documents: Sequence[Split],
        vectors: np.ndarray[Any, Any],
        fingerprint: str,
        ratio: int,
        encoder: TextEncoder,
    ) -> set[tuple[bytes, str]]:
        """Write documents; they replace those of the same source.

        Args:
            transaction: A write transaction.
            documents: Documents with their passages.
            vectors: (passages of all documents, width) float16.
            fingerprint: Fingerprint of the embedder that compressed them.
            ratio: Finest ratio at which they were compressed.
            encoder: Text encoder that made the vectors.

        Returns:
            The refs of the passages of replaced documents, and of those that `expect` noted for these sources, each
            with the embedder's fingerprint.

        Raises:
            MismatchError: The vectors in the library were made by another text encoder.
        """
        self.check_encoder(transaction, encoder)
        database = self._environment.database
        number = int(self.settings(transaction)["next_id"])
        rows = iter(vectors)
        before: set[tuple[bytes, str]] = set()
        for split in documents:
            before |= self.forget(transaction, split.document.source) or set()
            before |= self.expected(transaction, split.document.source)
            self.change(transaction, embedders=self._counted(transaction, fingerprint, 1))
            key = _key(split.document.source)
            first, offset = number, 0
            for (start, end), text in zip(split.spans, split.texts, strict=True):
                size = len(text.encode())
                ref, name = ref_bytes(text_ref(text)), _ID.pack(number)
                passage = _PASSAGE.pack(key, ref, offset, offset + size, start, end)
                transaction.put(name, passage, db=database("passages"))
                transaction.put(name, next(rows).tobytes(), db=database("vectors"))
                transaction.put(ref + name, b"", db=database("refs"))
                offset += size
                number += 1
            compression = {"fingerprint": fingerprint, "ratio": ratio}
            record = _described(split.document) | compression | {"passages": [first, number]}
            transaction.put(key, _sealed(record), db=database("documents"))
            transaction.put(key, split.document.text.encode(), db=database("texts"))
        self.change(transaction, next_id=number, encoder=encoder.name, width=vectors.shape[1])
        return before

    def forget(self, transaction: Any, source: str) -> set[tuple[bytes, str]] | None:
        """Remove a document and its passages.

        Returns:
            The refs of the passages, each with the embedder's fingerprint; None if there is no such document.
        """
        database = self._environment.database
        record = self.record(transaction, source)
        if record is None:
            return None
        self.change(transaction, embedders=self._counted(transaction, record["fingerprint"], -1))
        refs = set()
        for number in range(*record["passages"]):
            name = _ID.pack(number)
            ref = _PASSAGE.unpack(transaction.get(name, db=database("passages")))[1]
            refs.add((ref, record["fingerprint"]))
            transaction.delete(ref + name, db=database("refs"))
            transaction.delete(name, db=database("passages"))
            transaction.delete(name, db=database("vectors"))
        for kind in ("documents", "texts"):
            transaction.delete(_key(source), db=database(kind))
        return refs

    def expect(self, transaction: Any, documents: Iterable[Split], fingerprint: str) -> None:
        """Note passages before they are compressed: until `put`, no document refers to their embeddings."""
        for split in documents:
            key = _key(split.document.source)
            for text in split.texts:
                name = key + ref_bytes(text_ref(text)) + fingerprint.encode()
                transaction.put(name, b"", db=self._environment.database("pending"))

    def expected(self, transaction: Any, source: str) -> set[tuple[bytes, str]]:
        """Remove and return what `expect` noted for a document: (ref of a passage, fingerprint of the embedder)."""
        key = _key(source)
        rows = (bytes(name) for name, _ in self._environment.rows(transaction, "pending", key))
        names = list(takewhile(lambda name: name.startswith(key), rows))
        for name in names:
            transaction.delete(name, db=self._environment.database("pending"))
        return {(name[16:32], name[32:].decode()) for name in names}

    def holds(self, transaction: Any, ref: bytes, fingerprint: str | None = None) -> bool:
        """Return whether a passage has a ref, and its document was compressed by an embedder, where one is named."""
        get = self._environment.get
        for name, _ in self._environment.rows(transaction, "refs", ref):
            if bytes(name[:16]) != ref:
                break
            if fingerprint is None:
                return True
            key = bytes(_PASSAGE.unpack(get(transaction, "passages", bytes(name[16:])))[0])
            if self._parsed(get(transaction, "documents", key))["fingerprint"] == fingerprint:
                return True
        return False

    def record(self, transaction: Any, source: str) -> dict[str, Any] | None:
        """Read the record of a document.

        It has source, title, ref, n_chars, metadata, the first and last id of its passages, and the embedder and ratio
        with which it was compressed.
        """
        data = self._environment.get(transaction, "documents", _key(source))
        return None if data is None else self._parsed(data)

    def text(self, transaction: Any, source: str) -> str | None:
        """Read the text of a document; None if it is not in the library.

        Raises:
            StoreCorruptError: The text is not what was written.
        """
        record = self.record(transaction, source)
        if record is None:
            return None
        text = bytes(self._text_of(transaction, _key(source))).decode(errors="replace")
        if text_ref(text) != record["ref"]:
            raise self._damaged(source)
        return text

    def problem(self, transaction: Any, source: str) -> str | None:
        """Describe what is wrong with a document, apart from its embeddings and vectors; None if nothing is."""
        try:
            text, record = self.text(transaction, source), self.record(transaction, source)
            numbers = range(*record["passages"]) if record is not None else ()
            passages = self.passages(transaction, [(number, 0.0) for number in numbers])
            if "".join(passage.text for passage in passages) != (text or ""):
                raise self._damaged(source)
        except StoreCorruptError as error:
            return str(error)
        return None

    def refs(self, transaction: Any, record: Mapping[str, Any]) -> list[str]:
        """List the refs of a document's passages that exist."""
        numbers = range(*record["passages"])
        rows = (self._environment.get(transaction, "passages", _ID.pack(number)) for number in numbers)
        return [ref_of(_PASSAGE.unpack(data)[1]) for data in rows if data is not None]

    def problems(self) -> Iterator[str]:
        """Yield the result of `problem` for every document; no transaction stays open while the caller works."""
        for _, value in self._environment.items("documents"):
            try:
                source = self._parsed(value)["source"]
                with self._environment.read() as transaction:
                    problem = self.problem(transaction, source)
            except StoreCorruptError as error:
                problem = str(error)
            if problem is not None:
                yield problem

    def ids(self, transaction: Any, first: int = 0) -> set[int]:
        """Return the ids of all passages, or of the newest, from `first` on."""
        rows = self._environment.rows(transaction, "passages", _ID.pack(first))
        return {int(_ID.unpack(key)[0]) for key, _ in rows}

    def changes(self, transaction: Any, known: set[int]) -> tuple[set[int], set[int]]:
        """Return the ids among `known` whose passages are gone, and the ids of new passages."""
        new = self.ids(transaction, max(known, default=-1) + 1)
        if len(known) + len(new) == self._environment.count(transaction, "passages"):
            return set(), new
        ids = self.ids(transaction)
        return known - ids, ids - known

    def vectors(self, transaction: Any, ids: Sequence[int]) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float32]]]:
        """Return those of the ids whose passages exist, and their (n, width) vectors."""
        width = int(self.settings(transaction)["width"])
        stored = {number: self._environment.get(transaction, "vectors", _ID.pack(number)) for number in ids}
        rows = {number: np.frombuffer(data, "<f2") for number, data in stored.items() if data is not None}
        return list(rows), np.array([*rows.values()], np.float32).reshape(-1, width)

    def passages(self, transaction: Any, scores: Iterable[tuple[int, float]]) -> list[Passage]:
        """Read passages by (id, score); passages removed meanwhile are left out.

        Raises:
            StoreCorruptError: A passage is not what was written.
        """
        passages = []
        records: dict[bytes, dict[str, Any]] = {}
        for number, score in scores:
            data = self._environment.get(transaction, "passages", _ID.pack(number))
            if data is None:
                continue
            key, ref, first, last, start, end = _PASSAGE.unpack(data)
            if key not in records:
                records[key] = self._parsed(self._environment.get(transaction, "documents", key))
            record = records[key]
            text = bytes(self._text_of(transaction, key)[first:last]).decode(errors="replace")
            if ref_bytes(text_ref(text)) != ref or len(text) != end - start:
                raise self._damaged(record["source"])
            document = {"source": record["source"], "title": record["title"], "ref": ref_of(ref)}
            passages.append(Passage(id=number, text=text, start=start, end=end, score=score, **document))
        return passages

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield every record, with the number of passages; no transaction stays open while the caller works."""
        for _, value in self._environment.items("documents"):
            record = self._parsed(value)
            first, end = record.pop("passages")
            yield record | {"n_passages": end - first}

    def _parsed(self, data: Any) -> dict[str, Any]:
        """Parse a record and check it against its checksum, which earlier versions did not write."""
        try:
            record = dict(parse_json(bytes(data)))
            if (checksum := record.pop("checksum", None)) not in (None, _checksum(record)):
                raise ValueError(f"another checksum than {checksum}")
        except (ValueError, TypeError) as error:
            raise StoreCorruptError(
                f"{self._environment.folder}: a record of the library is damaged ({error}); restore it from a copy, or "
                "make a new library"
            ) from error
        return record

    def _text_of(self, transaction: Any, key: bytes) -> memoryview:
        return memoryview(self._environment.get(transaction, "texts", key) or b"")

    def _damaged(self, source: str) -> StoreCorruptError:
        return StoreCorruptError(
            f"{self._environment.folder}: the text of {source!r} is not what was written; add the document again, or "
            "remove it"
        )

    def _counted(self, transaction: Any, fingerprint: str, more: int) -> dict[str, int]:
        """Return `embedders` with the count of one fingerprint raised by `more`."""
        counted = Counter(self.embedders(transaction))
        counted[fingerprint] += more
        return dict(+counted)


def is_of(record: Mapping[str, Any], document: Document, fingerprint: str, ratio: int) -> bool:
    """Return whether a record is of this very document, title and metadata included, compressed as it would be now."""
    same = all(record[name] == value for name, value in _described(document).items())
    return same and record["fingerprint"] == fingerprint and ratio % int(record["ratio"]) == 0


def _described(document: Document) -> dict[str, Any]:
    try:
        # Values that JSON cannot hold, also NaN, are written as text.
        metadata = json.loads(json.dumps(dict(document.metadata), default=str), parse_constant=str)
    except (TypeError, ValueError, RecursionError):  # keys that JSON cannot hold, or circular references
        metadata = {str(name): str(value) for name, value in document.metadata.items()}
    return {
        "source": document.source,
        "title": document.title,
        "ref": document.ref,
        "n_chars": len(document.text),
        "metadata": metadata,
    }


def _sealed(record: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(record) | {"checksum": _checksum(record)}).encode()


def _checksum(record: Mapping[str, Any]) -> int:
    return xxhash.xxh3_64(json.dumps(record).encode()).intdigest()


def _key(source: str) -> bytes:
    return xxhash.xxh3_128(source.encode(errors="surrogatepass")).digest()
