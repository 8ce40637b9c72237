"""Measure speed and size of the store and the library, each beside a baseline, in one run.

    python benchmarks/library.py --json benchmarks/results/library.json

Sections: read (64 documents of 64 embeddings, against numpy.memmap), disk (against the raw arrays, and the LLM's own
cache of the same text), rounding (what float16 and int8 cost the LLM), open (a store of a million entries), first_token
(from the store against full text), add (a corpus against its passages through the bare embedder), again (adding an
unchanged corpus once more), search (HNSW against exact search).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import ending
import numpy as np
import torch
from memory import sample_text
from timing import alternate, compare

from extemb_core.context.assembly import Prompt
from extemb_core.documents import Document, text_ref
from extemb_core.library import PASSAGE_TOKENS
from extemb_core.library.library import Library
from extemb_core.library.passages import split_passages
from extemb_core.library.vector_index import VectorIndex
from extemb_core.lm import ExtensibleLM
from extemb_core.models.compressed import Compressed
from extemb_core.models.llm import LLM
from extemb_core.store.format import DTYPES, decode, encode
from extemb_core.store.store import EmbeddingStore
from extemb_core.weights.resolve import resolve_embedder, short_name

SECTIONS = ("read", "disk", "rounding", "open", "first_token", "add", "again", "search")
FINGERPRINT = "00" * 16


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    quick = options.quick
    rounds = 2 if quick else options.rounds
    loaded: list[ExtensibleLM] = []

    def lm() -> ExtensibleLM:  # only for the sections that need it
        if not loaded:
            loaded.append(ExtensibleLM.from_pretrained(options.llm, resolve_embedder(options.embedder, options.llm)))
        return loaded[0]

    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sections: dict[str, Callable[[], dict[str, Any]]] = {
            "read": lambda: reading(folder, rounds, lm().llm.hidden_size, lm().embedder.config.entry_layer),
            "disk": lambda: disk(folder, lm().llm, lm().embedder.config.entry_layer, 200 if quick else 2_000),
            "rounding": lambda: rounding(lm(), 2 if quick else 40),
            "open": lambda: opening(folder, 2_000 if quick else 1_000_000, rounds),
            "first_token": lambda: first_token(folder, lm(), 2 if quick else 16, 1 if quick else options.first_rounds),
            "add": lambda: adding(folder, lm(), 1 if quick else 8, 1 if quick else options.first_rounds),
            "again": lambda: adding_again(folder, lm(), 20 if quick else options.documents),
            "search": lambda: searching(1_000 if quick else options.vectors, 20 if quick else 200),
        }
        report: dict[str, Any] = {
            "config": {"llm": short_name(options.llm), "rounds": rounds, "quick": quick, "seed": 0}
        }
        return report | ending.measured(sections, options.only)


def made(name: int, count: int, width: int, entry_layer: int = 0, ratio: int = 8) -> Compressed:
    """Make a document of `count` random embeddings."""
    generator = torch.Generator().manual_seed(name)
    embeddings = torch.randn(count, width, generator=generator)
    norms = embeddings.norm(dim=-1)
    beside = {"mean_norms": norms / 2, "norms": norms, "weights": torch.ones(count)}
    states: dict[str, Any] = {"anchors": np.arange(count, dtype=np.int32), **beside} if entry_layer else {}
    return Compressed(
        embeddings=embeddings,
        entry_layer=entry_layer,
        **states,
        ratio=ratio,
        n_tokens=count * ratio,
        ref=text_ref(str(name)),
        fingerprint=FINGERPRINT,
        chunk_size=max(32, count * ratio),
        ratios=(2, 4, 8, 16, 32),
        downscaling="mean" if entry_layer else "strided",
    )


# -- sections -------------------------------------------------------------------------------------------------


def reading(folder: Path, rounds: int, width: int, entry_layer: int) -> dict[str, Any]:
    """Time reading 64 documents of 64 embeddings as float32 tensors, from the store and from a memmap of float16.

    The store checks checksums; above entry layer 0, embeddings are multiplied by their norms.
    """
    texts = [made(at, 64, width, entry_layer) for at in range(64)]
    file = folder / "plain.bin"
    norms = [text.norms[:, None] if text.norms is not None else torch.ones(64, 1) for text in texts]
    rows = [(text.embeddings / norm).half().numpy() for text, norm in zip(texts, norms, strict=True)]
    file.write_bytes(b"".join(row.tobytes() for row in rows))
    plain = torch.from_numpy(np.memmap(file, np.float16, "c", shape=(64, 64, width)))
    with EmbeddingStore.open(folder / "read") as store:
        store.put(*texts)
        refs = [text.ref for text in texts]

        def from_store() -> list[torch.Tensor]:
            found = store.get_many(refs, FINGERPRINT, 8)
            return [text.embeddings for text in found if text is not None]

        def from_memmap() -> list[torch.Tensor]:
            return [plain[at] * norms[at] if entry_layer else plain[at].float() for at in range(64)]

        for ours, theirs in zip(from_store(), from_memmap(), strict=True):
            assert torch.equal(ours, theirs)
        samples = alternate({"store": from_store, "memmap": from_memmap}, 20 * rounds)
    return {"n_documents": 64, "n_embeddings": 64, "width": width} | compare(samples, "store", "memmap", 1 / 0.8)


def disk(folder: Path, llm: LLM, entry_layer: int, count: int) -> dict[str, Any]:
    """Measure the size of documents of 64 embeddings in the file, beside raw arrays and the LLM's cache of the text."""
    sizes = {}
    for dtype, each in (("float16", 2), *([] if entry_layer else [("int8", 1)])):
        with EmbeddingStore.open(folder / f"disk-{dtype}", dtype=dtype) as store:  # type: ignore[arg-type]
            empty = store.stats().file_bytes
            for start in range(0, count, 100):
                store.put(*(made(at, 64, llm.hidden_size, entry_layer) for at in range(start, min(count, start + 100))))
            taken = store.stats().file_bytes
        raw = count * 64 * llm.hidden_size * each
        sizes[dtype] = {"file_bytes": taken, "empty_bytes": empty, "raw_bytes": raw, "overhead": taken / raw - 1}
    text = llm.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * heads * size * 2  # keys and values, bfloat16
    tokens = count * 64 * 8
    per_token = {dtype: row["file_bytes"] / tokens for dtype, row in sizes.items()}
    return {
        "n_documents": count,
        "sizes": sizes,
        "target_overhead": 0.05,
        "met": sizes["float16"]["overhead"] <= 0.05,
        "cache_bytes_per_token": cache,
        "store_bytes_per_token_at_ratio_8": per_token,
        "share_of_cache": {dtype: value / cache for dtype, value in per_token.items()},
        "target_share": 0.01,
        "met_share": per_token["float16"] / cache <= 0.01,
    }


