"""`extemb ask` and `extemb chat`: questions in, answers and what they rest on out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extemb_core.cli import options, output
from extemb_core.cli.options import option
from extemb_core.errors import BudgetError
from extemb_core.library import N_PASSAGES

if TYPE_CHECKING:
    from extemb_core.answers import Answer
    from extemb_core.context.conversation import Session
    from extemb_core.lm import ExtensibleLM

DEFAULT_MAX_NEW_TOKENS = 256

QuestionArgument = Annotated[
    str | None,
    typer.Argument(metavar="QUESTION", help="What to ask; before or after the documents.", show_default=False),
]
_DOCUMENTS = "Files and folders to read, best first: text, Markdown, HTML, PDF; - is text from stdin."
DocumentsOption = Annotated[list[str] | None, option("--documents", "FILE...", _DOCUMENTS)]
_RATIO = "Tokens per extensible embedding: one ratio for all documents, raw text, or the finest that fits."
RatioOption = Annotated[str, option("--ratio", "auto|raw|N", _RATIO)]
_BUDGET = "Positions of the LLM's window that the documents may take."
BudgetOption = Annotated[int | None, option("--budget", "N", _BUDGET, "all that is free")]
SessionBudgetOption = Annotated[int | None, option("--budget", "N", _BUDGET, "half of the window")]
StoreOption = Annotated[
    str | None,
    option("--store", "DIR", "Keep compressed documents in this folder, and reuse those that are there.", "in memory"),
]
MaxNewTokensOption = Annotated[int, option("--max-new-tokens", "N", "Maximum tokens of an answer.")]
TemperatureOption = Annotated[float, option("--temperature", "X", "Sampling temperature; 0 is greedy and repeatable.")]
SeedOption = Annotated[int | None, option("--seed", "N", "Random seed of the sampling.", "another each time")]


def ask(
    question: QuestionArgument = None,
    documents: DocumentsOption = None,
    ratio: RatioOption = "auto",
    budget: BudgetOption = None,
    llm: options.LlmOption = options.DEFAULT_LLM,
    embedder: options.EmbedderOption = None,
    store: StoreOption = None,
    library: Annotated[
        str | None, option("--library", "DIR", "Ask the documents of a library (`extemb index add`).")
    ] = None,
    k: Annotated[int, option("--k", "N", "Maximum number of passages of the library.")] = N_PASSAGES,
    max_new_tokens: MaxNewTokensOption = DEFAULT_MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Answer a question from documents: the answer on stdout, what became of each document on stderr."""
    question, paths = _question_and_paths(question, documents or [])
    if library is not None and (paths or store is not None):
        raise typer.BadParameter("a library has its own documents and store; leave out --documents and --store")
    settings: dict[str, Any] = {"budget": budget, "ratio": _parse_ratio(ratio)}
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    texts = options.load_documents(paths) if library is None else []
    with ExitStack() as exit_stack:
        with output.library_output():
            from extemb_core.lm import ExtensibleLM

            lm = ExtensibleLM.from_pretrained(llm, embedder, store=store, device=device, dtype=dtype)
            _require_room(lm, question, budget, max_new_tokens)
            if library is None:
                stream = lm.stream(question, texts, **settings)
            else:
                from extemb_core.library.library import Library

                stream = exit_stack.enter_context(Library(library, lm, mode="r")).stream(question, k=k, **settings)
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
        _note_cut(stream.answer)


