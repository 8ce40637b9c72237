"""`extemb ask` and `extemb chat`: answer questions from documents, and show what became of each."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extemb_core.cli import options, output
from extemb_core.cli.config_options import options_from
from extemb_core.errors import BudgetError, DocumentError
from extemb_core.library import N_PASSAGES
from extemb_core.loaders import BINARY_SUFFIXES, SUPPORTED_SUFFIXES
from extemb_core.utils.validation import check_sampling, require_text, whole_number

if TYPE_CHECKING:
    from extemb_core.answers import Answer
    from extemb_core.context.conversation import Session
    from extemb_core.lm import ExtensibleLM


@dataclass(frozen=True, kw_only=True)
class AskOptions(options.ModelOptions):
    """Options of `extemb ask`; `extemb chat` has all but `plan`, `library` and `k`.

    Attributes:
        documents: Files and folders to read, best first: text, Markdown, HTML, PDF; - is text from stdin.
        ratio: Tokens per extensible embedding: one ratio for all documents, raw text, or the finest that fits.
        plan: Read the sentences that say most about the question in full and, if they are few, the rest compressed
            (focus); those sentences alone (select); or each document at one ratio (even).
        budget: Positions of the LLM's window that the documents may take.
        store: Keep compressed documents in this folder, and reuse those in it.
        library: Ask the documents of a library (`extemb index add`).
        k: Maximum number of passages of the library.
        max_new_tokens: Maximum tokens of an answer.
        temperature: Sampling temperature; 0 is greedy and repeatable.
        seed: Random seed of the sampling.
    """

    documents: tuple[str, ...] = ()
    ratio: str = field(default="auto", metadata={"metavar": "auto|raw|N"})
    plan: str | None = field(
        default=None, metadata={"metavar": "focus|select|even", "default": "what suits the embedder and --ratio"}
    )
    budget: int | None = None
    store: str | None = field(default=None, metadata={"default": "in memory"})
    library: str | None = None
    k: int | None = field(default=None, metadata={"default": str(N_PASSAGES)})
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int | None = field(default=None, metadata={"default": "another each time"})

    def __post_init__(self) -> None:
        """Check all settings that can be checked without an LLM, which is slow to load."""
        from extemb_core.context.planning import check_budget

        for name, value in self.sampling().items():
            check_sampling(name, value)
        if self.budget is not None:
            check_budget(self.budget)
        if self.k is not None:
            whole_number(self.k, "k", remedy=f"e.g. {N_PASSAGES}")

    def parsed_ratio(self) -> str | int:
        """Parse `auto`, `raw` or a whole number."""
        if self.ratio in ("auto", "raw"):
            return self.ratio
        try:
            return int(self.ratio)
        except ValueError:
            message = f"{self.ratio!r} is not auto, raw or a whole number."
            raise typer.BadParameter(message, param_hint="'--ratio'") from None

    def sampling(self) -> dict[str, Any]:
        """Return the settings of an answer."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}

    def load_for(self, question: str) -> ExtensibleLM:
        """Load the LLM and its embedder; raise `BudgetError` for a budget that would be lowered to fit the window."""
        lm = self.load(store=self.store)
        if self.budget is None:
            return lm
        room = lm.plan(question, (), budget=self.budget, max_new_tokens=self.max_new_tokens).budget
        if room < self.budget:
            raise BudgetError(
                f"budget={self.budget} is more than the {room} positions that the question and an answer of up to "
                f"{self.max_new_tokens} leave of {lm.llm.context_window}; pass at most {room}"
            )
        return lm


_OF_ASK = ("plan", "library", "k")
_NAMES = (
    "documents", "ratio", "plan", "budget", "llm", "embedder", "store", "library", "k", "max_new_tokens", "temperature",
    "seed", "device", "dtype",
)  # fmt: skip


