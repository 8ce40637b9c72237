"""Return passages of a library as LangChain's documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, PrivateAttr

from extemb_core.library import N_PASSAGES
from extemb_core.library.library import Library


class ExtensibleRetriever(BaseRetriever):
    """Finds passages in a `Library`, by vectors and by words.

    Metadata of each: source, title, start and end (characters of the document), score, and ref.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    library: Library | str | Path
    """A library, or the folder of one, which is opened to read when it is first asked."""
    k: int = N_PASSAGES
    """Passages at most."""
    hybrid: bool = True
    """By vectors and words; else by vectors alone."""

    _opened: Library | None = PrivateAttr(default=None)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, **_: Any
    ) -> list[Document]:
        if self._opened is None:
            library = self.library
            self._opened = library if isinstance(library, Library) else Library(library, mode="r")
        return [
            Document(
                page_content=passage.text,
                id=f"{passage.source}:{passage.start}-{passage.end}",
                metadata={
                    "source": passage.source,
                    "title": passage.title,
                    "start": passage.start,
                    "end": passage.end,
                    "score": passage.score,
                    "ref": passage.ref,
                },
            )
            for passage in self._opened.search(query, self.k if k is None else k, hybrid=self.hybrid)
        ]
