"""On-disk format of a store: its folder, the records of its databases, and embeddings as bytes.

Embeddings are float16, int8 with a scale for each vector, or float32. Above entry layer 0 each has 16 bytes more, so
that every coarser ratio can still be derived, and is kept as a direction, which fits the range of every dtype.
"""

from __future__ import annotations

import json
import os
import re
import struct
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import xxhash
from torch import Tensor

from extemb_core.documents import REF_PREFIX
from extemb_core.errors import ConfigError, MismatchError, StoreCorruptError, StoreError, StoreFormatError
from extemb_core.models.compressed import Compressed
from extemb_core.models.downscaling import DOWNSCALINGS, check_ratios
from extemb_core.store.lmdb_env import DATA_FILE, LOCK_FILE
from extemb_core.utils.files import atomic_write_text, make_folder, parse_json, refuse_foreign
from extemb_core.utils.validation import require_one_of, whole_number

FORMAT, VERSION = "extemb-store", 2
_READ = (1, 2)  # version 1 knew no entry layer above 0; otherwise the two are the same
DESCRIPTION = "store.json"
Dtype = Literal["float32", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_MAX_INT8 = 127
_STORED = {"float32": "<f4", "float16": "<f2", "int8": "i1"}
_COLUMNS = {"anchors": "<i4", "mean_norms": "<f4", "norms": "<f4", "weights": "<f4"}
COUNT = struct.Struct("<Q")
NUMBER = struct.Struct(">Q")  # big-endian: keys in order
_ENTRY = struct.Struct("<QQQIIIIQ")  # of `Entry`
_SETTINGS = ("fingerprint", "chunk_size", "ratios", "downscaling", "entry_layer")  # set by a text's embedder
_REF_BYTES = 16
_UNFINISHED = re.compile(
    rf"{re.escape(LOCK_FILE)}|\.{re.escape(DESCRIPTION)}\..*\.tmp"
)  # all that a folder holds if the disk was full from the start
_REF = re.compile(f"{REF_PREFIX}[0-9A-Fa-f]{{32}}")


def prepare(folder: Path) -> None:
    """Create the folder of a store, or check that one that is there holds nothing else."""
    if folder.exists() and not folder.is_dir():
        raise StoreFormatError(f"{folder} is a file, and a store is a folder; pass another path")
    if not (folder / DATA_FILE).is_file():  # LMDB itself checks whether an existing one may be written
        make_folder(folder, StoreError, "pass another path")
    if not (folder / DATA_FILE).is_file() and not (folder / DESCRIPTION).is_file():
        foreign = [name for name in os.listdir(folder) if not _UNFINISHED.fullmatch(name)]
        refuse_foreign(folder, foreign, "a store's", StoreFormatError)


def check_description(folder: Path) -> int | None:
    """Check that a folder with a description of a store has its data.

    Returns:
        The version in the description; None without a description.
    """
    file = folder / DESCRIPTION
    try:
        if not file.is_file():
            return None
        description = parse_json(file.read_text(encoding="utf-8"))
        name, version = description["format"], description["version"]
    except OSError as error:
        raise StoreError(f"{file} cannot be read ({error.strerror}); check that the folder may be read") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorruptError(f"{file} does not describe a store ({error}); restore it from a copy") from error
    if name != FORMAT or version not in _READ:
        raise StoreFormatError(
            f"{file} says {name!r} version {version!r}, and this library reads {FORMAT!r} versions "
            f"{' and '.join(map(str, _READ))}; export it with the version that wrote it, and import it here"
        )
    data = folder / DATA_FILE
    if not data.is_file() or not data.stat().st_size:
        raise StoreCorruptError(f"{data} is missing or empty; restore it from a copy, or start with a new folder")
    return int(version)


def describe(folder: Path) -> None:
    """Mark a folder as a store of this version, atomically, once its data file exists.

    Raises:
        StoreError: The disk refuses.
    """
    if check_description(folder) == VERSION:
        return
    try:
        atomic_write_text(folder / DESCRIPTION, json.dumps({"format": FORMAT, "version": VERSION}) + "\n")
    except OSError as error:
        raise StoreError(f"{folder / DESCRIPTION} could not be written ({error.strerror}); check the disk") from error


class Entry(NamedTuple):
    """Location, sizes and checksum of a document's embeddings."""

    block: int
    offset: int
    n_tokens: int
    n_embeddings: int
    ratio: int
    kind: int
    dtype: int
    checksum: int

    @classmethod
    def of(cls, n_tokens: Any, n_embeddings: Any, ratio: Any, dtype: Dtype, kind: int = 0) -> Entry:
        """Make a document's entry without its location and checksum; `kind` is not used in a shard."""
        return cls(0, 0, int(n_tokens), int(n_embeddings), int(ratio), kind, DTYPES.index(dtype), 0)

    @classmethod
    def unpack(cls, data: Any) -> Entry:
        """Read an entry from its bytes. Raises `StoreCorruptError` if they are not an entry."""
        try:
            return cls._make(_ENTRY.unpack(data))
        except struct.error as error:
            raise StoreCorruptError(f"an entry of the store is damaged ({error}); restore it from a copy") from error

    def pack(self) -> bytes:
        """Return the entry as bytes."""
        return _ENTRY.pack(*self)

    def sum_of(self, key: bytes, payload: Any) -> int:
        """Compute the checksum of everything stored except its location, which `gc` may change."""
        digest = self._sum_begun(key)
        digest.update(payload)
        return digest.intdigest()

    def size_in(self, key: bytes, payload: Any) -> int:
        """Find the size of the embeddings that begin a payload by their checksum, without their format; 0 if none fits.

        Anchors and norms only add the bytes of some more dimensions.
        """
        digest = self._sum_begun(key)
        end = 0
        for width in count(1):
            size = n_bytes(self.n_embeddings, width, DTYPES[self.dtype], anchored=False)
            if not end < size <= len(payload):
                break
            digest.update(payload[end:size])
            end = size
            if digest.intdigest() == self.checksum:
                return size
        return 0

    def _sum_begun(self, key: bytes) -> xxhash.xxh3_64:
        digest = xxhash.xxh3_64(key)
        digest.update(self._replace(block=0, offset=0, checksum=0).pack())
        return digest


@dataclass(frozen=True)
class EmbeddingFormat:
    """Settings that documents of one embedder have in common.

    Raises:
        ConfigError: The settings cannot be an embedder's.
    """

    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: Any
    width: int
    entry_layer: int = 0  # version 1 knew no other

    def __post_init__(self) -> None:
        for name, least in (("chunk_size", 1), ("width", 1), ("entry_layer", 0)):
            whole_number(getattr(self, name), name, least)
        ordered = check_ratios(self.ratios, self.chunk_size) == self.ratios
        if not (ordered and self.downscaling in DOWNSCALINGS and str(self.fingerprint).isascii()):
            raise ConfigError(
                f"ratios={self.ratios!r}, downscaling={self.downscaling!r} and fingerprint={self.fingerprint!r} are no "
                "embedder's; compress the text again"
            )

    @classmethod
    def of(cls, text: Compressed) -> EmbeddingFormat:
        """Return the format of a text."""
        settings = {name: getattr(text, name) for name in _SETTINGS}
        return cls(**settings, width=int(text.embeddings.shape[1]))

    @staticmethod
    @lru_cache  # called for every document that is read
    def parse(data: bytes) -> EmbeddingFormat:
        """Read a format from what `to_bytes` wrote. Raises `StoreCorruptError` if it is not a format."""
        try:
            values = parse_json(data)
            return EmbeddingFormat(**values | {"ratios": tuple(values["ratios"])})
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorruptError(
                f"the settings of an embedder in the store are damaged ({error}); restore it from a copy"
            ) from error

    def matches(self, key: bytes) -> bool:
        """Return whether a document is of this embedder."""
        return name_in(key) == fingerprint_bytes(self.fingerprint)

    def size(self, entry: Entry) -> int:
        """Count the bytes of a document's embeddings."""
        return n_bytes(entry.n_embeddings, self.width, DTYPES[entry.dtype], anchored=self.entry_layer > 0)

    def decode(self, payload: Any, entry: Entry, ref: str) -> Compressed:
        """Read a document of this format from its `size` bytes. Raises `StoreCorruptError` if that is not possible."""
        anchored = self.entry_layer > 0
        embeddings = decode(payload, entry.n_embeddings, self.width, DTYPES[entry.dtype], anchored=anchored)
        settings = {name: getattr(self, name) for name in _SETTINGS}
        try:
            text = Compressed(**embeddings, **settings, ratio=entry.ratio, n_tokens=entry.n_tokens, ref=ref)
            return text.checked()
        except MismatchError as error:
            raise StoreCorruptError(f"what is stored of {ref} is no compressed text: {error}") from error

    def to_bytes(self) -> bytes:
        """Return the format as JSON."""
        return json.dumps(asdict(self)).encode()


def key_of(ref: str, fingerprint: str) -> bytes:
    """Return a key of 32 bytes: those of the ref, then a hash of the fingerprint."""
    return ref_bytes(ref) + fingerprint_bytes(fingerprint)


def name_in(key: bytes) -> bytes:
    """Return the part of a key that identifies the embedder."""
    return key[_REF_BYTES:]


def ref_bytes(ref: str) -> bytes:
    """Return the 16 bytes of a ref. Raises `ConfigError` if it is not one."""
    if not isinstance(ref, str) or not _REF.fullmatch(ref):
        raise ConfigError(f"ref={ref!r} is not a document's ref ({REF_PREFIX} and 32 hex digits); pass document.ref")
    return bytes.fromhex(ref.removeprefix(REF_PREFIX))


def ref_of(data: bytes) -> str:
    """Return the ref with which a key, or the bytes of a ref, begin."""
    return REF_PREFIX + data[:_REF_BYTES].hex()


def fingerprint_bytes(fingerprint: str) -> bytes:
    """Return the 16 bytes that the keys of an embedder's documents end with. Raises `ConfigError` if it has none."""
    if not isinstance(fingerprint, str) or not fingerprint.isascii():
        raise ConfigError(f"fingerprint={fingerprint!r:.80} is not an embedder's; pass embedder.fingerprint")
    return xxhash.xxh3_128(fingerprint.encode()).digest()


def check_dtype(dtype: str, entry_layer: int = 0) -> Dtype:
    """Return the dtype after checking it.

    Raises:
        ConfigError: It is unknown.
        MismatchError: int8 above entry layer 0.
    """
    require_one_of(dtype, "dtype", DTYPES)
    if dtype == "int8" and entry_layer:
        raise MismatchError(
            f"dtype='int8' is too coarse for embeddings of entry layer {entry_layer}: a few of their dimensions are "
            "far larger than the rest; keep them in float16"
        )
    return cast(Dtype, dtype)


def encode(text: Compressed, dtype: Dtype) -> tuple[bytes, Dtype]:
    """Write the embeddings of a text as bytes: `n_bytes` of them.

    float16 rounds to 11 bits; int8, stored as N float32 scales and then the rows, to 1/127 of a vector's largest value.
    Above entry layer 0 come first N anchors, mean norms, norms and weights, then the embeddings, each divided by its
    norm.

    Returns:
        The bytes and their dtype: float32 where a value is beyond float16, so that none becomes infinite.

    Raises:
        MismatchError: int8 above entry layer 0.
    """
    check_dtype(dtype, text.entry_layer)
    if not text.entry_layer:
        return _encode_rows(text.embeddings, dtype)
    assert text.norms is not None
    columns = [np.asarray(getattr(text, name)).astype(kind).tobytes() for name, kind in _COLUMNS.items()]
    directions = text.embeddings / torch.where(text.norms > 0, text.norms, 1)[:, None]
    data, dtype = _encode_rows(directions, dtype)
    return b"".join([*columns, data]), dtype


def n_bytes(count: int, width: int, dtype: Dtype, *, anchored: bool) -> int:
    """Count the bytes of (count, width) embeddings; `anchored` above entry layer 0."""
    row_bytes = width * np.dtype(_STORED[dtype]).itemsize + 4 * (dtype == "int8")  # a scale
    return count * (row_bytes + 4 * len(_COLUMNS) * anchored)


def decode(buffer: Any, count: int, width: int, dtype: Dtype, *, anchored: bool) -> dict[str, Any]:
    """Read what `encode` wrote. Returns copies: the fields of a `Compressed` with its (count, width) embeddings."""
    if not anchored:
        return {"embeddings": _decode_rows(buffer, count, width, dtype)}
    fields: dict[str, Any] = {}
    for name, kind in _COLUMNS.items():
        fields[name], buffer = _numbers(buffer, kind, count), memoryview(buffer)[4 * count :]
    embeddings = _decode_rows(buffer, count, width, dtype, scales=fields["norms"])
    return fields | {"anchors": fields["anchors"].numpy(), "embeddings": embeddings}


def _encode_rows(embeddings: Tensor, dtype: Dtype) -> tuple[bytes, Dtype]:
    values = embeddings.detach().to("cpu", torch.float32)
    if dtype == "float16":
        halves = values.half()
        if halves.isfinite().all() or not values.isfinite().all():
            return _bytes_of(halves), dtype
        dtype = "float32"
    if dtype == "float32":
        return _bytes_of(values), dtype
    scales = values.abs().amax(1, keepdim=True) / _MAX_INT8 if values.numel() else values.new_zeros(len(values), 1)
    steps = torch.where(scales > 0, values / scales, 0).round().clamp(-_MAX_INT8, _MAX_INT8)
    return _bytes_of(scales) + _bytes_of(steps.to(torch.int8)), dtype


def _decode_rows(buffer: Any, count: int, width: int, dtype: Dtype, scales: Tensor | None = None) -> Tensor:
    """Read (count, width) float32 rows, multiplied by their scales, (count,), if there are any."""
    if dtype == "int8":
        scales, buffer = _numbers(buffer, "<f4", count), memoryview(buffer)[4 * count :]
    rows = _numbers(buffer, _STORED[dtype], count * width).view(count, width)
    return rows.float() if scales is None else torch.mul(rows, scales[:, None])


def _numbers(buffer: Any, kind: str, count: int) -> Tensor:
    """Copy the first (count,) numbers of a buffer, by torch, which converts them many times faster than numpy."""
    return torch.from_numpy(np.frombuffer(buffer, kind, count).copy())


def _bytes_of(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()
