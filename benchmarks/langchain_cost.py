"""Measure what LangChain's interface costs, compared with `ExtensibleLM` itself, and a batch with single calls.

    python benchmarks/langchain_cost.py --json benchmarks/results/langchain.json

Sections: first_token (`ChatExtensible.stream` against `ExtensibleLM.stream`, the same compressed documents), batch
(eight prompts of equal length in one call against eight calls), construct (the object, no weights).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import ending
from memory import sample_text
from timing import alternate, compare

from extemb_core.documents import Document
from extemb_core.lm import ExtensibleLM
from extemb_core.weights.resolve import resolve_embedder, short_name
from langchain_extemb import ChatExtensible

SECTIONS = ("first_token", "batch", "construct")
QUESTION = "What is this about?"
_PROMPTS = 8
_PARTS = 4  # documents


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    rounds = 2 if options.quick else options.rounds
    lm = ExtensibleLM.from_pretrained(options.llm, resolve_embedder(options.embedder, options.llm))
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "first_token": lambda: first_token(lm, rounds),
        "batch": lambda: batch(lm, 2 if options.quick else options.batch_rounds, 4 if options.quick else 32),
        "construct": lambda: construct(5 if options.quick else 200),
    }
    config = {"llm": short_name(options.llm), "rounds": rounds, "batch_rounds": options.batch_rounds,
              "quick": options.quick, "seed": 0}  # fmt: skip
    return {"config": config} | ending.measured(sections, options.only)


def first_token(lm: ExtensibleLM, rounds: int) -> dict[str, Any]:
    """Time the first piece of an answer from documents that are in the store and take half of the window as text."""
    ids = lm.llm.encode(sample_text(4 * lm.llm.context_window))[: lm.llm.context_window // 2]
    size = -(-len(ids) // _PARTS)
    documents = [
        Document(lm.llm.decode(ids[at : at + size].tolist()), title=str(at)) for at in range(0, len(ids), size)
    ]
    ratio = 8 if 8 in lm.embedder.config.ratios else max(lm.embedder.config.ratios)
    lm.compress(documents, ratio=ratio, show_progress=False)
    chat = ChatExtensible.from_lm(lm, ratio=ratio, max_tokens=2)
    handed = [{"text": one.text, "title": one.title} for one in documents]

    def ours() -> None:
        stream = chat.stream(QUESTION, documents=handed)
        next(stream)
        stream.close()  # type: ignore[attr-defined]

    def core() -> None:
        with lm.stream(QUESTION, documents, ratio=ratio, max_new_tokens=2) as stream:
            next(stream)

    row = compare(alternate({"langchain": ours, "core": core}, rounds), "langchain", "core", 1.03)
    return {"n_tokens": len(ids), "n_documents": len(documents), "ratio_of_embeddings": ratio} | row


def batch(lm: ExtensibleLM, rounds: int, new_tokens: int) -> dict[str, Any]:
    """Time eight prompts of equal length, together and one after another."""
    chat = ChatExtensible.from_lm(lm, max_tokens=new_tokens)
    prompts = [f"Write one sentence about the number {at}." for at in range(_PROMPTS)]
    lengths = {lm.positions(prompt) for prompt in prompts}

    def together() -> None:
        chat.batch(prompts)

    def single() -> None:
        for prompt in prompts:
            chat.invoke(prompt)

    row = compare(alternate({"batch": together, "single": single}, rounds), "batch", "single", 1 / 2.5)
    return {"n_prompts": _PROMPTS, "positions": sorted(lengths), "new_tokens": new_tokens,
            "times_faster": 1 / row["ratio"]} | row  # fmt: skip


def construct(rounds: int) -> dict[str, Any]:
    """Time making the object, in milliseconds."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        ChatExtensible.from_model_id("smollm2-135m-instruct", budget=1024)
        samples.append(1000 * (time.perf_counter() - start))
    return {"n": rounds, "median_ms": median(samples), "highest_ms": max(samples), "target_ms": 5,
            "met": median(samples) < 5}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """Format what was measured beside its target, as plain text."""
    rows: list[tuple[str, str, str, bool]] = []
    if row := report.get("first_token"):
        rows.append(("first token, LangChain / core", f"{row['ratio']:.3f}x", "<= 1.03x", row["met"]))
    if row := report.get("batch"):
        rows.append(
            (f"{row['n_prompts']} prompts, single / batch", f"{row['times_faster']:.1f}x", ">= 2.5x", row["met"])
        )
    if row := report.get("construct"):
        rows.append(("making the object", f"{row['median_ms']:.2f} ms", "< 5 ms", row["met"]))
    return "\n".join(ending.verdicts(rows))


def _parser() -> argparse.ArgumentParser:
    parser = ending.parser(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=15, help="of first_token")
    parser.add_argument("--batch-rounds", type=int, default=5)
    return parser


if __name__ == "__main__":
    ending.run(main)
