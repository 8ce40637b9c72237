"""Measure what compressing nodes saves and costs in LlamaIndex, beside the same nodes as text, with the same LLM.

    python benchmarks/llamaindex_cost.py --json benchmarks/results/llamaindex.json

Sections: calls (how often the LLM is asked in each response mode: four nodes of 3,000 words and a window of 2,048),
query (seconds of a whole query of those nodes, `compact`, from a store that has them), postprocessor (milliseconds a
node, from that store).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import ending
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from memory import sample_text
from timing import alternate, compare

from extemb_core.answers import Answer
from extemb_core.lm import ExtensibleLM
from extemb_core.store.store import EmbeddingStore
from extemb_core.weights.resolve import resolve_embedder, short_name
from llama_index.llms.extemb import ExtensibleLLM, extensible_prompt_helper
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor

SECTIONS = ("calls", "query", "postprocessor")
QUESTION = "What is this about?"
WINDOW = 2048
NEW_TOKENS = 32
_NODES, _WORDS = 4, 3000
_MODES = ("compact", "tree_summarize", "refine", "accumulate")


class Fixed(BaseRetriever):
    """Retrieves what it is given."""

    def __init__(self, nodes: list[NodeWithScore]) -> None:
        self._nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return list(self._nodes)


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    rounds = 1 if options.quick else options.rounds
    words = sample_text(40 * _NODES * _WORDS).split()
    count = 200 if options.quick else _WORDS
    nodes = [
        NodeWithScore(
            node=TextNode(text=" ".join(words[at * count :][:count]), metadata={"part": at}), score=1 - at / 8
        )
        for at in range(_NODES)
    ]
    loaded = ExtensibleLM.from_pretrained(options.llm, resolve_embedder(options.embedder, options.llm))
    with tempfile.TemporaryDirectory() as folder, EmbeddingStore.open(f"{folder}/store") as store:
        lm = ExtensibleLM(loaded.llm, loaded.embedder, store)
        lm.llm.text_config.max_position_embeddings = WINDOW  # the same for both sides
        llm = ExtensibleLLM.from_lm(lm, max_tokens=2 if options.quick else NEW_TOKENS)
        # "focus" has embeddings also with an untrained embedder, whose default plan has none.
        plan = "focus" if lm.embedder.config.entry_layer else None
        post = ExtensibleEmbeddingPostprocessor(llm=llm, plan=plan)
        post.postprocess_nodes(nodes)  # warms the store
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "calls": lambda: calls(llm, post, nodes),
            "query": lambda: query(llm, post, nodes, rounds),
            "postprocessor": lambda: postprocessor(post, nodes, 3 if options.quick else 50),
        }
        config = {"llm": short_name(options.llm), "window": lm.llm.context_window, "rounds": rounds, "n_nodes": _NODES,
                  "words_per_node": count, "tokens_per_node": [len(lm.llm.encode(found.text)) for found in nodes],
                  "quick": options.quick, "seed": 0}  # fmt: skip
        return {"config": config} | ending.measured(sections, options.only)


def engine(llm: ExtensibleLLM, mode: str, nodes: list[NodeWithScore], *post: Any) -> RetrieverQueryEngine:
    synthesizer = get_response_synthesizer(
        llm=llm,
        response_mode=mode,
        prompt_helper=extensible_prompt_helper(llm),  # type: ignore[arg-type]
    )
    return RetrieverQueryEngine(Fixed(nodes), synthesizer, node_postprocessors=list(post))


def calls(llm: ExtensibleLLM, post: Any, nodes: list[NodeWithScore]) -> dict[str, Any]:
    """Count how often the LLM is asked, and with how many positions; nothing is generated."""
    found = {}
    for mode in _MODES:
        with counted(llm) as plain:
            engine(llm, mode, nodes).query(QUESTION)
        with counted(llm) as ours:
            response = engine(llm, mode, nodes, post).query(QUESTION)
        kept = [one.text for one in response.source_nodes] == [one.text for one in nodes]
        found[mode] = {"plain": len(plain), "ours": len(ours), "sources_kept": kept,
                       "plain_positions": plain, "our_positions": ours}  # fmt: skip
    return {"modes": found, "met": found["compact"]["ours"] == found["tree_summarize"]["ours"] == 1}


@contextmanager
def counted(llm: ExtensibleLLM) -> Any:
    """Collect the positions of each prompt; the LLM answers with one word."""
    batcher = llm.lm.batcher
    whole, made = batcher.answer, []

    def answer(ready: Any, sampling: Any, cancelled: Any = None) -> Any:
        made.append(len(ready.prompt))
        return Answer(
            text="word", context=(), seconds={}, finish_reason="stop", prompt_positions=len(ready.prompt), new_tokens=1
        )

    batcher.answer = answer  # type: ignore[method-assign]
    try:
        yield made
    finally:
        batcher.answer = whole  # type: ignore[method-assign]


def query(llm: ExtensibleLLM, post: Any, nodes: list[NodeWithScore], rounds: int) -> dict[str, Any]:
    """Time a query, without retrieval, in seconds."""
    ours, plain = engine(llm, "compact", nodes, post), engine(llm, "compact", nodes)
    row = compare(
        alternate({"embeddings": lambda: ours.query(QUESTION), "text": lambda: plain.query(QUESTION)}, rounds),
        "embeddings", "text", 1 / 4,
    )  # fmt: skip
    return {"new_tokens": llm.max_tokens, "times_faster": 1 / row["ratio"]} | row


def postprocessor(post: Any, nodes: list[NodeWithScore], rounds: int) -> dict[str, Any]:
    """Time the postprocessor, in milliseconds per node."""
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        post.postprocess_nodes(nodes)
        samples.append(1000 * (time.perf_counter() - start) / len(nodes))
    return {"n": rounds, "median_ms": median(samples), "highest_ms": max(samples), "target_ms": 1,
            "met": median(samples) < 1}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """Format what was measured beside its target, as plain text."""
    rows: list[tuple[str, str, str, bool]] = []
    for mode, row in report.get("calls", {}).get("modes", {}).items():
        target = "1" if mode in ("compact", "tree_summarize") else "stated"
        rows.append((f"calls, {mode}", f"{row['plain']} -> {row['ours']}", target, target != "1" or row["ours"] == 1))
    if row := report.get("query"):
        rows.append(("a whole query, text / embeddings", f"{row['times_faster']:.1f}x", ">= 4x", row["met"]))
    if row := report.get("postprocessor"):
        rows.append(("postprocessor, each node", f"{row['median_ms']:.2f} ms", "< 1 ms", row["met"]))
    return "\n".join(ending.verdicts(rows))


def _parser() -> argparse.ArgumentParser:
    parser = ending.parser(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=3, help="of query")
    return parser


if __name__ == "__main__":
    ending.run(main)
