"""What the databases of a store hold, as bytes: where a document's embeddings are, and what made them."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

import xxhash
from torch import Tensor

from extemb_core.documents import REF_PREFIX
from extemb_core.errors import ConfigError
from extemb_core.models.compressed import Compressed
from extemb_core.store.coding import DTYPES, n_bytes

COUNT = struct.Struct("<Q")
NUMBER = struct.Struct(">Q")  # big-endian: keys in order
_ENTRY = struct.Struct("<QQQIIIIQ")  # block, offset, n_tokens, n_embeddings, ratio, kind, dtype, checksum


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

    def size(self, width: int) -> int:
        return n_bytes(self.n_embeddings, width, DTYPES[self.dtype])

    def sum_of(self, key: bytes, payload: Any) -> int:
        """The checksum of what is stored: of everything but where it is, which `gc` may change."""
        digest = xxhash.xxh3_64(key)
        digest.update(_ENTRY.pack(0, 0, self.n_tokens, self.n_embeddings, self.ratio, self.kind, self.dtype, 0))
        digest.update(payload)
        return digest.intdigest()


@dataclass(frozen=True)
class Kind:
    """What documents of one embedder have in common."""

    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: Any
    width: int

    @classmethod
    def of(cls, text: Compressed) -> Kind:
        width = int(text.embeddings.shape[1])
        return cls(text.fingerprint, text.chunk_size, tuple(text.ratios), text.downscaling, width)

    @classmethod
    def parse(cls, data: Any) -> Kind:
        values = json.loads(bytes(data))
        return cls(**(values | {"ratios": tuple(values["ratios"])}))

    def compressed(self, embeddings: Tensor, *, ref: str, ratio: int, n_tokens: int) -> Compressed:
        """A document of this kind."""
        return Compressed(
            embeddings=embeddings,
            ratio=ratio,
            n_tokens=n_tokens,
            ref=ref,
            fingerprint=self.fingerprint,
            chunk_size=self.chunk_size,
            ratios=self.ratios,
            downscaling=self.downscaling,
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
    return ref_bytes(ref) + xxhash.xxh3_128(fingerprint.encode()).digest()


def ref_bytes(ref: str) -> bytes:
    """The 16 bytes of a ref. Raises `ConfigError` when it is none."""
    try:
        own = bytes.fromhex(ref.removeprefix(REF_PREFIX))
    except ValueError:
        own = b""
    if not ref.startswith(REF_PREFIX) or len(own) != 16:
        raise ConfigError(f"ref={ref!r} is not a document's ref ({REF_PREFIX} and 32 hex digits); pass document.ref")
    return own


def ref_of(data: bytes) -> str:
    """The ref that a key, or the bytes of a ref, begin with."""
    return REF_PREFIX + data[:16].hex()
