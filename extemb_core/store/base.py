"""What `ExtensibleLM` needs of a store, and the store in memory: what a second question is answered from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

from extemb_core.errors import ConfigError

if TYPE_CHECKING:
    from extemb_core.models.compressed import Compressed


class Store(Protocol):
    """Keeps compressed documents by ref and fingerprint: `MemoryStore`, `EmbeddingStore`, or your own."""

    @property
    def readonly(self) -> bool:
        """Whether nothing can be put."""

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """The text at `ratio`, if it is here at that ratio or at a finer one it can be derived from."""

    def put(self, *texts: Compressed) -> None:
        """Keep texts, unless they are here already at a ratio at least as fine."""


class MemoryStore:
    """Keeps compressed texts by ref and fingerprint, the finest ratio of each; the least recently used go first.

    Args:
        max_bytes: What the embeddings may take together.
    """

    readonly = False

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        if max_bytes < 0:
            raise ConfigError(f"max_bytes={max_bytes} is below 0; pass 0 to keep nothing")
        self.max_bytes = max_bytes
        self.n_bytes = 0
        self._kept: OrderedDict[tuple[str, str], Compressed] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """The text at `ratio`, if it is here at that ratio or at a finer one it can be derived from."""
        with self._lock:
            kept = self._kept.get((ref, fingerprint))
            if kept is None or ratio % kept.ratio:
                return None
            self._kept.move_to_end((ref, fingerprint))
        return kept.at_ratio(ratio)

    def put(self, *texts: Compressed) -> None:
        """Keep texts, but those here already at a ratio at least as fine, and those larger than the whole store."""
        for compressed in texts:
            self._put(compressed)

    def _put(self, compressed: Compressed) -> None:
        key = (compressed.ref, compressed.fingerprint)
        with self._lock:
            before = self._kept.get(key)
            if before is not None and before.ratio <= compressed.ratio:
                return
            if _n_bytes(compressed) > self.max_bytes:
                return
            if before is not None:
                self.n_bytes -= _n_bytes(self._kept.pop(key))
            self._kept[key] = compressed
            self.n_bytes += _n_bytes(compressed)
            while self.n_bytes > self.max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.n_bytes -= _n_bytes(oldest)


def _n_bytes(compressed: Compressed) -> int:
    kept = (compressed.embeddings, compressed.mean_norms, compressed.norms, compressed.weights)
    anchors = 0 if compressed.anchors is None else compressed.anchors.nbytes
    return anchors + sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor is not None)
