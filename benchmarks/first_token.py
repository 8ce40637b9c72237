"""Time the first token of answers to questions of data files, by what the LLM reads in place of the text.

    python benchmarks/first_token.py --data dev_squad.jsonl.zst dev_multihop.jsonl.zst --json first_token.json

Each question is asked in every way, one after another, in an order that is reversed with every question; no two are
about the same text. The text was compressed before and is in the store; everything else is done anew: it is tokenised,
its sentences are found, ranked and looked at, the prompt is built and read. `python -m benchmarks.report --times` plots
quality against these times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ending

from extemb_core.context import scoring
from extemb_core.context.assembly import DOCUMENT_SEPARATOR, document_heading
from extemb_core.documents import Document
from extemb_core.errors import ConfigError
from extemb_core.evaluation.baselines import head
from extemb_core.lm import ExtensibleLM
from extemb_core.questions import Question, read_questions
from extemb_core.utils.jsonl import evenly
from extemb_core.weights.resolve import resolve_embedder, short_name


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    embedder = resolve_embedder(options.embedder, options.llm)
    lm = ExtensibleLM.from_pretrained(options.llm, embedder, dtype=options.dtype)
    ratios = [2] if options.quick else options.ratios
    sets = {}
    for file in options.data:
        drawn = evenly(read_questions([file]), 1 + (1 if options.quick else options.limit))
        questions = list({question.document: question for question in drawn}.values())
        start = time.perf_counter()
        sets[file.name.split(".")[0]] = timed(lm, questions, ratios)
        ending.note(f"{file.name}: {time.perf_counter() - start:.0f} s")
    config = {
        "llm": short_name(options.llm),
        "embedder": short_name(str(embedder)),
        "dtype": str(lm.llm.dtype).removeprefix("torch."),
        "ratios": ratios,
        "quick": options.quick,
        "fingerprint": lm.embedder.fingerprint,
    }
    return {"config": config, "sets": sets}


def timed(lm: ExtensibleLM, questions: Sequence[Question], ratios: Sequence[int]) -> dict[str, Any]:
    """Time each way of reading the text of some questions; the first question only warms up."""
    asked = ways(lm, ratios)
    samples: list[dict[str, Any]] = []
    for number, question in enumerate(questions):
        lm.compress([Document(question.context)], show_progress=False)
        seconds, positions = {}, {}
        for name in list(asked) if number % 2 else list(asked)[::-1]:
            ready = asked[name](question)
            scoring.index_of.cache_clear()
            start = time.perf_counter()
            answer = ready()
            seconds[name] = time.perf_counter() - start
            positions[name] = answer.prompt_positions
            if name == "full" and answer.context[0].fidelity != "raw":
                raise ConfigError(f"the text of question {question.id!r} does not fit the window; leave its file out")
        if number:
            samples.append({"id": question.id, "seconds": seconds, "positions": positions})
    summary = {name: _summary(samples, name) for name in asked}
    return {"n": len(samples), "ways": summary, "samples": samples}


def ways(lm: ExtensibleLM, ratios: Sequence[int]) -> dict[str, Callable[[Question], Callable[[], Any]]]:
    """Make, by the names of `extemb eval qa`'s arms, functions that prepare a question in each way of reading its text.

    Each way has an `ExtensibleLM` of its own over the same store, so that none reuses what another has found in a text.
    A budget includes a document's heading, which stands before it in the other ways too.
    """
    heading = lm.positions_of([DOCUMENT_SEPARATOR + document_heading(0)])

    def way(ratio: int | None, how: Callable[[int], dict[str, Any]], cut: bool = False, scorer: Any = None) -> Any:
        own = ExtensibleLM(lm.llm, lm.embedder, lm.store, scorer=scorer)

        def ready(question: Question) -> Callable[[], Any]:
            ids = lm.llm.encode(question.context)
            n = -(-len(ids) // (ratio or 1))
            text = lm.llm.decode(head(ids, n).tolist()) if cut else question.context
            return lambda: own.stream(question.question, [Document(text)], max_new_tokens=1, **how(n)).finish()

        return ready

    made = {"full": way(None, lambda n: {"ratio": "raw"})}
    for ratio in ratios:
        made |= {
            f"truncated/{ratio}": way(ratio, lambda n: {"ratio": "raw"}, cut=True),
            f"chosen/{ratio}": way(
                ratio, lambda n: {"budget": n + heading, "plan": "select"}, scorer=scoring.bm25_scores
            ),
            f"extensible/{ratio}": way(ratio, lambda n, ratio=ratio: {"ratio": ratio}),
            f"focus/{ratio}": way(ratio, lambda n: {"budget": n + heading, "plan": "focus"}),
        }
    return made


def _summary(samples: Sequence[dict[str, Any]], way: str) -> dict[str, Any]:
    return {
        "median_seconds": median(sample["seconds"][way] for sample in samples),
        "over_full": median(sample["seconds"][way] / sample["seconds"]["full"] for sample in samples),
        "median_positions": median(sample["positions"][way] for sample in samples),
    }


def table(report: dict[str, Any]) -> str:
    """Format a line for each way of each set: seconds, and how many times those of the full text."""
    lines = []
    for name, found in report["sets"].items():
        lines.append(f"{name}, n = {found['n']}")
        for way, row in found["ways"].items():
            seconds, positions = f"{row['median_seconds']:.3f} s", f"{row['median_positions']:,.0f} positions"
            lines.append(f"  {way:<16}{seconds:>12}{row['over_full']:>8.3f}x{positions:>18}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    made = ending.model_parser(__doc__)
    made.add_argument(
        "--data", nargs="+", type=Path, required=True, metavar="FILE", help="questions, as extemb eval qa takes"
    )
    made.add_argument(
        "--limit",
        type=int,
        default=8,
        help="questions of each file, evenly spaced; of those about one text one is asked",
    )
    made.add_argument("--ratios", nargs="+", type=int, default=[2, 4, 8, 16], help="of the ways that have one")
    made.add_argument("--dtype", default="auto", help="of the LLM")
    return made


if __name__ == "__main__":
    ending.run(main)
