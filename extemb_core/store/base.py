"""What `ExtensibleLM` needs of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

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
