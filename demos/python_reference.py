"""Ask a document that does not fit the window, three ways: full text, truncation, extensible embeddings.

The document is the Python language reference that ships inside every CPython (`pydoc_data.topics`), or a file of
yours. Nothing is smoothed over: a small LLM gets much of this wrong, and that is shown as it is. What was compressed
stays on disk: a second run takes it from there.

    python demos/python_reference.py
    python demos/python_reference.py --document my.pdf --question "What was agreed?"
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from extemb_core import Answer, Document, ExtembError, ExtensibleLM, read_document
from extemb_core.weights.cache import cache_root

BUDGET = 1024  # positions that truncation and embeddings may take for a topic
WHOLE_BUDGET = 4096  # and for the whole reference: half of the window
NEW_TOKENS = 48

QUESTIONS = (
    ("specialnames", "Which special method implements the built-in function len()?"),
    ("compound", "Which method of the context manager is called when the body of a with statement has ended?"),
    ("types", "Which two values does the Boolean type have?"),
    ("formatstrings", "Which presentation type writes an integer in binary?"),
    ("debugger", "Which debugger command continues execution until a breakpoint is met?"),
)
WHOLE = "Which programming language does this reference describe?"


@dataclass(frozen=True)
class Task:
    """One question to one document, with the positions the document may take."""

    question: str
    document: Document
    budget: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--document", help="a text, Markdown, HTML or PDF file instead of the Python reference")
    parser.add_argument("--question", help="the question to ask of it")
    parser.add_argument("--llm", default="smollm2-135m-joint", help="a path, known name or hub id")
    parser.add_argument("--embedder", help="a path or hub id; the shipped one when not given")
    parser.add_argument("--store", help="folder of the compressed documents; one in the cache when not given")
    parser.add_argument("--json", help="also write the answers to this file")
    arguments = parser.parse_args()
    if bool(arguments.document) != bool(arguments.question):
        parser.error("--document and --question go together")
    console = Console()
    try:
        store = arguments.store or cache_root() / "demo.extemb"
        lm = ExtensibleLM.from_pretrained(arguments.llm, arguments.embedder, store=store)
        tasks = _own_task(lm, arguments) if arguments.document else _reference_tasks(lm)
        _compress(lm, tasks, console)
        rows = [_answer_three_ways(lm, task, console) for task in tasks]
    except ExtembError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as out:
            json.dump(rows, out, indent=2)
    return 0


def _reference_tasks(lm: ExtensibleLM) -> list[Task]:
    from pydoc_data.topics import topics

    tasks = [Task(question, Document(topics[name], title=name), BUDGET) for name, question in QUESTIONS]
    whole = Document("\n\n".join(topics[name] for name in sorted(topics)), title="The Python language reference")
    return [*tasks, Task(WHOLE, whole, min(WHOLE_BUDGET, _room(lm, WHOLE)))]


def _own_task(lm: ExtensibleLM, arguments: argparse.Namespace) -> list[Task]:
    document = read_document(arguments.document)
    return [Task(arguments.question, document, min(BUDGET, _room(lm, arguments.question)))]


def _room(lm: ExtensibleLM, question: str) -> int:
    """Positions that question and answer leave for documents."""
    return lm.plan(question, ["."], max_new_tokens=NEW_TOKENS).budget


def _compress(lm: ExtensibleLM, tasks: list[Task], console: Console) -> None:
    """Compress every document once, if its budget asks for that."""
    for task in tasks:
        (planned,) = lm.plan(task.question, task.document, budget=task.budget, max_new_tokens=NEW_TOKENS).documents
        if planned.fidelity not in ("raw", "dropped"):
            kept = lm.store.get(task.document.ref, lm.embedder.fingerprint, lm.embedder.config.kept_ratio)
            console.print(
                f"{'compressing' if kept is None else 'compressed earlier:'} [bold]{escape(task.document.source)}[/]: "
                f"{planned.n_tokens:,} tokens into {planned.positions:,} positions"
            )
            lm.compress(task.document)


def _answer_three_ways(lm: ExtensibleLM, task: Task, console: Console) -> dict[str, object]:
    n_tokens = len(lm.llm.encode(task.document.text))
    room = _room(lm, task.question)
    ways = {
        "full text" if n_tokens <= room else f"full text, first {room:,}": (
            _first(lm, task.document, room),
            "raw",
            room,
        ),
        "truncation": (_first(lm, task.document, task.budget), "raw", task.budget),
        "extensible embeddings": (task.document, "auto", task.budget),
    }
    table = Table(
        title=f"{task.document.source} ({n_tokens:,} tokens)\n{task.question}", title_justify="left", expand=True
    )
    for name in ("reads", "positions", "first token", "answer"):
        table.add_column(name, justify="left" if name in ("reads", "answer") else "right", overflow="fold")
    answers: dict[str, object] = {}
    for way, (document, ratio, budget) in ways.items():
        with Progress(SpinnerColumn(), TextColumn(f"{way} ..."), console=console, transient=True) as bar:
            bar.add_task("")
            answer = lm.ask(task.question, document, ratio=ratio, budget=budget, max_new_tokens=NEW_TOKENS)
        entry = answer.context[0]
        table.add_row(way, f"{entry.positions:,}", _seconds(answer), escape(" ".join(answer.text.split())))
        answers[way] = asdict(answer)
    console.print(table)
    return {"question": task.question, "source": task.document.source, "n_tokens": n_tokens, "answers": answers}


def _first(lm: ExtensibleLM, document: Document, positions: int) -> Document:
    """The document cut so that, with its heading, it takes at most `positions` as raw text."""
    ids = lm.llm.encode(document.text)
    kept = min(len(ids), positions - 32)  # the heading and the blank line after the text
    return Document(lm.llm.decode(ids[:kept].tolist()), title=document.title, metadata=document.metadata)


def _seconds(answer: Answer) -> str:
    return f"{answer.seconds['first_token']:.2f} s"


if __name__ == "__main__":
    sys.exit(main())
