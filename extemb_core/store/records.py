"""What the databases of a store hold, as bytes: where a document's embeddings are, and what made them."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import xxhash

from extemb_core.documents import REF_PREFIX
from extemb_core.errors import ConfigError
from extemb_core.models.compressed import Compressed
from extemb_core.store.coding import DTYPES, decode, n_bytes

COUNT = struct.Struct("<Q")
NUMBER = struct.Struct(">Q")  # big-endian: keys in order
_ENTRY = struct.Struct("<QQQIIIIQ")  # block, offset, n_tokens, n_embeddings, ratio, kind, dtype, checksum
_REF_BYTES = 16


@dataclass(frozen=True)
class Entry:
    """Where a document's embeddings are."""

    block: int
    offset: int
    n_tokens: int
    n_embeddings: int
    ratio: int
    kind: int
    dtype: int
    checksum: int

    @classmethod
    def unpack(cls, data: Any) -> Entry:
        return cls(*_ENTRY.unpack(data))

    def pack(self) -> bytes:
        return _ENTRY.pack(*(getattr(self, name) for name in self.__dataclass_fields__))

    def size(self, width: int, *, anchored: bool = False) -> int:
        return n_bytes(self.n_embeddings, width, DTYPES[self.dtype], anchored=anchored)

    def sum_of(self, key: bytes, payload: Any) -> int:
        """The checksum of what is stored: of everything but where it is, which `gc` may change."""
        digest = self._sum_begun(key)
        digest.update(payload)
        return digest.intdigest()

    def size_in(self, key: bytes, payload: Any) -> int:
        """`size` without the kind: the one that the checksum fits, of bytes that begin with the embeddings; else 0.

        Anchors and norms are as many bytes as some dimensions more.
        """
        digest = self._sum_begun(key)
        end = 0
        for width in count(1):
            size = self.size(width)
            if not end < size <= len(payload):
                break
            digest.update(payload[end:size])
            end = size
            if digest.intdigest() == self.checksum:
                return size
        return 0

    def _sum_begun(self, key: bytes) -> xxhash.xxh3_64:
        digest = xxhash.xxh3_64(key)
        digest.update(_ENTRY.pack(0, 0, self.n_tokens, self.n_embeddings, self.ratio, self.kind, self.dtype, 0))
        return digest


@dataclass(frozen=True)
class Kind:
    """What documents of one embedder have in common."""

    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: Any
    width: int
    entry_layer: int = 0  # version 1 knew no other

    @classmethod
    def of(cls, text: Compressed) -> Kind:
        width = int(text.embeddings.shape[1])
        return cls(text.fingerprint, text.chunk_size, tuple(text.ratios), text.downscaling, width, text.entry_layer)

    @classmethod
    def parse(cls, data: Any) -> Kind:
        return _parsed(bytes(data))

    @cached_property
    def name(self) -> bytes:
        """What the keys of its documents end with."""
        return _name(self.fingerprint)

    def made(self, key: bytes) -> bool:
        """Whether a document is of this embedder."""
        return name_in(key) == self.name

    def size(self, entry: Entry) -> int:
        """Bytes of a document's embeddings."""
        return entry.size(self.width, anchored=self.entry_layer > 0)

    def decode(self, payload: Any, entry: Entry, ref: str) -> Compressed:
        """Read a document of this kind from its `size` bytes."""
        dtype, anchored = DTYPES[entry.dtype], self.entry_layer > 0
        fields = decode(payload, entry.n_embeddings, self.width, dtype, anchored=anchored)
        return Compressed(
            **fields,
            ratio=entry.ratio,
            n_tokens=entry.n_tokens,
            ref=ref,
            fingerprint=self.fingerprint,
            chunk_size=self.chunk_size,
            ratios=self.ratios,
            downscaling=self.downscaling,
            entry_layer=self.entry_layer,
        )

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass
class Block:
    """Documents that will share one value."""

    payload: bytearray = field(default_factory=bytearray)
    entries: list[tuple[bytes, Entry]] = field(default_factory=list)


def key_of(ref: str, fingerprint: str) -> bytes:
    """32 bytes: those of the ref, then a hash of the fingerprint."""
    return ref_bytes(ref) + _name(fingerprint)


def name_in(key: bytes) -> bytes:
    """The part of a key that stands for the embedder."""
    return key[_REF_BYTES:]


def ref_bytes(ref: str) -> bytes:
    """The 16 bytes of a ref. Raises `ConfigError` when it is none."""
    try:
        own = bytes.fromhex(ref.removeprefix(REF_PREFIX))
    except ValueError:
        own = b""
    if not ref.startswith(REF_PREFIX) or len(own) != _REF_BYTES:
        raise ConfigError(f"ref={ref!r} is not a document's ref ({REF_PREFIX} and 32 hex digits); pass document.ref")
    return own


def ref_of(data: bytes) -> str:
    """The ref that a key, or the bytes of a ref, begin with."""
    return REF_PREFIX + data[:_REF_BYTES].hex()


def _name(fingerprint: str) -> bytes:
    return xxhash.xxh3_128(fingerprint.encode()).digest()


@lru_cache  # every document that is read asks for it
def _parsed(data: bytes) -> Kind:
    values = json.loads(data)
    return Kind(**(values | {"ratios": tuple(values["ratios"])}))
