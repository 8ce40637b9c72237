"""Compressed documents as immutable safetensors shards with a manifest: for export, and from distributed jobs.

A shard holds documents of one embedder in one dtype:

    refs (E, 16) uint8, n_tokens (E,) int64, n_embeddings (E,) int64, ratios (E,) int64: the documents, in order
    payload (sum of bytes,) uint8: their embeddings as `coding` has them, one after another

Its settings are in the file's metadata. A file is written beside its place, pushed to the disk and renamed, so that
one with a shard's name is whole; the manifest comes last and names every shard with its size and sha256.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from extemb_core.errors import ConfigError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.files import whole, write_whole
from extemb_core.models.compressed import Compressed
from extemb_core.models.sources import sha256_of
from extemb_core.store.coding import Dtype, check_dtype, decode, encode, n_bytes
from extemb_core.store.records import Kind, ref_bytes, ref_of

MANIFEST = "manifest.json"
FORMAT, VERSION = "extemb-shards", 1
_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Shard:
    """A shard as the manifest names it."""

    file: str
    sha256: str
    size_bytes: int
    n_documents: int


def write_shard(folder: Path, name: str, texts: Sequence[Compressed], dtype: Dtype = "float16") -> Shard:
    """Write one shard, `folder/name.safetensors`; one of that name is replaced.

    Args:
        folder: Is made if it is not there.
        name: Without a suffix.
        texts: Of one embedder.
        dtype: Of the embeddings; float32 for all if a value is beyond it.

    Raises:
        ConfigError: There are none, or they are of several embedders.
        StoreError: The disk refuses; nothing is left of it.
    """
    kinds = {Kind.of(text) for text in texts}
    if len(kinds) != 1:
        raise ConfigError(f"a shard holds documents of one embedder, and {len(kinds)} were passed; write one for each")
    coded = [encode(text.embeddings, dtype) for text in texts]
    if any(own != dtype for _, own in coded):
        dtype = "float32"
        coded = [encode(text.embeddings, dtype) for text in texts]
    kind = kinds.pop()
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fingerprint": kind.fingerprint,
        "chunk_size": str(kind.chunk_size),
        "trained_ratios": json.dumps(kind.ratios),
        "downscaling": kind.downscaling,
        "width": str(kind.width),
        "dtype": dtype,
    }
    refs = [np.frombuffer(ref_bytes(text.ref), np.uint8) for text in texts]
    tensors = {
        "refs": torch.from_numpy(np.stack(refs)),
        "n_tokens": torch.tensor([text.n_tokens for text in texts]),
        "n_embeddings": torch.tensor([len(text) for text in texts]),
        "ratios": torch.tensor([text.ratio for text in texts]),
        "payload": torch.from_numpy(np.frombuffer(bytearray(b"".join(data for data, _ in coded)), np.uint8)),
    }
    place = folder / f"{name}{_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole(place) as temporary:
            save_file(tensors, temporary, metadata)
        return Shard(place.name, sha256_of(place), place.stat().st_size, len(texts))
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{place} could not be written ({error}); nothing of it was kept, see to the disk") from error


def read_shard(file: Path) -> Iterator[Compressed]:
    """The documents of a shard, in order.

    Raises:
        StoreNotFoundError: There is no such file.
        StoreCorruptError: It is not a whole shard.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        if (metadata["format"], metadata["version"]) != (FORMAT, str(VERSION)):
            raise StoreError(f"{file} is {metadata['format']!r} version {metadata['version']!r}; write it anew")
        dtype = check_dtype(metadata["dtype"])
        kind = Kind(
            fingerprint=metadata["fingerprint"],
            chunk_size=int(metadata["chunk_size"]),
            ratios=tuple(json.loads(metadata["trained_ratios"])),
            downscaling=metadata["downscaling"],
            width=int(metadata["width"]),
        )
        rows = zip(*(tensors[name].tolist() for name in ("n_tokens", "n_embeddings", "ratios")), strict=True)
        refs, payload = tensors["refs"].numpy(), memoryview(tensors["payload"].numpy())
        sizes = [n_bytes(count, kind.width, dtype) for count in tensors["n_embeddings"].tolist()]
        if sum(sizes) != len(payload):
            raise ValueError(f"{len(payload)} bytes of embeddings where {sum(sizes)} belong")
    except FileNotFoundError as error:
        raise StoreNotFoundError(f"{file} does not exist; check the path") from error
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreCorruptError(f"{file} is not a whole shard ({error}); get it again") from error
    start = 0
    for at, (n_tokens, count, ratio) in enumerate(rows):
        data = payload[start : start + sizes[at]]
        start += sizes[at]
        embeddings = decode(data, count, kind.width, dtype)
        yield kind.compressed(embeddings, ref=ref_of(refs[at].tobytes()), ratio=ratio, n_tokens=n_tokens)


def write_manifest(folder: Path, shards: Iterable[Shard]) -> None:
    """Name the shards of a folder: it is whole from now on."""
    content = {"format": FORMAT, "version": VERSION, "shards": [asdict(shard) for shard in shards]}
    try:
        write_whole(folder / MANIFEST, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise StoreError(f"{folder / MANIFEST} could not be written ({error.strerror}); see to the disk") from error


def read_manifest(folder: Path, *, verify: bool = True) -> list[Path]:
    """The files of the shards of a folder.

    Args:
        folder: With a manifest.
        verify: Compare every file with its sha256, and not only its size.

    Raises:
        StoreNotFoundError: There is no manifest.
        StoreCorruptError: It is damaged, names what is not in its folder, or a shard is not what was written.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            raise StoreError(f"{file} is {content['format']!r} version {content['version']!r}; export it anew")
        shards = [Shard(**shard) for shard in content["shards"]]
    except FileNotFoundError as error:
        raise StoreNotFoundError(
            f"{folder} has no {MANIFEST}, so its shards are not known to be whole; export again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorruptError(f"{file} is not a manifest of shards ({error}); export again") from error
    found = []
    for shard in shards:
        if Path(shard.file).name != shard.file or not shard.file.endswith(_SUFFIX):
            raise StoreCorruptError(
                f"{file} names {shard.file!r}, which is no shard beside it; do not trust this folder"
            )
        place = folder / shard.file
        if not place.is_file() or place.is_symlink() or place.stat().st_size != shard.size_bytes:
            raise StoreCorruptError(f"{place} is missing or of another size than {MANIFEST} says; export again")
        if verify and sha256_of(place) != shard.sha256:
            raise StoreCorruptError(f"{place} is not what was written (another sha256); export again")
        found.append(place)
    return found
