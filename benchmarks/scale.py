"""Measure what a corpus costs: tokens per second of a process and bytes per token, and from these what a day takes.

    python benchmarks/scale.py --json benchmarks/results/scale.json

Sections: throughput (`CompressWorker` in this process on all cores, and Ray Data with a process for each core), size
(bytes of shards and of a store per token, at every ratio), index (bytes of a passage's vector in each kind of index).
The plan that follows is computed from these: for a number of tokens every day, compressed as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ending
import numpy as np
from memory import sample_text

from extemb_core.library import PASSAGE_TOKENS
from extemb_core.library.vector_index import VectorIndex
from extemb_core.lm import ExtensibleLM
from extemb_core.scale.corpus import compress_corpus
from extemb_core.scale.worker import CompressWorker, seal
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import import_shards
from extemb_core.weights.resolve import resolve_embedder, short_name

SECTIONS = ("throughput", "size", "index")
DAYS = (1_000_000, 100_000_000, 10_000_000_000)  # tokens
_SECONDS = 24 * 60 * 60
INDICES = ("Flat", "HNSW32", "IVF1024,PQ32")
_VECTOR_WIDTH = 256  # width of the default text encoder


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    models = {"llm": options.llm, "embedder": str(resolve_embedder(options.embedder, options.llm))}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        rows = 4 if options.quick else options.rows
        chars = 500 if options.quick else 8_000
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "throughput": lambda: throughput(folder, models, chars, rows, 1 if options.quick else options.rounds),
            "size": lambda: size(folder, models, chars, rows),
            "index": lambda: index(folder, 1_000 if options.quick else 100_000, INDICES[: 2 if options.quick else 3]),
        }
        report = {
            "config": {
                "llm": short_name(options.llm), "rows": rows, "rounds": options.rounds, "quick": options.quick,
                "passage_tokens": PASSAGE_TOKENS, "cores": os.cpu_count(), "seed": 0,
            }
        } | ending.measured(sections, options.only)  # fmt: skip
    if options.only is None:
        report["plan"] = plan(report)
    return report


def texts(chars: int, rows: int, first: int = 0) -> list[str]:
    """Return parts of the Python reference, of `chars` characters each, all different."""
    whole = sample_text(chars * (first + rows))
    return [f"Part {at}.\n" + whole[chars * at :][:chars] for at in range(first, first + rows)]


def throughput(folder: Path, models: dict[str, str], chars: int, rows: int, rounds: int) -> dict[str, Any]:
    """Measure tokens per second, each round with other texts: one process on all cores, and Ray with one per core.

    The start of the process, or of Ray and its workers, is reported separately.
    """
    own: list[dict[str, float]] = []
    by_ray: list[dict[str, float]] = []
    cores = os.cpu_count() or 1
    worker = CompressWorker(folder / "own", **models, passage_tokens=PASSAGE_TOKENS)
    worker({"text": texts(chars, 1)})
    for at in range(rounds):
        columns = {"text": texts(chars, rows, first=1 + at * rows)}
        start = time.perf_counter()
        made = worker(columns)
        own.append({"n_tokens": made["n_tokens"][0], "seconds": time.perf_counter() - start})
        file = folder / f"corpus-{at}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in columns["text"]), encoding="utf-8")
        start = time.perf_counter()
        done = compress_corpus(file, folder / f"ray-{at}", **models, passage_tokens=PASSAGE_TOKENS, workers=cores,
                               rows_per_batch=max(1, rows // (4 * cores)), show_progress=False)  # fmt: skip
        by_ray.append({"n_tokens": done.batch.n_tokens, "seconds": done.seconds,
                       "seconds_with_start": time.perf_counter() - start})  # fmt: skip
    return {
        "tokens_per_second": median(one["n_tokens"] / one["seconds"] for one in own),
        "tokens_per_second_ray": median(one["n_tokens"] / one["seconds"] for one in by_ray),
        "samples": own,
        "samples_ray": by_ray,
    }


def size(folder: Path, models: dict[str, str], chars: int, rows: int) -> dict[str, Any]:
    """Measure bytes per token of text in shards, receipts and manifest included, and in a store after an import."""
    found: dict[str, Any] = {}
    lm = ExtensibleLM.from_pretrained(**models)
    dtypes = ("float16",) if lm.embedder.config.entry_layer else ("float16", "int8")  # a store refuses int8 above 0
    for ratio in lm.embedder.config.ratios:
        for dtype in dtypes:
            name = f"{ratio}-{dtype}"
            worker = CompressWorker(folder / name, **models, ratio=ratio, dtype=dtype,  # type: ignore[arg-type]
                                    passage_tokens=PASSAGE_TOKENS)  # fmt: skip
            n_tokens = worker({"text": texts(chars, rows)})["n_tokens"][0]
            seal(folder / name)
            shards = sum(file.stat().st_size for file in (folder / name).iterdir())
            with EmbeddingStore.open(folder / f"{name}-store", dtype=dtype) as store:  # type: ignore[arg-type]
                empty = store.stats().file_bytes
                import_shards(store, folder / name, show_progress=False)
                taken = store.stats().file_bytes - empty
            found[name] = {"n_tokens": n_tokens, "shards": shards / n_tokens, "store": taken / n_tokens}
    return {"bytes_per_token": found, "width": lm.llm.hidden_size}


def index(folder: Path, count: int, factories: Sequence[str]) -> dict[str, Any]:
    """Measure bytes per vector in the index of a library, which is in memory while it is searched."""
    vectors = np.random.default_rng(0).standard_normal((count, _VECTOR_WIDTH)).astype(np.float32)
    found = {}
    for factory in factories:
        made = VectorIndex(_VECTOR_WIDTH, factory)
        made.add(range(count), vectors)
        file = folder / f"{factory}.faiss"
        made.save(file)
        found[factory] = file.stat().st_size / count
    return {"n_vectors": count, "width": _VECTOR_WIDTH, "bytes_per_vector": found}


def plan(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Compute how many machines like this one a day's tokens need, and what a day adds on disk and in memory."""
    speed = report["throughput"]["tokens_per_second"]
    bytes_per_token = report["size"]["bytes_per_token"]
    ratio = "8" if "8-float16" in bytes_per_token else next(iter(bytes_per_token)).split("-")[0]
    rows = []
    for tokens in DAYS:
        passages = tokens / PASSAGE_TOKENS
        rows.append(
            {
                "tokens_per_day": tokens,
                "machine_hours": tokens / speed / 3600,
                "machines": tokens / speed / _SECONDS,
                "ratio": int(ratio),
                "gb_per_day": {name.split("-")[1]: tokens * size["shards"] / 1e9
                               for name, size in bytes_per_token.items() if name.startswith(f"{ratio}-")},
                "passages": passages,
                "index_gb": {name: passages * size / 1e9
                             for name, size in report["index"]["bytes_per_vector"].items()},
            }
        )  # fmt: skip
    return rows


