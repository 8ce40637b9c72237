"""A folder of shards read as a store, where it lies: on this machine or in object storage."""

from __future__ import annotations

from pathlib import Path

from extemb_core.errors import StoreError
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import ref_bytes
from extemb_core.store.remote import StorageLocation, is_url
from extemb_core.store.shards import MANIFEST, ShardReader, read_manifest


class ShardStore:
    """The documents of the shards that a manifest names; nothing can be put. Of each no more is read than is asked for.

    What a distributed job or an export wrote is asked right where it is; `import_shards` takes it into a store on this
    machine instead, which is faster to read.

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
        self.place = StorageLocation(folder)
        self._readers = [ShardReader(self.place, shard.file) for shard in read_manifest(self.place, verify=verify)]
        self._found: dict[tuple[bytes, str], tuple[int, int, int]] = {}  # ratio, reader, place in it
        for number, reader in enumerate(self._readers):
            for at, (ref, ratio) in enumerate(zip(reader.refs, reader.ratios.tolist(), strict=True)):
                key = ref.tobytes(), reader.kind.fingerprint
                if key not in self._found or ratio < self._found[key][0]:
                    self._found[key] = ratio, number, at

    def __len__(self) -> int:
        """Documents, each counted once for every embedder that compressed it."""
        return len(self._found)

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """The text at `ratio`, if it is here at that ratio or at a finer one it can be derived from.

        Raises:
            StoreCorruptError: Its bytes are not what was written.
        """
        found = self._found.get((ref_bytes(ref), fingerprint))
        if found is None or ratio % found[0]:
            return None
        _, number, at = found
        return self._readers[number].text(at).at_ratio(ratio)

    def put(self, *texts: Compressed) -> None:
        """Raises `StoreError`: shards are never changed."""
        raise StoreError(f"{self.place} is a folder of shards, which are never changed; import it into a store")


def is_sharded(where: str | Path) -> bool:
    """Whether a store to be opened is a folder of shards: a URL, or a folder with a manifest."""
    return is_url(where) or (Path(where) / MANIFEST).is_file()
