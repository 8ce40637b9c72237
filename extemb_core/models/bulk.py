"""Compress many texts, or answer many prompts, batch by batch: at most one is held in memory, or lost in a crash."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import MismatchError
from extemb_core.models.anchors import anchor_positions
from extemb_core.models.chunks import n_embeddings
from extemb_core.models.compressed import Compressed
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.utils.batches import batches, padded_batches
from extemb_core.utils.progress import progress
from extemb_core.utils.validation import whole_number

if TYPE_CHECKING:
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.llm import LLM

T = TypeVar("T")

Pieces = Iterable[tuple[np.ndarray[Any, Any], int]]
"""Pieces of a text: (T,) ids, each with its units on a progress bar."""

Text = tuple[str, "np.ndarray[Any, Any]"]
"""A ref, and (T,) token ids."""

POSITIONS_AT_ONCE = 4096  # in one pass over prompts, padding included: bounds memory, and padding of uneven lengths

_SORT_WINDOW_BATCHES = 64
_MEASURES = ("mean_norms", "norms", "weights")  # of each group, above entry layer 0
_PASSES = 8  # forward passes in a batch
_CPU_CHUNKS, _MAX_CUDA_CHUNKS = 4, 128
_BYTES_PER_UNIT = 128  # of activations, for each token and unit of the hidden size; generous for a dense layer
_SHARE = 4  # activations take at most this fraction, a quarter, of the free memory

_quiet: dict[ExtensibleEmbedder, tuple[int, list[torch.nn.Module]]] = {}  # threads that compress, modules to restore
_quiet_lock = threading.Lock()


def default_batch_size(llm: LLM, chunk_size: int) -> int:
    """Choose how many chunks of `chunk_size` tokens go through the layers at once on an LLM's device.

    4 on a CPU, where more is not faster; on CUDA as many as fit a quarter of the free memory, from 4 to 128.
    """
    if llm.device.type != "cuda":
        return _CPU_CHUNKS
    return max(_CPU_CHUNKS, min(_MAX_CUDA_CHUNKS, _cuda_tokens(llm) // chunk_size))


def positions_at_once(llm: LLM) -> int:
    """Choose how many positions of prompts and answers, padding included, go through an LLM at once on its device.

    4096 on a CPU; on CUDA as many as fit a quarter of the free memory, if that is more. A longer prompt is read alone.
    """
    return max(POSITIONS_AT_ONCE, _cuda_tokens(llm) if llm.device.type == "cuda" else 0)


def batch_with(first: T, lengths: Mapping[T, int], llm: LLM) -> list[T]:
    """Choose which waiting prompts are answered together with `first`, by the positions that each takes."""
    return next(batch for batch in padded_batches(lengths, positions_at_once(llm)) if first in batch)


def _cuda_tokens(llm: LLM) -> int:
    free, _ = torch.cuda.mem_get_info(llm.device)
    free += torch.cuda.memory_reserved(llm.device) - torch.cuda.memory_allocated(llm.device)  # PyTorch's to reuse
    return free // (_SHARE * _BYTES_PER_UNIT * llm.hidden_size)


def compress_in_batches(
    embedder: ExtensibleEmbedder,
    texts: Sequence[Text],
    *,
    ratio: int | None = None,
    batch_size: int | None = None,
    show_progress: bool | None = None,
) -> Iterator[list[Compressed]]:
    """Compress texts in the order given, and yield each batch before the next is made, for the caller to write it.

    A batch holds the tokens of 8 forward passes, and at least one text.

    Args:
        embedder: Embedder that compresses them.
        texts: The ref and (T,) token ids of each.
        ratio: Tokens per embedding; the embedder's `kept_ratio` when not given.
        batch_size: Chunks per forward pass; by the device when not given (see `default_batch_size`).
        show_progress: Show a bar over all texts; None shows it on a terminal.

    Raises:
        RatioError: The ratio was not trained.
    """
    chunk_size = embedder.config.chunk_size
    size = default_batch_size(embedder.llm, chunk_size) if batch_size is None else batch_size
    with progress("compress", sum(len(ids) for _, ids in texts), show_progress) as advance:
        for batch in batches(texts, lambda text: len(text[1]), _PASSES * size * chunk_size):
            refs, ids = zip(*batch, strict=True)
            yield embedder.compress_ids(ids, refs=refs, ratio=ratio, batch_size=size, show_progress=advance)


@torch.no_grad()
def compress_pieces(
    embedder: ExtensibleEmbedder,
    texts: Sequence[Pieces],
    refs: Sequence[str],
    ratio: int | None,
    batch_size: int | None,
    total: int,
    show_progress: bool | Callable[[float], None] | None,
) -> list[Compressed]:
    """Compress texts that come as pieces of ids, as `ExtensibleEmbedder.compress` does.

    Args:
        embedder: Embedder that compresses them.
        texts: For each text, pieces of ids, each with its units on the progress bar.
        refs: Refs of the texts.
        ratio, batch_size, show_progress: See `ExtensibleEmbedder.compress`.
        total: Units of all pieces on the progress bar.
    """
    config = embedder.config
    ratio = config.finest(ratio)
    if batch_size is None:
        batch_size = default_batch_size(embedder.llm, config.chunk_size)
    whole_number(batch_size, "batch_size")
    fields = [_fields(config) for _ in texts]
    n_tokens = [0] * len(texts)
    chunks = _chunks(texts, config.chunk_size, ratio, n_tokens)
    with _without_dropout(embedder), progress("compress", total, show_progress) as advance:
        while window := list(islice(chunks, batch_size * _SORT_WINDOW_BATCHES)):
            window.sort(key=lambda chunk: -len(chunk.ids))
            for at in range(0, len(window), batch_size):
                batch = window[at : at + batch_size]
                _compress_batch(embedder, batch, ratio, fields)
                advance(sum(chunk.units for chunk in batch))
    fingerprint = embedder.fingerprint
    return [
        Compressed(
            ratio=ratio,
            n_tokens=count,
            ref=ref,
            fingerprint=fingerprint,
            chunk_size=config.chunk_size,
            ratios=tuple(config.ratios),
            downscaling=config.downscaling,
            entry_layer=config.entry_layer,
            anchors=rows.pop("anchors").array() if config.entry_layer else None,
            **{name: torch.from_numpy(tensor.array()) for name, tensor in rows.items()},
        ).checked()
        for rows, count, ref in zip(fields, n_tokens, refs, strict=True)
    ]


@contextmanager
def _without_dropout(embedder: ExtensibleEmbedder) -> Iterator[None]:
    """Turn off the dropout of an embedder in training mode while it compresses, and restore its mode afterwards.

    If several threads compress with it, the last one to finish restores it.
    """
    with _quiet_lock:
        count, trained = _quiet.get(embedder, (0, []))
        modules = [module for module in embedder.modules() if module.training]
        for module in modules:
            module.training = False
        _quiet[embedder] = count + 1, trained + modules
    try:
        yield
    finally:
        with _quiet_lock:
            count, trained = _quiet.pop(embedder)
            if count > 1:
                _quiet[embedder] = count - 1, trained
            else:
                for module in trained:
                    module.training = True


def _fields(config: ExtensibleEmbedderConfig) -> dict[str, _Rows]:
    """Create empty buffers for the fields of a `Compressed` that grow with its text."""
    embeddings = {"embeddings": _Rows(config.hidden_size)}
    if not config.entry_layer:
        return embeddings
    return embeddings | {name: _Rows() for name in _MEASURES} | {"anchors": _Rows(dtype=np.int32)}


def _chunks(texts: Sequence[Pieces], size: int, ratio: int, n_tokens: list[int]) -> Iterator[_Chunk]:
    """Yield the chunks of all texts on demand; count each text's tokens in `n_tokens`."""
    for text, pieces in enumerate(texts):
        offset = 0
        for ids, units in _regrouped(pieces, size):
            yield _Chunk(text, ids, offset, units)
            offset += n_embeddings(len(ids), ratio)
            n_tokens[text] += len(ids)


