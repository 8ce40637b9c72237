"""The store on disk: compressed documents by ref and fingerprint, written once and read by any number of processes.

In LMDB, so that a process killed at any moment loses nothing that was acknowledged. The embeddings of the documents
that are put together share large values, which LMDB keeps in whole pages; `entries` says where each of them is:

    entries   ref, fingerprint -> block, offset, tokens, embeddings, ratio, kind, dtype, checksum
    blocks    number -> embeddings of one or more documents
    live      number -> bytes of the block that entries refer to; at 0 the block goes
    kinds     number -> the embedder's fingerprint, chunk size, ratios, down-scaling and width
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import xxhash

from extemb_core.errors import ConfigError, MismatchError, StoreCorruptError, StoreError
from extemb_core.models.compressed import Compressed
from extemb_core.store.coding import DTYPES, Dtype, check_dtype, decode, encode, n_bytes
from extemb_core.store.environment import DATA_FILE, Environment, open_environment

T = TypeVar("T")

FORMAT, VERSION = "extemb-store", 1
DESCRIPTION = "store.json"
_PREFIX = "ext:"
_ENTRY = struct.Struct("<QQQIIIIQ")  # block, offset, n_tokens, n_embeddings, ratio, kind, dtype, checksum
_COUNT = struct.Struct("<Q")
_NUMBER = struct.Struct(">Q")  # big-endian: keys in order
_BLOCK_BYTES = 4 * 2**20
_SMALL_BLOCK_BYTES = _BLOCK_BYTES // 4
_WRITE_BYTES = 64 * 2**20  # of one transaction when blocks are moved


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What is in a store.

    Attributes:
        n_documents: Texts, each counted once for every embedder that compressed it.
        n_tokens: Of these texts.
        n_embeddings: Of these texts.
        live_bytes: What their embeddings take.
        block_bytes: The same and what was replaced or removed since; `gc` frees the difference for reuse.
        file_bytes: Size of the file. Freed space is used again and never given back: export and import to shrink it.
        by_fingerprint: Documents of each embedder.
    """

    n_documents: int
    n_tokens: int
    n_embeddings: int
    live_bytes: int
    block_bytes: int
    file_bytes: int
    by_fingerprint: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What `verify` found.

    Attributes:
        n_documents: That were read and are what was written.
        damaged: (ref, fingerprint, reason) of those that are not.
        problems: What else does not fit together.
    """

    n_documents: int
    damaged: tuple[tuple[str, str, str], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return not self.damaged and not self.problems


@dataclass(frozen=True)
class _Entry:
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
    def unpack(cls, data: Any) -> _Entry:
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
class _Kind:
    """What documents of one embedder have in common."""

    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: Any
    width: int

    @classmethod
    def of(cls, text: Compressed) -> _Kind:
        width = int(text.embeddings.shape[1])
        return cls(text.fingerprint, text.chunk_size, tuple(text.ratios), text.downscaling, width)

    @classmethod
    def parse(cls, data: Any) -> _Kind:
        values = json.loads(bytes(data))
        return cls(**(values | {"ratios": tuple(values["ratios"])}))


@dataclass
class _Block:
    """Documents that will share one value."""

    payload: bytearray = field(default_factory=bytearray)
    entries: list[tuple[bytes, _Entry]] = field(default_factory=list)


class EmbeddingStore:
    """Compressed documents on disk, the finest ratio of each, by ref and fingerprint. See `open`.

    One object may be used from several threads, several objects may be open on one folder, and any number of processes
    may read while one writes; writers wait for each other.
    """

    def __init__(self, environment: Environment, dtype: Dtype = "float16") -> None:
        self.environment = environment
        self.dtype = dtype
        self._closing = ExitStack()
        self._closing.callback(environment.close)
        self._kinds: dict[int, _Kind] = {}

    @classmethod
    def open(
        cls,
        path: str | Path,
        mode: Literal["r", "a"] = "a",
        *,
        dtype: Literal["float32", "float16", "int8"] = "float16",
    ) -> EmbeddingStore:
        """Open a store.

        Args:
            path: Its folder.
            mode: "r" reads; "a" reads and writes, and makes the folder if there is none.
            dtype: What new embeddings are kept in. "float16" rounds to 11 bits and is right for all but tests of
                exactness, which take "float32"; "int8" halves the size, with a scale for each vector.

        Raises:
            StoreNotFoundError: It is to be read, and is not there.
            StoreCorruptError: It is damaged.
            StoreError: The folder is something else, or may not be read or written.
        """
        if mode not in ("r", "a"):
            raise ConfigError(f"mode={mode!r} is neither 'r' nor 'a'; pass 'r' to read, 'a' to read and write")
        folder = Path(path)
        check_dtype(dtype)
        if mode == "a":
            _prepare(folder)
        elif folder.is_dir():
            _check_description(folder)
        store = cls(open_environment(folder, readonly=mode == "r"), dtype)
        if mode == "a" and not (folder / DESCRIPTION).exists():
            _describe(folder)
        return store

    @property
    def path(self) -> Path:
        return self.environment.folder

    @property
    def readonly(self) -> bool:
        return self.environment.readonly

    def close(self) -> None:
        """Give the files back. A second call does nothing."""
        self._closing.close()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- reading ----------------------------------------------------------------------------------------------

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """The text at `ratio`, if it is here at that ratio or at a finer one it can be derived from.

        Raises:
            StoreCorruptError: Its bytes are not what was written.
        """
        return self.get_many([ref], fingerprint, ratio)[0]

    def get_many(self, refs: Sequence[str], fingerprint: str, ratio: int) -> list[Compressed | None]:
        """`get` for several documents, in one transaction."""
        with self.environment.read() as transaction:
            return [self._at(transaction, _key(ref, fingerprint), ratio) for ref in refs]

    def finest(self, ref: str, fingerprint: str) -> Compressed | None:
        """The text at the ratio it is kept at, if it is here."""
        with self.environment.read() as transaction:
            return self._at(transaction, _key(ref, fingerprint))

    def _at(self, transaction: Any, key: bytes, ratio: int | None = None) -> Compressed | None:
        entries, blocks = self._databases("entries", "blocks")
        data = None if entries is None else transaction.get(key, db=entries)
        if data is None:
            return None
        entry = _Entry.unpack(data)
        if ratio is not None and ratio % entry.ratio:
            return None
        kept = self._read(transaction, blocks, key, entry, self._kind(transaction, entry.kind))
        return kept if ratio in (None, kept.ratio) else kept.at_ratio(ratio)

    def items(self) -> Iterator[tuple[str, str]]:
        """(ref, fingerprint) of everything here, as of now."""
        for key, entry, kind in self._entries():
            del entry
            yield _ref(key), kind.fingerprint

    def __contains__(self, item: tuple[str, str]) -> bool:
        with self.environment.read() as transaction:
            (entries,) = self._databases("entries")
            return entries is not None and transaction.get(_key(*item), db=entries) is not None

    def __len__(self) -> int:
        with self.environment.read() as transaction:
            (entries,) = self._databases("entries")
            return 0 if entries is None else int(transaction.stat(entries)["entries"])

    def stats(self) -> StoreStats:
        """What is here, and what it takes."""
        tokens = embeddings = live = 0
        by_fingerprint: dict[str, int] = {}
        count = 0
        for _, entry, kind in self._entries():
            count += 1
            tokens += entry.n_tokens
            embeddings += entry.n_embeddings
            live += entry.size(kind.width)
            by_fingerprint[kind.fingerprint] = by_fingerprint.get(kind.fingerprint, 0) + 1
        with self.environment.read() as transaction:
            (blocks,) = self._databases("blocks")
            taken = 0 if blocks is None else sum(len(value) for _, value in transaction.cursor(db=blocks))
        return StoreStats(
            n_documents=count,
            n_tokens=tokens,
            n_embeddings=embeddings,
            live_bytes=live,
            block_bytes=taken,
            file_bytes=self.environment.file_bytes(),
            by_fingerprint=by_fingerprint,
        )

    def verify(self) -> Verified:
        """Read everything and compare it with its checksums."""
        good = 0
        damaged: list[tuple[str, str, str]] = []
        problems: list[str] = []
        with self.environment.read() as transaction:
            entries, blocks, live = self._databases("entries", "blocks", "live")
            if entries is None:
                return Verified(n_documents=0)
            found: dict[int, int] = {}
            for data, value in transaction.cursor(db=entries):
                key, entry = bytes(data), _Entry.unpack(value)
                try:
                    kind = self._kind(transaction, entry.kind)
                    found[entry.block] = found.get(entry.block, 0) + entry.size(kind.width)
                    self._read(transaction, blocks, key, entry, kind)
                    good += 1
                except StoreCorruptError as error:
                    name = self._kinds[entry.kind].fingerprint if entry.kind in self._kinds else "?"
                    damaged.append((_ref(key), name, str(error)))
            counted = {_NUMBER.unpack(key)[0]: _COUNT.unpack(value)[0] for key, value in transaction.cursor(db=live)}
            present = {_NUMBER.unpack(key)[0] for key in transaction.cursor(db=blocks).iternext(values=False)}
            problems += [
                f"block {at} holds {found.get(at, 0):,} bytes of documents, and {counted.get(at, 0):,} are noted"
                for at in sorted(found.keys() | counted.keys())
                if found.get(at, 0) != counted.get(at, 0)
            ]
            problems += [f"block {at} belongs to no document" for at in sorted(present - found.keys())]
        return Verified(n_documents=good, damaged=tuple(damaged), problems=tuple(problems))

    # -- writing ----------------------------------------------------------------------------------------------

    def put(self, *texts: Compressed) -> None:
        """Keep texts, unless they are here at a ratio at least as fine: all of them are on disk when this returns.

        Raises:
            StoreError: The store is read-only, or the disk refuses; then none of them was kept.
        """
        finest: dict[bytes, Compressed] = {}
        for text in texts:
            key = _key(text.ref, text.fingerprint)
            if key not in finest or text.ratio < finest[key].ratio:
                finest[key] = text
        coded = [(key, text, *encode(text.embeddings, self.dtype)) for key, text in finest.items()]
        if coded:
            self.write(lambda transaction: self._put(transaction, coded))

    def remove(self, refs: Iterable[str], fingerprint: str | None = None) -> int:
        """Remove documents, of one embedder or of all. Returns how many entries went."""
        wanted = list(refs)

        return self.write(lambda transaction: sum(self.forget(transaction, ref, fingerprint) for ref in wanted))

    def forget(self, transaction: Any, ref: str, fingerprint: str | None = None) -> int:
        """`remove` of one document within a transaction of `write`."""
        keys = self._keys_of(transaction, ref, fingerprint)
        for key in keys:
            self._forget(transaction, key)
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
                    f"no document here is of the embedder {min(unknown)!r}; pass fingerprints that "
                    "store.stats().by_fingerprint names"
                )
            for fingerprint in set(before.by_fingerprint) - set(keep):
                self.remove([ref for ref, own in self.items() if own == fingerprint], fingerprint)
        sparse = self._sparse()
        while sparse:
            some, taken = [], 0
            while sparse and taken < _WRITE_BYTES:
                number, size = sparse.pop()
                some.append(number)
                taken += size
            self._move(set(some))
        return before.block_bytes - self.stats().block_bytes

    # -- inside -----------------------------------------------------------------------------------------------

    def _databases(self, *names: str) -> list[Any]:
        return [self.environment.database(name) for name in names]

    def write(self, work: Callable[[Any], T]) -> T:
        """Run `work(transaction)` over the databases of this folder and commit: see `Environment.write`."""
        try:
            return self.environment.write(work)
        except BaseException:
            self._kinds.clear()  # a number that was not committed may become another's
            raise

    def _entries(self) -> Iterator[tuple[bytes, _Entry, _Kind]]:
        last: bytes | None = None
        while True:  # a page at a time: no transaction stays open while the caller works
            with self.environment.read() as transaction:
                (entries,) = self._databases("entries")
                if entries is None:
                    return
                cursor = transaction.cursor(db=entries)
                found = cursor.first() if last is None else cursor.set_range(last + b"\0")
                page: list[tuple[bytes, _Entry, _Kind]] = []
                while found and len(page) < 1000:
                    entry = _Entry.unpack(cursor.value())
                    page.append((bytes(cursor.key()), entry, self._kind(transaction, entry.kind)))
                    found = cursor.next()
            if not page:
                return
            last = page[-1][0]
            yield from page

    def _kind(self, transaction: Any, number: int) -> _Kind:
        if number not in self._kinds:
            data = transaction.get(_NUMBER.pack(number), db=self.environment.database("kinds"))
            if data is None:
                raise StoreCorruptError(
                    f"{self.path}: an entry is of kind {number}, which is not there; compress it again"
                )
            self._kinds[number] = _Kind.parse(data)
        return self._kinds[number]

    def _read(self, transaction: Any, blocks: Any, key: bytes, entry: _Entry, kind: _Kind) -> Compressed:
        block = transaction.get(_NUMBER.pack(entry.block), db=blocks)
        size = entry.size(kind.width)
        payload = memoryview(b"" if block is None else block)[entry.offset : entry.offset + size]
        if len(payload) != size or entry.sum_of(key, payload) != entry.checksum:
            raise StoreCorruptError(
                f"{self.path}: the embeddings of {_ref(key)} are not what was written; remove that ref and compress "
                "the document again"
            )
        return Compressed(
            embeddings=decode(payload, entry.n_embeddings, kind.width, DTYPES[entry.dtype]),
            ratio=entry.ratio,
            n_tokens=entry.n_tokens,
            ref=_ref(key),
            fingerprint=kind.fingerprint,
            chunk_size=kind.chunk_size,
            ratios=kind.ratios,
            downscaling=kind.downscaling,
        )

    def _put(self, transaction: Any, coded: Sequence[tuple[bytes, Compressed, bytes, Dtype]]) -> None:
        entries = self.environment.database("entries")
        block = _Block()
        for key, text, payload, dtype in coded:
            there = transaction.get(key, db=entries)
            if there is not None and _Entry.unpack(there).ratio <= text.ratio:
                continue
            kind = self._number_of(transaction, _Kind.of(text))
            entry = _Entry(0, 0, text.n_tokens, len(text), text.ratio, kind, DTYPES.index(dtype), 0)
            self._add(transaction, block, key, entry, payload)
        self._put_block(transaction, block)

    def _add(self, transaction: Any, block: _Block, key: bytes, entry: _Entry, payload: Any) -> None:
        if block.payload and len(block.payload) + len(payload) > _BLOCK_BYTES:
            self._put_block(transaction, block)
        values = asdict(entry) | {"offset": len(block.payload), "checksum": entry.sum_of(key, payload)}
        block.entries.append((key, _Entry(**values)))
        block.payload += payload

    def _put_block(self, transaction: Any, block: _Block) -> None:
        """Put a block and its entries into the databases, and empty it."""
        entries, blocks, live = self._databases("entries", "blocks", "live")
        if not block.entries:
            return
        cursor = transaction.cursor(db=live)
        number = _NUMBER.unpack(cursor.key())[0] + 1 if cursor.last() else 0
        total = 0
        for key, entry in block.entries:
            self._forget(transaction, key)
            transaction.put(key, _Entry(**(asdict(entry) | {"block": number})).pack(), db=entries)
            total += entry.size(self._kinds[entry.kind].width)
        transaction.put(_NUMBER.pack(number), bytes(block.payload), db=blocks)
        transaction.put(_NUMBER.pack(number), _COUNT.pack(total), db=live)
        block.payload, block.entries = bytearray(), []

    def _forget(self, transaction: Any, key: bytes) -> None:
        """Drop an entry, if it is there, and its block with the last of them."""
        entries, blocks, live = self._databases("entries", "blocks", "live")
        data = transaction.get(key, db=entries)
        if data is None:
            return
        entry = _Entry.unpack(data)
        size = entry.size(self._kind(transaction, entry.kind).width)
        transaction.delete(key, db=entries)
        name = _NUMBER.pack(entry.block)
        left = _COUNT.unpack(transaction.get(name, db=live) or _COUNT.pack(0))[0] - size
        if left > 0:
            transaction.put(name, _COUNT.pack(left), db=live)
        else:
            transaction.delete(name, db=live)
            transaction.delete(name, db=blocks)

    def _number_of(self, transaction: Any, kind: _Kind) -> int:
        kinds = self.environment.database("kinds")
        for key, value in transaction.cursor(db=kinds):
            number = int(_NUMBER.unpack(key)[0])
            self._kinds[number] = _Kind.parse(value)
            if self._kinds[number] == kind:
                return number
        number = int(transaction.stat(kinds)["entries"])
        transaction.put(_NUMBER.pack(number), json.dumps(asdict(kind)).encode(), db=kinds)
        self._kinds[number] = kind
        return number

    def _keys_of(self, transaction: Any, ref: str, fingerprint: str | None) -> list[bytes]:
        entries = self.environment.database("entries")
        if fingerprint is not None:
            key = _key(ref, fingerprint)
            return [key] if transaction.get(key, db=entries) is not None else []
        start = _key(ref, "")[:16]
        cursor = transaction.cursor(db=entries)
        keys = []
        found = cursor.set_range(start)
        while found and bytes(cursor.key())[:16] == start:
            keys.append(bytes(cursor.key()))
            found = cursor.next()
        return keys

    def _sparse(self) -> list[tuple[int, int]]:
        """(number, live bytes) of the blocks with gaps, and of the small ones if there are several."""
        with self.environment.read() as transaction:
            blocks, live = self._databases("blocks", "live")
            sizes = {_NUMBER.unpack(key)[0]: len(value) for key, value in transaction.cursor(db=blocks)}
            counted = {_NUMBER.unpack(key)[0]: _COUNT.unpack(value)[0] for key, value in transaction.cursor(db=live)}
        small = [at for at, size in sizes.items() if size < _SMALL_BLOCK_BYTES]
        chosen = {at for at, size in sizes.items() if counted.get(at, 0) < size}
        chosen |= set(small) if len(small) > 1 else set()
        return [(at, counted.get(at, 0)) for at in sorted(chosen, reverse=True)]

    def _move(self, numbers: set[int]) -> None:
        """Write the documents of some blocks anew, together."""

        def work(transaction: Any) -> None:
            entries, blocks = self._databases("entries", "blocks")
            moved = [(bytes(key), _Entry.unpack(value)) for key, value in transaction.cursor(db=entries)
                     if _ENTRY.unpack(value)[0] in numbers]  # fmt: skip
            block = _Block()
            for key, entry in moved:
                kind = self._kind(transaction, entry.kind)
                self._read(transaction, blocks, key, entry, kind)  # damage is not to be sealed with a new checksum
                value = transaction.get(_NUMBER.pack(entry.block), db=blocks)
                payload = bytes(value[entry.offset : entry.offset + entry.size(kind.width)])
                self._add(transaction, block, key, entry, payload)
            self._put_block(transaction, block)

        self.write(work)


def _key(ref: str, fingerprint: str) -> bytes:
    """32 bytes: those of the ref, then a hash of the fingerprint."""
    digits = ref.removeprefix(_PREFIX)
    try:
        own = bytes.fromhex(digits)
    except ValueError:
        own = b""
    if not ref.startswith(_PREFIX) or len(own) != 16:
        raise ConfigError(f"ref={ref!r} is not a document's ref ({_PREFIX} and 32 hex digits); pass document.ref")
    return own + xxhash.xxh3_128(fingerprint.encode()).digest()


def _ref(key: bytes) -> str:
    return _PREFIX + key[:16].hex()


def _prepare(folder: Path) -> None:
    """Make the folder of a store, or see that it is one."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file, and a store is a folder; pass another path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made ({error.strerror}); pass a path that can be written to") from error
    if any(folder.iterdir()) and not (folder / DATA_FILE).is_file() and not (folder / DESCRIPTION).is_file():
        raise StoreError(f"{folder} holds files that are not a store's; pass another folder, or an empty one")
    _check_description(folder)


def _check_description(folder: Path) -> None:
    """A folder that says it is a store of this version has its data."""
    file = folder / DESCRIPTION
    if not file.is_file():
        return
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        known = said["format"] == FORMAT
        version = said["version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StoreCorruptError(f"{file} does not describe a store ({error}); get it again from a copy") from error
    if not known or version != VERSION:
        raise StoreError(
            f"{file} says {said['format']!r} version {version!r}, and this library reads {FORMAT!r} version {VERSION}; "
            "export it with the version that wrote it, and import it here"
        )
    data = folder / DATA_FILE
    if not data.is_file() or not data.stat().st_size:
        raise StoreCorruptError(f"{data} is missing or empty; get it again from a copy, or start with a new folder")


def _describe(folder: Path) -> None:
    """Written once the data file is there, and whole or not at all."""
    temporary = folder / f".{DESCRIPTION}.tmp"
    temporary.write_text(json.dumps({"format": FORMAT, "version": VERSION}) + "\n", encoding="utf-8")
    temporary.replace(folder / DESCRIPTION)
