"""Store protocol, and the store in memory, so that a second question compresses nothing again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from extemb_core.errors import RatioError
from extemb_core.utils.validation import whole_number

if TYPE_CHECKING:
    from extemb_core.models.compressed import Compressed


class Store(Protocol):
    """Keeps compressed documents by ref and fingerprint: `MemoryStore`, `EmbeddingStore`, or a class of your own."""

    @property
    def readonly(self) -> bool:
        """Return whether nothing can be put."""

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """Return the text at `ratio`, derived from a finer one if need be, or None if it is not here."""

    def put(self, *texts: Compressed) -> None:
        """Keep texts, except those that can be derived from what is here already."""


def missing_from(store: Store, refs: Iterable[str], fingerprint: str, ratio: int) -> list[str]:
    """List the refs whose documents a store lacks at `ratio`; a store on disk does not read embeddings for it."""
    if (missing := getattr(store, "missing", None)) is not None:
        return list(missing(refs, fingerprint, ratio))
    return [ref for ref in refs if store.get(ref, fingerprint, ratio) is None]


def checked_ratio(ratio: int) -> int:
    """Return a ratio as an int; raise `RatioError` if it cannot be one."""
    return whole_number(ratio, "ratio", remedy="one of the embedder's ratios", error=RatioError)


class MemoryStore:
    """Keeps compressed texts by ref and fingerprint, each at its finest ratio; drops the least recently used first.

    Args:
        max_bytes: Limit on the total size of the embeddings.
    """

    readonly = False

    def __init__(self, max_bytes: int = 512 * 2**20) -> None:
        self.max_bytes = whole_number(max_bytes, "max_bytes", 0, remedy="0 to keep nothing")
        self.n_bytes = 0
        self._texts: OrderedDict[tuple[str, str], Compressed] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """Return the text at `ratio`, derived from a finer one if need be, or None if it is not here.

        Raises:
            RatioError: The ratio is not a whole number of at least 1.
        """
        ratio = checked_ratio(ratio)
        with self._lock:
            text = self._texts.get((ref, fingerprint))
            if text is None or ratio % text.ratio:
                return None
            self._texts.move_to_end((ref, fingerprint))
        return text.derived(ratio)

    def put(self, *texts: Compressed) -> None:
        """Keep texts, except those that can be derived from what is here and those larger than the whole store."""
        with self._lock:
            for text in texts:
                key, size = (text.ref, text.fingerprint), _n_bytes(text)
                before = self._texts.get(key)
                if size > self.max_bytes or (before is not None and text.ratio % before.ratio == 0):
                    continue
                if before is not None:
                    self.n_bytes -= _n_bytes(self._texts.pop(key))
                self._texts[key] = text
                self.n_bytes += size
                while self.n_bytes > self.max_bytes:
                    _, oldest = self._texts.popitem(last=False)
                    self.n_bytes -= _n_bytes(oldest)


def _n_bytes(text: Compressed) -> int:
    arrays = (text.embeddings, text.mean_norms, text.norms, text.weights, text.anchors)
    return sum(array.nbytes for array in arrays if array is not None)
