"""Maintain a store: count its content, verify that it is what was written, and free space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from extemb_core.errors import StoreCorruptError
from extemb_core.store.blocks import BLOCK_BYTES, Blocks
from extemb_core.store.format import COUNT, NUMBER, Entry, ref_of
from extemb_core.store.lmdb_env import DATA_FILE

LOST = "?"  # stands for a fingerprint that is lost
_SMALL_BLOCK_BYTES = BLOCK_BYTES // 4


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Counts and sizes of a store.

    Attributes:
        n_documents: Texts, each counted once for every embedder that compressed it.
        n_tokens: Tokens of these texts.
        n_embeddings: Embeddings of these texts.
        live_bytes: Bytes of their embeddings.
        block_bytes: Bytes of the blocks, with replaced and removed embeddings; `gc` frees the difference for reuse.
        file_bytes: Size of the file. Freed space is used again and never given back: export and import to shrink it.
        by_fingerprint: Number of documents of each embedder.
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
    """Result of `verify`.

    Attributes:
        n_documents: Documents that are what was written.
        damaged: (ref, fingerprint, reason) of those that are not.
        problems: Other inconsistencies, in words.
    """

    n_documents: int
    damaged: tuple[tuple[str, str, str], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.damaged and not self.problems


def stats_of(blocks: Blocks) -> StoreStats:
    """Count the documents and the space they take."""
    blocks.environment.require_in_place()
    tokens = embeddings = live = 0
    by_fingerprint: Counter[str] = Counter()
    for _, entry, kind in blocks.entries():
        tokens += entry.n_tokens
        embeddings += entry.n_embeddings
        live += kind.size(entry)
        by_fingerprint[kind.fingerprint] += 1
    with blocks.environment.read() as transaction:
        block_bytes = sum(len(value) for _, value in blocks.environment.rows(transaction, "blocks"))
    return StoreStats(
        n_documents=by_fingerprint.total(),
        n_tokens=tokens,
        n_embeddings=embeddings,
        live_bytes=live,
        block_bytes=block_bytes,
        file_bytes=(blocks.environment.folder / DATA_FILE).stat().st_size,
        by_fingerprint=dict(by_fingerprint),
    )


def verify(blocks: Blocks) -> Verified:
    """Read everything and compare it with its checksums."""
    good = 0
    damaged: list[tuple[str, str, str]] = []
    with blocks.environment.read() as transaction:
        held: Counter[int] = Counter()  # bytes of documents in each block
        for data, value in blocks.environment.rows(transaction, "entries"):
            key, entry, name = bytes(data), Entry.unpack(value), LOST
            held[entry.block] += blocks.size(transaction, key, entry)
            try:
                name = blocks.kind(transaction, key, entry).fingerprint
                blocks.at(transaction, key)
                good += 1
            except StoreCorruptError as error:
                damaged.append((ref_of(key), name, str(error)))
        sizes, counted = _sizes(blocks, transaction)
    problems = [
        f"block {at} holds {held[at]:,} bytes of documents, and {counted.get(at, 0):,} are noted"
        for at in sorted(held.keys() | counted.keys())
        if held[at] != counted.get(at, 0)
    ]
    problems += [f"block {at} belongs to no document" for at in sorted(sizes.keys() - held.keys())]
    return Verified(n_documents=good, damaged=tuple(damaged), problems=tuple(problems))


def sparse(blocks: Blocks) -> list[tuple[int, int]]:
    """List (number, live bytes) of the blocks with gaps, and of the small ones if there are several."""
    with blocks.environment.read() as transaction:
        sizes, counted = _sizes(blocks, transaction)
    small = [at for at, size in sizes.items() if size < _SMALL_BLOCK_BYTES]
    with_gaps = [at for at, size in sizes.items() if counted.get(at, 0) < size]
    chosen = {*with_gaps, *(small if len(small) > 1 else ())}
    return [(at, counted.get(at, 0)) for at in sorted(chosen)]


def keys_in(blocks: Blocks, numbers: set[int]) -> dict[int, list[bytes]]:
    """List the keys of the documents in some blocks, by block."""
    keys: dict[int, list[bytes]] = {number: [] for number in numbers}
    for key, value in blocks.environment.items("entries"):
        if (number := Entry.unpack(value).block) in keys:
            keys[number].append(key)
    return keys


def move(blocks: Blocks, keys: Mapping[int, Sequence[bytes]], transaction: Any) -> None:
    """Rewrite the documents of some blocks together, except those that have gone meanwhile."""
    rows = ((key, blocks.environment.get(transaction, "entries", key)) for key in chain(*keys.values()))
    there = ((key, Entry.unpack(value)) for key, value in rows if value is not None)
    entries = [(key, entry) for key, entry in there if entry.block in keys]
    # `payload` checks it, as a new checksum must not hide damage; a copy, as writing may move what it is a view of.
    blocks.write(transaction, ((key, entry, bytes(blocks.payload(transaction, key, entry))) for key, entry in entries))


def _sizes(blocks: Blocks, transaction: Any) -> tuple[dict[int, int], dict[int, int]]:
    """Return the bytes of each block, and the bytes in each that are noted as live."""
    values, live = (blocks.environment.rows(transaction, name) for name in ("blocks", "live"))
    sizes = {NUMBER.unpack(key)[0]: len(value) for key, value in values}
    return sizes, {NUMBER.unpack(key)[0]: COUNT.unpack(value)[0] for key, value in live}
