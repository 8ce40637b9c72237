"""Compress documents during ingestion, so that questions need not wait for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode, TransformComponent
from typing_extensions import Self

from extemb_core.frameworks.aio import until_cancelled
from llama_index.postprocessor.extemb.base import CompressionSettings
from llama_index.postprocessor.extemb.node import text_of, to_document


class ExtensibleTransform(CompressionSettings, TransformComponent):
    """Compresses nodes into the store, each text once; the nodes go on unchanged.

    Use it as the last transformation of an `IngestionPipeline`, after the splitter. Finished batches are in the store:
    an interrupted run resumes, and a node whose text is there costs only a look-up. Give as `ratio` the finest one that
    will be asked for, or "auto" for the embedder's `kept_ratio`, which a plan for a query needs.
    """

    show_progress: bool | None = None
    """Show a bar; None shows it on a terminal."""

    @classmethod
    def class_name(cls) -> str:
        return "ExtensibleTransform"

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Describe the object and its store: for a pipeline's cache, the same nodes in another store are other work."""
        return {**super().to_dict(**kwargs), "fills": self._fills()}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Make an object from the result of `to_dict`."""
        return super().from_dict({name: value for name, value in data.items() if name != "fills"}, **kwargs)

    def _fills(self) -> str:
        """Return names of the embedder and the store, without loading them; one in memory belongs to this process."""
        owner = self if self.llm is None else self.llm
        lm = getattr(owner, "loaded_lm", None)
        names = [getattr(owner, name, None) for name in ("model", "embedder")]
        store = getattr(owner, "store", None) if lm is None else lm.store
        folder = getattr(getattr(store, "environment", None), "folder", store)
        where = folder if isinstance(folder, str | os.PathLike) else f"{os.getpid()}/{id(store)}"
        return f"{names if lm is None else lm.embedder.fingerprint} in {where}"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        if self.ratio != "raw":
            with_text = (to_document(node, text) for node in nodes if (text := text_of(node)) and text.strip())
            documents = list({document.ref: document for document in with_text}.values())
            ratio = self.ratio if isinstance(self.ratio, int) else None
            self.lm.compress(documents, ratio=ratio, batch_size=self.batch_size, show_progress=self.show_progress)
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compress in a thread, without blocking the event loop; it stops when nobody waits any more."""
        return await until_cancelled(lambda _cancelled: self(nodes, **kwargs))
