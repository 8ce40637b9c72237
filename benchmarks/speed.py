"""Measure speed and size, each beside a baseline, in one run.

    python benchmarks/speed.py --json benchmarks/results/speed.json

Sections: start (import and --help), compress (against a bare forward pass), first_token (against a plain prompt),
plan (for a question against evenly), memory (1 MB against 10 MB of text), size (what the base install takes on disk).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import ending
from install_size import install_size
from memory import growth, sample_text
from timing import cold_start, compress_cost, first_token, planning

from extemb_core.lm import ExtensibleLM
from extemb_core.weights.resolve import resolve_embedder, short_name

SECTIONS = ("start", "compress", "first_token", "plan", "memory", "size")


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the report without its provenance."""
    quick = options.quick
    rounds = 2 if quick else options.rounds
    sizes = (20_000, 60_000) if quick else (1_000_000, 10_000_000)
    embedder = str(resolve_embedder(options.embedder, options.llm))
    text = sample_text(1_000_000)
    loaded: list[ExtensibleLM] = []

    def lm() -> ExtensibleLM:  # only for the sections that need it
        if not loaded:
            loaded.append(ExtensibleLM.from_pretrained(options.llm, embedder))
        return loaded[0]

    def compress() -> dict[str, Any]:
        tokens = 256 if quick else options.tokens
        made = lm()
        part = made.llm.decode(made.llm.encode(text[: tokens * 8])[:tokens].tolist())
        return compress_cost(made.embedder, part, rounds=rounds)

    def first() -> dict[str, Any]:
        made = lm()
        ratio = 8 if 8 in made.embedder.config.ratios else min(made.embedder.config.ratios)
        return first_token(made, text, embeddings=8 if quick else 512, ratio=ratio, rounds=rounds)

    def plan() -> dict[str, Any]:
        return planning(lm(), text, tokens=128 if quick else 7168, rounds=rounds)

    def memory() -> dict[str, Any]:
        found = {"tiny_llm": growth(options.llm, None, sizes, 1 if quick else 2)}
        if options.thorough:
            found["llm"] = growth(options.llm, embedder, (1_000_000, 2_000_000), 1)
        return found

    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "start": lambda: cold_start(1 if quick else 7),
        "compress": compress,
        "first_token": first,
        "plan": plan,
        "memory": memory,
        "size": install_size,
    }
    report: dict[str, Any] = {
        "config": {
            "llm": short_name(options.llm),
            "embedder": short_name(embedder),
            "rounds": rounds,
            "quick": quick,
            "thorough": options.thorough,
        }
    }
    report |= ending.measured(sections, options.only)
    if loaded:
        report["config"]["fingerprint"] = lm().embedder.fingerprint
        report["config"]["dtype"] = str(lm().llm.dtype).removeprefix("torch.")
    return report


def table(report: dict[str, Any]) -> str:
    """Format what was measured beside its target, as plain text."""
    rows: list[tuple[str, str, str, bool]] = []
    if start := report.get("start"):
        for name, what in (("import", "import extemb_core"), ("help", "extemb --help")):
            row = start[name]
            rows.append((what, f"{row['median_seconds']:.3f} s", f"< {row['target']} s", row["met"]))
    for name, what in (("compress", "compress / bare forward"), ("first_token", "first token / plain prompt"),
                       ("plan", "first token, planned for the question / evenly")):  # fmt: skip
        if row := report.get(name):
            rows.append((what, f"{row['ratio']:.3f}x", f"<= {row['target']:.2f}x", row["met"]))
        if row := (row or {}).get("next_question"):
            rows.append((f"{what}, next one", f"{row['ratio']:.3f}x", f"<= {row['target']:.2f}x", row["met"]))
    for name, row in report.get("memory", {}).items():
        small, large = (size / 1e6 for size in row["bytes"])
        what = f"peak memory, {large:g} MB / {small:g} MB of text, {name.replace('_', ' ')}"
        rows.append((what, f"{row['ratio']:.3f}x", f"<= {row['target']:.2f}x", row["met"]))
    lines = ending.verdicts(rows)
    if size := report.get("size"):
        lines.append(
            f"base install: {size['extemb_code_mb']:.1f} MB code, {size['extemb_weights_mb']:.1f} MB weights, "
            f"{size['dependencies_mb']:.0f} MB of {size['n_dependencies']} dependencies; "
            f"torch {size['torch_version']}: {size['torch_mb']:.0f} MB"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = ending.parser(__doc__, SECTIONS)
    parser.add_argument("--rounds", type=int, default=9, help="of the sections that alternate")
    parser.add_argument("--tokens", type=int, default=8192, help="to compress per round")
    parser.add_argument("--thorough", action="store_true", help="memory of the LLM itself too, 1 MB against 2 MB")
    return parser


if __name__ == "__main__":
    ending.run(main)
