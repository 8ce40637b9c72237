"""Compressed documents as immutable safetensors shards with a manifest: for export, and from distributed jobs.

A shard holds documents of one embedder in one dtype:

    refs (E, 16) uint8, n_tokens (E,) int64, n_embeddings (E,) int64, ratios (E,) int64: the documents, in order
    checksums (E,) int64: one for each, see `format.Entry.sum_of`
    payload (sum of bytes,) uint8: their embeddings as `format.encode` writes them, one after another

Its settings are in the file's metadata. A file is written under another name, flushed to disk and renamed, so that one
with a shard's name is whole; the manifest comes last and names every shard with its size and sha256.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from extemb_core.errors import (
    ConfigError,
    ExtembError,
    StoreCorruptError,
    StoreError,
    StoreFormatError,
    StoreNotFoundError,
    first_line,
)
from extemb_core.models.chunks import embeddings_of
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import Dtype, EmbeddingFormat, Entry, check_dtype, encode, key_of, ref_of
from extemb_core.store.remote import AnyFolder, StorageLocation
from extemb_core.utils.files import FULL, parse_json, refuse_foreign

MANIFEST = "manifest.json"
FORMAT, VERSION = "extemb-shards", 2
_READ = (1, 2)  # version 1 knew no entry layer above 0
SUFFIX = ".safetensors"
# Names in a folder of shards: those of an export, of `scale.worker`, and of interrupted writes.
EXPORTED, COMPRESSED = r"shard-\d{5,}\.safetensors", r"shard-[0-9a-f]{32}\.(safetensors|json)"
LEFT = r"\.(shard-|manifest\.json\.).*\.tmp"
_NAMED = 9  # damaged shards that an error names besides the first
_LENGTH_BYTES = 8  # a safetensors file begins with the length of its header
_OPENED_AT_ONCE = 16
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_LISTS = {"n_tokens": "I64", "n_embeddings": "I64", "ratios": "I64", "checksums": "I64", "refs": "U8"}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shard:
    """Name, hash and size of a shard, as in the manifest."""

    file: str
    sha256: str
    size_bytes: int
    n_documents: int


@contextmanager
def write_errors(location: StorageLocation, file: str) -> Iterator[None]:
    """Turn a failed write into a `StoreError` with the remedy; no part of the file remains.

    Raises:
        StoreError: A write in this block failed.
    """
    try:
        yield
    except ExtembError:
        raise
    except Exception as error:  # of safetensors, or of the package that reaches a URL
        why, check = first_line(error), "the disk" if location.local else "the connection and that it may be written"
        remedy = "make room" if getattr(error, "errno", None) in FULL else f"check {check}"
        raise StoreError(
            f"{location.naming(file)} could not be written ({why}); {remedy}, and the same command goes on"
        ) from error


def write_shard(folder: AnyFolder, name: str, texts: Sequence[Compressed], dtype: Dtype = "float16") -> Shard:
    """Write one shard, `name`.safetensors; an existing one is replaced.

    Args:
        folder: A path, which is made if it does not exist, or a URL that fsspec knows.
        name: Name without a suffix.
        texts: Compressed texts of one embedder.
        dtype: Data type of the embeddings; float32 for all if a value is beyond its range.

    Raises:
        ConfigError: There are no texts, or they are of several embedders.
        StoreError: The disk refuses; no part of the shard remains.
        MismatchError: They enter above layer 0, and `dtype` is int8.
    """
    location = StorageLocation.of(folder)
    kinds = {EmbeddingFormat.of(text) for text in texts}
    if len(kinds) != 1:
        raise ConfigError(f"a shard holds documents of one embedder, and {len(kinds)} were passed; write one for each")
    coded = [encode(text, dtype) for text in texts]
    if any(used != dtype for _, used in coded):
        dtype = "float32"
        coded = [encode(text, dtype) for text in texts]
    kind = kinds.pop()
    keys = [key_of(text.ref, kind.fingerprint) for text in texts]
    entries = [Entry.of(text.n_tokens, len(text), text.ratio, dtype) for text in texts]
    sums = [entry.sum_of(key, data) for entry, key, (data, _) in zip(entries, keys, coded, strict=True)]
    metadata = {name: str(value) for name, value in asdict(kind).items() if name != "ratios"}
    metadata |= {"format": FORMAT, "version": str(VERSION), "trained_ratios": json.dumps(kind.ratios), "dtype": dtype}
    tensors = {
        "refs": torch.from_numpy(np.stack([np.frombuffer(key, np.uint8, 16) for key in keys])),
        "n_tokens": torch.tensor([entry.n_tokens for entry in entries]),
        "n_embeddings": torch.tensor([entry.n_embeddings for entry in entries]),
        "ratios": torch.tensor([entry.ratio for entry in entries]),
        "checksums": torch.from_numpy(np.array(sums, np.uint64).view(np.int64)),
        "payload": torch.from_numpy(np.frombuffer(bytearray(b"".join(data for data, _ in coded)), np.uint8)),
    }
    file = f"{name}{SUFFIX}"
    with write_errors(location, file):
        # save_file would write to a temporary file of its own, which a kill would leave behind.
        sha256, size = location.write(file, lambda target: target.write_bytes(save(tensors, metadata)))
    return Shard(file, sha256, size, len(texts))


class ShardReader:
    """Reads one shard, and of it only what is asked for.

    Attributes:
        kind: Format of its documents.
        dtype: Data type of the embeddings.
        refs: (E, 16) uint8.
        n_tokens: (E,) int64, as are n_embeddings and ratios.

    Raises:
        StoreNotFoundError: There is no such file.
        StoreCorruptError: The file is not a whole shard.
        StoreError: The file cannot be read.
    """

    def __init__(self, folder: AnyFolder, file: str) -> None:
        self._location = StorageLocation.of(folder)
        self.file = file
        with self._location.errors(file):  # a failure to read does not mean damage
            try:
                self._read_header()
            except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
                raise StoreCorruptError(f"{self} is not a whole shard ({error}); {_again()}") from error

    def __str__(self) -> str:
        return self._location.naming(self.file)

    def __len__(self) -> int:
        return len(self.refs)

    def text(self, at: int) -> Compressed:
        """Read a document by its index.

        Raises:
            StoreCorruptError: Its bytes are not what was written.
        """
        begin, end = int(self._begins[at]), int(self._begins[at + 1])
        return self._text(at, self._location.read(self.file, begin, end))

    def texts(self) -> Iterator[Compressed]:
        """Read all documents, in order."""
        with self._location.errors(self.file), self._location.open(self.file) as stream:
            stream.seek(int(self._begins[0]))
            for at in range(len(self)):
                yield self._text(at, stream.read(int(self._begins[at + 1] - self._begins[at])))

    def _text(self, at: int, data: bytes) -> Compressed:
        ref = ref_of(self.refs[at].tobytes())
        entry = Entry.of(self.n_tokens[at], self.n_embeddings[at], self.ratios[at], self.dtype)
        if entry.sum_of(key_of(ref, self.kind.fingerprint), data) != int(self._sums[at]):
            raise StoreCorruptError(f"{self} has another checksum for {ref} than was written; {_again()}")
        return self.kind.decode(data, entry, ref)

    def _read_header(self) -> None:
        """Read the header and compare it with the file's size. By hand: safetensors reads no parts of remote files."""
        size = self._location.size(self.file)
        if size is None:
            raise StoreNotFoundError(f"{self} does not exist; check the path")
        with self._location.open(self.file) as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes")
            header = parse_json(stream.read(length))
            metadata = header.pop("__metadata__")
            if metadata["format"] != FORMAT or metadata["version"] not in map(str, _READ):
                raise StoreFormatError(
                    f"{self} is {metadata['format']!r} version {metadata['version']!r}; export it again"
                )
            start = _LENGTH_BYTES + length
            spans = {name: [start + int(at) for at in tensor["data_offsets"]] for name, tensor in header.items()}
            if (total := max(end for _, end in spans.values())) != size:
                raise ValueError(f"{size:,} bytes where {total:,} belong")
            lists = {name: self._list(stream, header[name]["dtype"], name, spans[name]) for name in _LISTS}
        self.dtype = check_dtype(metadata["dtype"])
        given: dict[str, Any] = {"entry_layer": 0} | metadata  # which version 1 did not have
        given |= {name: int(given[name]) for name in ("chunk_size", "width", "entry_layer")}
        given["ratios"] = tuple(parse_json(given["trained_ratios"]))
        self.kind = EmbeddingFormat(**{field.name: given[field.name] for field in fields(EmbeddingFormat)})
        self.refs = lists["refs"].reshape(-1, 16)
        self.n_tokens, self.n_embeddings, self.ratios = (lists[name] for name in ("n_tokens", "n_embeddings", "ratios"))
        self._sums = lists["checksums"].view(np.uint64)
        if any(len(values) != len(self.refs) for name, values in lists.items() if name != "refs"):
            raise ValueError("lists of unequal length")
        rows = zip(self.n_tokens.tolist(), self.ratios.tolist(), strict=True)
        counts = [embeddings_of(n_tokens, ratio, self.kind.chunk_size) for n_tokens, ratio in rows]
        if counts != self.n_embeddings.tolist():
            raise ValueError("other numbers of embeddings than its documents have")
        sizes = [self.kind.size(Entry.of(0, count, 1, self.dtype)) for count in self.n_embeddings]
        begin, end = spans["payload"]
        if sum(sizes) != end - begin:
            raise ValueError(f"{end - begin:,} bytes of embeddings where {sum(sizes):,} belong")
        self._begins = begin + np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)

    def _list(self, stream: Any, dtype: str, name: str, span: Sequence[int]) -> Array:
        if dtype != _LISTS[name]:
            raise ValueError(f"{name} of type {dtype}")
        stream.seek(span[0])
        return np.frombuffer(stream.read(span[1] - span[0]), np.uint8 if dtype == "U8" else "<i8")


