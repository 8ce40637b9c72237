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

from extemb_core.cli.options import (
    DEFAULT_LLM,
    DEFAULT_MAX_NEW_TOKENS,
    BudgetOption,
    DeviceOption,
    DocumentsOption,
    DtypeOption,
    EmbedderOption,
    JsonOption,
    LlmOption,
    MaxNewTokensOption,
    RatioOption,
    SeedOption,
    SessionBudgetOption,
    StoreOption,
    TemperatureOption,
    load_documents,
    parse_ratio,
)
from extemb_core.cli.output import (
    code_of,
    library_output,
    print_error,
    print_json,
    print_note,
    reported,
    strip_control_chars,
)
from extemb_core.cli.tables import show_context
from extemb_core.errors import BudgetError, DocumentError
from extemb_core.library import N_PASSAGES

if TYPE_CHECKING:
    from extemb_core.answers import Answer, AnswerStream
    from extemb_core.context.conversation import Session
    from extemb_core.lm import ExtensibleLM

QuestionArgument = Annotated[
    str | None,
    typer.Argument(metavar="QUESTION", help="What to ask; before or after the documents.", show_default=False),
]


@reported
def ask(
    question: QuestionArgument = None,
    documents: DocumentsOption = None,
    ratio: RatioOption = "auto",
    budget: BudgetOption = None,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    store: StoreOption = None,
    library: Annotated[
        str | None,
        typer.Option("--library", metavar="DIR", help="Ask the documents of a library (`extemb index add`)."),
    ] = None,
    k: Annotated[int, typer.Option("--k", metavar="N", help="Passages of the library at most.")] = N_PASSAGES,
    max_new_tokens: MaxNewTokensOption = DEFAULT_MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Answer a question from documents: the answer on stdout, what became of each document on stderr."""
    question, paths = _question_and_paths(question, documents or [])
    if library is not None and (paths or store is not None):
        raise typer.BadParameter("a library has its own documents and store; leave out --documents and --store")
    settings: dict[str, Any] = {"budget": budget, "ratio": parse_ratio(ratio)}
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    texts = load_documents(paths) if library is None else []
    with ExitStack() as opened:
        with library_output():
            from extemb_core.lm import ExtensibleLM

            lm = ExtensibleLM.from_pretrained(llm, embedder, store=store, device=device, dtype=dtype)
            _require_room(lm, question, budget, max_new_tokens)
            if library is None:
                stream = lm.stream(question, texts, **settings)
            else:
                from extemb_core.library.library import Library

                stream = opened.enter_context(Library(library, lm, mode="r")).stream(question, k=k, **settings)
        if as_json:
            with library_output():
                answer = stream.finish()
            print_json(answer.to_dict())
            return
        with stream:
            for piece in stream:
                _say(piece)
        typer.echo()
        show_context(stream.answer)
        _note_cut(stream.answer)


@reported
def chat(
    documents: DocumentsOption = None,
    ratio: RatioOption = "auto",
    budget: SessionBudgetOption = None,
    llm: LlmOption = DEFAULT_LLM,
    embedder: EmbedderOption = None,
    store: StoreOption = None,
    max_new_tokens: MaxNewTokensOption = DEFAULT_MAX_NEW_TOKENS,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Talk about documents: a prompt on a terminal, one message per line from a pipe.

    Ctrl-C stops the answer that is being written; at the prompt, Ctrl-C or Ctrl-D leaves. What no longer fits
    the window is condensed, so a conversation may be of any length. With --json, one object per answer and line.
    """
    chosen = parse_ratio(ratio)
    texts = load_documents(documents or [], stdin=False)
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with library_output():
        from extemb_core.lm import ExtensibleLM

        lm = ExtensibleLM.from_pretrained(llm, embedder, store=store, device=device, dtype=dtype)
        _require_room(lm, "?", budget, max_new_tokens)
        session = lm.session(texts, ratio=chosen, budget=budget)
    failed: Exception | None = None
    context_shown = False
    for message in _messages():
        try:
            answer = _turn(session, message, sampling, as_json=as_json)
        except BrokenPipeError:
            raise
        except Exception as error:  # a message that does not fit, say: the next one may
            print_error(error, as_json=as_json)
            failed = failed or error
            continue
        if not as_json and not context_shown:
            show_context(answer)
            context_shown = True
    if failed is not None and not sys.stdin.isatty():
        raise typer.Exit(code_of(failed))


def _require_room(lm: ExtensibleLM, question: str, budget: int | None, max_new_tokens: int) -> None:
    """Raise `BudgetError` for a budget that the window does not hold, which `ExtensibleLM` would lower."""
    if budget is None:
        return
    room = lm.plan(question, (), budget=budget, max_new_tokens=max_new_tokens).budget
    if room < budget:
        raise BudgetError(
            f"budget={budget} is more than the {room} positions that the question and an answer of up to "
            f"{max_new_tokens} leave of {lm.llm.window}; pass at most {room}"
        )


def _question_and_paths(question: str | None, paths: list[str]) -> tuple[str, list[str]]:
    """The question may stand behind the documents, where it was taken for one more of them."""
    if question is not None:
        return question, paths
    if not paths or Path(paths[-1]).exists() or paths[-1] == "-":
        raise typer.BadParameter(
            'there is no question; for instance: extemb ask "Who wrote this?" --documents letter.txt',
            param_hint="'QUESTION'",
        )
    return paths[-1], paths[:-1]


def _messages() -> Iterator[str]:
    """What the user says, message by message, until Ctrl-D, or Ctrl-C at the prompt."""
    if not sys.stdin.isatty():
        for number, data in enumerate(sys.stdin.buffer, 1):
            if message := _decoded(data, number).strip():
                yield message
        return
    with suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  # lets input() edit lines and keep a history
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print_note("")
            return
        if line.strip():
            yield line.strip()


def _decoded(data: bytes, number: int) -> str:
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"line {number} of stdin is not valid UTF-8 at byte {error.start}; re-encode it as UTF-8 "
            "(for instance: iconv -f WINDOWS-1252 -t UTF-8)"
        ) from error


def _turn(session: Session, message: str, sampling: dict[str, Any], *, as_json: bool) -> Answer:
    """One answer, shown as it comes."""
    with _stop_on_interrupt() as stopped:
        with library_output():
            stream: AnswerStream = session.stream(message, **sampling)
        with stream:
            for piece in stream:
                if not as_json:
                    _say(piece)
                if stopped.is_set():
                    break
    if as_json:
        print_json(stream.answer.to_dict())
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
        print_note("\n(stopping; Ctrl-C again leaves)")

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _say(piece: str) -> None:
    """A part of an answer: to a file as it is, to a terminal without what that would obey."""
    typer.echo(strip_control_chars(piece) if sys.stdout.isatty() else piece, nl=False)


def _note_cut(answer: Answer) -> None:
    if answer.finish_reason == "length":
        print_note(f"(cut at {answer.new_tokens} tokens; --max-new-tokens allows more)")
    if answer.dropped:
        names = ", ".join(entry.source for entry in answer.dropped)
        print_note(f"warning: not read, for want of positions: {names}; raise --budget or pass fewer documents")
