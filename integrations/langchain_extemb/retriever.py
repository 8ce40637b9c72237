"""Return passages of a library as LangChain's documents."""

from __future__ import annotations

import threading
from typing import Annotated, Any, ClassVar

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import BeforeValidator, ConfigDict, PrivateAttr, field_validator
from typing_extensions import Self

from extemb_core.frameworks.settings import StrictSettings, folder_as_text
from extemb_core.library import N_PASSAGES
from extemb_core.library.library import Library
from extemb_core.utils.validation import refuse_unknown, whole_number

_opening = threading.Lock()  # one for all objects, which are copied and pickled


class ExtensibleRetriever(StrictSettings, BaseRetriever):
    """Finds passages in a `Library`, by vectors and by words.

    Metadata of each: source, title, start and end (characters of the document), and ref, a hash of the text. In a
    prompt `ref` does not stand for the document; `extemb_ref`, of an `ExtensibleCompressor`, does. A passage is the
    same document for every question, so that retrievers that ask several return it once; `Library.search` gives scores.
    """

    _SHARED: ClassVar[tuple[str, ...]] = ("library",)

    model_config = ConfigDict(arbitrary_types_allowed=True)

    library: Annotated[Library | str, BeforeValidator(folder_as_text)]
    """A library, or its folder, which is opened for reading at the first question."""
    k: int = N_PASSAGES
    """Maximum number of passages."""
    hybrid: bool = True
    """Search by vectors and by words, or by vectors alone."""

    _opened: Library | None = PrivateAttr(default=None)

    @field_validator("k", mode="before")
    @classmethod
    def _counts(cls, k: Any) -> int:
        return whole_number(k, "k", remedy=f"e.g. {N_PASSAGES}")

    def close(self) -> None:
        """Close a library that was given as a folder; the next question opens it again."""
        with _opening:
            opened, self._opened = self._opened, None
        if opened is not None and opened is not self.library:
            opened.close()

    def _open(self) -> Library:
        """Return the library, which is opened once, even if several threads ask first."""
        with _opening:
            if self._opened is None:
                library = self.library
                self._opened = library if isinstance(library, Library) else Library(library, mode="r")
            return self._opened

    # A copy, or another process, opens the folder itself, so that each may close its own.

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied._opened = None
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        memo = {} if memo is None else memo
        memo[id(self._opened)] = None
        return super().__deepcopy__(memo)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        return {**state, "__pydantic_private__": {**state["__pydantic_private__"], "_opened": None}}

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        hybrid: bool | None = None,
        **others: Any,
    ) -> list[Document]:
        refuse_unknown(others, ("k", "hybrid"))
        library = self._open()
        return [
            Document(
                page_content=passage.text,
                id=f"{passage.source}:{passage.start}-{passage.end}",
                metadata={
                    "source": passage.source,
                    "title": passage.title,
                    "start": passage.start,
                    "end": passage.end,
                    "ref": passage.ref,
                },
            )
            for passage in library.search(
                query, self.k if k is None else k, hybrid=self.hybrid if hybrid is None else hybrid
            )
        ]