def open_shards(
    folder: AnyFolder,
    shards: Iterable[Shard],
    damaged: Callable[[Shard, StoreCorruptError], None] | None = None,
) -> list[ShardReader]:
    """Open shards, several at once: in object storage, a header takes two or three requests that mostly wait.

    Args:
        folder: A path, or a URL that fsspec knows.
        shards: Shards in that folder.
        damaged: Called with each shard that is not whole, which is then left out; without it, that is an error.

    Raises:
        StoreNotFoundError, StoreCorruptError, StoreError: See `ShardReader`.
    """
    location = StorageLocation.of(folder)

    def opened(shard: Shard) -> ShardReader | None:
        try:
            return ShardReader(location, shard.file)
        except StoreCorruptError as error:
            if damaged is None:
                raise
            damaged(shard, error)
            return None

    with ThreadPoolExecutor(_OPENED_AT_ONCE) as pool:
        return [reader for reader in pool.map(opened, shards) if reader is not None]


def write_manifest(folder: AnyFolder, shards: Iterable[Shard]) -> None:
    """Write the manifest of a folder, which makes it whole.

    Raises:
        StoreError: The disk refuses.
    """
    location = StorageLocation.of(folder)
    content = {"format": FORMAT, "version": VERSION, "shards": [asdict(shard) for shard in shards]}
    with write_errors(location, MANIFEST):
        location.write_text(MANIFEST, json.dumps(content, indent=2) + "\n")


