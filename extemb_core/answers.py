"""Answers: the text, what became of each document, and where the time went."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from extemb_core.context.planning import Fidelity, count_fidelities
from extemb_core.documents import Document
from extemb_core.errors import ConfigError
from extemb_core.utils.text import strip_control_chars

if TYPE_CHECKING:
    from extemb_core.context.assembly import Prompt
    from extemb_core.models.generation import Generated, Sampling
    from extemb_core.models.llm import LLM

# Bold, underlined or struck out: the form tells the fidelities apart without colour. Translucent tints suit light and
# dark pages.
_RAW = '<mark style="background:rgba(86,180,233,.35);color:inherit;font-weight:600"{}>{}</mark>'
_AT_RATIO = '<u style="text-decoration:underline dotted rgb(213,94,0) 2px"{}>{}</u><sub>{}</sub>'
_PASSAGE = '<span{} style="outline:2px solid rgb(213,94,0);outline-offset:2px">{}</span>'
_DROPPED = '<s style="opacity:.65"{}>{}</s>'


@dataclass(frozen=True)
class ContextSpan:
    """What became of a part of a document.

    Attributes:
        start, stop: First character, and the one after the last.
        fidelity: "raw", a ratio, or "dropped".
        positions: Positions of the LLM's window that it took.
    """

    start: int
    stop: int
    fidelity: Fidelity
    positions: int

    def to_html(self, text: str) -> str:
        """Return HTML of this part of a document's text, marked by its fidelity."""
        shown = html.escape(strip_control_chars(text[self.start : self.stop]))
        title = f' title="{self.positions:,} positions"'
        if isinstance(self.fidelity, int):
            return _AT_RATIO.format(title, shown, self.fidelity)
        return (_RAW if self.fidelity == "raw" else _DROPPED).format(title, shown)


@dataclass(frozen=True, kw_only=True)
class ContextEntry:
    """What became of one document.

    Attributes:
        source: Name of its origin, to show and cite.
        ref: Its content hash.
        n_tokens: Its length as raw tokens.
        positions: Positions of the LLM's window that it took, its heading included; 0 when dropped.
        fidelity: "raw", a ratio, "dropped", or "mixed": see `spans`.
        cached: Whether its embeddings were in the store already.
        reason: Why this fidelity, in a few words.
        spans: What became of each part, where the parts differ.
        turn: True for an older turn of the conversation that did not fit the window, not a document.
    """

    source: str
    ref: str
    n_tokens: int
    positions: int
    fidelity: Fidelity
    cached: bool
    reason: str
    spans: tuple[ContextSpan, ...] = ()
    turn: bool = False

    def highlight(self, document: Any, *, passage: tuple[int, int] = (0, 0)) -> str:
        """Return HTML of the document with its spans marked as raw, dropped, or at a ratio, which is shown.

        In a notebook: `IPython.display.HTML(answer.context[0].highlight(document))`.

        Args:
            document: The document of this entry, in any form that `ExtensibleLM.ask` takes.
            passage: (start, stop) characters of a passage to frame, under the id "passage".

        Raises:
            ConfigError: This is another document.
        """
        document = Document.from_any(document)
        if document.ref != self.ref:
            raise ConfigError(f"{document.source!r:.80} is not the text of {self.source!r:.80}; pass that document")
        spans = self.spans or (ContextSpan(0, len(document.text), self.fidelity, self.positions),)
        legend = " · ".join(
            (_RAW.format("", "raw"), _AT_RATIO.format("", "compressed", "ratio"), _DROPPED.format("", "dropped"))
        )
        return (
            f"<div><p><b>{html.escape(self.source)}</b>: {self.n_tokens:,} tokens in {self.positions:,} positions<br>"
            f'<small>{legend}</small></p><div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{''.join(_framed(spans, document.text, *passage))}</div></div>"
        )


