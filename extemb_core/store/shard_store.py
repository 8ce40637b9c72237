"""Store that reads a folder of shards in place, on this machine or in object storage."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np

from extemb_core.errors import ConfigError, StoreError
from extemb_core.models.compressed import Compressed
from extemb_core.store.base import Store, checked_ratio
from extemb_core.store.format import ref_bytes
from extemb_core.store.remote import StorageLocation, is_url
from extemb_core.store.shards import MANIFEST, Array, open_shards, read_manifest
from extemb_core.store.store import EmbeddingStore
from extemb_core.utils.validation import path_of


class ShardStore:
    """Read-only store over the shards that a manifest names. Reads no more than it is asked for.

    It reads what a distributed job or an export wrote; `import_shards` copies that into a store on this machine
    instead, which is faster to read.

    Args:
        folder: A path, or a URL that fsspec knows.
        verify: Compare every file with its sha256 first, which reads all files; each document is compared with its
            checksum in any case.

    Raises:
        StoreNotFoundError: There is no manifest.
        StoreCorruptError: The manifest does not fit the shards.
    """

    readonly = True

    def __init__(self, folder: str | os.PathLike[str], *, verify: bool = False) -> None:
        self._location = StorageLocation(folder)
        self._readers = open_shards(self._location, read_manifest(self._location, verify=verify))
        # For each embedder: refs, (E,) of 16 bytes, sorted; and (E, 3) ratio, shard, and index in the shard.
        self._documents: dict[str, tuple[Array, Array]] = {}
        for fingerprint in {reader.kind.fingerprint for reader in self._readers}:
            shards = [(at, one) for at, one in enumerate(self._readers) if one.kind.fingerprint == fingerprint]
            refs = np.concatenate([reader.refs.view("S16")[:, 0] for _, reader in shards])
            where = [np.stack([one.ratios, np.full(len(one), at), np.arange(len(one))], 1) for at, one in shards]
            finest_first = np.argsort(np.concatenate(where)[:, 0], kind="stable")
            refs, first = np.unique(refs[finest_first], return_index=True)
            self._documents[fingerprint] = refs, np.concatenate(where)[finest_first[first]]

    def __len__(self) -> int:
        """Return the number of documents, each counted once for every embedder that compressed it."""
        return sum(len(refs) for refs, _ in self._documents.values())

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """Return the text at `ratio`, derived from a finer one if need be, or None if it is not here.

        Raises:
            RatioError: The ratio is not a whole number of at least 1.
            StoreCorruptError: Its bytes are not what was written.
        """
        ratio = checked_ratio(ratio)
        if fingerprint not in self._documents:
            return None
        refs, where = self._documents[fingerprint]
        wanted = np.frombuffer(ref_bytes(ref), "S16")
        row = int(np.searchsorted(refs, wanted)[0])
        if row == len(refs) or refs[row] != wanted[0]:
            return None
        stored_ratio, shard, at = map(int, where[row])
        return None if ratio % stored_ratio else self._readers[shard].text(at).derived(ratio)

    def put(self, *texts: Compressed) -> None:
        """Raise `StoreError`: shards are never changed."""
        raise StoreError(f"{self._location} is a folder of shards, which are never changed; import it into a store")


def is_sharded(where: str | os.PathLike[str]) -> bool:
    """Return whether a store to be opened is a folder of shards: a URL, or a folder with a manifest."""
    return is_url(where) or (path_of(where) / MANIFEST).is_file()


def open_store(store: str | os.PathLike[str] | Store | None, mode: Literal["r", "a"] = "a") -> Store | None:
    """Open the store of a folder or URL, to read or to add to it; one that is open already stays as it is."""
    if not isinstance(store, str | os.PathLike):
        if store is not None and not hasattr(store, "put"):
            raise ConfigError(f"store={store!r:.80} is neither a folder nor a store; pass one of them")
        return store
    return ShardStore(store) if is_sharded(store) else EmbeddingStore.open(store, mode)
