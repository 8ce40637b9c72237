"""The documents of one API key: those that were added, in a library on disk, and those sent with questions, in memory.

No workspace can read another's documents, or learn whether they exist.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extemb_core.documents import Document
from extemb_core.errors import DocumentError
from extemb_core.library.library import Library
from extemb_core.lm import ExtensibleLM
from extemb_core.models.compressed import Compressed
from extemb_core.serving.errors import ApiError
from extemb_core.serving.requests import StoredDocument, TextDocument
from extemb_core.store.base import MemoryStore, Store


class Workspace:
    """Documents of a key.

    Args:
        folder: Folder of its library, made if it does not exist.
        lm: Model that compresses; its store is read, and never added to.
        encoder: Text encoder that finds passages; see `Library`.
        memory_bytes: Maximum bytes of embeddings kept of documents sent with questions.
        max_documents: Maximum number of documents in the library.

    Attributes:
        lm: Prepares questions with the documents of this workspace.
    """

    def __init__(self, folder: Path, lm: ExtensibleLM, *, encoder: Any, memory_bytes: int, max_documents: int) -> None:
        self._library = Library(folder, lm, encoder=encoder)
        self._max_documents = max_documents
        self._lock = threading.Lock()  # held while documents are added or removed
        store = _Layers(self._library.store, lm.store, MemoryStore(memory_bytes))
        self.lm = ExtensibleLM(lm.llm, lm.embedder, store, scorer=lm.builder.scorer)

    def close(self) -> None:
        """Close the library."""
        self._library.close()

    def records(self) -> list[dict[str, Any]]:
        """List the documents of the library."""
        return list(self._library.documents())

    def add(self, documents: Sequence[TextDocument | Document]) -> list[dict[str, Any]]:
        """Add documents, or replace those of the same id, which is a `Document`'s source. Returns the record of each.

        Of each document its passages are compressed, which searches find, and the whole text, which is read by its ref.

        Raises:
            ApiError: The library would hold too many, or two texts have one id.
            DocumentError: A text is not valid Unicode.
        """
        sent = list(map(_stored_document, documents))
        added: dict[str, Document] = {}
        for document in sent:
            if added.setdefault(document.source, document).text != document.text:
                raise ApiError(
                    400, f"the id {document.source!r:.80} is that of two texts; give each an id of its own",
                    param="documents",
                )  # fmt: skip
        with self._lock:
            before = {record["source"]: record["ref"] for record in self.records()}
            if (count := len(before.keys() | added.keys())) > self._max_documents:
                raise ApiError(
                    400, f"{count} documents are more than the {self._max_documents} that a key may keep; delete some",
                    code="too_many_documents", param="documents",
                )  # fmt: skip
            try:
                self._library.add(list(added.values()), show_progress=False)
                if self._library.lm is not None:
                    self._library.lm.compress(list(added.values()), show_progress=False)
            finally:  # embeddings of replaced texts are dropped even after an error
                records = {record["source"]: record for record in self.records()}
                self._forget({before[source] for source in added if source in before}, records.values())
        return [records[document.source] for document in sent]

    def remove(self, name: str) -> None:
        """Remove a document by its id.

        Raises:
            ApiError: There is no such document.
        """
        with self._lock:
            refs = {record["ref"] for record in self.records() if record["source"] == name}
            if not self._library.remove(name):
                raise _not_found(name)
            self._forget(refs, self.records())

    def documents(self, named: Sequence[TextDocument | StoredDocument]) -> list[Document]:
        """Return the documents that a question names or brings with it.

        Raises:
            ApiError: A document that is named is not in the library.
            DocumentError: A text is not valid Unicode.
        """
        return [self._find(one.ref) if isinstance(one, StoredDocument) else _document(one) for one in named]

    def search(self, question: str, k: int) -> list[Document]:
        """Find passages of the library."""
        return [passage.to_document() for passage in self._library.search(question, k)]

    def _find(self, name: str) -> Document:
        """Return a document by its id or ref; one without an id is cited by its title."""
        try:
            document = self._library.document(name)
        except DocumentError:
            known = next((record["source"] for record in self.records() if record["ref"] == name), None)
            if known is None:
                raise _not_found(name) from None
            document = self._library.document(known)
        return document if document.source != document.ref else Document(document.text, title=document.title)

    def _forget(self, refs: set[str], records: Any) -> None:
        """Drop the embeddings of whole texts that no document has any more."""
        self._library.drop_embeddings(refs - {record["ref"] for record in records})


class _Layers:
    """Several stores: texts are looked for in each in turn, and put into the last."""

    readonly = False

    def __init__(self, *stores: Store) -> None:
        self._stores = stores

    def get(self, ref: str, fingerprint: str, ratio: int) -> Compressed | None:
        """Return the text from the first store that has it."""
        texts = (store.get(ref, fingerprint, ratio) for store in self._stores)
        return next((text for text in texts if text is not None), None)

    def put(self, *texts: Compressed) -> None:
        """Keep texts."""
        self._stores[-1].put(*texts)


def _document(sent: TextDocument) -> Document:
    metadata = {} if sent.id is None else {"source": sent.id}
    return Document(sent.text, title=sent.title, metadata=metadata)


def _stored_document(sent: TextDocument | Document) -> Document:
    """Return a document identified by its id, or else by its text; not by its title, which others may have too."""
    if isinstance(sent, Document):
        return sent
    document = _document(sent)
    return Document(sent.text, title=sent.title, metadata={"source": sent.id or document.ref})


def _not_found(name: str) -> ApiError:
    return ApiError(404, f"there is no document {name!r:.80}; GET /v1/documents lists them", code="document_not_found")