def chat(
    documents: DocumentsOption = None,
    ratio: RatioOption = "auto",
    budget: SessionBudgetOption = None,
    llm: options.LlmOption = options.DEFAULT_LLM,
    embedder: options.EmbedderOption = None,
    store: StoreOption = None,
    max_new_tokens: MaxNewTokensOption = DEFAULT_MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Talk about documents: a prompt on a terminal, one message per line from a pipe.

    Ctrl-C stops the answer that is being written; at the prompt, Ctrl-C or Ctrl-D leaves. What no longer fits
    the window is condensed, so a conversation may be of any length. With --json, one object per answer and line.
    """
    parsed_ratio = _parse_ratio(ratio)
    texts = options.load_documents(documents or [], stdin=False)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with output.library_output():
        from extemb_core.lm import ExtensibleLM

        lm = ExtensibleLM.from_pretrained(llm, embedder, store=store, device=device, dtype=dtype)
        _require_room(lm, "?", budget, max_new_tokens)
        session = lm.session(texts, ratio=parsed_ratio, budget=budget)
    first_error: Exception | None = None
    context_shown = False
    for message in _messages():
        try:
            answer = _turn(session, message, sampling, as_json=as_json)
        except BrokenPipeError:
            raise
        except Exception as error:  # a message that does not fit, say: the next one may
            output.print_error(error, as_json=as_json)
            first_error = first_error or error
            continue
        if not as_json and not context_shown:
            _print_context(answer)
            context_shown = True
    if first_error is not None and not sys.stdin.isatty():
        raise typer.Exit(output.code_of(first_error))


def _parse_ratio(value: str) -> str | int:
    """Parse `auto`, `raw` or a whole number."""
    if value in ("auto", "raw"):
        return value
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is not auto, raw or a whole number.", param_hint="'--ratio'") from None


def _require_room(lm: ExtensibleLM, question: str, budget: int | None, max_new_tokens: int) -> None:
    """Raise `BudgetError` for a budget that the window does not hold, which `ExtensibleLM` would lower."""
    if budget is None:
        return
    room = lm.plan(question, (), budget=budget, max_new_tokens=max_new_tokens).budget
    if room < budget:
        raise BudgetError(
            f"budget={budget} is more than the {room} positions that the question and an answer of up to "
            f"{max_new_tokens} leave of {lm.llm.context_window}; pass at most {room}"
        )


def _question_and_paths(question: str | None, paths: list[str]) -> tuple[str, list[str]]:
    """Find the question, which may stand behind the documents, where it was taken for one more of them."""
    if question is not None:
        return question, paths
    if not paths or Path(paths[-1]).exists() or paths[-1] == options.STDIN:
        raise typer.BadParameter(
            'there is no question; for instance: extemb ask "Who wrote this?" --documents letter.txt',
            param_hint="'QUESTION'",
        )
    return paths[-1], paths[:-1]


def _messages() -> Iterator[str]:
    """Read what the user says, message by message, until Ctrl-D, or Ctrl-C at the prompt."""
    if not sys.stdin.isatty():
        for number, data in enumerate(sys.stdin.buffer, 1):
            encoding = "utf-8-sig" if number == 1 else "utf-8"
            if message := options.decode_stdin(data, f"line {number} of stdin", encoding).strip():
                yield message
        return
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  # lets input() edit lines and keep a history
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            output.print_note("")
            return
        if line.strip():
            yield line.strip()


def _turn(session: Session, message: str, sampling: dict[str, Any], *, as_json: bool) -> Answer:
    """Answer one message, and print it as it comes."""
    with _stop_on_interrupt() as stopped:
        with output.library_output():
            stream = session.stream(message, **sampling)
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
        _note_cut(stream.answer)
    return stream.answer


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn Ctrl-C into a wish to stop, which is granted between two pieces; a second one leaves the program.

    An exception in the midst of an answer could leave the session half changed.
    """
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        output.print_note("\n(stopping; Ctrl-C again leaves)")

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


def _note_cut(answer: Answer) -> None:
    """Say that an answer was cut, or documents were left out."""
    if answer.finish_reason == "length":
        output.print_note(f"(cut at {answer.new_tokens} tokens; --max-new-tokens allows more)")
    if answer.dropped:
        names = ", ".join(entry.source for entry in answer.dropped)
        output.print_note(f"warning: not read, for want of positions: {names}; raise --budget or pass fewer documents")
