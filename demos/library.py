"""Put documents into a library once, then find and ask them in any later run.

The documents are the topics of the Python language reference that ships inside every CPython (`pydoc_data.topics`), or
the files of a folder of yours. The first run compresses them, which takes a while; the second finds them unchanged.

    python demos/library.py
    python demos/library.py --documents notes/ --question "Who signed it?"
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from extemb_core import Answer, Document, ExtembError, ExtensibleLM, Library
from extemb_core.models.cache import cache_root

QUESTIONS = (
    "Which special method implements the built-in function len()?",
    "Which two values does the Boolean type have?",
    "Which debugger command continues execution until a breakpoint is met?",
)
NEW_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=Path, help="a file or a folder instead of the Python reference")
    parser.add_argument("--question", action="append", help="what to ask; may be given several times")
    parser.add_argument("--library", type=Path, help="the library's folder; one in the cache when not given")
    parser.add_argument("--topics", type=int, help="how many topics of the Python reference; all when not given")
    parser.add_argument("--llm", default="smollm2-135m-instruct", help="a path, known name or hub id")
    parser.add_argument("--embedder", help="a path or hub id; the shipped one when not given")
    parser.add_argument("--ratio", type=int, default=8, help="tokens per embedding")
    parser.add_argument("--passages", type=int, default=6, help="to read for each question")
    arguments = parser.parse_args()
    console = Console()
    try:
        lm = ExtensibleLM.from_pretrained(arguments.llm, arguments.embedder)
        folder = arguments.library or cache_root() / "demo-library.extemb"
        with Library(folder, lm, ratio=arguments.ratio) as library:
            added = library.add(arguments.documents or _topics(arguments.topics))
            console.print(
                f"{added.added:,} documents added, {added.updated:,} brought up to date, {added.unchanged:,} "
                f"unchanged: {added.compressed_tokens:,} tokens compressed in {added.seconds:.1f} s"
            )
            for question in arguments.question or QUESTIONS:
                _show(library, question, arguments, console)
    except ExtembError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


def _topics(count: int | None) -> list[Document]:
    from pydoc_data.topics import topics

    names = sorted(topics)[:count]
    return [Document(topics[name], title=name, metadata={"source": f"topics/{name}"}) for name in names]


def _show(library: Library, question: str, arguments: argparse.Namespace, console: Console) -> None:
    start = time.perf_counter()
    answer = library.ask(question, k=arguments.passages, ratio=arguments.ratio, max_new_tokens=NEW_TOKENS)
    table = Table(title=escape(question), title_justify="left", caption=_told(answer, time.perf_counter() - start))
    for name in ("read", "tokens", "positions", "from"):
        table.add_column(name, justify="left" if name in ("read", "from") else "right")
    for entry in answer.context:
        where = "disk" if entry.cached else "computed"
        table.add_row(escape(entry.source), f"{entry.n_tokens:,}", f"{entry.positions:,}", where)
    console.print(table)


def _told(answer: Answer, seconds: float) -> str:
    return f"{escape(' '.join(answer.text.split()))}\n({seconds:.1f} s)"


if __name__ == "__main__":
    sys.exit(main())
