"""Store documents in shared blocks, transaction by transaction, for `EmbeddingStore`.

    entries   ref, fingerprint -> block, offset, tokens, embeddings, ratio, kind, dtype, checksum
    blocks    number -> embeddings of one or more documents
    live      number -> bytes of the block that entries refer to; at 0 the block goes
    kinds     number -> the embedder's fingerprint, chunk size, ratios, down-scaling, width and entry layer

LMDB keeps large values in whole pages; documents that are put together share a block, so that little space is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from extemb_core.errors import StoreCorruptError
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import COUNT, NUMBER, Dtype, EmbeddingFormat, Entry, key_of, name_in, ref_bytes, ref_of
from extemb_core.store.lmdb_env import Environment

BLOCK_BYTES = 4 * 2**20


class Blocks:
    """Databases of a store. Every method but `entries` works within a transaction of its environment.

    No state is kept between transactions: what one wrote may still be rolled back.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def at(self, transaction: Any, key: bytes, ratio: int | None = None) -> Compressed | None:
        """Return the document of a key, at a ratio or at the stored one; None if it is not here at that ratio."""
        data = self.environment.get(transaction, "entries", key)
        if data is None:
            return None
        entry = Entry.unpack(data)
        if ratio is not None and ratio % entry.ratio:
            return None
        payload = self.payload(transaction, key, entry)
        text = self.kind(transaction, key, entry).decode(payload, entry, ref_of(key))
        return text if ratio in (None, entry.ratio) else text.derived(ratio)

    def holds(self, transaction: Any, key: bytes, ratio: int) -> bool:
        """Return whether the document of a key is here at a ratio, without reading it."""
        data = self.environment.get(transaction, "entries", key)
        return data is not None and ratio % Entry.unpack(data).ratio == 0

    def entries(self) -> Iterator[tuple[bytes, Entry, EmbeddingFormat]]:
        """Yield every entry with its key and format; no transaction stays open while the caller works."""
        kinds: dict[tuple[int, bytes], EmbeddingFormat] = {}  # may be remembered: rows are never removed
        for key, value in self.environment.items("entries"):
            entry = Entry.unpack(value)
            embedder = entry.kind, name_in(key)
            if embedder not in kinds:
                with self.environment.read() as transaction:
                    kinds[embedder] = self.kind(transaction, key, entry)
            yield key, entry, kinds[embedder]

    def kind(self, transaction: Any, key: bytes, entry: Entry) -> EmbeddingFormat:
        """Return the format of a document. Raises `StoreCorruptError` if it is lost."""
        data = self.environment.get(transaction, "kinds", NUMBER.pack(entry.kind))
        if data is not None and (kind := EmbeddingFormat.parse(bytes(data))).matches(key):
            return kind
        # Earlier versions could lose rows and reuse their numbers. The embedder's next `put` adds its row again,
        # perhaps under another number, so look for it by fingerprint.
        for _, kind in self._kinds(transaction):
            if kind.matches(key):
                return kind
        raise StoreCorruptError(
            f"{self.environment.folder}: the settings of the embedder of {ref_of(key)} are lost; compress any new "
            "document with that embedder, which brings them back, or remove that ref and compress the document again"
        )

    def size(self, transaction: Any, key: bytes, entry: Entry) -> int:
        """Count the bytes of a document's embeddings; if its format is lost, find their size by the checksum.

        0 if they are damaged too: the block is then overcounted, and kept with its other documents.
        """
        try:
            return self.kind(transaction, key, entry).size(entry)
        except StoreCorruptError:
            return entry.size_in(key, self._from(transaction, entry))

    def payload(self, transaction: Any, key: bytes, entry: Entry) -> memoryview:
        """Read a document's bytes, a view of the file. Raises `StoreCorruptError` if they are not what was written."""
        size = self.kind(transaction, key, entry).size(entry)
        payload = self._from(transaction, entry)[:size]
        if len(payload) != size or entry.sum_of(key, payload) != entry.checksum:
            raise StoreCorruptError(
                f"{self.environment.folder}: the embeddings of {ref_of(key)} are not what was written; remove "
                "that ref and compress the document again"
            )
        return payload

    def put(self, transaction: Any, coded: Sequence[tuple[bytes, Compressed, bytes, Dtype]]) -> None:
        """Write documents with their keys and bytes, except those that can be derived from what is here."""
        new = []
        for key, text, payload, dtype in coded:
            # Done even if nothing has to be written: it makes documents readable again whose kind was lost.
            kind = self._number_of(transaction, EmbeddingFormat.of(text))
            stored = self.environment.get(transaction, "entries", key)
            if stored is not None and text.ratio % Entry.unpack(stored).ratio == 0:
                continue
            entry = Entry.of(text.n_tokens, len(text), text.ratio, dtype, kind)
            new.append((key, entry, payload))
        self.write(transaction, new)

    def write(self, transaction: Any, documents: Iterable[tuple[bytes, Entry, bytes]]) -> None:
        """Write documents, with their keys and bytes, over those of the same keys into new blocks."""
        payload = bytearray()
        entries: list[tuple[bytes, Entry]] = []
        for key, entry, data in documents:
            if payload and len(payload) + len(data) > BLOCK_BYTES:
                self._write_block(transaction, bytes(payload), entries)
                payload, entries = bytearray(), []
            entries.append((key, entry._replace(offset=len(payload), checksum=entry.sum_of(key, data))))
            payload += data
        if entries:
            self._write_block(transaction, bytes(payload), entries)

    def _write_block(self, transaction: Any, payload: bytes, documents: Sequence[tuple[bytes, Entry]]) -> None:
        entries, blocks, live = map(self.environment.database, ("entries", "blocks", "live"))
        cursor = transaction.cursor(db=live)
        number = NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else 0
        for key, entry in documents:
            self.forget(transaction, key)
            transaction.put(key, entry._replace(block=number).pack(), db=entries)
        transaction.put(NUMBER.pack(number), payload, db=blocks)
        transaction.put(NUMBER.pack(number), COUNT.pack(len(payload)), db=live)

    def forget(self, transaction: Any, key: bytes) -> None:
        """Drop an entry if it exists, and its block with the last entry in it."""
        entries, blocks, live = map(self.environment.database, ("entries", "blocks", "live"))
        data = transaction.get(key, db=entries)
        if data is None:
            return
        entry = Entry.unpack(data)
        size = self.size(transaction, key, entry)
        transaction.delete(key, db=entries)
        name = NUMBER.pack(entry.block)
        remaining = COUNT.unpack(transaction.get(name, db=live) or COUNT.pack(0))[0] - size
        if remaining > 0:
            transaction.put(name, COUNT.pack(remaining), db=live)
        else:
            transaction.delete(name, db=live)
            transaction.delete(name, db=blocks)

    def keys_of(self, transaction: Any, ref: str, fingerprint: str | None) -> list[bytes]:
        """Return the keys of a document, for one embedder or for all."""
        start = ref_bytes(ref) if fingerprint is None else key_of(ref, fingerprint)
        cursor = transaction.cursor(db=self.environment.database("entries"))
        cursor.set_range(start)
        return list(takewhile(lambda key: key.startswith(start), map(bytes, cursor.iternext(values=False))))

    def _from(self, transaction: Any, entry: Entry) -> memoryview:
        """Return a block from an entry's document on, a view of the file."""
        block = self.environment.get(transaction, "blocks", NUMBER.pack(entry.block))
        return memoryview(b"" if block is None else block)[entry.offset :]

    def _kinds(self, transaction: Any) -> Iterator[tuple[int, EmbeddingFormat]]:
        for key, value in self.environment.rows(transaction, "kinds"):
            yield int(NUMBER.unpack(key)[0]), EmbeddingFormat.parse(bytes(value))

    def _number_of(self, transaction: Any, kind: EmbeddingFormat) -> int:
        number = -1
        for number, known in self._kinds(transaction):
            if known == kind:
                return number
        transaction.put(NUMBER.pack(number + 1), kind.to_bytes(), db=self.environment.database("kinds"))
        return number + 1
