"""Compress documents on their way from a retriever to a chain, which passes on a ref of each."""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import Field

from extemb_core.frameworks.aio import until_cancelled
from extemb_core.frameworks.settings import ModelSettings
from langchain_extemb.messages import to_documents

REF = "extemb_ref"


class ExtensibleCompressor(ModelSettings, BaseDocumentCompressor):
    """Compresses documents into the store and adds `metadata["extemb_ref"]`; the documents stay as they are otherwise.

    For `ContextualCompressionRetriever` and LCEL. A chain that formats documents with
    `PromptTemplate.from_template("{extemb_ref}")` then hands refs to a `ChatExtensible` or `ExtensibleLLM` of the same
    model and store, which reads the embeddings in their places: at the ratio given here or a coarser one.
    """

    batch_size: int | None = Field(default=None, ge=1)
    """Chunks per forward pass; by the device when not given."""

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return the same documents, ids and all, with a ref in the metadata of each.

        The query makes no difference: the model plans how each is read when it is asked.
        """
        lm, documents = self.lm, list(documents)
        ours = to_documents(documents)
        ratio = self.ratio if isinstance(self.ratio, int) else None
        if self.ratio != "raw":
            lm.compress(ours, ratio=ratio, batch_size=self.batch_size, show_progress=False)
        return [
            document.model_copy(update={"metadata": {**document.metadata, REF: mark}})
            for document, mark in zip(documents, lm.refs.put(*ours, finest=[ratio] * len(ours)), strict=True)
        ]

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Compress as `compress_documents` does, in a thread that stops when nobody waits any more."""
        return await until_cancelled(lambda _cancelled: self.compress_documents(documents, query, callbacks))
