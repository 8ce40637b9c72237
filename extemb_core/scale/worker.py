"""Compress texts into a shard of embeddings and its receipt, for any engine that hands out work."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from extemb_core.documents import Document, text_ref
from extemb_core.errors import ConfigError, DocumentError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.library.passages import split_passages
from extemb_core.models.compressed import Compressed
from extemb_core.store.format import Dtype, check_dtype, ref_bytes
from extemb_core.store.remote import StorageLocation
from extemb_core.store.shards import (
    COMPRESSED,
    EXPORTED,
    LEFT,
    MANIFEST,
    SUFFIX,
    Shard,
    open_shards,
    parse_manifest,
    require_only_shards,
    write_errors,
    write_manifest,
    write_shard,
)
from extemb_core.utils.files import parse_json

logger = logging.getLogger(__name__)

SHARD = "shard"  # column of the rows that `CompressWorker` returns
_RECEIPT = ".json"
Refs = np.ndarray[Any, Any]
Done = Mapping[tuple[str, int], Refs]  # (fingerprint, ratio) -> refs, (E,) of 16 bytes, sorted


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Counts for one batch, or for all batches together.

    Attributes:
        n_rows: Rows handed in.
        n_empty: Rows without any text.
        n_unreadable: Rows with something that is not text.
        n_texts: Documents, or passages of them, each counted once in its batch.
        n_present: Texts that were in the shards already.
        n_tokens: Tokens that were compressed now.
        n_embeddings: Embeddings that they became.
        n_bytes: Bytes that these take on disk.
    """

    n_rows: int = 0
    n_empty: int = 0
    n_unreadable: int = 0
    n_texts: int = 0
    n_present: int = 0
    n_tokens: int = 0
    n_embeddings: int = 0
    n_bytes: int = 0

    def __add__(self, other: Batch) -> Batch:
        return Batch(**{name: count + getattr(other, name) for name, count in asdict(self).items()})


