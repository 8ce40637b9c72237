"""Conversations of any length in a window of fixed size.

`Condenser` takes a whole conversation at each call, as chat frameworks hand it over, and compresses the older turns if
the window does not hold it.

`Session` is the online mode (twin paper, section 3), for a conversation or a stream. It keeps a timeline, oldest first:
condensed text, then raw text and turns. When the next answer would not fit the window, the oldest raw part is condensed
into extensible embeddings. When those take more than half of the window, the oldest are coarsened, ratio by ratio,
without another forward pass; the oldest part is dropped, and counted in `dropped_tokens`, only when even the coarsest
no longer fit. Memory stays flat: condensed text is not kept.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from torch import Tensor

from extemb_core.answers import Answer, AnswerStream, ContextEntry, PreparedPrompt
from extemb_core.context.assembly import Prompt, assemble_chat
from extemb_core.context.builder import ContextBuilder, ReadDocuments, capped
from extemb_core.context.messages import Messages, content_parts, inline_documents, question_in
from extemb_core.context.planning import check_budget
from extemb_core.context.tools import written_call
from extemb_core.documents import Document, Documents, as_documents
from extemb_core.errors import BudgetError, ConfigError
from extemb_core.models.compressed import Compressed
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.models.tokenization import pieces_of
from extemb_core.store.base import MemoryStore
from extemb_core.utils.validation import require_text, whole_number

_EARLIER = "Earlier in this conversation:\n"
_FORGOTTEN = "the oldest turns"
_PIECE_CHARS = 8192  # long texts are taken in piece by piece
_FIRST_RATIO = 4  # ratio at which raw text is condensed first; it is coarsened when room runs out
_MAX_TURN_BYTES = 64 * 2**20  # of embeddings of older turns, kept in memory


class CompressedTurn(Document):
    """A turn of a conversation that is compressed to make room."""


class Condenser:
    """Builds prompts from conversations, compressing the older turns that the window does not hold.

    Embeddings of turns are kept in memory only, the most recent ones: what was said in a conversation never enters the
    documents' store.

    Args:
        builder: Builds the prompts.
    """

    def __init__(self, builder: ContextBuilder) -> None:
        self._builder = builder
        self.turns = MemoryStore(_MAX_TURN_BYTES)

    def chat(
        self,
        messages: Messages,
        documents: Sequence[Document],
        *,
        budget: int | None,
        ratio: str | int,
        max_new_tokens: int,
        plan: str | None = None,
        **template: Any,
    ) -> PreparedPrompt:
        """Build what `ContextBuilder.chat` builds; `answer.context` says what became of each older turn.

        Documents get their budget first (half of the room when none is given), turns get the rest.
        """
        start = time.perf_counter()
        builder = self._builder
        room = max(0, builder.llm.context_window - max_new_tokens)
        cap = room // 2 if budget is None else capped(budget, room)
        rendered = builder.render(messages, documents, **template)
        ranked = [*documents, *inline_documents(messages)]
        settings: dict[str, Any] = {"n_headed": len(documents), "question": question_in(messages), "plan": plan}
        n_bare, condensed = rendered.n_around, None
        if n_bare > room - cap:  # otherwise all turns fit, even beside documents of the full budget
            left = room - builder.plan(ranked, cap, ratio, **settings).positions
            condensed = None if n_bare <= left else self._condensed(messages, left, template)
        if condensed is None:
            prepared = builder.chat(
                messages, documents, budget=budget, ratio=ratio, plan=plan, max_new_tokens=max_new_tokens,
                rendered=rendered,
            )  # fmt: skip
            return replace(prepared, start=start)
        rendered = builder.render(condensed, documents, **template)
        ranked = [*documents, *inline_documents(condensed)]
        turns = [at for at, document in enumerate(ranked) if isinstance(document, CompressedTurn)]
        others = [at for at, document in enumerate(ranked) if not isinstance(document, CompressedTurn)]
        uncondensed = [ranked[at] for at in others]
        n_bare = rendered.n_around
        room = builder.room(n_bare, max_new_tokens, cap, uncondensed)
        read = builder.read(uncondensed, room, ratio, **settings)
        # Turns share what the documents leave; newer turns rank higher.
        free = builder.llm.context_window - n_bare - max_new_tokens
        left = free - read.positions
        earlier = builder.read([ranked[at] for at in reversed(turns)], left, "auto", n_headed=0, store=self.turns)
        contents = dict(zip([*others, *reversed(turns)], [*read.parts, *earlier.parts], strict=True))
        seconds = read.seconds + earlier.seconds
        context = (*read.context, *(replace(entry, turn=True) for entry in earlier.context))
        prompt = rendered.fill_within(contents, min(room + earlier.positions, free))
        return PreparedPrompt(prompt, context, seconds, start, room)

    def _condensed(self, messages: Messages, left: int, template: dict[str, Any]) -> Messages | None:
        """Turn the older turns into documents that stand before the first turn that stays; None if there are none.

        The newest turns stay text, up to half of `left`, beginning with a user's. If the tool rounds since the last
        user turn are still too long, tool results become documents in their places, except those of the newest calls.
        """
        starts = [at for at, message in enumerate(messages) if message["role"] == "user"]
        system = [message for message in messages if message["role"] == "system"]
        first = starts[-1] if starts else 0
        for start in reversed(starts[:-1]):
            recent = self._builder.render([*system, *messages[start:]], **template)
            if len(recent.fill({})) > left // 2:
                break
            first = start
        turns = [
            part
            for number, message in enumerate(messages[:first], start=1)
            if message["role"] != "system"
            for part in self._turn(message, f"turn {number}, {message['role']}")
        ]
        condensed = [*messages]
        if turns:
            content = [_EARLIER, *turns, "\n", *content_parts(messages[first])]
            later = [message for message in messages[first + 1 :] if message["role"] != "system"]
            condensed = [*system, {**messages[first], "content": content}, *later]
            if self._builder.render(condensed, **template).n_around <= left:
                return condensed
        newest = max((at for at, message in enumerate(condensed) if message["role"] == "assistant"), default=0)
        said = [at for at, message in enumerate(condensed[:newest]) if message["role"] == "tool"]
        for at in said:
            title = f"turn {at + 1 + len(messages) - len(condensed)}, tool"
            parts = content_parts(condensed[at])
            content = [CompressedTurn(part, title=title) if isinstance(part, str) and part else part for part in parts]
            condensed[at] = {**condensed[at], "content": content}
        return condensed if turns or said else None

    def _turn(self, message: Any, title: str) -> list[str | Document]:
        """Make a turn into text to compress; documents in it stay documents, and are reported as such."""
        calls = map(written_call, message.get("tool_calls") or ())
        parts = [f"{message['role']}: ", *map(self._text_of, content_parts(message)), *calls, "\n"]
        turn: list[str | Document] = []
        for are_documents, run in groupby(parts, lambda part: isinstance(part, Document)):
            if are_documents:
                turn += run
            else:
                text = "".join(map(str, run))
                turn.append(CompressedTurn(text, title=title) if text.strip() else text)
        return turn

    def _text_of(self, part: Any) -> str | Document:
        if isinstance(part, Tensor | AnchoredStates):
            raise ConfigError("an older turn holds embeddings, which cannot be condensed; pass their Document")
        return part if isinstance(part, str | Document) else self._builder.llm.decode(part.tolist())


@dataclass
class _Turn:
    """One message, or streamed text (role None)."""

    role: str | None
    text: str


class Session:
    """A conversation that never overflows. Made by `ExtensibleLM.session`.

    Args:
        builder: Builds the prompts.
        documents: Documents that stay in the prompt throughout, as `ask` would place them.
        ratio: Ratio of the documents.
        window: Positions to use; by default, and at most, the LLM's own window.
        budget: Positions that the documents may take at most, if the conversation leaves them; half of the window when
            not given.

    Attributes:
        condensed_tokens: Tokens that are now extensible embeddings.
        dropped_tokens: Tokens that did not fit even at the coarsest ratio; each answer's context reports them.
    """

    def __init__(
        self,
        builder: ContextBuilder,
        documents: Documents = (),
        *,
        ratio: str | int = "auto",
        window: int | None = None,
        budget: int | None = None,
    ) -> None:
        llm = builder.llm
        if window is not None and whole_number(window, "window", remedy="e.g. 2048") > llm.context_window:
            raise ConfigError(f"window={window} is not between 1 and the {llm.context_window} positions of {llm.name}")
        self._builder = builder
        self._llm = llm
        self._window = window or llm.context_window
        self._documents = as_documents(documents)
        self._read = ReadDocuments((), (), 0.0)
        self._compress_seconds = 0.0
        self._ratio = ratio
        self._asked = self._window // 2 if budget is None else check_budget(budget)
        self._budget = max(0, min(self._asked, self._free(0)))
        self._read_documents()
        self._condensed: list[Compressed] = []
        self._timeline: list[_Turn] = []
        self._lock = threading.Lock()
        self.condensed_tokens = 0
        self.dropped_tokens = 0

    @property
    def positions(self) -> int:
        """Positions that the conversation so far takes, documents included; room is made before the next answer."""
        return len(self._prompt([]))

    def append(self, text: str) -> None:
        """Feed text that belongs to no turn: a transcript, a log, a novel, piece by piece."""
        require_text(text, "text", may_be_empty=True)
        with self._lock:
            draft = self._draft()
            draft._take_in(text)
            self._adopt(draft)

    def send(self, text: str, **sampling: Any) -> Answer:
        """Send a message and return the answer; both become part of the conversation."""
        return self.stream(text, **sampling).finish()

    def stream(self, text: str, **sampling: Any) -> AnswerStream:
        """Answer as `send` does, piece by piece. What is written until the stream is closed joins the conversation.

        If nothing was written, or the LLM fails, the message does not join it either, and may be sent again.
        """
        require_text(text, "message")
        start = time.perf_counter()
        settings = Sampling(**sampling)
        with self._lock:
            # A message longer than the window is taken in as streamed text, except for its last piece.
            *pieces, text = [text] if self._holds(text, settings.max_new_tokens) else pieces_of(text, _PIECE_CHARS)
            long = "".join(pieces)
            question = _Turn("user", text)
            before, draft = self._timeline, self._draft()
            draft._take_in(long)
            draft._make_room([question], settings.max_new_tokens)
            prompt = draft._prompt([question])
        context = (*draft._read.context, *draft._forgotten())
        prepared = PreparedPrompt(prompt, context, draft._compress_seconds, start, draft._budget)
        draft._compress_seconds = 0.0  # the documents are read once, and the next answer says so
        draft._read = draft._read.cached()

        def take_in(answer: Answer) -> None:
            with self._lock:
                joined = draft
                if self._timeline is not before:  # another thread changed the conversation meanwhile
                    joined, question.text = self._draft(), text
                    joined._take_in(long)
                joined._timeline += [question, _Turn("assistant", answer.text)]
                self._adopt(joined)

        return AnswerStream(self._llm, prepared, settings, take_in)

    def _holds(self, text: str, new_tokens: int) -> bool:
        """Return whether a message is short or fits beside an answer; no more of it is encoded than tells that."""
        if len(text) <= _PIECE_CHARS:
            return True
        sizes = (len(self._llm.encode(piece)) for piece in pieces_of(text, _PIECE_CHARS))
        room = self._free(new_tokens) - self._read.positions
        return all(size <= room for size in accumulate(sizes))

    # -- documents --------------------------------------------------------------------------------------------

    def _free(self, new_tokens: int) -> int:
        """Count the positions for documents, beside a chunk of text and an answer."""
        bare = len(assemble_chat(self._llm, [{"role": "user", "content": ""}]))
        return self._window - new_tokens - bare - self._builder.embedder.config.chunk_size

    def _read_documents(self) -> None:
        """Read the documents within the budget."""
        if self._documents:
            self._read = self._builder.read(self._documents, self._budget, self._ratio)
            self._compress_seconds += self._read.seconds

    # -- the timeline -----------------------------------------------------------------------------------------

    def _draft(self) -> Session:
        """Copy the conversation, to try something that may fail."""
        draft = copy(self)
        draft._timeline, draft._condensed = [replace(turn) for turn in self._timeline], [*self._condensed]
        return draft

    def _adopt(self, draft: Session) -> None:
        vars(self).update(vars(draft))

    def _take_in(self, text: str) -> None:
        """Add streamed text in pieces, making room after each, so that the work grows only linearly with the text."""
        for piece in pieces_of(text, _PIECE_CHARS):
            self._timeline.append(_Turn(None, piece))
            self._make_room([], 0)

    def _prompt(self, coming: list[_Turn]) -> Prompt:
        """Assemble the conversation as one prompt: documents, condensed and streamed text lead the first user turn."""
        parts = [part for document in self._read.parts for part in document]
        streamed = [turn.text for turn in self._timeline if turn.role is None]
        if self._condensed or streamed:
            parts += [_EARLIER, *[text.part for text in self._condensed], "".join(streamed), "\n\n"]
        turns = [turn for turn in self._timeline + coming if turn.role is not None]
        if not turns or turns[0].role != "user":
            turns.insert(0, _Turn("user", ""))
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
        messages[0]["content"] = [*parts, turns[0].text]
        return assemble_chat(self._llm, messages)

    def _make_room(self, coming: list[_Turn], new_tokens: int) -> None:
        """Condense from the oldest on until the coming turns and their answer fit."""
        room, free = self._window - new_tokens, self._free(new_tokens)
        if free < 0:
            raise BudgetError(
                f"an answer of up to {new_tokens} leaves a message no room in the session's window of {self._window}; "
                "lower max_new_tokens"
            )
        before, self._budget = self._budget, min(self._asked if coming else self._budget, free)
        if self._read.positions > self._budget or before < self._budget:
            self._read_documents()  # coarser, or finer when a long answer is over
        while len(self._prompt(coming)) > room:
            if self._timeline or any(len(turn.text) > 1 for turn in coming):
                self._condense_oldest(coming)
            elif not self._drop_oldest():
                raise BudgetError(f"the message does not fit the session's window of {self._window}; send it in parts")
            self._relieve(room // 2)

    def _condense_oldest(self, coming: list[_Turn]) -> None:
        """Turn the oldest raw text, at most a chunk, into embeddings."""
        source = self._timeline if self._timeline else coming
        turn = source[0]
        size = self._builder.embedder.config.chunk_size
        label = f"{turn.role}: " if turn.role else ""
        ids = self._llm.encode(label + turn.text)
        if len(ids) <= size and source is self._timeline:
            source.pop(0)
        else:  # only the beginning of a long text; the rest keeps its role
            head, rest = _split_text(self._llm, turn.text, size)
            ids = self._llm.encode(label + head)
            turn.text = rest
        if turn.role is not None and source is self._timeline:
            ids = np.concatenate([ids, self._llm.encode("\n")])
        ratios = self._builder.embedder.config.plan_ratios
        ratio = next((r for r in ratios if r >= _FIRST_RATIO), ratios[-1])
        if len(ids):
            self._condensed += self._builder.embedder.compress_ids([ids], ratio=ratio, show_progress=False)
            self.condensed_tokens += len(ids)

    def _relieve(self, limit: int) -> None:
        """Coarsen the oldest embeddings until all take at most `limit` positions; then drop the oldest."""
        ratios = self._builder.embedder.config.plan_ratios
        while sum(map(len, self._condensed)) > limit:
            at, finest = min(enumerate(self._condensed), key=lambda item: item[1].ratio)
            if finest.ratio == ratios[-1]:
                self._drop_oldest()
            else:
                self._condensed[at] = finest.at_ratio(ratios[ratios.index(finest.ratio) + 1])

    def _forgotten(self) -> Iterator[ContextEntry]:
        """Report what was dropped, in the form in which `Condenser` reports older turns."""
        if self.dropped_tokens:
            yield ContextEntry(
                source=_FORGOTTEN, ref="", n_tokens=self.dropped_tokens, positions=0, fidelity="dropped", cached=False,
                reason="no room at the coarsest ratio", turn=True,
            )  # fmt: skip

    def _drop_oldest(self) -> bool:
        if not self._condensed:
            return False
        dropped = self._condensed.pop(0)
        self.dropped_tokens += dropped.n_tokens
        self.condensed_tokens -= dropped.n_tokens
        return True


def _split_text(llm: LLM, text: str, n_tokens: int) -> tuple[str, str]:
    """Split a text after about `n_tokens` tokens, at white space where there is some."""
    encoding = llm.tokenizer.backend_tokenizer.encode(text[: 16 * n_tokens], add_special_tokens=False)
    end = encoding.offsets[min(n_tokens, len(encoding)) - 1][1] if len(encoding) else len(text)
    cut = max(text.rfind(" ", 0, end), text.rfind("\n", 0, end)) + 1
    end = cut if cut > end // 2 else max(end, 1)
    return text[:end], text[end:]