def _compress_batch(
    embedder: ExtensibleEmbedder, batch: list[_Chunk], ratio: int, fields: list[dict[str, _Rows]]
) -> None:
    layer, llm = embedder.config.entry_layer, embedder.llm
    padded = np.zeros((len(batch), len(batch[0].ids)), dtype=np.int64)
    for row, chunk in enumerate(batch):
        padded[row, : len(chunk.ids)] = chunk.ids
    outputs = embedder(torch.from_numpy(padded))
    for row, chunk in enumerate(batch):
        length = len(chunk.ids)
        values: dict[str, Any] = {}
        if not layer:
            values["embeddings"] = embedder.read_out(outputs, row, length, ratio)
        else:
            groups = embedder.pool(outputs, row, length, ratio)
            if not torch.isfinite(groups.norms).all():
                raise MismatchError(
                    f"layer {layer} of {llm.name} gives states that are not finite in "
                    f"{llm.dtype}; load the LLM in float32, or choose an earlier entry_layer"
                )
            measures = torch.stack([groups.means.norm(dim=-1), groups.norms, groups.weights])
            values = dict(zip(_MEASURES, measures.cpu(), strict=True))  # one transfer from a GPU
            values["embeddings"] = groups.states
            values["anchors"] = chunk.ids[anchor_positions(length, ratio).numpy()]
        for name, rows in values.items():
            fields[chunk.text][name].write(chunk.offset, rows)


@dataclass(frozen=True)
class _Chunk:
    """The ids of one chunk of text number `text`, whose embeddings begin at row `offset`."""

    text: int
    ids: np.ndarray[Any, Any]
    offset: int
    units: float  # on the progress bar


class _Rows:
    """A growing (N, ...) buffer for one field of a `Compressed`, whose memory the result then shares."""

    def __init__(self, *shape: int, dtype: type = np.float32) -> None:
        self._buffer = bytearray()
        self._shape = shape
        self._dtype = dtype

    def write(self, offset: int, rows: Tensor | np.ndarray[Any, Any]) -> None:
        values = rows.float().cpu().numpy() if isinstance(rows, Tensor) else rows
        n_bytes = (offset + len(values)) * math.prod(self._shape) * np.dtype(self._dtype).itemsize
        self._buffer.extend(bytes(max(0, n_bytes - len(self._buffer))))
        self.array()[offset : offset + len(values)] = values

    def array(self) -> np.ndarray[Any, Any]:
        return np.frombuffer(self._buffer, dtype=self._dtype).reshape(-1, *self._shape)


def _regrouped(pieces: Pieces, size: int) -> Iterator[tuple[np.ndarray[Any, Any], float]]:
    """Regroup pieces of ids into chunks of `size` and a tail, each with its share of the pieces' units."""
    held: list[np.ndarray[Any, Any]] = []
    count, units = 0, 0.0
    for ids, worth in pieces:
        start = 0
        while start < len(ids):
            part = ids[start : start + size - count]
            held.append(part)
            start, count, units = start + len(part), count + len(part), units + worth * len(part) / len(ids)
            if count == size:
                yield np.concatenate(held), units
                held, count, units = [], 0, 0.0
    if held:
        yield np.concatenate(held), units