def rounding(lm: ExtensibleLM, n_windows: int) -> dict[str, Any]:
    """Measure the loss, in nats, of 128 tokens after 512 read as embeddings at ratio 8, rounded as in the store.

    In a small window, 3/8 and 1/8 of it; the text is the Python reference.
    """
    ratio = 8 if 8 in lm.embedder.config.ratios else min(lm.embedder.config.ratios)
    context, scored = min(512, 3 * lm.llm.context_window // 8), min(128, lm.llm.context_window // 8)
    ids = lm.llm.encode(sample_text(40 * n_windows * (context + scored)))
    anchored = lm.embedder.config.entry_layer > 0
    dtypes = [dtype for dtype in DTYPES if not (anchored and dtype == "int8")]  # a store refuses int8
    losses: dict[str, list[float]] = {dtype: [] for dtype in dtypes}
    for start in range(0, n_windows * (context + scored), context + scored):
        (text,) = lm.embedder.compress_ids([ids[start : start + context]], refs=[text_ref(str(start))], ratio=ratio)
        targets = ids[start + context : start + context + scored]
        for dtype in dtypes:
            data, kept = encode(text, dtype)
            rounded = replace(text, **decode(data, *text.embeddings.shape, kept, anchored=anchored))
            losses[dtype].append(-float(lm.llm.score(Prompt((rounded.part,)).inputs(lm.llm), targets).mean()))
    worse = {dtype: [a - b for a, b in zip(losses[dtype], losses["float32"], strict=True)] for dtype in dtypes}
    return {
        "n_windows": n_windows,
        "ratio": ratio,
        "mean_loss": {dtype: float(np.mean(values)) for dtype, values in losses.items()},
        "mean_increase": {dtype: float(np.mean(values)) for dtype, values in worse.items()},
        "highest_increase": {dtype: max(values) for dtype, values in worse.items()},
    }


def opening(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Time opening a store of many entries and reading one of them, in milliseconds."""
    path = folder / "open"
    with EmbeddingStore.open(path) as store:
        for start in range(0, count, 10_000):
            store.put(*(made(at, 1, 8) for at in range(start, min(count, start + 10_000))))
    samples = []
    for at in range(5 * rounds):
        start = time.perf_counter()
        with EmbeddingStore.open(path, "r") as store:
            assert store.get(text_ref(str(at)), FINGERPRINT, 8) is not None
        samples.append(1000 * (time.perf_counter() - start))
    return {"n_entries": count, "n": len(samples), "median_ms": median(samples), "highest_ms": max(samples),
            "target_ms": 50, "met": median(samples) < 50, "samples_ms": samples}  # fmt: skip


def first_token(folder: Path, lm: ExtensibleLM, count: int, rounds: int) -> dict[str, Any]:
    """Time the first token from documents in the store, beside the same documents as full text, 7/8 of the window."""
    n_tokens = (7 * lm.llm.context_window // 8 // count - 32) * count
    ids = lm.llm.encode(sample_text(12 * n_tokens))[:n_tokens]
    part = n_tokens // count
    texts = [Document(lm.llm.decode(ids[at : at + part].tolist()), title=str(at)) for at in range(0, n_tokens, part)]
    rows: dict[str, Any] = {}
    with EmbeddingStore.open(folder / "first") as store:
        own = ExtensibleLM(lm.llm, lm.embedder, store)
        ratios = [ratio for ratio in lm.embedder.config.ratios if ratio in (4, 8, 16)]
        own.compress(texts, ratio=min(ratios))

        def asked(ratio: int | str) -> Callable[[], object]:
            return lambda: own.ask("What is this about?", texts, ratio=ratio, max_new_tokens=1)

        sides = {f"ratio {ratio}": asked(ratio) for ratio in ratios} | {"full text": asked("raw")}
        samples = alternate(sides, rounds)
    for ratio in ratios:
        row = compare(samples, f"ratio {ratio}", "full text", 1 / (0.85 * ratio))
        rows[str(ratio)] = row | {"times_faster": 1 / row["ratio"]}
    return {"n_tokens": n_tokens, "n_documents": len(texts), "ratios": rows}


def adding(folder: Path, lm: ExtensibleLM, count: int, rounds: int) -> dict[str, Any]:
    """Time adding documents of 2,048 tokens to a new library, beside only compressing their passages."""
    ids = lm.llm.encode(sample_text(12 * 2048 * count))
    texts = [lm.llm.decode(ids[2048 * at : 2048 * (at + 1)].tolist()) for at in range(count)]
    documents = [Document(text, metadata={"source": f"document {at}"}) for at, text in enumerate(texts)]
    passages = [
        text[begin:end] for text in texts for begin, end in split_passages(text, PASSAGE_TOKENS, lm.llm.lengths)
    ]
    numbers = itertools.count()

    def library() -> None:
        with Library(folder / f"add-{next(numbers)}", lm) as made:
            made.add(documents, show_progress=False)

    def embedder() -> None:
        lm.embedder.compress(passages, ratio=lm.embedder.config.kept_ratio, show_progress=False)

    samples = alternate({"library": library, "embedder": embedder}, rounds)
    counts = {"n_documents": count, "n_passages": len(passages), "n_tokens": sum(lm.llm.lengths(passages))}
    return counts | compare(samples, "library", "embedder", 1 / 0.9)


def adding_again(folder: Path, lm: ExtensibleLM, count: int) -> dict[str, Any]:
    """Time adding a corpus, and adding it again, unchanged, after reopening the library."""
    text = sample_text(400 * count + 1000)
    documents = [Document(text[300 * at : 300 * at + 300], metadata={"source": f"part {at}"}) for at in range(count)]
    seconds = []
    for _ in range(2):
        with Library(folder / "again", lm) as library:
            start = time.perf_counter()
            added = library.add(documents)
            seconds.append(time.perf_counter() - start)
    assert added.unchanged == count
    return {"n_documents": count, "characters_each": 300, "seconds": seconds, "times_faster": seconds[0] / seconds[1],
            "target": 50, "met": seconds[0] >= 50 * seconds[1]}  # fmt: skip


def searching(count: int, n_queries: int, width: int = 256, k: int = 10) -> dict[str, Any]:
    """Time a search in HNSW, in milliseconds, and count how many of the exact nearest vectors it finds.

    Vectors lie around 1,000 centres, as passages lie around their subjects; among uniformly random ones none are near.
    """
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((1000, width)).astype(np.float32)

    def points(number: int) -> np.ndarray[Any, Any]:
        around = centres[draw.integers(1000, size=number)]
        vectors = around + 0.7 * draw.standard_normal((number, width)).astype(np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    vectors, queries = points(count), points(n_queries)
    found: dict[str, list[set[int]]] = {}
    milliseconds: dict[str, list[float]] = {}
    build = {}
    for factory in ("Flat", "HNSW32"):
        index = VectorIndex(width, factory)
        start = time.perf_counter()
        index.add(range(count), vectors)
        build[factory] = time.perf_counter() - start
        found[factory], milliseconds[factory] = [], []
        for query in queries:
            start = time.perf_counter()
            hits = index.search(query, k)
            milliseconds[factory].append(1000 * (time.perf_counter() - start))
            found[factory].append({number for number, _ in hits})
    recall = sum(len(a & b) for a, b in zip(found["Flat"], found["HNSW32"], strict=True)) / (k * n_queries)
    middle = {factory: median(values) for factory, values in milliseconds.items()}
    return {"n_vectors": count, "width": width, "n_queries": n_queries, "k": k, "recall": recall, "median_ms": middle,
            "build_seconds": build, "target_ms": 5, "target_recall": 0.95,
            "met": middle["HNSW32"] < 5 and recall >= 0.95}  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """Format what was measured beside its target, as plain text."""
    rows: list[tuple[str, str, str, bool]] = []
    lines: list[str] = []
    if row := report.get("read"):
        rows.append(("reading 64 x 64: store / memmap", f"{row['ratio']:.2f}x", "<= 1.25x", row["met"]))
    if row := report.get("disk"):
        rows.append(("disk over raw arrays", f"{100 * row['sizes']['float16']['overhead']:.1f}%", "<= 5%", row["met"]))
        share = row["share_of_cache"]["float16"]
        rows.append(("disk per token at ratio 8 / KV cache", f"1/{1 / share:.0f}", "<= 1/100", row["met_share"]))
    if row := report.get("rounding"):
        found = ", ".join(
            f"{dtype} {row['mean_increase'][dtype]:+.4f}" for dtype in row["mean_increase"] if dtype != "float32"
        )
        lines.append(f"loss of the next tokens beside float32, nats: {found}")
    if row := report.get("open"):
        rows.append((f"opening {row['n_entries']:,} entries", f"{row['median_ms']:.1f} ms", "< 50 ms", row["met"]))
    for ratio, row in report.get("first_token", {}).get("ratios", {}).items():
        target = f">= {0.85 * int(ratio):.1f}x"
        rows.append((f"first token, full text / ratio {ratio}", f"{row['times_faster']:.1f}x", target, row["met"]))
    if row := report.get("add"):
        rows.append(("adding / the bare embedder, speed", f"{1 / row['ratio']:.2f}", ">= 0.90", row["met"]))
    if row := report.get("again"):
        rows.append(("adding / adding again", f"{row['times_faster']:.0f}x", ">= 50x", row["met"]))
    if row := report.get("search"):
        what = f"search in {row['n_vectors']:,}, recall {row['recall']:.3f}"
        rows.append((what, f"{row['median_ms']['HNSW32']:.2f} ms", "< 5 ms, 0.95", row["met"]))
    lines += ending.verdicts(rows)
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = ending.parser(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=9, help="of the sections that alternate")
    parser.add_argument("--first-rounds", type=int, default=3, help="of first_token, which takes long")
    parser.add_argument("--documents", type=int, default=10_000, help="of the corpus that is added twice")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="to search")
    parser.add_argument("--folder", type=Path, help="where to work; the system's temporary folder when not given")
    return parser


if __name__ == "__main__":
    ending.run(main)
