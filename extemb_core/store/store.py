"""Store on disk: compressed documents by ref and fingerprint, written once and read by any number of processes.

It uses LMDB, so that a process killed at any moment loses nothing that was acknowledged; see `blocks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

from extemb_core.errors import ConfigError, MismatchError, StoreError
from extemb_core.models.compressed import Compressed
from extemb_core.store.base import checked_ratio
from extemb_core.store.blocks import Blocks
from extemb_core.store.format import (
    DTYPES,
    Dtype,
    check_description,
    check_dtype,
    describe,
    encode,
    key_of,
    prepare,
    ref_of,
)
from extemb_core.store.lmdb_env import Environment, open_environment
from extemb_core.store.maintenance import StoreStats, Verified, keys_in, move, sparse, stats_of, verify
from extemb_core.utils.batches import batches
from extemb_core.utils.validation import path_of, whole_number

T = TypeVar("T")

_WRITE_BYTES = 64 * 2**20  # per transaction when blocks are moved


class EmbeddingStore:
    """Keeps compressed documents on disk by ref and fingerprint, each at its finest ratio. See `open`.

    One object may be used from several threads, several objects may be open on one folder, and any number of processes
    may read while one writes; writers wait for each other.
    """

    def __init__(self, environment: Environment, dtype: Dtype = "float16", *, readonly: bool = False) -> None:
        self.environment = environment
        self.dtype = dtype
        self.readonly = readonly  # another store of this process may have the environment open for writing
        self._closing = ExitStack()
        self._closing.callback(environment.close)
        self._blocks = Blocks(environment)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], mode: Literal["r", "a"] = "a", *, dtype: Dtype = "float16"
    ) -> EmbeddingStore:
        """Open a store.

        Args:
            path: Folder of the store.
            mode: "r" reads; "a" reads and writes, and makes the folder if there is none.
            dtype: Data type of new embeddings. "float16" rounds to 11 bits and is right for everything but tests of
                exactness, which need "float32"; "int8" halves the size, with a scale for each vector.

        Raises:
            StoreNotFoundError: The mode is "r", and there is no store.
            StoreCorruptError: The store is damaged.
            StoreError: The folder is something else, or may not be read or written.
        """
        if mode not in ("r", "a"):
            raise ConfigError(f"mode={mode!r} is neither 'r' nor 'a'; pass 'r' to read, 'a' to read and write")
        check_dtype(dtype)
        folder = path_of(path)
        if mode == "a":
            prepare(folder)
        check_description(folder)
        store = cls(open_environment(folder, readonly=mode == "r"), dtype, readonly=mode == "r")
        if mode == "a":
            try:
                describe(folder)  # earlier versions of this library must not read what this one will write
            except BaseException:
                store.close()
                raise
        return store

    @property
    def path(self) -> Path:
        """Folder of the store."""
        return self.environment.folder

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self._closing.close()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """Return the text at `ratio`, derived from a finer one if need be, or None if it is not here.

        Raises:
            ConfigError: No document has such a ref, no embedder such a fingerprint, or the ratio cannot be.
            StoreCorruptError: Its bytes are not what was written.
        """
        return self.get_many([ref], fingerprint, ratio)[0]

    def get_many(self, refs: Sequence[str], fingerprint: str, ratio: int) -> list[Compressed | None]:
        """Call `get` for several documents, in one transaction."""
        keys, ratio = [key_of(ref, fingerprint) for ref in refs], checked_ratio(ratio)
        with self.environment.read() as transaction:
            return [self._blocks.at(transaction, key, ratio) for key in keys]

    def missing(self, refs: Iterable[str], fingerprint: str, ratio: int) -> list[str]:
        """List the refs whose documents are not here at `ratio`; no embeddings are read."""
        listed = list(refs)
        with self.environment.read() as transaction:
            return self.missing_within(transaction, listed, fingerprint, ratio)

    def missing_within(self, transaction: Any, refs: Iterable[str], fingerprint: str, ratio: int) -> list[str]:
        """Call `missing` within a transaction, such as that of a `write` that relies on the result."""
        ratio = checked_ratio(ratio)
        return [ref for ref in refs if not self._blocks.holds(transaction, key_of(ref, fingerprint), ratio)]

    def finest(self, ref: str, fingerprint: str) -> Compressed | None:
        """Return the text at the stored ratio, or None if it is not here."""
        key = key_of(ref, fingerprint)
        with self.environment.read() as transaction:
            return self._blocks.at(transaction, key)

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield (ref, fingerprint) of every document."""
        for ref, fingerprint, _ in self.entries():
            yield ref, fingerprint

    def entries(self) -> Iterator[tuple[str, str, Dtype]]:
        """Yield (ref, fingerprint, dtype on disk) of every document."""
        for key, entry, kind in self._blocks.entries():
            yield ref_of(key), kind.fingerprint, DTYPES[entry.dtype]

    def __contains__(self, item: tuple[str, str]) -> bool:
        key = key_of(*item)
        with self.environment.read() as transaction:
            return self.environment.get(transaction, "entries", key) is not None

    def __len__(self) -> int:
        with self.environment.read() as transaction:
            return self.environment.count(transaction, "entries")

    def stats(self) -> StoreStats:
        """Count the documents and the space they take.

        Raises:
            StoreError: The folder was removed, moved or replaced while it was open.
        """
        return stats_of(self._blocks)

    def verify(self) -> Verified:
        """Read everything and compare it with its checksums."""
        return verify(self._blocks)

    # -- writing ----------------------------------------------------------------------------------------------

    def put(self, *texts: Compressed, dtype: Dtype | None = None) -> None:
        """Keep texts, except those that can be derived from what is here; all are on disk when this returns.

        Args:
            *texts: Texts to keep.
            dtype: Data type to keep them in; the store's own when not given.

        Raises:
            StoreError: The store is read-only, or the disk refuses; then none of them was kept.
            MismatchError: One of them enters above layer 0, and the dtype is int8; none of them was kept.
        """
        for text in texts:
            for name, least in (("ratio", 1), ("n_tokens", 0)):
                whole_number(getattr(text, name), name, least, remedy="a text as it was compressed")
        finest_last = sorted(texts, key=attrgetter("ratio"), reverse=True)
        finest = {key_of(text.ref, text.fingerprint): text for text in finest_last}
        coded = [(key, text, *encode(text, dtype or self.dtype)) for key, text in finest.items()]
        if coded:
            self.write(lambda transaction: self._blocks.put(transaction, coded))

    def remove(self, refs: Iterable[str], fingerprint: str | None = None) -> int:
        """Remove documents, as compressed by one embedder or by all. Returns how many entries were removed."""
        wanted = list(refs)
        return self.write(lambda transaction: sum(self.forget(transaction, ref, fingerprint) for ref in wanted))

    def forget(self, transaction: Any, ref: str, fingerprint: str | None = None) -> int:
        """Remove one document within a transaction of `write`. Returns how many entries were removed."""
        keys = self._blocks.keys_of(transaction, ref, fingerprint)
        for key in keys:
            self._blocks.forget(transaction, key)
        return len(keys)

    def gc(self, *, keep: Sequence[str] | None = None) -> int:
        """Free what nothing refers to, and join small blocks; space in the file is used again, not given back.

        Args:
            keep: Fingerprints of the embedders whose documents stay; all when not given.

        Returns:
            Bytes freed for reuse.
        """
        before = self.stats()
        if keep is not None:
            unknown = set(keep) - set(before.by_fingerprint)
            if unknown:
                raise MismatchError(
                    f"no document here is of the embedder {min(unknown)!r}; pass fingerprints that its stats list"
                )
            for fingerprint in set(before.by_fingerprint) - set(keep):
                self.remove([ref for ref, embedder in self.items() if embedder == fingerprint], fingerprint)
        chosen = sparse(self._blocks)
        keys = keys_in(self._blocks, {number for number, _ in chosen})
        for group in batches(chosen, itemgetter(1), _WRITE_BYTES):
            self.write(partial(move, self._blocks, {number: keys[number] for number, _ in group}))
        return before.block_bytes - self.stats().block_bytes

    def write(self, work: Callable[[Any], T]) -> T:
        """Run `work(transaction)` over the databases of this folder and commit: see `Environment.write`."""
        self.require_writable()
        return self.environment.write(work)

    def require_writable(self) -> None:
        """Raise `StoreError` if the store is read-only, before long work that would end in that error."""
        if self.readonly:
            raise StoreError(f"{self.path} was opened to read; open it with mode='a' to write")
