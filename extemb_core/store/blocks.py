"""Documents in shared blocks, transaction by transaction: what `EmbeddingStore` is made of.

    entries   ref, fingerprint -> block, offset, tokens, embeddings, ratio, kind, dtype, checksum
    blocks    number -> embeddings of one or more documents
    live      number -> bytes of the block that entries refer to; at 0 the block goes
    kinds     number -> the embedder's fingerprint, chunk size, ratios, down-scaling, width and entry layer

LMDB keeps large values in whole pages; documents that are put together share one, so that little is lost to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from extemb_core.errors import StoreCorruptError
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import (
    COUNT,
    DTYPES,
    NUMBER,
    Block,
    Dtype,
    EmbeddingFormat,
    Entry,
    key_of,
    name_in,
    ref_bytes,
    ref_of,
)
from extemb_core.store.lmdb_env import Environment

BLOCK_BYTES = 4 * 2**20


class Blocks:
    """The databases of a store. Every method but `entries` works within a transaction of its environment.

    Nothing is remembered from one to the next: what a transaction wrote is there once it is committed, which it may
    never be.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment

    def databases(self, *names: str) -> list[Any]:
        return [self.environment.database(name) for name in names]

    def at(self, transaction: Any, key: bytes, ratio: int | None = None) -> Compressed | None:
        """The document of a key, at a ratio or at the one it is kept at."""
        entries = self.environment.database("entries")
        data = None if entries is None else transaction.get(key, db=entries)
        if data is None:
            return None
        entry = Entry.unpack(data)
        if ratio is not None and ratio % entry.ratio:
            return None
        kind = self.kind(transaction, key, entry)
        payload = self.payload(transaction, key, entry, kind)
        kept = kind.decode(payload, entry, ref_of(key))
        return kept if ratio in (None, kept.ratio) else kept.at_ratio(ratio)

    def entries(self) -> Iterator[tuple[bytes, Entry, EmbeddingFormat]]:
        """Everything that is here, with its key; no transaction stays open while the caller works."""
        kinds: dict[tuple[int, bytes], EmbeddingFormat] = {}  # committed, and rows never go
        for key, value in self.environment.items("entries"):
            entry = Entry.unpack(value)
            own = entry.kind, name_in(key)
            if own not in kinds:
                with self.environment.read() as transaction:
                    kinds[own] = self.kind(transaction, key, entry)
            yield key, entry, kinds[own]

    def kind(self, transaction: Any, key: bytes, entry: Entry) -> EmbeddingFormat:
        """What a document is of. Raises `StoreCorruptError` when that is lost."""
        data = transaction.get(NUMBER.pack(entry.kind), db=self.environment.database("kinds"))
        if data is not None and EmbeddingFormat.parse(data).made(key):
            return EmbeddingFormat.parse(data)
        # Earlier versions lost rows, and the numbers became other embedders'. With the next document that its embedder
        # puts there is a row again, under whatever number.
        for _, kind in self._kinds(transaction):
            if kind.made(key):
                return kind
        raise StoreCorruptError(
            f"{self.environment.folder}: the settings of the embedder of {ref_of(key)} are lost; compress any new "
            "document with that embedder, which brings them back, or remove that ref and compress the document again"
        )

    def size(self, transaction: Any, key: bytes, entry: Entry) -> int:
        """Bytes of a document's embeddings, by their checksum where its kind is lost. 0 where they are damaged too: a
        count of the block that stays too high keeps the others in it."""
        try:
            return self.kind(transaction, key, entry).size(entry)
        except StoreCorruptError:
            return entry.size_in(key, self._from(transaction, entry))

    def payload(self, transaction: Any, key: bytes, entry: Entry, kind: EmbeddingFormat) -> memoryview:
        """A document's bytes, a view of the file. Raises `StoreCorruptError` when they are not what was written."""
        size = kind.size(entry)
        payload = self._from(transaction, entry)[:size]
        if len(payload) != size or entry.sum_of(key, payload) != entry.checksum:
            raise StoreCorruptError(
                f"{self.environment.folder}: the embeddings of {ref_of(key)} are not what was written; remove "
                "that ref and compress the document again"
            )
        return payload

    def put(self, transaction: Any, coded: Sequence[tuple[bytes, Compressed, bytes, Dtype]]) -> None:
        """Write documents with their keys and bytes, but those that are here at a ratio at least as fine."""
        entries = self.environment.database("entries")
        block = Block()
        for key, text, payload, dtype in coded:
            # Before what is here is left as it is: it also makes documents readable whose kind was lost.
            kind = self._number_of(transaction, EmbeddingFormat.of(text))
            there = transaction.get(key, db=entries)
            if there is not None and Entry.unpack(there).ratio <= text.ratio:
                continue
            entry = Entry(0, 0, text.n_tokens, len(text), text.ratio, kind, DTYPES.index(dtype), 0)
            self.add(transaction, block, key, entry, payload)
        self.put_block(transaction, block)

    def add(self, transaction: Any, block: Block, key: bytes, entry: Entry, payload: Any) -> None:
        """Put a document into a block; a full one is written first."""
        if block.payload and len(block.payload) + len(payload) > BLOCK_BYTES:
            self.put_block(transaction, block)
        placed = replace(entry, offset=len(block.payload), checksum=entry.sum_of(key, payload))
        block.entries.append((key, placed))
        block.payload += payload

    def put_block(self, transaction: Any, block: Block) -> None:
        """Put a block and its entries into the databases, and empty it."""
        entries, blocks, live = self.databases("entries", "blocks", "live")
        if not block.entries:
            return
        cursor = transaction.cursor(db=live)
        number = NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else 0
        for key, entry in block.entries:
            self.forget(transaction, key)
            transaction.put(key, replace(entry, block=number).pack(), db=entries)
        transaction.put(NUMBER.pack(number), bytes(block.payload), db=blocks)
        transaction.put(NUMBER.pack(number), COUNT.pack(len(block.payload)), db=live)
        block.payload, block.entries = bytearray(), []

    def forget(self, transaction: Any, key: bytes) -> None:
        """Drop an entry, if it is there, and its block with the last of them."""
        entries, blocks, live = self.databases("entries", "blocks", "live")
        data = transaction.get(key, db=entries)
        if data is None:
            return
        entry = Entry.unpack(data)
        size = self.size(transaction, key, entry)
        transaction.delete(key, db=entries)
        name = NUMBER.pack(entry.block)
        left = COUNT.unpack(transaction.get(name, db=live) or COUNT.pack(0))[0] - size
        if left > 0:
            transaction.put(name, COUNT.pack(left), db=live)
        else:
            transaction.delete(name, db=live)
            transaction.delete(name, db=blocks)

    def keys_of(self, transaction: Any, ref: str, fingerprint: str | None) -> list[bytes]:
        """Of a document: of one embedder, or of all."""
        entries = self.environment.database("entries")
        if fingerprint is not None:
            key = key_of(ref, fingerprint)
            return [key] if transaction.get(key, db=entries) is not None else []
        start = ref_bytes(ref)
        cursor = transaction.cursor(db=entries)
        keys = []
        found = cursor.set_range(start)
        while found and bytes(cursor.key())[:16] == start:
            keys.append(bytes(cursor.key()))
            found = cursor.next()
        return keys

    def _from(self, transaction: Any, entry: Entry) -> memoryview:
        """A block from a document on, a view of the file."""
        block = transaction.get(NUMBER.pack(entry.block), db=self.environment.database("blocks"))
        return memoryview(b"" if block is None else block)[entry.offset :]

    def _kinds(self, transaction: Any) -> Iterator[tuple[int, EmbeddingFormat]]:
        for key, value in transaction.cursor(db=self.environment.database("kinds")):
            yield int(NUMBER.unpack(key)[0]), EmbeddingFormat.parse(value)

    def _number_of(self, transaction: Any, kind: EmbeddingFormat) -> int:
        number = -1
        for number, known in self._kinds(transaction):
            if known == kind:
                return number
        transaction.put(NUMBER.pack(number + 1), kind.to_bytes(), db=self.environment.database("kinds"))
        return number + 1
