"""Build the prompt that the LLM reads from documents and a question: tokenise, plan, compress, assemble."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

import numpy as np

from extemb_core.answers import ContextEntry, ContextSpan, PreparedPrompt
from extemb_core.context import assembly
from extemb_core.context.assembly import ChatPrompt, Part
from extemb_core.context.focus import Mode, SplitDocument, mode_of
from extemb_core.context.messages import Messages, inline_documents, question_in, with_slots
from extemb_core.context.planning import DocumentPlan, Fidelity, Plan, Span, check_budget, plan_context, plan_of_spans
from extemb_core.context.scoring import SentenceScorer
from extemb_core.context.sentence_planner import SentencePlanner
from extemb_core.context.spans import MAX_SENTENCE_TOKENS, cover, split_into_sentences
from extemb_core.documents import Document, ReferencedDocument, several
from extemb_core.errors import BudgetError, ConfigError, StoreCorruptError
from extemb_core.models.bulk import compress_in_batches
from extemb_core.models.chunks import compressed_positions
from extemb_core.models.compressed import Compressed
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.store.base import Store

_KEPT_TEXTS = 64  # recent documents whose texts, token ids and sentences stay in memory


@dataclass(frozen=True)
class ReadDocuments:
    """Documents as they stand in a prompt.

    Attributes:
        parts: For each document, its heading if it gets one, then its text or embeddings; nothing if it is dropped.
        context: What became of each document.
        seconds: Time that planning and compressing took.
    """

    parts: Sequence[Sequence[Part]]
    context: tuple[ContextEntry, ...]
    seconds: float

    def cached(self) -> ReadDocuments:
        """Return the same documents as when read again: all that were compressed are marked as cached."""
        fidelities = [{entry.fidelity, *(span.fidelity for span in entry.spans)} for entry in self.context]
        compressed = [any(isinstance(fidelity, int) for fidelity in of_entry) for of_entry in fidelities]
        context = tuple(replace(one, cached=there) for one, there in zip(self.context, compressed, strict=True))
        return replace(self, context=context)

    @property
    def positions(self) -> int:
        """Positions that all documents take together."""
        return sum(entry.positions for entry in self.context)


@dataclass(frozen=True, eq=False)
class _Fetched:
    """Compressed texts of one call, by ref and ratio.

    Attributes:
        store: Store that keeps them.
        texts: Texts fetched or compressed so far.
        stored: Keys of the texts that were in the store before.
    """

    store: Store
    texts: dict[tuple[str, int], Compressed] = field(default_factory=dict)
    stored: set[tuple[str, Fidelity]] = field(default_factory=set)


class ContextBuilder:
    """Builds prompts with documents in them for one LLM and its embedder.

    Safe for several threads.

    Args:
        llm: The frozen LLM.
        embedder: Made for that LLM.
        store: Store that keeps compressed documents.
        scorer: See `SentencePlanner`.
    """

    def __init__(
        self, llm: LLM, embedder: ExtensibleEmbedder, store: Store, *, scorer: SentenceScorer | None = None
    ) -> None:
        self.llm = llm
        self.embedder = embedder
        self.store = store
        self.scorer = scorer
        self.scorer_id = None if scorer is None else uuid4().hex  # not id(scorer), which another object may have later
        self._planner = SentencePlanner(llm, embedder, scorer)
        self._tokens = lru_cache(_KEPT_TEXTS)(lambda text: llm.encode_with_ends(text))
        self._sentences = lru_cache(_KEPT_TEXTS)(
            lambda text, longest: split_into_sentences(text, self._tokens(text)[1], max_tokens=longest)
        )

    # -- whole prompts ----------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        documents: Sequence[Document],
        *,
        budget: int | None,
        ratio: str | int,
        max_new_tokens: int,
        plan: str | None = None,
        rendered: ChatPrompt | None = None,
        **template: Any,
    ) -> PreparedPrompt:
        """Build a prompt from messages, the documents that join the last user message, and those inside messages.

        Args:
            messages, documents, budget, ratio, max_new_tokens, plan: See `ExtensibleLM.prepare`.
            rendered: Result of `render` for the same messages and documents; made here, with `template`, if not given.
            **template: See `render_chat`.

        Raises:
            BudgetError: The messages leave no room.
            ConfigError: There is no user message that the documents could join.
        """
        start = time.perf_counter()
        if rendered is None:
            rendered = self.render(messages, documents, **template)
        ranked = [*documents, *inline_documents(messages)]
        room = self.room(rendered.n_around, max_new_tokens, budget, ranked)
        read = self.read(ranked, room, ratio, n_headed=len(documents), question=question_in(messages), plan=plan)
        prompt = rendered.fill_within(dict(enumerate(read.parts)), room)
        return PreparedPrompt(prompt, read.context, read.seconds, start, room)

    def text(
        self,
        texts: str | Sequence[str | Document],
        documents: Sequence[Document],
        *,
        budget: int | None,
        ratio: str | int,
        max_new_tokens: int,
    ) -> PreparedPrompt:
        """Build a plain prompt, without a chat template: documents, then texts and the documents between them.

        There is no question to plan for, so each document is read at one ratio.
        """
        start = time.perf_counter()
        pieces = several(texts, "prompt")
        if wrong := [piece for piece in pieces if not isinstance(piece, str | Document)]:
            raise ConfigError(
                f"a plain prompt holds a {type(wrong[0]).__name__}; pass texts, and Documents between them"
            )
        encoded = [self.llm.encode(piece) if isinstance(piece, str) else piece for piece in pieces]
        ranked = [*documents, *(piece for piece in pieces if isinstance(piece, Document))]
        bare = assembly.assemble_text(self.llm, [piece for piece in encoded if not isinstance(piece, Document)])
        room = self.room(len(bare), max_new_tokens, budget, ranked)
        read = self.read(ranked, room, ratio, n_headed=len(documents))
        parts: list[Part] = [part for before in read.parts[: len(documents)] for part in before]
        inside = iter(read.parts[len(documents) :])
        for piece in encoded:
            parts += next(inside) if isinstance(piece, Document) else [piece]
        prompt = assembly.assemble_text(self.llm, parts)
        return PreparedPrompt(prompt, read.context, read.seconds, start, room)

    def render(self, messages: Messages, documents: Sequence[Document] = (), **settings: Any) -> ChatPrompt:
        """Render messages with slots for the documents that join them and for those inside; see `render_chat`."""
        return assembly.render_chat(self.llm, with_slots(messages, documents), **settings)

    # -- documents --------------------------------------------------------------------------------------------

    def plan(
        self,
        documents: Sequence[Document],
        room: int,
        ratio: str | int,
        *,
        n_headed: int | None = None,
        question: str = "",
        plan: str | None = None,
        overhead: Sequence[int] | None = None,
        fetched: _Fetched | None = None,
    ) -> Plan:
        """Plan what becomes of documents, of which the first `n_headed` (all when not given) get a heading.

        With ratio "auto", documents that carry spans (see `ReferencedDocument`) are read as their spans say, if they
        fit together with the others at their coarsest ratio; the others share what is left. Otherwise all documents are
        planned anew.

        Args:
            documents, room, ratio, n_headed: See `read`.
            question: The question about them.
            plan: "focus", "select" or "even"; None for what suits the embedder and the question (see `mode_of`).
            overhead: Positions that each takes besides its content; those of its heading when not given.
            fetched: Texts compressed so far; those that planning compresses are added.

        Raises:
            RatioError: The ratio is not one of the embedder's.
            ConfigError: The plan is unknown, or not possible here.
            StoreCorruptError: A document's spans cannot come from this embedder.
        """
        config = self.embedder.config
        if isinstance(ratio, int):
            config.require_ratio(ratio)
        if overhead is None:
            # Separator and heading are counted together: white space before text is tokenised differently than alone.
            overhead = [self.positions_of(after + heading) for heading, after in _around(documents, n_headed)]
        mode = mode_of(plan, ratio, question, config)
        if plan is None and mode == "select" and any(map(_finest_of, documents)):
            mode = "focus"  # "select" would drop documents that may not be read in full
        fetched = fetched or _Fetched(self.store)
        before = {
            at: self._planned_before(at, document, positions)
            for at, (document, positions) in enumerate(zip(documents, overhead, strict=True))
            if ratio == "auto" and isinstance(document, ReferencedDocument) and document.spans is not None
        }
        others = [at for at in range(len(documents)) if at not in before]
        left = room - sum(planned.positions for planned in before.values())
        if not before or left < sum(self._coarsest(documents[at], overhead[at]) for at in others):
            planned_all = self._planned(documents, overhead, room, ratio, question, mode, fetched)
            plans = [
                replace(planned, reason=f"{planned.reason}; planned anew, as no room was left for what was planned")
                if planned.index in before
                else planned
                for planned in planned_all.documents
            ]
            return replace(planned_all, documents=tuple(plans))
        rest = self._planned(
            [documents[at] for at in others], [overhead[at] for at in others], left, ratio, question, mode, fetched
        )
        before |= {at: replace(planned, index=at) for at, planned in zip(others, rest.documents, strict=True)}
        return Plan(documents=tuple(before[at] for at in range(len(documents))), budget=room, note=rest.note)

    def _planned_before(self, index: int, document: ReferencedDocument, overhead: int) -> DocumentPlan:
        """Return the plan in the spans that a document carries, after checking that they can be its spans."""
        config, grid, n_tokens = self.embedder.config, self._grid_of(document), self.n_tokens(document)
        spans = tuple(Span(*span) for span in document.spans or ())  # type: ignore[arg-type]
        legal: set[Fidelity] = {"dropped", *(ratio for ratio in config.ratios if ratio >= grid and config.entry_layer)}
        if document.finest is None:
            legal.add("raw")
        if not cover(spans, n_tokens, grid, config.chunk_size) or not legal.issuperset(span.fidelity for span in spans):
            raise StoreCorruptError(
                f"the spans that a ref of {document.source} carries are none that this embedder can have made of its "
                "text; make the ref again, with the same lm or the same model and store"
            )

        def excerpt(span: Span) -> str:
            return self._sentences(document.text, MAX_SENTENCE_TOKENS).excerpt(span)

        return plan_of_spans(index, spans, "as planned before", excerpt, overhead, config.chunk_size)

    def _coarsest(self, document: Document, overhead: int) -> int:
        """Count the positions of a whole document at the coarsest ratio that a plan chooses by itself."""
        config, n_tokens = self.embedder.config, self.n_tokens(document)
        ratio = max(config.plan_ratios[-1], _finest_of(document) or 1)
        return compressed_positions(n_tokens, ratio, config.chunk_size) + overhead if n_tokens else 0

    def _planned(
        self,
        documents: Sequence[Document],
        overhead: Sequence[int],
        room: int,
        ratio: str | int,
        question: str,
        mode: Mode,
        fetched: _Fetched,
    ) -> Plan:
        """Plan documents anew, without the spans that they may carry."""
        config = self.embedder.config
        if mode == "even":
            return plan_context(
                [self.n_tokens(document) for document in documents],
                room,
                ratio=ratio,  # type: ignore[arg-type]
                ratios=config.ratios,
                auto_ratios=config.plan_ratios,
                chunk_size=config.chunk_size,
                overhead=overhead,
                finest=[_finest_of(document) for document in documents],
            )
        longest = self._planner.max_sentence_tokens(sum(map(self.n_tokens, documents)))
        split = [
            SplitDocument(
                self._sentences(document.text, longest), self._grid_of(document), config.chunk_size, positions, limit
            )
            for document, positions, limit in zip(documents, overhead, map(_finest_of, documents), strict=True)
        ]
        return self._planner.plan(
            question, split, room, lambda: self._fetched_for(documents, split, fetched), select=mode == "select"
        )

    def _fetched_for(
        self, documents: Sequence[Document], split: Sequence[SplitDocument], fetched: _Fetched
    ) -> list[Compressed]:
        """Return documents compressed at their finest ratio."""
        keys = [(document.ref, one.finest) for document, one in zip(documents, split, strict=True)]
        self._fetch({key: document.text for key, document in zip(keys, documents, strict=True)}, fetched)
        return [fetched.texts[key] for key in keys]

    def _grid_of(self, document: Document) -> int:
        """Return the ratio at which a document is stored when its spans are read at different fidelities."""
        return max(self.embedder.config.kept_ratio, _finest_of(document) or 1)

    def stored_ratio(self, document: Document, planned: DocumentPlan) -> Fidelity:
        """Return the ratio at which a document is compressed for its plan, or its fidelity if it is not compressed."""
        in_part = any(isinstance(span.fidelity, int) for span in planned.spans)
        return self._grid_of(document) if in_part else planned.fidelity

    def read(
        self,
        documents: Sequence[Document],
        room: int,
        ratio: str | int,
        *,
        n_headed: int | None = None,
        question: str = "",
        plan: str | None = None,
        store: Store | None = None,
    ) -> ReadDocuments:
        """Plan documents, and compress those that need it and are not in `store` (the builder's when not given)."""
        start = time.perf_counter()
        fetched = _Fetched(self.store if store is None else store)
        planned_all = self.plan(
            documents, room, ratio, n_headed=n_headed, question=question, plan=plan, fetched=fetched
        )
        ratios = [self.stored_ratio(*pair) for pair in zip(documents, planned_all.documents, strict=True)]
        wanted = {
            (document.ref, stored_ratio): document.text
            for document, stored_ratio in zip(documents, ratios, strict=True)
            if isinstance(stored_ratio, int)
        }
        self._fetch(wanted, fetched)
        parts: list[list[Part]] = []
        context = []
        around = _around(documents, n_headed)
        for document, planned, stored_ratio, (heading, separator) in zip(
            documents, planned_all.documents, ratios, around, strict=True
        ):
            if planned.fidelity == "raw":
                parts.append(self._as_text(document, heading, separator))
            elif planned.fidelity == "dropped":
                parts.append([])
            else:
                text = fetched.texts.get((document.ref, stored_ratio))  # type: ignore[arg-type]
                ids, spans = self.token_ids(document.text), planned.spans
                content = parts_of(spans, ids, text) if spans else [text.part]  # type: ignore[union-attr]
                parts.append([heading, *content, separator] if heading else content)
            context.append(
                ContextEntry(
                    source=document.source,
                    ref=document.ref,
                    n_tokens=planned.n_tokens,
                    positions=planned.positions,
                    fidelity=planned.fidelity,
                    cached=(document.ref, stored_ratio) in fetched.stored,
                    reason=planned.reason,
                    spans=self._described(document, planned.spans) if planned.fidelity == "mixed" else (),
                )
            )
        return ReadDocuments(parts, tuple(context), time.perf_counter() - start)

    def _as_text(self, document: Document, heading: str, separator: str) -> list[Part]:
        """List the parts of a prompt for a document that is read as text."""
        # As text it would be split at its control tokens, into more tokens than planned.
        if any(token in document.text for token in self.llm.control_tokens):
            ids = self.token_ids(document.text)
            return [heading, ids, separator] if heading else [ids]
        return [heading + document.text + separator]

    def _described(self, document: Document, spans: Sequence[Span]) -> tuple[ContextSpan, ...]:
        character = self._sentences(document.text, MAX_SENTENCE_TOKENS).character
        size = self.embedder.config.chunk_size
        return tuple(
            ContextSpan(character(span.start), character(span.stop), span.fidelity, span.positions(size))
            for span in spans
        )

    def _fetch(self, wanted: Mapping[tuple[str, int], str], fetched: _Fetched) -> None:
        """Fetch texts, by ref and ratio, from the store; compress those that it lacks, and put them there."""
        fingerprint, store = self.embedder.fingerprint, fetched.store
        wanted = {key: text for key, text in wanted.items() if key not in fetched.texts}
        in_store = {(ref, ratio): store.get(ref, fingerprint, ratio) for ref, ratio in wanted}
        found = {
            key: self._own(text, len(self.token_ids(wanted[key]))) for key, text in in_store.items() if text is not None
        }
        fetched.texts.update(found)
        fetched.stored.update(found)
        for ratio in sorted({ratio for _, ratio in wanted.keys() - found.keys()}):
            missing = [ref for ref, wanted_ratio in wanted if wanted_ratio == ratio and (ref, ratio) not in found]
            texts = [(ref, self.token_ids(wanted[ref, ratio])) for ref in missing]
            for batch in compress_in_batches(self.embedder, texts, ratio=ratio):
                if not store.readonly:  # a read-only store keeps nothing: what it lacks serves this call alone
                    store.put(*batch)
                for text in batch:
                    # Read back: a store on disk rounds, and the first answer must equal later ones.
                    rounded = store.get(text.ref, fingerprint, ratio)
                    fetched.texts[text.ref, ratio] = text if rounded is None else rounded

    def _own(self, text: Compressed, n_tokens: int) -> Compressed:
        """Return a stored text with the embedder's ratios, which may be more than when it was put.

        Raises:
            StoreCorruptError: It is stored under the embedder's fingerprint, but cannot have been made by it.
        """
        config = self.embedder.config
        expected = (n_tokens, self.llm.hidden_size, config.chunk_size, config.downscaling, config.entry_layer)
        found = (text.n_tokens, text.embeddings.shape[1], text.chunk_size, text.downscaling, text.entry_layer)
        if found != expected:
            raise StoreCorruptError(
                f"what the store has of {text.ref} is not what this embedder makes of that text; remove it, and do not "
                "trust where the store came from"
            )
        return replace(text, ratios=tuple(config.ratios))

    # -- sizes ------------------------------------------------------------------------------------------------

    def token_ids(self, text: str) -> np.ndarray[Any, Any]:
        """Encode a document's text, (T,); the ids of recent ones are remembered."""
        ids: np.ndarray[Any, Any] = self._tokens(text)[0]
        return ids

    def n_tokens(self, document: Document) -> int:
        """Count a document's tokens."""
        return len(self.token_ids(document.text))

    def room(self, n_bare: int, max_new_tokens: int, budget: int | None, documents: Sequence[Document]) -> int:
        """Count the positions for documents: the budget, or less if a prompt of `n_bare` and its answer leave less.

        Raises:
            BudgetError: Nothing is left, or the budget is below 0 or no whole number.
        """
        free = self.llm.context_window - n_bare - max_new_tokens
        room = capped(budget, free)
        if free < 0 or (documents and free == 0):
            raise BudgetError(
                f"the question takes {n_bare} positions and the answer up to {max_new_tokens}, more than the "
                f"{self.llm.context_window} of {self.llm.name}; shorten the question, allow a shorter answer, or use a "
                "session of ExtensibleLM"
            )
        return room

    def length(
        self, rendered: ChatPrompt, documents: Sequence[Document], planned: Plan, room: int, *, n_headed: int
    ) -> int:
        """Count the positions of the prompt that `chat` would build from a plan, tokenising text as `chat` does."""
        contents: dict[int, list[Part]] = {}
        for document, one, (heading, separator) in zip(
            documents, planned.documents, _around(documents, n_headed), strict=True
        ):
            if one.fidelity == "raw":
                contents[one.index] = self._as_text(document, heading, separator)
            elif one.fidelity != "dropped":
                content = np.zeros(one.positions - self.positions_of(separator + heading), np.int32)
                contents[one.index] = [heading, content, separator]
        return len(rendered.fill_within(contents, room))

    def positions_of(self, part: str | Document) -> int:
        """Count the positions of a text, or of a document at its finest ratio or as it was planned before."""
        if isinstance(part, str):
            return len(self.llm.encode(part))
        if isinstance(part, ReferencedDocument) and part.spans is not None:
            return self._planned_before(0, part, 0).positions
        config = self.embedder.config
        return compressed_positions(self.n_tokens(part), config.finest(_finest_of(part)), config.chunk_size)


def parts_of(spans: Sequence[Span], ids: np.ndarray[Any, Any], text: Compressed | None) -> list[Part]:
    """List the parts of a prompt for the spans of a document.

    Args:
        spans: Spans, in order.
        ids: (T,) the document's tokens.
        text: The compressed document; None if no span is read at a ratio.
    """
    at_ratio = [(span.start, span.stop, span.fidelity) for span in spans if isinstance(span.fidelity, int)]
    compressed = iter(text.parts(at_ratio) if text is not None else ())
    return [
        ids[span.start : span.stop] if span.fidelity == "raw" else next(compressed)
        for span in spans
        if span.fidelity != "dropped"
    ]


def capped(budget: int | None, free: int) -> int:
    """Return the budget, but no more than the positions that are free."""
    return free if budget is None else min(check_budget(budget), free)


def _around(documents: Sequence[Document], n_headed: int | None) -> list[tuple[str, str]]:
    """List what stands before and after each document: a heading and a separator for the first `n_headed`."""
    headed = [assembly.document_heading(rank, document.title) for rank, document in enumerate(documents[:n_headed])]
    return [(heading, assembly.DOCUMENT_SEPARATOR) for heading in headed] + [("", "")] * (len(documents) - len(headed))


def _finest_of(document: Document) -> int | None:
    return document.finest if isinstance(document, ReferencedDocument) else None