def table(report: dict[str, Any]) -> str:
    """Format what was measured, and the plan, as plain text."""
    lines: list[str] = []
    if row := report.get("throughput"):
        lines.append(f"tokens/s: {row['tokens_per_second']:,.0f}, through Ray {row['tokens_per_second_ray']:,.0f}")
    for name, row in report.get("size", {}).get("bytes_per_token", {}).items():
        lines.append(f"bytes per token, {name}: {row['shards']:.1f} in shards, {row['store']:.1f} in a store")
    for name, value in report.get("index", {}).get("bytes_per_vector", {}).items():
        lines.append(f"bytes per vector, {name}: {value:.0f}")
    for row in report.get("plan", []):
        indices = ", ".join(f"{name} {value:,.3f}" for name, value in row["index_gb"].items())
        sizes = ", ".join(f"{dtype} {value:,.2f}" for dtype, value in row["gb_per_day"].items())
        lines.append(
            f"{row['tokens_per_day']:,} tokens a day: {row['machines']:,.2f} machines, GB: {sizes}; index GB: {indices}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = ending.parser(__doc__, SECTIONS)
    parser.add_argument("--rows", type=int, default=24, help="documents of 8,000 characters in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; the system's temporary folder when not given")
    return parser


if __name__ == "__main__":
    ending.run(main)
