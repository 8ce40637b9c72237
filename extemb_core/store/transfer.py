"""Export a store to shards and import them: to other machines, to object storage and into another store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import groupby

from extemb_core.errors import StoreError, StoreNotFoundError
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import Dtype, EmbeddingFormat, n_bytes
from extemb_core.store.remote import StorageLocation
from extemb_core.store.shards import (
    EXPORTED,
    MANIFEST,
    SUFFIX,
    Shard,
    ShardReader,
    parse_manifest,
    read_manifest,
    require_only_shards,
    write_manifest,
    write_shard,
)
from extemb_core.store.store import EmbeddingStore
from extemb_core.utils.batches import batches
from extemb_core.utils.files import locked_folder, make_folder
from extemb_core.utils.progress import progress
from extemb_core.utils.validation import whole_number

SHARD_BYTES = 256 * 2**20
_PUT_BYTES = 32 * 2**20  # per transaction


def export_store(
    store: EmbeddingStore,
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = SHARD_BYTES,
    show_progress: bool | None = None,
) -> list[Shard]:
    """Write every document of a store, in its stored dtype, into shards and a manifest.

    Args:
        store: Store to export; documents that others write meanwhile may be exported or not.
        folder: A path or a URL that fsspec knows: a new or empty one, or one whose export was interrupted.
        shard_bytes: Approximate size of the embeddings of a shard.
        show_progress: Show a bar; None shows it on a terminal.

    Raises:
        ConfigError: `shard_bytes` is not positive.
        StoreError: The folder holds a finished export or other files, another export into it finished first, or the
            disk refuses.
    """
    whole_number(shard_bytes, "shard_bytes", remedy=f"e.g. {SHARD_BYTES}")
    location = StorageLocation(folder)
    names = require_only_shards(location, EXPORTED)
    if MANIFEST in names:
        raise StoreError(f"{location} holds an export already; pass another folder")
    for name in names:
        if name.endswith(SUFFIX):
            ShardReader(location, name)  # refuses a file that is not a shard
    left = [name for name in names if location.is_left(name)]  # left by an interrupted export
    for name in left:
        location.remove(name)
    others = set(names).difference(left)  # of another interrupted export, or of one that is running
    first = secrets.randbelow(10**15)  # another export may begin at the same time: use different numbers
    shards: list[Shard] = []
    try:
        with progress("export", len(store), show_progress) as advance:
            for dtype, texts in _groups(store, shard_bytes):
                shards.append(write_shard(location, f"shard-{first + len(shards):05d}", texts, dtype))
                advance(len(texts))
        with _alone(location) as alone:
            if alone and location.size(MANIFEST) is None:
                write_manifest(location, shards)
            if not alone or not _is_of(location, shards):
                raise StoreError(f"{location} holds an export that ended before this one did; pass another folder")
    except BaseException:
        with suppress(StoreError):  # report what ended the export, not errors of the clean-up
            if not _is_of(location, shards):
                for shard in shards:
                    location.remove(shard.file)
        raise
    for name in others:
        location.remove(name)
    return shards


def _alone(location: StorageLocation) -> AbstractContextManager[bool]:
    """Lock a local folder while its manifest is written; yields False if another export holds the lock."""
    if location.local is None:
        return nullcontext(True)
    make_folder(location.local, StoreError, "pass another folder")
    return locked_folder(location.local)


def _is_of(location: StorageLocation, shards: list[Shard]) -> bool:
    """Return whether the manifest of a folder names these shards."""
    with suppress(StoreNotFoundError):
        return parse_manifest(location) == shards
    return False


def import_shards(store: EmbeddingStore, folder: str | os.PathLike[str], *, show_progress: bool | None = None) -> int:
    """Put the documents of a folder of shards into a store, in the shards' dtypes: nothing is rounded again.

    Documents that can be derived from what is in the store stay as they are. Every file is compared with the manifest
    before the first document is put; after an interruption, make the same call again.

    Args:
        store: Store to put them into.
        folder: A path, or a URL that fsspec knows, with shards and their manifest.
        show_progress: Show a bar; None shows it on a terminal.

    Returns:
        Number of documents read.

    Raises:
        StoreNotFoundError, StoreCorruptError: The shards are not what was written.
        StoreError: The store is read-only, or the disk refuses.
    """
    location = StorageLocation(folder)
    shards = read_manifest(location)
    count = 0
    with progress("import", len(shards), show_progress) as advance:
        for shard in shards:
            reader = ShardReader(location, shard.file)
            for group in batches(reader.texts(), lambda text: text.embeddings.numel() * 4, _PUT_BYTES):
                store.put(*group, dtype=reader.dtype)
                count += len(group)
            advance(1)
    return count


def _groups(store: EmbeddingStore, shard_bytes: int) -> Iterator[tuple[Dtype, list[Compressed]]]:
    """Group documents by embedder and dtype, with about `shard_bytes` of embeddings in a group."""
    for fingerprint, dtype in sorted({(fingerprint, dtype) for _, fingerprint, dtype in store.entries()}):
        texts = (store.finest(ref, fingerprint) for ref, *kind in store.entries() if kind == [fingerprint, dtype])
        present = (text for text in texts if text is not None)  # None: removed meanwhile
        for _, alike in groupby(present, EmbeddingFormat.of):  # one fingerprint may have several formats
            size = partial(_size, dtype)
            yield from ((dtype, group) for group in batches(alike, size, shard_bytes))


def _size(dtype: Dtype, text: Compressed) -> int:
    count, width = text.embeddings.shape
    return n_bytes(count, width, dtype, anchored=text.entry_layer > 0)