class CompressWorker:
    """Compresses batches of rows into shards. A callable for any engine that keeps one object per process.

    Every batch becomes one shard, whose name follows from its content, and gets a receipt beside it once it is whole.
    So when a batch is handed out again, after a worker or its machine was lost, an incomplete shard is replaced and a
    whole one is not compressed again.

    Args:
        output: Folder of the shards, or a URL that fsspec knows; the same for all workers.
        llm, embedder, device, llm_dtype: As `llm`, `embedder`, `device` and `dtype` of `ExtensibleLM.from_pretrained`.
        ratio: The finest ratio that will be asked for; the embedder's `kept_ratio` when not given.
        dtype: Data type of the embeddings on disk: "float16", "int8" or "float32".
        passage_tokens: Cut documents into the passages of a `Library` with this setting; None compresses them whole.
        column: Name of the column that holds the text.
        batch_size: Chunks per forward pass; by the device when not given (see `models.bulk.default_batch_size`).
        done: Refs of the texts in the shards already (see `finished`).

    Raises:
        RatioError: The ratio was not trained.
        WeightsError: Files are missing or damaged.
        StoreError: The output cannot be reached.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        *,
        llm: str | os.PathLike[str],
        embedder: str | os.PathLike[str] | None = None,
        ratio: int | None = None,
        dtype: Dtype = "float16",
        passage_tokens: int | None = None,
        column: str = "text",
        batch_size: int | None = None,
        device: str = "auto",
        llm_dtype: str = "auto",
        done: Done | None = None,
    ) -> None:
        from extemb_core.frameworks.shared import share

        self._location = StorageLocation(output)
        self._passage_tokens = passage_tokens
        self._column = column
        self._batch_size = batch_size
        # Workers of one process share the loaded models.
        self._embedder = share(llm, embedder, device=device, dtype=llm_dtype).embedder
        self._dtype = check_dtype(dtype, self._embedder.config.entry_layer)
        self._ratio = self._embedder.config.finest(ratio)
        self._done = [
            refs
            for (fingerprint, stored_ratio), refs in (done or {}).items()
            if fingerprint == self._embedder.fingerprint and self._ratio % stored_ratio == 0 and len(refs)
        ]

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Compress the texts of some rows, given as columns.

        Returns:
            One row: the fields of `Batch`, and as `SHARD` the file that was written or found whole, "" for none.

        Raises:
            ConfigError: There is no such column.
            StoreError: The shard or its receipt could not be written.
        """
        if self._column not in rows:
            columns = ", ".join(sorted(rows))
            raise ConfigError(f"column={self._column!r} is not a column of the input; pass one of {columns}")
        read = [_document(value) for value in rows[self._column]]
        documents = [document for document in read if document is not None]
        passages = (passage for document in documents if document.text for passage in self._passages(document.text))
        texts = {text_ref(passage): passage for passage in passages}
        missing = self._missing(list(texts))
        name = self._name(missing)
        file = name + SUFFIX if missing else ""
        if missing and _is_whole(self._location, name):
            missing = []
        compressed = self._embedder.compress(
            [texts[ref] for ref in missing], ratio=self._ratio, batch_size=self._batch_size, show_progress=False
        )
        shard = self._write(name, compressed) if compressed else None
        batch = Batch(
            n_rows=len(read),
            n_empty=sum(not document.text for document in documents),
            n_unreadable=len(read) - len(documents),
            n_texts=len(texts),
            n_present=len(texts) - len(compressed),
            n_tokens=sum(text.n_tokens for text in compressed),
            n_embeddings=sum(map(len, compressed)),
            n_bytes=shard.size_bytes if shard else 0,
        )
        return {name: [value] for name, value in asdict(batch).items()} | {SHARD: [file]}

    def _passages(self, text: str) -> list[str]:
        if self._passage_tokens is None:
            return [text]
        spans = split_passages(text, self._passage_tokens, self._embedder.llm.lengths)
        return [text[begin:end] for begin, end in spans]

    def _missing(self, refs: list[str]) -> list[str]:
        if not refs or not self._done:
            return refs
        wanted = _sortable([ref_bytes(ref) for ref in refs])
        present = np.zeros(len(refs), bool)
        for done in self._done:
            present |= done[np.searchsorted(done, wanted).clip(max=len(done) - 1)] == wanted
        return [ref for ref, is_present in zip(refs, present, strict=True) if not is_present]

    def _name(self, refs: Sequence[str]) -> str:
        """Return the name of a shard of these texts."""
        content = f"{self._embedder.fingerprint} {self._ratio} {self._dtype}" + "".join(sorted(refs))
        return f"shard-{hashlib.sha256(content.encode()).hexdigest()[:32]}"

    def _write(self, name: str, texts: Sequence[Compressed]) -> Shard:
        """Write a shard, then its receipt."""
        shard = write_shard(self._location, name, texts, self._dtype)
        with write_errors(self._location, name + _RECEIPT):
            self._location.write_text(name + _RECEIPT, json.dumps(asdict(shard)))
        return shard


def _document(value: Any) -> Document | None:
    """Read the text of a row; None if it is not text."""
    try:
        return Document("" if value is None else value)
    except DocumentError as error:
        logger.warning("a row is skipped: %s", error)
        return None


def receipts(output: str | os.PathLike[str]) -> list[Shard]:
    """List the whole shards in a folder, by their receipts. Shards without one were left by lost workers."""
    location = StorageLocation(output)
    sizes = location.sizes()
    names = [name for name in sorted(sizes) if re.fullmatch(COMPRESSED, name) and name.endswith(_RECEIPT)]
    shards = [_parsed(location, name, text, sizes.get) for name, text in location.read_texts(names).items()]
    return [shard for shard in shards if shard is not None]


def _is_whole(location: StorageLocation, name: str) -> bool:
    """Return whether a shard is there with its receipt."""
    try:
        receipt = location.read_text(name + _RECEIPT)
    except StoreNotFoundError:
        return False
    return _parsed(location, name + _RECEIPT, receipt, location.size) is not None