def read_manifest(folder: AnyFolder, *, verify: bool = True) -> list[Shard]:
    """Read the manifest of a folder and check all its shards, so that an error names all that are damaged.

    Args:
        folder: A path, or a URL that fsspec knows, with a manifest.
        verify: Compare every file with its sha256, and not only its size.

    Raises:
        StoreNotFoundError: There is no manifest.
        StoreCorruptError: It is damaged, names a file outside its folder, or a shard is not what was written.
    """
    location = StorageLocation.of(folder)
    where, shards = location.naming(MANIFEST), parse_manifest(location)
    sizes = location.sizes()
    damaged: dict[str, str] = {}
    for shard in shards:
        if sizes.get(shard.file) != shard.size_bytes:
            damaged[shard.file] = f"is missing or of another size than {where} says"
        elif verify and location.sha256(shard.file) != shard.sha256:
            damaged[shard.file] = f"is not what was written (another sha256 than in {where})"
    if damaged:
        (file, what), *others = damaged.items()
        if others:
            shown = ", ".join(name for name, _ in others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
            what += f", and {len(others):,} more are damaged too ({shown})"
        raise StoreCorruptError(f"{file} {what}; {_again('them' if others else 'it')}")
    return shards


def parse_manifest(location: StorageLocation) -> list[Shard]:
    """Read the manifest of a folder without checking its shards.

    Raises:
        StoreNotFoundError, StoreCorruptError: There is none, or it is damaged or names a file outside its folder.
    """
    where = location.naming(MANIFEST)
    try:
        content = parse_json(location.read_text(MANIFEST))
        if content["format"] != FORMAT or content["version"] not in _READ:
            raise StoreFormatError(f"{where} is {content['format']!r} version {content['version']!r}; export it again")
        shards = [Shard(**shard) for shard in content["shards"]]
    except StoreNotFoundError as error:
        raise StoreNotFoundError(
            f"{location} has no {MANIFEST}, so its shards are not known to be whole; export or compress again"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreCorruptError(f"{where} is not a manifest of shards ({error}); {_again()}") from error
    for shard in shards:
        if Path(str(shard.file)).name != shard.file or not shard.file.endswith(SUFFIX):
            raise StoreCorruptError(f"{where} names {shard.file!r}, which is not a shard beside it; do not trust it")
    return shards


def require_only_shards(folder: AnyFolder, *kinds: str) -> list[str]:
    """List the files in a folder of shards, also leftovers of interrupted writes.

    Args:
        folder: A path, or a URL that fsspec knows.
        *kinds: Patterns of allowed names, `EXPORTED` or `COMPRESSED`; a file such as shard-00000.parquet is not ours.

    Raises:
        StoreError: There is something else, which must not be removed.
    """
    location = StorageLocation.of(folder)
    names = location.names()
    ours = re.compile("|".join((re.escape(MANIFEST), LEFT, *kinds)))
    refuse_foreign(location, (name for name in names if not ours.fullmatch(name)), "a shard", StoreFormatError)
    return names


def _again(what: str = "it") -> str:
    """Say how to get damaged shards again."""
    return f"remove {what}, and copy, export or compress {what} again"
