"""Store that reads a folder of shards where it is: on this machine or in object storage."""

from __future__ import annotations

from pathlib import Path

from extemb_core.errors import StoreError
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import ref_bytes
from extemb_core.store.remote import StorageLocation, is_url
from extemb_core.store.shards import MANIFEST, ShardReader, read_manifest


class ShardStore:
    """Read-only store over the shards that a manifest names. Reads no more than it is asked for.

    It serves what a distributed job or an export wrote; `import_shards` takes that into a store on this machine
    instead, which is faster to read.

    Args:
        folder: A path, or a URL that fsspec knows.
        verify: Compare every file with its sha256 first, which reads all of it; each document is compared with its
            checksum in any case.

    Raises:
        StoreNotFoundError: There is no manifest.
        StoreCorruptError: It does not fit the shards.
    """

    readonly = True

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self._location = StorageLocation(folder)
        shards = read_manifest(self._location, verify=verify)
        self._entries: dict[tuple[bytes, str], tuple[int, ShardReader, int]] = {}  # ratio, shard, index in it
        for reader in [ShardReader(self._location, shard.file) for shard in shards]:
            for at, (ref, ratio) in enumerate(zip(reader.refs, reader.ratios.tolist(), strict=True)):
                key = ref.tobytes(), reader.kind.fingerprint
                if key not in self._entries or ratio < self._entries[key][0]:
                    self._entries[key] = ratio, reader, at

    def __len__(self) -> int:
        """Count the documents, each once for every embedder that compressed it."""
        return len(self._entries)

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """Return the text at `ratio`, derived from a finer one if need be, or None if it is not here.

        Raises:
            StoreCorruptError: Its bytes are not what was written.
        """
        entry = self._entries.get((ref_bytes(ref), fingerprint))
        if entry is None or ratio % entry[0]:
            return None
        _, reader, at = entry
        return reader.text(at).at_ratio(ratio)

    def put(self, *texts: Compressed) -> None:
        """Raise `StoreError`: shards are never changed."""
        raise StoreError(f"{self._location} is a folder of shards, which are never changed; import it into a store")


def is_sharded(where: str | Path) -> bool:
    """Return True if a store to be opened is a folder of shards: a URL, or a folder with a manifest."""
    return is_url(where) or (Path(where) / MANIFEST).is_file()
