"""Looking after a store: what is in it, whether it is what was written, and making room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from extemb_core.errors import StoreCorruptError
from extemb_core.store.blocks import BLOCK_BYTES, Blocks
from extemb_core.store.format import COUNT, NUMBER, Block, Entry, ref_of

_SMALL_BLOCK_BYTES = BLOCK_BYTES // 4


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What is in a store.

    Attributes:
        n_documents: Texts, each counted once for every embedder that compressed it.
        n_tokens: Of these texts.
        n_embeddings: Of these texts.
        live_bytes: What their embeddings take.
        block_bytes: The same and what was replaced or removed since; `gc` frees the difference for reuse.
        file_bytes: Size of the file. Freed space is used again and never given back: export and import to shrink it.
        by_fingerprint: Documents of each embedder.
    """

    n_documents: int
    n_tokens: int
    n_embeddings: int
    live_bytes: int
    block_bytes: int
    file_bytes: int
    by_fingerprint: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` found.

    Attributes:
        n_documents: That were read and are what was written.
        damaged: (ref, fingerprint, reason) of those that are not.
        problems: What else does not fit together.
    """

    n_documents: int
    damaged: tuple[tuple[str, str, str], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return not self.damaged and not self.problems


def stats_of(blocks: Blocks) -> StoreStats:
    """What is here, and what it takes."""
    tokens = embeddings = live = 0
    by_fingerprint: dict[str, int] = {}
    count = 0
    for _, entry, kind in blocks.entries():
        count += 1
        tokens += entry.n_tokens
        embeddings += entry.n_embeddings
        live += kind.size(entry)
        by_fingerprint[kind.fingerprint] = by_fingerprint.get(kind.fingerprint, 0) + 1
    with blocks.environment.read() as transaction:
        (values,) = blocks.databases("blocks")
        taken = 0 if values is None else sum(len(value) for _, value in transaction.cursor(db=values))
    return StoreStats(
        n_documents=count,
        n_tokens=tokens,
        n_embeddings=embeddings,
        live_bytes=live,
        block_bytes=taken,
        file_bytes=blocks.environment.file_bytes(),
        by_fingerprint=by_fingerprint,
    )


def verify(blocks: Blocks) -> Verified:
    """Read everything and compare it with its checksums."""
    good = 0
    damaged: list[tuple[str, str, str]] = []
    problems: list[str] = []
    with blocks.environment.read() as transaction:
        entries, values, live = blocks.databases("entries", "blocks", "live")
        if entries is None:
            return Verified(n_documents=0)
        found: dict[int, int] = {}
        for data, value in transaction.cursor(db=entries):
            key, entry, name = bytes(data), Entry.unpack(value), "?"
            found[entry.block] = found.get(entry.block, 0) + blocks.size(transaction, key, entry)
            try:
                kind = blocks.kind(transaction, key, entry)
                name = kind.fingerprint
                blocks.payload(transaction, key, entry, kind)
                good += 1
            except StoreCorruptError as error:
                damaged.append((ref_of(key), name, str(error)))
        counted = {NUMBER.unpack(key)[0]: COUNT.unpack(value)[0] for key, value in transaction.cursor(db=live)}
        present = {NUMBER.unpack(key)[0] for key in transaction.cursor(db=values).iternext(values=False)}
        problems += [
            f"block {at} holds {found.get(at, 0):,} bytes of documents, and {counted.get(at, 0):,} are noted"
            for at in sorted(found.keys() | counted.keys())
            if found.get(at, 0) != counted.get(at, 0)
        ]
        problems += [f"block {at} belongs to no document" for at in sorted(present - found.keys())]
    return Verified(n_documents=good, damaged=tuple(damaged), problems=tuple(problems))


def sparse(blocks: Blocks) -> list[tuple[int, int]]:
    """(number, live bytes) of the blocks with gaps, and of the small ones if there are several."""
    with blocks.environment.read() as transaction:
        values, live = blocks.databases("blocks", "live")
        sizes = {NUMBER.unpack(key)[0]: len(value) for key, value in transaction.cursor(db=values)}
        counted = {NUMBER.unpack(key)[0]: COUNT.unpack(value)[0] for key, value in transaction.cursor(db=live)}
    small = [at for at, size in sizes.items() if size < _SMALL_BLOCK_BYTES]
    chosen = {at for at, size in sizes.items() if counted.get(at, 0) < size}
    chosen |= set(small) if len(small) > 1 else set()
    return [(at, counted.get(at, 0)) for at in sorted(chosen, reverse=True)]


def move(blocks: Blocks, transaction: Any, numbers: set[int]) -> None:
    """Write the documents of some blocks anew, together."""
    entries = blocks.environment.database("entries")
    moved = [(bytes(key), Entry.unpack(value)) for key, value in transaction.cursor(db=entries)
             if Entry.unpack(value).block in numbers]  # fmt: skip
    block = Block()
    for key, entry in moved:
        # Checked, as damage is not to be sealed with a new checksum; a copy, as writing may move what it is a view of.
        payload = bytes(blocks.payload(transaction, key, entry, blocks.kind(transaction, key, entry)))
        blocks.add(transaction, block, key, entry, payload)
    blocks.put_block(transaction, block)
