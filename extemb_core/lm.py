"""ExtensibleLM: a frozen LLM that reads documents as extensible embeddings. The class that most users meet."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.answers import Answer, AnswerStream, ContextEntry, Ready, to_answer
from extemb_core.context.assembly import (
    DOCUMENT_SEPARATOR,
    Part,
    Prompt,
    assemble_chat,
    assemble_text,
    document_heading,
)
from extemb_core.context.planning import Fidelity, Plan, check_budget, compressed_positions, plan_context
from extemb_core.context.tools import Tool
from extemb_core.documents import Document
from extemb_core.errors import BudgetError, ConfigError, DocumentError, MismatchError
from extemb_core.frameworks.batching import Batcher
from extemb_core.frameworks.refs import Handed, Refs
from extemb_core.models.bulk import compress_in_batches
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.llm import LLM, Sampling
from extemb_core.store.base import Store
from extemb_core.store.memory import MemoryStore
from extemb_core.weights.resolve import resolve_embedder

if TYPE_CHECKING:
    from extemb_core.context.conversation import Session

DEFAULT_LLM = "smollm2-135m-joint"

_EARLIER = "Earlier in this conversation:\n"
_KEPT_TOKEN_IDS = 64  # recent documents whose token ids stay in memory
_KEPT_TURN_BYTES = 64 * 2**20  # of the embeddings of recent conversations' older turns

Messages = Sequence[Mapping[str, Any]]
Documents = str | Document | Mapping[str, Any] | Iterable[Any]


class ExtensibleLM:
    """A frozen LLM with an embedder that compresses its documents.

    One object may be used from several threads. Documents are compressed once and kept in `store`: in memory, least
    recently used ones going first, or on disk, for later processes too. What was said in conversations is never put
    there: turns that are condensed are kept in memory, for a while.

    Args:
        llm: The frozen LLM.
        embedder: Made for that LLM.
        store: Where compressed documents are kept; in memory, 512 MiB, when not given.

    Attributes:
        refs: The documents that frameworks were handed refs of.
        batcher: Answers what several threads ask at once.
    """

    def __init__(self, llm: LLM, embedder: ExtensibleEmbedder, store: Store | None = None) -> None:
        if embedder.llm is not llm:
            raise MismatchError(
                f"the embedder is bound to another LLM object ({embedder.llm.name!r}); load it with llm=this one"
            )
        self.llm = llm
        self.embedder = embedder
        self.store: Store = store if store is not None else MemoryStore()
        self.refs = Refs(self.store)
        self.batcher = Batcher(self)
        self._turns = MemoryStore(_KEPT_TURN_BYTES)
        self._ids: OrderedDict[str, np.ndarray[Any, Any]] = OrderedDict()
        self._ids_lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        llm: str | Path = DEFAULT_LLM,
        embedder: str | Path | None = None,
        *,
        store: str | Path | Store | None = None,
        device: str = "auto",
        dtype: str | torch.dtype = "auto",
        adapt: bool = False,
    ) -> ExtensibleLM:
        """Load an LLM and its embedder.

        Args:
            llm: A local folder, a known name (`extemb weights list`) or a Hugging Face id.
            embedder: A folder or hub id; "untrained", the LLM's own first layers as they are; or when not given the one
                shipped for a known LLM, untrained for any other.
            store: Folder of an `EmbeddingStore`, made if it is not there; folder or URL of shards (`ShardStore`); or a
                store. In memory when not given.
            device: "auto" or a torch device.
            dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype.
            adapt: Take an embedder for an LLM with other tensors too: see `ExtensibleEmbedder.from_pretrained`.

        Raises:
            WeightsError: Files are missing or damaged.
            MismatchError: The embedder was made for another LLM.
            StoreError: The store cannot be opened.
        """
        opened = open_store(store)
        where = resolve_embedder(embedder, str(llm))
        loaded = LLM.from_pretrained(llm, device=device, dtype=dtype)
        return cls(loaded, ExtensibleEmbedder.from_pretrained(where, llm=loaded, adapt=adapt), opened)

    # -- asking -----------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        **sampling: Any,
    ) -> Answer:
        """Answer a question from documents.

        Args:
            question: In the user's words.
            documents: Best first: texts, `Document`s, mappings with a text, or the documents of LangChain and
                LlamaIndex.
            budget: Positions of the LLM's window that the documents may take at most; all that is free when not given,
                or where it is less. `answer.budget` says which it was.
            ratio: "auto" (see `plan_context`), "raw", or a trained ratio for all documents.
            **sampling: The fields of `Sampling`: max_new_tokens, temperature, top_p, top_k, stop, seed, ...

        Returns:
            The answer; `answer.context` says what became of each document.

        Raises:
            BudgetError: The question leaves no room, or the budget is below 0 or no whole number.
            RatioError: The ratio was not trained.
        """
        return self.stream(question, documents, budget=budget, ratio=ratio, **sampling).finish()

    def chat(
        self,
        messages: Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        **sampling: Any,
    ) -> Answer:
        """`ask` for a whole conversation: messages with "role" and "content".

        Documents join the last user turn. A content may also be a list of texts and `Document`s: these are read where
        they stand, without a heading, and rank below those that join.
        """
        return self.stream(messages, documents, budget=budget, ratio=ratio, **sampling).finish()

    def stream(
        self,
        question: str | Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        **settings: Any,
    ) -> AnswerStream:
        """`ask` or `chat`, piece by piece. Closing the stream stops the LLM; `.answer` holds what there is.

        Settings are those of `prepare`.
        """
        return AnswerStream(self.llm, *self.prepare(question, documents, budget=budget, ratio=ratio, **settings))

    def prepare(
        self,
        question: str | Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        condense: bool = False,
        tools: Sequence[Tool] = (),
        opening: str = "",
        **sampling: Any,
    ) -> tuple[Ready, Sampling]:
        """What `ask` or `chat` hands to the LLM, before it is: the documents are compressed, the prompt is whole.

        Args:
            question, documents, budget, ratio, **sampling: See `ask` and `chat`.
            condense: Compress the older turns of a conversation that the window does not hold beside its documents,
                instead of refusing it; the answer's context tells what became of each. Documents have the positions of
                the budget before turns do, and half of the room where none is given.
            tools: Functions in OpenAI's form that the LLM may call, where its template has a place for them; see
                `context.tools`.
            opening: What the answer begins with; it is not repeated in it.
        """
        settings = Sampling(**sampling)
        messages, texts = _as_messages(question), as_documents(documents)
        assemble = partial(assemble_chat, self.llm, tools=tools, opening=opening)
        if condense:
            messages, budget = self._condensed(messages, texts, budget, ratio, settings.max_new_tokens, assemble)
        return self._prepare(messages, texts, budget, ratio, settings.max_new_tokens, assemble), settings

    def generate(
        self,
        prompt: str | Sequence[str | Document],
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        **sampling: Any,
    ) -> Answer:
        """Continue a plain prompt, without a chat template, after the documents and with those that stand in it."""
        return AnswerStream(
            self.llm, *self.prepare_text(prompt, documents, budget=budget, ratio=ratio, **sampling)
        ).finish()

    def prepare_text(
        self,
        prompt: str | Sequence[str | Document],
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        **sampling: Any,
    ) -> tuple[Ready, Sampling]:
        """What `generate` hands to the LLM, before it is."""
        settings = Sampling(**sampling)
        return self._continue_from(prompt, as_documents(documents), budget, ratio, settings.max_new_tokens), settings

    def score(
        self,
        continuation: str,
        *,
        prompt: str = "",
        documents: Documents = (),
        budget: int | None = None,
        ratio: str | int = "auto",
    ) -> float:
        """Log-probability, in nats, of a continuation after documents and a plain prompt.

        Raises:
            ConfigError: There is nothing before the continuation, or nothing in it.
        """
        targets = self.llm.encode(continuation)
        ready = self._continue_from(prompt, as_documents(documents), budget, ratio, len(targets))
        if not len(ready.prompt) or not len(targets):
            raise ConfigError("score needs a continuation and something before it; pass a prompt or a document")
        return float(self.llm.score(ready.prompt.inputs(self.llm), targets).sum())

    def ask_batch(
        self,
        questions: Sequence[str | Messages],
        documents: Sequence[Documents] | None = None,
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        batch_size: int = 8,
        **sampling: Any,
    ) -> list[Answer]:
        """`ask` or `chat` for several at once, each with its own documents (one entry per question).

        Questions are batched by length; an answer does not depend on its batch. In `seconds`, "first_token" is the
        time of the whole batch: nothing is streamed.
        """
        each = [()] * len(questions) if documents is None else list(documents)
        if len(each) != len(questions):
            raise ConfigError(
                f"{len(questions)} questions came with {len(each)} lists of documents; pass one per question"
            )
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is below 1; pass a positive whole number")
        settings = Sampling(**sampling)
        prepared = [
            self.prepare(question, texts, budget=budget, ratio=ratio, **sampling)[0]
            for question, texts in zip(questions, each, strict=True)
        ]
        order = sorted(range(len(prepared)), key=lambda index: len(prepared[index].prompt))
        answers: dict[int, Answer] = {}
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            start = time.perf_counter()
            made = self.llm.generate([prepared[index].prompt.inputs(self.llm) for index in batch], settings)
            seconds = time.perf_counter() - start
            for index, generated in zip(batch, made, strict=True):
                answers[index] = to_answer(prepared[index], generated, first_token=seconds, total=seconds)
        return [answers[index] for index in range(len(questions))]

    def session(
        self,
        documents: Documents = (),
        *,
        ratio: str | int = "auto",
        window: int | None = None,
        budget: int | None = None,
    ) -> Session:
        """A conversation of any length: see `Session`."""
        from extemb_core.context.conversation import Session

        return Session(self, documents, ratio=ratio, window=window, budget=budget)

    # -- documents --------------------------------------------------------------------------------------------

    def plan(
        self,
        question: str | Messages,
        documents: Documents,
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
        max_new_tokens: int = 256,
    ) -> Plan:
        """What would become of each document, without compressing or answering: `print(lm.plan(...).explain())`."""
        messages, joined = _as_messages(question), as_documents(documents)
        bare = assemble_chat(self.llm, _replaced(messages))
        room = self._room(bare, max_new_tokens, budget, joined or _inline(messages))
        return self._plan_all(joined, messages, room, ratio)

    def positions(
        self,
        question: str | Messages,
        documents: Documents = (),
        *,
        budget: int | None = None,
        ratio: str | int = "auto",
    ) -> int:
        """Positions that a prompt takes, its documents included; nothing is compressed.

        One that the window does not hold is counted too, with no position left for its documents.
        """
        messages, joined = _as_messages(question), as_documents(documents)
        bare = assemble_chat(self.llm, _replaced(messages))
        free = max(0, self.llm.window - len(bare))
        return len(bare) + self._plan_all(joined, messages, _capped(budget, free), ratio).positions

    def positions_of(self, parts: Iterable[str | Document]) -> int:
        """Positions that a piece of a prompt takes: its texts, and its documents at the finest ratio each may have."""
        config, positions = self.embedder.config, 0
        for part in parts:
            if isinstance(part, Document):
                limit = part.finest if isinstance(part, Handed) else None
                length = len(self.token_ids(part.text, part.ref))
                positions += compressed_positions(length, config.finest(limit), config.chunk_size)
            else:
                positions += len(self.llm.encode(part))
        return positions

    def compress(
        self,
        documents: Documents,
        *,
        ratio: int | None = None,
        batch_size: int | None = None,
        show_progress: bool | None = None,
    ) -> None:
        """Compress documents now, so that later questions about them start at once.

        What is done is in the store batch by batch, of 8 forward passes each: after Ctrl-C, or worse, the same call
        goes on. A store that is only read is left as it is.

        Args:
            documents: As for `ask`.
            ratio: The finest ratio that will be asked for; the embedder's `kept_ratio` when not given.
            batch_size: Chunks per forward pass; by the device when not given (see `default_batch_size`).
            show_progress: Show a bar; None shows it on a terminal.

        Raises:
            RatioError: The ratio was not trained.
        """
        finest, fingerprint = self.embedder.config.finest(ratio), self.embedder.fingerprint
        if self.store.readonly:
            return
        texts = {document.ref: document.text for document in as_documents(documents)}
        missing = [
            (ref, self.token_ids(text, ref))
            for ref, text in texts.items()
            if self.store.get(ref, fingerprint, finest) is None
        ]
        for made in compress_in_batches(
            self.embedder, missing, ratio=finest, batch_size=batch_size, show_progress=show_progress
        ):
            self.store.put(*made)

    def token_ids(self, text: str, ref: str) -> np.ndarray[Any, Any]:
        """(T,) ids of a document's text, remembered for recent documents."""
        with self._ids_lock:
            if ref in self._ids:
                self._ids.move_to_end(ref)
                return self._ids[ref]
        ids = self.llm.encode(text)
        with self._ids_lock:
            self._ids[ref] = ids
            while len(self._ids) > _KEPT_TOKEN_IDS:
                self._ids.popitem(last=False)
        return ids

    def _compressed(self, wanted: Sequence[tuple[Document, int]], store: Store) -> tuple[list[Part], list[bool]]:
        """What documents at their ratios are in a prompt, and whether each was in the store, where they are put."""
        fingerprint = self.embedder.fingerprint
        found = [store.get(document.ref, fingerprint, ratio) for document, ratio in wanted]
        cached = [kept is not None for kept in found]
        for ratio in sorted({ratio for (_, ratio), kept in zip(wanted, found, strict=True) if kept is None}):
            places = [place for place, (_, own) in enumerate(wanted) if own == ratio and not cached[place]]
            texts = [(document.ref, self.token_ids(document.text, document.ref)) for document, _ in
                     (wanted[place] for place in places)]  # fmt: skip
            waiting = iter(places)
            for made in compress_in_batches(self.embedder, texts, ratio=ratio):
                if not store.readonly:  # one to read is read; what it lacks serves this call alone
                    store.put(*made)
                for compressed in made:
                    # As kept, which on disk is rounded: the first answer is what later ones will be.
                    kept = store.get(compressed.ref, fingerprint, ratio)
                    found[next(waiting)] = compressed if kept is None else kept
        return [kept.part for kept in found if kept is not None], cached

    # -- prompts ----------------------------------------------------------------------------------------------

    def _prepare(
        self,
        messages: Messages,
        documents: list[Document],
        budget: int | None,
        ratio: str | int,
        new_tokens: int,
        assemble: Callable[[Messages], Prompt],
    ) -> Ready:
        start = time.perf_counter()
        bare = assemble(_replaced(messages))
        inside = _inline(messages)
        turns = [at for at, document in enumerate(inside) if isinstance(document, _Turn)]
        every = documents + [document for document in inside if not isinstance(document, _Turn)]
        room = self._room(bare, new_tokens, budget, every)
        if not every and not turns:
            return Ready(bare, (), 0.0, start, room)
        plan = self._plan(every, room, ratio, headed=len(documents))
        parts, context, seconds = self._read(every, plan, headed=len(documents))
        own = iter(parts[len(documents) :])
        in_place: list[list[Part]] = [[] if isinstance(document, _Turn) else next(own) for document in inside]
        if turns:  # they take what documents leave; the newest is the best of them
            latest = [inside[at] for at in reversed(turns)]
            left = self.llm.window - len(bare) - new_tokens - plan.positions
            read, told, more = self._read(
                latest, self._plan(latest, left, "auto", headed=0), headed=0, store=self._turns
            )
            for at, own_parts in zip(reversed(turns), read, strict=True):
                in_place[at] = own_parts
            context, seconds = context + told, seconds + more
        full = _replaced(messages, in_place)
        if documents:
            last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
            if last is None:
                raise ConfigError("documents join the last user message, and there is none; add one")
            content = full[last]["content"]
            joined = [part for own_parts in parts[: len(documents)] for part in own_parts]
            full[last] = {**full[last], "content": [*joined, *([content] if isinstance(content, str) else content)]}
        return Ready(assemble(full), context, seconds, start, room)

    def _condensed(
        self,
        messages: Messages,
        documents: list[Document],
        budget: int | None,
        ratio: str | int,
        new_tokens: int,
        assemble: Callable[[Messages], Prompt],
    ) -> tuple[Messages, int | None]:
        """A conversation that the window does not hold, with its older turns as documents before the first that stays.

        What its documents take of the budget, or of half of the room, is set aside for them. Of the rest, turns stay
        text from the newest backwards as far as they take half, and begin with the user's.

        Returns:
            The messages, and the budget of the documents.
        """

        def length(some: Messages) -> int:
            return len(assemble(_replaced(some)))

        room = max(0, self.llm.window - new_tokens)
        cap = room // 2 if budget is None else _capped(budget, room)
        left = room - self._plan_all(documents, messages, cap, ratio).positions
        starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
        if not starts or length(messages) <= left:
            return messages, budget
        system = [message for message in messages if message["role"] == "system"]
        first = starts[-1]
        for start in reversed(starts[:-1]):
            if length([*system, *messages[start:]]) > left // 2:
                break
            first = start
        turns: list[Any] = []
        for number, message in enumerate(messages[:first], start=1):
            if message["role"] != "system":
                pieces = [message["content"]] if isinstance(message["content"], str) else message["content"]
                text = "".join(map(self._text_of, pieces))
                text += json.dumps(message["tool_calls"]) if message.get("tool_calls") else ""
                title = f"turn {number}, {message['role']}"
                turns.append(_Turn(f"{message['role']}: {text}\n", title=title))
        own = messages[first]["content"]
        if not turns:
            return messages, budget
        content = [_EARLIER, *turns, "\n", *([own] if isinstance(own, str) else own)]
        kept = [message for message in messages[first + 1 :] if message["role"] != "system"]
        return [*system, {**messages[first], "content": content}, *kept], cap

    def _text_of(self, piece: Part | Document) -> str:
        if isinstance(piece, str | Document):
            return piece if isinstance(piece, str) else piece.text
        if isinstance(piece, Tensor | AnchoredStates):
            raise ConfigError(
                "an older turn holds embeddings, which cannot be condensed; pass the Document that they are of"
            )
        return self.llm.decode(piece.tolist())

    def _continue_from(
        self,
        prompt: str | Sequence[str | Document],
        documents: list[Document],
        budget: int | None,
        ratio: str | int,
        new_tokens: int,
    ) -> Ready:
        start = time.perf_counter()
        pieces = [prompt] if isinstance(prompt, str) else list(prompt)
        every = documents + [piece for piece in pieces if isinstance(piece, Document)]
        bare = assemble_text(self.llm, [piece for piece in pieces if not isinstance(piece, Document)])
        room = self._room(bare, new_tokens, budget, every)
        plan = self._plan(every, room, ratio, headed=len(documents))
        parts, context, seconds = self._read(every, plan, headed=len(documents))
        inside = iter(parts[len(documents) :])
        joined = [part for own in parts[: len(documents)] for part in own]
        for piece in pieces:
            joined += next(inside) if isinstance(piece, Document) else [piece]
        return Ready(assemble_text(self.llm, joined), context, seconds, start, room)

    def _room(self, bare: Prompt, new_tokens: int, budget: int | None, documents: Sequence[Document]) -> int:
        """Positions that the documents may take: the budget, or what a prompt and its answer leave where it is less."""
        window = self.llm.window
        free = window - len(bare) - new_tokens
        room = _capped(budget, free)
        if free < 0 or (documents and free == 0):
            raise BudgetError(
                f"the question takes {len(bare)} positions and the answer up to {new_tokens}, more than the "
                f"{window} of {self.llm.name}; shorten the question, lower max_new_tokens, or use a session"
            )
        return room

    def _plan_all(self, joined: list[Document], messages: Messages, room: int, ratio: str | int) -> Plan:
        """What becomes of the documents that join messages, and of those inside them."""
        return self._plan(joined + _inline(messages), room, ratio, headed=len(joined))

    def _plan(self, documents: Sequence[Document], room: int, ratio: str | int, *, headed: int | None = None) -> Plan:
        """What becomes of documents, of which the first `headed` (all when not given) get a heading."""
        config = self.embedder.config
        if isinstance(ratio, int):
            config.require_ratio(ratio)
        finest = [document.finest if isinstance(document, Handed) else None for document in documents]
        return plan_context(
            [len(self.token_ids(document.text, document.ref)) for document in documents],
            room,
            ratio=ratio,  # type: ignore[arg-type]
            ratios=config.ratios,
            auto_ratios=config.plan_ratios,
            chunk_size=config.chunk_size,
            overhead=[
                len(self.llm.encode(document_heading(i, d.title) + DOCUMENT_SEPARATOR))
                if headed is None or i < headed
                else 0
                for i, d in enumerate(documents)
            ],
            finest=finest,
        )

    def _read(
        self, documents: Sequence[Document], plan: Plan, *, headed: int | None = None, store: Store | None = None
    ) -> tuple[list[list[Part]], tuple[ContextEntry, ...], float]:
        """Each document as message parts: its heading if it gets one (see `_plan`), then text or embeddings.

        Embeddings are kept in `store`, that of the documents when not given.
        """
        start = time.perf_counter()
        compressed = [(d, p.fidelity) for d, p in zip(documents, plan.documents, strict=True) if _is_ratio(p.fidelity)]
        embeddings, cached = self._compressed(compressed, self.store if store is None else store)  # type: ignore[arg-type]
        seconds = time.perf_counter() - start
        ready = iter(zip(embeddings, cached, strict=True))
        parts: list[list[Part]] = []
        entries = []
        for document, planned in zip(documents, plan.documents, strict=True):
            from_store = False
            with_heading = headed is None or planned.index < headed
            before = document_heading(planned.index, document.title) if with_heading else ""
            after = DOCUMENT_SEPARATOR if with_heading else ""
            if planned.fidelity == "raw":
                parts.append([before + document.text + after])
            elif planned.fidelity == "dropped":
                parts.append([])
            else:
                vectors, from_store = next(ready)
                parts.append([part for part in (before, vectors, after) if not isinstance(part, str) or part])
            entries.append(
                ContextEntry(
                    source=document.source,
                    ref=document.ref,
                    n_tokens=planned.n_tokens,
                    positions=planned.positions,
                    fidelity=planned.fidelity,
                    cached=from_store,
                    reason=planned.reason,
                )
            )
        return parts, tuple(entries), seconds