def _framed(spans: Sequence[ContextSpan], text: str, start: int, stop: int) -> Iterator[str]:
    """Yield the HTML of spans, cut where a passage begins and ends."""
    for span in spans:
        cuts = sorted({span.start, span.stop, *(at for at in (start, stop) if span.start < at < span.stop)})
        for left, right in pairwise(cuts):
            part = replace(span, start=left, stop=right).to_html(text)
            named = ' id="passage"' if left == max(start, spans[0].start) else ""
            yield _PASSAGE.format(named, part) if start <= left < stop else part


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer with its sources.

    Attributes:
        text: Text that the LLM wrote.
        context: One entry per document, in the order given; then one per older turn that the window did not hold.
        seconds: "compress" (documents to embeddings), "first_token" (from the call to the first token, compressing
            included) and "total".
        prompt_positions: Positions of the whole prompt.
        new_tokens: Number of tokens written.
        finish_reason: "stop", "length" (max_new_tokens reached) or "cancelled".
        budget: Positions that the documents could take: the budget asked for, or less if less was free.
    """

    text: str
    context: tuple[ContextEntry, ...]
    seconds: Mapping[str, float]
    prompt_positions: int
    new_tokens: int
    finish_reason: str
    budget: int | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def documents(self) -> tuple[ContextEntry, ...]:
        """Entries of the documents: `context` without turns of the conversation."""
        return tuple(entry for entry in self.context if not entry.turn)

    @property
    def dropped(self) -> tuple[ContextEntry, ...]:
        """The documents that the LLM did not see."""
        return tuple(entry for entry in self.context if entry.fidelity == "dropped")

    def to_dict(self) -> dict[str, Any]:
        """Return the answer, except its budget, as plain values that JSON can hold."""
        values = {**asdict(self), "seconds": dict(self.seconds)}
        return {name: value for name, value in values.items() if name != "budget"}

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(entry.source)}</td><td>{entry.n_tokens:,}</td><td>{entry.positions:,}</td>"
            f"<td>{html.escape(_in_words(entry))}</td><td>{'cache' if entry.cached else 'computed'}</td></tr>"
            for entry in self.context
        )
        head = "".join(f"<th>{name}</th>" for name in ("source", "tokens", "positions", "fidelity", "from"))
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
        timing = (
            f"{self.prompt_positions:,} positions, first token after {self.seconds.get('first_token', 0):.2f} s, "
            f"{self.seconds.get('total', 0):.2f} s in all"
        )
        return f"<div><p>{html.escape(self.text)}</p>{table}<small>{timing}</small></div>"


def _in_words(entry: ContextEntry) -> str:
    if not entry.spans:
        return str(entry.fidelity)
    return f"mixed, of {len(entry.spans)} spans: {count_fidelities(span.fidelity for span in entry.spans)}"


@dataclass(frozen=True)
class PreparedPrompt:
    """A prompt that is ready for the LLM, what became of its documents in which budget, and when it was asked for."""

    prompt: Prompt
    context: tuple[ContextEntry, ...]
    compress_seconds: float
    start: float
    budget: int | None = None


class AnswerStream(Iterator[str]):
    """An answer, piece by piece; usable in a `with` statement.

    After the last piece, or `close()`, `.answer` holds the answer.
    """

    def __init__(
        self, llm: LLM, prepared: PreparedPrompt, sampling: Sampling, on_answer: Callable[[Answer], None] | None = None
    ) -> None:
        from extemb_core.models.generation import Generated  # here, so that Answer alone does not load torch

        self._prepared = prepared
        self._generated = Generated()
        self._pieces = llm.stream(prepared.prompt.inputs(llm), sampling, self._generated)
        self._first_token: float | None = None
        self._answer: Answer | None = None
        self._closed = threading.Event()
        self._reading = threading.Lock()  # one thread at a time reads, or ends
        self._on_answer = on_answer

    @property
    def answer(self) -> Answer:
        """The answer.

        Raises:
            ConfigError: The stream was neither read to its end nor closed.
        """
        if self._answer is None:
            raise ConfigError("the stream is still open; read it to its end or close it before taking .answer")
        return self._answer

    def __next__(self) -> str:
        with self._reading:
            if self._closed.is_set():
                self._end()
                raise StopIteration
            try:
                piece = next(self._pieces)
            except StopIteration:
                self._settle()
                raise
            except BaseException:
                self._on_answer = None  # after a failure there is no answer to hand over
                raise
            if self._first_token is None:
                self._first_token = time.perf_counter() - self._prepared.start
            if self._closed.is_set():  # closed meanwhile by another thread
                self._end()
            return piece

    def finish(self) -> Answer:
        """Read what is left and return the answer."""
        for _ in self:
            pass
        return self.answer

    def close(self) -> None:
        """Stop the LLM; the answer is what was written so far.

        If another thread is waiting for the next piece, the stream ends when that piece has come.
        """
        self._closed.set()
        if self._reading.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._reading.release()

    def _end(self) -> None:
        self._pieces.close()  # type: ignore[attr-defined]
        if self._answer is None and not self._generated.text:
            self._generated.finish_reason = "cancelled"
        self._settle()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _settle(self) -> None:
        if self._answer is None:
            total = time.perf_counter() - self._prepared.start
            first = self._first_token if self._first_token is not None else total
            self._answer = to_answer(self._prepared, self._generated, first_token=first, total=total)
            if self._on_answer is not None and (self._answer.text or self._answer.finish_reason != "cancelled"):
                self._on_answer(self._answer)


def answer_now(llm: LLM, prepared: PreparedPrompt, sampling: Sampling) -> Answer:
    """Answer in the caller's thread."""
    times: list[float] = []  # of each token
    (generated,) = llm.generate([prepared.prompt.inputs(llm)], sampling, lambda: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    return to_answer(prepared, generated, first_token=times[0] - prepared.start, total=times[-1] - prepared.start)


def to_answer(prepared: PreparedPrompt, generated: Generated, *, first_token: float, total: float) -> Answer:
    """Make the answer of what was generated; times are in seconds from the call."""
    return Answer(
        text=generated.text,
        context=prepared.context,
        seconds={"compress": prepared.compress_seconds, "first_token": first_token, "total": total},
        prompt_positions=len(prepared.prompt),
        new_tokens=len(generated.token_ids),
        finish_reason=generated.finish_reason,
        budget=prepared.budget,
    )
