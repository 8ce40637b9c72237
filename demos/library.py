"""Put documents into a library once, then find and ask them in any later run.

The documents are the topics of the Python language reference that ships inside every CPython (`pydoc_data.topics`), or
a file or folder of yours. The first run compresses them, which takes a while; the second finds them unchanged and reads
their embeddings from disk. Each question is answered three ways from the same passages: as text, as text cut to the
positions that the embeddings take, and as embeddings. Nothing is smoothed over: a small LLM gets some of it wrong.

    python demos/library.py
    python demos/library.py --documents notes/ --question "Who signed it?"
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from extemb_core import Answer, Document, ExtembError, ExtensibleLM, Library
from extemb_core.models.chunks import compressed_positions
from extemb_core.weights.cache import cache_root

QUESTIONS = (
    "What does the for statement iterate over?",
    "Which module is the debugger?",
    "Which two values does the Boolean type have?",
    "Which special method implements the built-in function len()?",
    "What is raised when an assertion fails?",
)
NEW_TOKENS = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--documents", type=Path, help="a file or a folder instead of the Python reference")
    parser.add_argument("--question", action="append", help="what to ask; may be given several times")
    parser.add_argument("--library", type=Path, help="the library's folder; one in the cache when not given")
    parser.add_argument("--topics", type=int, help="how many topics of the Python reference; all when not given")
    parser.add_argument("--llm", default="smollm2-135m-joint", help="a path, known name or hub id")
    parser.add_argument("--embedder", help="a path or hub id; the shipped one when not given")
    parser.add_argument("--ratio", type=int, default=4, help="tokens per embedding")
    parser.add_argument("--passages", type=int, default=4, help="to read for each question")
    arguments = parser.parse_args()
    if arguments.documents and not arguments.question:
        parser.error("--documents needs a --question: those there are, are about Python")
    console = Console()
    try:
        lm = ExtensibleLM.from_pretrained(arguments.llm, arguments.embedder)
        folder = arguments.library or _folder(arguments, lm)
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


def _folder(arguments: argparse.Namespace, lm: ExtensibleLM) -> Path:
    """In the cache, one for each collection of documents, embedder and ratio."""
    of = (str(arguments.documents and arguments.documents.resolve()), lm.embedder.fingerprint, str(arguments.ratio))
    return cache_root() / f"demo-{hashlib.sha256(' '.join(of).encode()).hexdigest()[:12]}.extemb"


def _topics(count: int | None) -> list[Document]:
    from pydoc_data.topics import topics

    names = sorted(topics)[:count]
    return [Document(topics[name], title=name, metadata={"source": f"topics/{name}"}) for name in names]


def _cut(lm: ExtensibleLM, documents: list[Document], answer: Answer, ratio: int) -> list[Document]:
    """Cut what an answer was read from as embeddings, best first, to as many positions of text."""
    cut, left = [], sum(entry.positions for entry in answer.context)
    for document, entry in zip(documents, answer.context, strict=True):
        left -= max(0, entry.positions - compressed_positions(entry.n_tokens, ratio, lm.embedder.config.chunk_size))
        if left <= 0:  # what is left does not hold its heading
            break
        ids = lm.llm.encode(document.text)[:left]
        left -= len(ids)
        cut.append(Document(lm.llm.decode(ids), title=document.title))
    return cut


def _show(library: Library, question: str, arguments: argparse.Namespace, console: Console) -> None:
    def ask(documents: list[Document], ratio: Any) -> Answer:
        return lm.ask(question, documents, ratio=ratio, max_new_tokens=NEW_TOKENS, stop="\n")

    lm = library.lm
    found = [passage.to_document() for passage in library.search(question, k=arguments.passages)]
    embedded = ask(found, arguments.ratio)
    ways = {
        "as text": ask(found, "raw"),
        "as text, cut to as many positions": ask(_cut(lm, found, embedded, arguments.ratio), "raw"),
        "as embeddings": embedded,
    }
    from_disk = all(entry.cached for entry in embedded.context)
    table = Table(title=escape(question), title_justify="left")
    for name in ("passages", "read", "positions", "first token", "answer"):
        table.add_column(name, justify="left" if name in ("passages", "answer") else "right", overflow="fold")
    for way, answer in ways.items():
        read = [entry for entry in answer.context if entry.fidelity != "dropped"]
        table.add_row(
            way,
            f"{len(read)} of {len(embedded.context)}",
            f"{sum(entry.positions for entry in read):,}",
            f"{answer.seconds['first_token']:.2f} s",
            escape(" ".join(answer.text.split())),
        )
    console.print(table)
    passages = escape(", ".join(f"{entry.source} ({entry.n_tokens})" for entry in embedded.context))
    console.print(f"{'from disk' if from_disk else 'computed'}: {passages}", soft_wrap=True)  # no name is cut


if __name__ == "__main__":
    sys.exit(main())