@options_from(AskOptions, *_NAMES, budget="all that is free")
def ask(
    question: Annotated[
        str | None,
        typer.Argument(metavar="QUESTION", help="What to ask; before or after the documents.", show_default=False),
    ] = None,
    as_json: options.JsonOption = False,
    **settings: Any,
) -> None:
    """Answer a question from documents: the answer on stdout, what became of each document on stderr."""
    from extemb_core.context.focus import check_plan

    given = AskOptions(**settings)
    question, paths = _question_and_paths(question, list(given.documents))
    if given.library is not None and (paths or given.store is not None):
        raise typer.BadParameter("a library has its own documents and store; leave out --documents and --store")
    if given.library is None and given.k is not None:
        raise typer.BadParameter("--k counts passages of a library; add --library, or leave it out")
    answering: dict[str, Any] = {"budget": given.budget, "ratio": given.parsed_ratio(), **given.sampling()}
    answering["plan"] = check_plan(given.plan, answering["ratio"])
    require_text(question, "question")
    with ExitStack() as exit_stack:
        texts = options.load_documents(paths, exit_stack.enter_context(options.skipping()))
        with output.library_output():
            lm = given.load_for(question)
            if given.library is None:
                stream = lm.stream(question, texts, **answering)
            else:
                from extemb_core.library.library import Library

                library = exit_stack.enter_context(Library(given.library, lm, mode="r"))
                stream = library.stream(question, k=N_PASSAGES if given.k is None else given.k, **answering)
        if as_json:
            with output.library_output():
                answer = stream.finish()
            output.print_json(answer.to_dict())
            return
        with stream:
            for piece in stream:
                output.print_piece(piece)
        typer.echo()
        _print_context(stream.answer)
        _note_cut(stream.answer, given)


@options_from(AskOptions, *(name for name in _NAMES if name not in _OF_ASK), budget="half of the window")
def chat(as_json: options.JsonOption = False, **settings: Any) -> None:
    """Talk about documents: a prompt on a terminal, one message per line from a pipe.

    Ctrl-C stops the answer that is being written; at the prompt, Ctrl-C or Ctrl-D leaves. A conversation may be of any
    length: what no longer fits the window is condensed, and in the end left out, with a note. With --json, one object
    per answer and line.
    """
    given = AskOptions(**settings)
    ratio = given.parsed_ratio()
    with options.skipping() as skipped:
        texts = options.load_documents(given.documents, skipped, stdin=False)
        with output.library_output():
            session = given.load_for("?").session(texts, ratio=ratio, budget=given.budget)
        _converse(session, given, as_json=as_json)


def _converse(session: Session, given: AskOptions, *, as_json: bool) -> None:
    """Answer message by message; if they come from a pipe, end with the exit code of the first that failed."""
    first_error: Exception | None = None
    context_shown = False
    read_message = _terminal_reader() if sys.stdin.isatty() else _pipe_reader()
    while True:
        message = None
        try:
            if (message := read_message()) is None:
                break
            answer = _turn(session, message, given, as_json=as_json)
        except BrokenPipeError:
            raise
        except Exception as error:  # a message too long or not text; the next one may be fine
            if message is None and not isinstance(error, (DocumentError, UnicodeDecodeError)):
                raise  # stdin itself has failed
            output.print_error(error, as_json=as_json)
            first_error = first_error or error
            continue
        if not as_json and not context_shown:
            _print_context(answer)
            context_shown = True
    if first_error is not None and not sys.stdin.isatty():
        raise typer.Exit(output.code_of(first_error))


def _question_and_paths(question: str | None, paths: list[str]) -> tuple[str, list[str]]:
    """Find the question, which may follow the documents, so that it was parsed as one of them."""
    if question is not None:
        return question, paths
    last = paths[-1] if paths else options.STDIN
    if last == options.STDIN or os.path.exists(last):
        why = "there is no question"
    elif _looks_like_a_file(last):
        why = f"{last} does not exist, and if it is the question, it stands before --documents"
    else:
        return last, paths[:-1]
    raise typer.BadParameter(
        f'{why}; for instance: extemb ask "Who wrote this?" --documents letter.txt', param_hint="'QUESTION'"
    )


