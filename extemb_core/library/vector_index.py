"""Search passages by their vectors, in FAISS: `IndexIDMap2` over a flat index, HNSW or IVF-PQ, depending on size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from extemb_core.errors import ConfigError, StoreError, optional_import
from extemb_core.library.bm25 import MAX_REMOVED
from extemb_core.utils.files import atomic_write, atomic_write_text, parse_json, sha256_of

_FLAT_UP_TO = 50_000  # exact search of so many vectors takes a few milliseconds
_GRAPH_UP_TO = 5_000_000  # beyond, uncompressed vectors need more memory than a machine has to spare
_EF_SEARCH, _EF_CONSTRUCTION = 128, 200
_PROBES = 64
_MAX_GROWTH = 4  # an index is retrained once it holds this many times the vectors it was trained on


def choose_factory(count: int) -> str:
    """Return the FAISS name of the index for so many vectors."""
    if count <= _GRAPH_UP_TO:
        return "Flat" if count <= _FLAT_UP_TO else "HNSW32"
    return f"IVF{2 ** int(np.log2(4 * count**0.5))},PQ32"


class VectorIndex:
    """Finds the vectors with the largest inner product with a given one.

    Args:
        width: Width of the vectors.
        factory: FAISS name of the index ("Flat", "HNSW32", "IVF4096,PQ32"); flat when not given.
        wanted: Factory to use whatever its size; None to choose by size.

    Raises:
        MissingExtraError: faiss is not installed.
        ConfigError: FAISS knows no such index.
    """

    def __init__(self, width: int, factory: str | None = None, wanted: str | None = None) -> None:
        self.width = width
        self.wanted = wanted
        self.factory = factory or "Flat"
        self.ids: set[int] = set()
        self._removed: set[int] = set()
        self._trained_on = 0  # so many vectors; 0 for an index that is not trained
        self._few = 0  # the largest number of vectors that was too few to train the wanted index
        self._index = _built(width, self.factory)

    def add(self, ids: Sequence[int], vectors: np.ndarray[Any, Any]) -> None:
        """Add vectors. ids, vectors: (n,), (n, width).

        An index that needs training is trained on the first vectors, and should be made anew once it holds four times
        as many. If they are too few for training, a flat index holds them.

        Raises:
            ConfigError: FAISS adds no more vectors to an index of this kind.
        """
        if not len(ids):
            return
        data, numbers = np.ascontiguousarray(vectors, np.float32), np.asarray(ids, np.int64)
        try:
            if not self._index.is_trained:
                self._index.train(data)
                self._trained_on = len(ids)
            self._index.add_with_ids(data, numbers)
        except RuntimeError as error:
            if self.ids:
                raise ConfigError(
                    f"index={self.factory!r} takes no more vectors once it is built; pass e.g. 'Flat' or 'HNSW32'"
                ) from error
            self.factory, self._few, self._trained_on = "Flat", len(ids), 0
            self._index = _built(self.width, self.factory)
            self._index.add_with_ids(data, numbers)
        self.ids.update(map(int, ids))

    def remove(self, ids: Iterable[int]) -> None:
        """Remove vectors; only a flat index can, so in others they are left out of search results."""
        removed = {int(index) for index in ids} & self.ids
        self.ids -= removed
        if self.factory != "Flat":
            self._removed |= removed
        elif removed:
            self._index.remove_ids(np.fromiter(removed, np.int64))

    def search(self, vector: np.ndarray[Any, Any], k: int) -> list[tuple[int, float]]:
        """Return (id, inner product) of the nearest, best first; fewer than `k` if there are fewer."""
        wanted = min(k + len(self._removed), len(self.ids) + len(self._removed))
        if not self.ids or wanted < 1:
            return []
        scores, indices = self._index.search(np.ascontiguousarray(vector, np.float32).reshape(1, -1), wanted)
        pairs = zip(indices[0].tolist(), scores[0].tolist(), strict=True)
        return [(index, score) for index, score in pairs if index >= 0 and index not in self._removed][:k]

    def should_be_made_anew(self) -> bool:
        """Return whether it is too large for its kind or for its training, or holds too much that was removed."""
        if self.wanted is None:
            outgrown = choose_factory(len(self.ids)) != self.factory
        else:
            outgrown = self.factory != self.wanted and len(self.ids) > 2 * self._few
        outgrown |= 0 < _MAX_GROWTH * self._trained_on <= len(self.ids)
        return outgrown or len(self._removed) > MAX_REMOVED * max(1, len(self.ids))

    def save(self, file: Path, **description: Any) -> None:
        """Write the index atomically, with a description beside it that is checked when it is read.

        Raises:
            StoreError: The disk refuses.
        """
        faiss = _faiss()
        try:
            with atomic_write(file) as temporary:
                faiss.write_index(self._index, str(temporary))
                description |= {"factory": self.factory, "width": self.width, "sha256": sha256_of(temporary),
                                "gone": sorted(self._removed), "trained_on": self._trained_on}  # fmt: skip
            atomic_write_text(file.with_suffix(".json"), json.dumps(description) + "\n")
        except (OSError, RuntimeError) as error:
            raise StoreError(f"{file} could not be written ({error}); it is rebuilt when next needed") from error

    @classmethod
    def load(cls, file: Path, width: int, factory: str | None = None, **description: Any) -> VectorIndex | None:
        """Load an index, or None if it is missing, damaged or of another description and has to be rebuilt."""
        if not (file.is_file() and file.with_suffix(".json").is_file()):  # devices and pipes would never end
            return None
        try:
            saved = parse_json(file.with_suffix(".json").read_text(encoding="utf-8"))
            description |= {"width": width, "sha256": sha256_of(file), "factory": factory or saved["factory"]}
            if any(saved.get(name) != value for name, value in description.items()):
                return None
            faiss = _faiss()
            loaded = cls(width, saved["factory"], factory)
            loaded._index = faiss.read_index(str(file))
            loaded._removed = set(saved["gone"])
            loaded._trained_on = int(saved.get("trained_on", 0))  # not written by earlier versions
            if loaded._index.d != width:
                return None
            loaded.ids = set(faiss.vector_to_array(loaded._index.id_map).tolist()) - loaded._removed
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
            return None
        return loaded


def _built(width: int, factory: str) -> Any:
    faiss = _faiss()
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ConfigError(
            f"index={factory!r} is not an index that FAISS builds for width {width}; pass e.g. 'Flat', 'HNSW32' or "
            "'IVF1024,PQ32'"
        ) from error
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch, index.hnsw.efConstruction = _EF_SEARCH, _EF_CONSTRUCTION
    if hasattr(index, "nprobe"):
        index.nprobe = _PROBES
    return faiss.IndexIDMap2(index)


@cache
def _faiss() -> Any:
    faiss = optional_import("faiss", "library", "a library of documents")
    if hasattr(os, "register_at_fork"):  # a forked child lacks the parent's threads, and would wait for them
        os.register_at_fork(after_in_child=partial(faiss.omp_set_num_threads, 1))
    return faiss