class _Turn(Document):
    """A turn of a conversation that is compressed for room."""


def open_store(store: str | Path | Store | None) -> Store | None:
    """The store of a folder or URL; one that is open already stays as it is."""
    if not isinstance(store, str | Path):
        return store
    from extemb_core.store.shard_store import ShardStore, is_sharded
    from extemb_core.store.store import EmbeddingStore

    return ShardStore(store) if is_sharded(store) else EmbeddingStore.open(store)


def as_documents(documents: Documents) -> list[Document]:
    """One document or several, of any accepted kind, as a list of `Document`."""
    if isinstance(documents, str | Document | Mapping) or hasattr(documents, "page_content"):
        return [Document.from_any(documents)]
    if not isinstance(documents, Iterable):
        raise DocumentError(f"documents is a {type(documents).__name__}; pass texts, Documents, or a list of them")
    return [Document.from_any(document) for document in documents]


def _inline(messages: Messages) -> list[Document]:
    """The documents inside messages, in order."""
    contents = [message["content"] for message in messages if not isinstance(message.get("content", ""), str)]
    return [part for content in contents for part in content or () if isinstance(part, Document)]


def _replaced(messages: Messages, parts: Sequence[Sequence[Part]] | None = None) -> list[dict[str, Any]]:
    """Messages with what each document inside them became in its place; without them when `parts` is not given."""
    left = None if parts is None else iter(parts)
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            pieces: list[Any] = []
            for part in content:
                inside = isinstance(part, Document)
                pieces += (() if left is None else next(left)) if inside else [part]
            content = pieces
        found.append({**message, "content": content})
    return found


def _as_messages(question: str | Messages) -> Messages:
    if isinstance(question, str):
        if not question.strip():
            raise ConfigError("the question is empty; ask something")
        return [{"role": "user", "content": question}]
    if not question:
        raise ConfigError("there are no messages; pass at least one of role user")
    return question


def _capped(budget: int | None, free: int) -> int:
    """The positions that are free, or the budget where that is less."""
    return free if budget is None else min(check_budget(budget), free)


def _is_ratio(fidelity: Fidelity) -> bool:
    return isinstance(fidelity, int)