def _looks_like_a_file(words: str) -> bool:
    """Return whether what stands last on the command line was meant as a file: a/b, letter.txt or my letter.txt."""
    if len(words.split()) == 1:
        return bool(re.search(r"[/\\]|\.\w{1,5}$", words))
    return Path(words).suffix.lower() in SUPPORTED_SUFFIXES | BINARY_SUFFIXES


def _pipe_reader() -> Callable[[], str | None]:
    """Return a function that reads the next line of stdin that is not blank; None after the last."""
    lines = enumerate(sys.stdin.buffer, 1)

    def read() -> str | None:
        for number, data in lines:
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            if message := options.decode_stdin(data, f"line {number} of stdin", encoding).strip():
                return message
        return None

    return read


def _terminal_reader() -> Callable[[], str | None]:
    """Return a function that asks for the next message; None after Ctrl-D, or Ctrl-C at the prompt."""
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  # lets input() edit lines and keep a history

    def read() -> str | None:
        try:
            message = ""
            while not message:
                if sys.stdout.isatty():
                    message = input("> ").strip()
                else:  # input() would write its prompt into the answers
                    typer.echo("> ", nl=False, err=True)
                    message = input().strip()
        except (EOFError, KeyboardInterrupt):
            output.print_note("")
            return None
        return message

    return read


def _turn(session: Session, message: str, given: AskOptions, *, as_json: bool) -> Answer:
    """Answer one message, and print it as it comes."""
    with _stop_on_interrupt() as stopped:
        with output.library_output():
            stream = session.stream(message, **given.sampling())
        with stream:
            for piece in stream:
                if not as_json:
                    output.print_piece(piece)
                if stopped.is_set():
                    break
    if as_json:
        output.print_json(stream.answer.to_dict())
    else:
        typer.echo()
        _note_cut(stream.answer, given)
    return stream.answer


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a request to stop between two pieces; a second Ctrl-C ends the program.

    An exception in the middle of an answer could leave the session half changed.
    """
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        output.print_note("")
        output.print_note("(stopping; Ctrl-C again leaves)")

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _print_context(answer: Answer) -> None:
    """Print what became of each document, on stderr."""
    if answer.context:
        columns = ("source", "tokens", "positions", "fidelity", "reason")
        rows = [(doc.source, doc.n_tokens, doc.positions, str(doc.fidelity), doc.reason) for doc in answer.context]
        output.print_table(columns, rows, stderr=True)


def _note_cut(answer: Answer, given: AskOptions) -> None:
    """Say if an answer was cut off, or documents were left out, and what would help."""
    if answer.finish_reason == "length":
        output.print_note(f"(cut at {answer.new_tokens} tokens; --max-new-tokens allows more)")
    if given.library is not None and not answer.context:
        output.print_note(
            f"warning: nothing was read, for {given.library} holds no documents; add some: extemb index add"
        )
    empty = [entry.source for entry in answer.dropped if not entry.n_tokens]
    if empty:
        output.print_note(f"warning: nothing to read, for they are empty: {', '.join(empty)}")
    if turns := [entry for entry in answer.dropped if entry.turn]:
        n_tokens = sum(entry.n_tokens for entry in turns)
        output.print_note(
            f"warning: {n_tokens:,} tokens of the oldest turns are not read any more, for want of positions"
        )
    names = [entry.source for entry in answer.dropped if entry.n_tokens and not entry.turn]
    if names:
        remedies = ["raise --budget"] if given.budget is not None else []
        remedies += ["pass a coarser --ratio"] if given.ratio != "auto" else []
        remedies += ["pass --plan focus"] if given.plan == "select" else []
        remedies += ["ask a library of them (extemb index add)"] if given.library is None else ["lower --k"]
        output.print_note(f"warning: not read, for want of positions: {', '.join(names)}; {', or '.join(remedies)}")