def _parsed(location: StorageLocation, name: str, text: str, size_of: Callable[[str], int | None]) -> Shard | None:
    """Parse a receipt; None if it is damaged, is that of another shard, or its shard is not whole."""
    try:
        shard = Shard(**parse_json(text))
    except (ValueError, TypeError) as error:  # storage without atomic writes may hold half a receipt
        logger.warning(
            "its texts are compressed again: %s is not a receipt of a shard (%s)", location.naming(name), error
        )
        return None
    is_its = shard.file == name.removesuffix(_RECEIPT) + SUFFIX
    return shard if is_its and size_of(shard.file) == shard.size_bytes else None


def check_output(output: str | os.PathLike[str]) -> list[Shard]:
    """Check that a folder is empty or holds shards of earlier runs. Returns the whole ones.

    Raises:
        StoreError: The folder holds something else, which `seal` must not touch.
    """
    location = StorageLocation(output)
    names, shards = require_only_shards(location, EXPORTED, COMPRESSED), receipts(output)
    if MANIFEST in names and not all(re.fullmatch(COMPRESSED, shard.file) for shard in parse_manifest(location)):
        raise StoreError(f"{location} holds the export of a store; pass another folder")
    return shards


def finished(output: str | os.PathLike[str]) -> dict[tuple[str, int], Refs]:
    """List the sorted refs in the shards of a folder, by fingerprint and ratio, for `CompressWorker(done=)`.

    Only the list of documents is read of each shard. If that is damaged, the shard loses its receipt, so that its texts
    are compressed again.

    Raises:
        StoreError: See `check_output`.
    """
    lists: dict[tuple[str, int], list[Refs]] = {}
    location = StorageLocation(output)

    def damaged(shard: Shard, error: StoreCorruptError) -> None:
        logger.warning("its texts are compressed again: %s", error)
        location.remove(_receipt_of(shard))

    for reader in open_shards(location, check_output(output), damaged):
        for ratio in np.unique(reader.ratios):
            refs = _sortable(reader.refs[reader.ratios == ratio])
            lists.setdefault((reader.kind.fingerprint, int(ratio)), []).append(refs)
    return {key: np.unique(np.concatenate(refs)) for key, refs in lists.items()}


def seal(output: str | os.PathLike[str], written: Iterable[str] = ()) -> list[Shard]:
    """Name the whole shards of a folder in its manifest, and remove what lost workers left. Returns them.

    Call it when all workers are done. Shards that another run finished meanwhile are named too, and files written less
    than an hour ago stay: a worker may be about to finish them.

    Args:
        output: Folder, or URL that fsspec knows.
        written: The `SHARD` of each batch, all of which must exist.

    Raises:
        StoreError: One of these shards is not listed, or the output cannot be written.
    """
    location = StorageLocation(output)
    shards, sealed = receipts(output), None
    expected = set(written) - {""}
    while shards != sealed:  # another run may have replaced the manifest meanwhile, and named more shards
        if lost := expected.difference(shard.file for shard in shards):
            raise StoreError(
                f"{location} does not list {len(lost):,} of the shards that were written there, {min(lost)} for one, "
                "as some storage does late; call again"
            )
        write_manifest(location, shards)
        sealed, shards = shards, receipts(output)
    whole = {name for shard in shards for name in (shard.file, _receipt_of(shard))}
    left = [name for name in location.names() if re.fullmatch(f"{COMPRESSED}|{LEFT}", name) and name not in whole]
    for name in filter(location.is_left, left):
        if not _is_whole(location, name.rpartition(".")[0]):  # its receipt may just have been written
            location.remove(name)
    return shards


def _receipt_of(shard: Shard) -> str:
    """Return the name of a shard's receipt."""
    return shard.file.removesuffix(SUFFIX) + _RECEIPT


def _sortable(refs: Any) -> Refs:
    """Return refs as (E,) items of 16 bytes, which numpy can sort and compare."""
    return np.frombuffer(b"".join(bytes(ref) for ref in refs), "S16")
