"""From documents and a question to the prompt that the LLM reads: tokenise, plan, compress, put in place."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extemb_core.answers import ContextEntry, PreparedPrompt
from extemb_core.context.assembly import (
    DOCUMENT_SEPARATOR,
    ChatPrompt,
    Part,
    assemble_text,
    document_heading,
    render_chat,
)
from extemb_core.context.messages import Messages, inline_documents, with_slots
from extemb_core.context.planning import Plan, check_budget, compressed_positions, plan_context
from extemb_core.context.tools import Tool
from extemb_core.documents import Document, ReferencedDocument
from extemb_core.errors import BudgetError
from extemb_core.models.bulk import compress_in_batches
from extemb_core.models.compressed import Compressed
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.store.base import Store

_KEPT_TOKEN_IDS = 64  # recent documents whose token ids stay in memory


@dataclass(frozen=True)
class ReadDocuments:
    """Documents as they stand in a prompt.

    Attributes:
        parts: Of each document: its heading if it gets one, then its text or embeddings; nothing where it is dropped.
        context: What became of each.
        seconds: That compressing took.
    """

    parts: Sequence[Sequence[Part]]
    context: tuple[ContextEntry, ...]
    seconds: float

    @property
    def positions(self) -> int:
        """Positions that all documents take together."""
        return sum(entry.positions for entry in self.context)


class ContextBuilder:
    """Builds prompts with documents in them for one LLM and its embedder.

    Safe for several threads.

    Args:
        llm: The frozen LLM.
        embedder: Made for that LLM.
        store: Where compressed documents are kept.
    """

    def __init__(self, llm: LLM, embedder: ExtensibleEmbedder, store: Store) -> None:
        self.llm = llm
        self.embedder = embedder
        self.store = store
        self._token_ids: OrderedDict[str, np.ndarray[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()

    # -- whole prompts ----------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        documents: Sequence[Document],
        *,
        budget: int | None,
        ratio: str | int,
        max_new_tokens: int,
        tools: Sequence[Tool] = (),
        assistant_prefix: str = "",
    ) -> PreparedPrompt:
        """Build a prompt from messages, documents that join the last user message, and documents inside messages.

        Raises:
            BudgetError: The messages leave no room.
            ConfigError: There is no user message that the documents could join.
        """
        start = time.perf_counter()
        rendered = self.render(messages, documents, tools=tools, assistant_prefix=assistant_prefix)
        return self.fill(rendered, messages, documents, start, budget, ratio, max_new_tokens)

    def fill(
        self,
        rendered: ChatPrompt,
        messages: Messages,
        documents: Sequence[Document],
        start: float,
        budget: int | None,
        ratio: str | int,
        max_new_tokens: int,
    ) -> PreparedPrompt:
        """Build what `chat` does from what `render` made of the same messages and documents."""
        ranked = [*documents, *inline_documents(messages)]
        room = self.room(len(rendered.fill({})), max_new_tokens, budget, ranked)
        read = self.read(ranked, room, ratio, n_headed=len(documents))
        return PreparedPrompt(rendered.fill(dict(enumerate(read.parts))), read.context, read.seconds, start, room)

    def text(
        self,
        prompt: str | Sequence[str | Document],
        documents: Sequence[Document],
        *,
        budget: int | None,
        ratio: str | int,
        max_new_tokens: int,
    ) -> PreparedPrompt:
        """Build a plain prompt, without a chat template: documents, then texts and the documents between them."""
        start = time.perf_counter()
        pieces = [prompt] if isinstance(prompt, str) else list(prompt)
        encoded = [self.llm.encode(piece) if isinstance(piece, str) else piece for piece in pieces]
        ranked = [*documents, *(piece for piece in pieces if isinstance(piece, Document))]
        bare = assemble_text(self.llm, [piece for piece in encoded if not isinstance(piece, Document)])
        room = self.room(len(bare), max_new_tokens, budget, ranked)
        read = self.read(ranked, room, ratio, n_headed=len(documents))
        parts: list[Part] = [part for before in read.parts[: len(documents)] for part in before]
        inside = iter(read.parts[len(documents) :])
        for piece in encoded:
            parts += next(inside) if isinstance(piece, Document) else [piece]
        return PreparedPrompt(assemble_text(self.llm, parts), read.context, read.seconds, start, room)

    def render(self, messages: Messages, documents: Sequence[Document] = (), **settings: Any) -> ChatPrompt:
        """Render messages with slots for the documents that join them and for those inside; see `render_chat`."""
        return render_chat(self.llm, with_slots(messages, documents), **settings)

    # -- documents --------------------------------------------------------------------------------------------

    def plan(self, documents: Sequence[Document], room: int, ratio: str | int, *, n_headed: int | None = None) -> Plan:
        """Plan what becomes of documents, of which the first `n_headed` (all when not given) get a heading.

        Raises:
            RatioError: The ratio may not be asked for.
        """
        config = self.embedder.config
        if isinstance(ratio, int):
            config.require_ratio(ratio)
        return plan_context(
            [self.n_tokens(document) for document in documents],
            room,
            ratio=ratio,  # type: ignore[arg-type]
            ratios=config.ratios,
            auto_ratios=config.plan_ratios,
            chunk_size=config.chunk_size,
            overhead=[
                len(self.llm.encode(document_heading(rank, document.title) + DOCUMENT_SEPARATOR))
                if n_headed is None or rank < n_headed
                else 0
                for rank, document in enumerate(documents)
            ],
            finest=[_finest_of(document) for document in documents],
        )

    def read(
        self,
        documents: Sequence[Document],
        room: int,
        ratio: str | int,
        *,
        n_headed: int | None = None,
        store: Store | None = None,
    ) -> ReadDocuments:
        """Compress documents as `plan` has it, as far as they are not in `store` (the builder's when not given)."""
        plan = self.plan(documents, room, ratio, n_headed=n_headed)
        start = time.perf_counter()
        store = self.store if store is None else store
        wanted = [
            (document, planned.fidelity)
            for document, planned in zip(documents, plan.documents, strict=True)
            if isinstance(planned.fidelity, int)
        ]
        compressed = iter(self._compressed(wanted, store))
        parts: list[list[Part]] = []
        context = []
        for document, planned in zip(documents, plan.documents, strict=True):
            headed = n_headed is None or planned.index < n_headed
            heading = document_heading(planned.index, document.title) if headed else ""
            separator = DOCUMENT_SEPARATOR if headed else ""
            cached = False
            if planned.fidelity == "raw":
                parts.append([heading + document.text + separator])
            elif planned.fidelity == "dropped":
                parts.append([])
            else:
                embeddings, cached = next(compressed)
                around: tuple[Part, ...] = (heading, embeddings.part, separator)
                parts.append([part for part in around if not isinstance(part, str) or part])
            context.append(
                ContextEntry(
                    source=document.source,
                    ref=document.ref,
                    n_tokens=planned.n_tokens,
                    positions=planned.positions,
                    fidelity=planned.fidelity,
                    cached=cached,
                    reason=planned.reason,
                )
            )
        return ReadDocuments(parts, tuple(context), time.perf_counter() - start)

    def _compressed(self, wanted: Sequence[tuple[Document, int]], store: Store) -> list[tuple[Compressed, bool]]:
        """Compress documents to their ratios, and say whether each was in the store, where they are put."""
        fingerprint = self.embedder.fingerprint
        stored = [store.get(document.ref, fingerprint, ratio) for document, ratio in wanted]
        read: dict[int, tuple[Compressed, bool]] = {
            at: (compressed, True) for at, compressed in enumerate(stored) if compressed is not None
        }
        for ratio in sorted({ratio for at, (_, ratio) in enumerate(wanted) if at not in read}):
            missing = [at for at, (_, own_ratio) in enumerate(wanted) if own_ratio == ratio and at not in read]
            texts = [(wanted[at][0].ref, self.token_ids(wanted[at][0].text, wanted[at][0].ref)) for at in missing]
            remaining = iter(missing)
            for batch in compress_in_batches(self.embedder, texts, ratio=ratio):
                if not store.readonly:  # one to read is read; what it lacks serves this call alone
                    store.put(*batch)
                for compressed in batch:
                    # As stored, which on disk is rounded: the first answer is what later ones will be.
                    rounded = store.get(compressed.ref, fingerprint, ratio)
                    read[next(remaining)] = (compressed if rounded is None else rounded, False)
        return [read[at] for at in range(len(wanted))]

    # -- sizes ------------------------------------------------------------------------------------------------

    def token_ids(self, text: str, ref: str) -> np.ndarray[Any, Any]:
        """Encode a document's text, (T,); the ids of recent documents are remembered by `ref`."""
        with self._lock:
            if ref in self._token_ids:
                self._token_ids.move_to_end(ref)
                return self._token_ids[ref]
        ids = self.llm.encode(text)
        with self._lock:
            self._token_ids[ref] = ids
            while len(self._token_ids) > _KEPT_TOKEN_IDS:
                self._token_ids.popitem(last=False)
        return ids

    def n_tokens(self, document: Document) -> int:
        """Count a document's tokens."""
        return len(self.token_ids(document.text, document.ref))

    def room(self, n_bare: int, max_new_tokens: int, budget: int | None, documents: Sequence[Document]) -> int:
        """Positions that documents may take: the budget, or what a prompt of `n_bare` and its answer leave, if less.

        Raises:
            BudgetError: Nothing is left, or the budget is below 0 or no whole number.
        """
        free = self.llm.context_window - n_bare - max_new_tokens
        room = capped(budget, free)
        if free < 0 or (documents and free == 0):
            raise BudgetError(
                f"the question takes {n_bare} positions and the answer up to {max_new_tokens}, more than the "
                f"{self.llm.context_window} of {self.llm.name}; shorten the question, lower max_new_tokens, or use a "
                "session"
            )
        return room

    def positions(self, messages: Messages, documents: Sequence[Document], budget: int | None, ratio: str | int) -> int:
        """Count the positions of a prompt, its documents included; nothing is compressed."""
        n_bare = len(self.render(messages).fill({}))
        ranked = [*documents, *inline_documents(messages)]
        room = capped(budget, max(0, self.llm.context_window - n_bare))
        return n_bare + self.plan(ranked, room, ratio, n_headed=len(documents)).positions

    def positions_of(self, parts: Sequence[str | Document]) -> int:
        """Count the positions of a piece of a prompt: its texts, and its documents at the finest ratio of each."""
        config = self.embedder.config
        return sum(
            compressed_positions(self.n_tokens(part), config.finest(_finest_of(part)), config.chunk_size)
            if isinstance(part, Document)
            else len(self.llm.encode(part))
            for part in parts
        )


def capped(budget: int | None, free: int) -> int:
    """The positions that are free, or the budget where that is less."""
    return free if budget is None else min(check_budget(budget), free)


def _finest_of(document: Document) -> int | None:
    return document.finest if isinstance(document, ReferencedDocument) else None
