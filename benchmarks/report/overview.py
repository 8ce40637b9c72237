"""Overview of all sets of questions on which plans were measured: how each way of using as many positions answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import cells
from benchmarks.report.plots import main_score
from benchmarks.report.sections import metric_name

Record = Mapping[str, Any]

_WAYS = ("truncated", "lingua", "chosen", "extensible", "focus")
_RIVALS = ("chosen", "extensible", "truncated")
_INTRODUCTION = """\
Each row is a set of questions with documents in so many positions of the LLM's window, those that `extensible/k` takes.
Means alone; intervals, and the other scores, stand with each set below. **Bold**: the best way to use these positions.
"""
_DIFFERENCES = (
    "`focus/k` less each other way, paired, in points of the score (above 0: plans for the question are better):\n"
)
_LOSS_DIFFERENCES = "The same in nats per token of the reference answer (below 0: plans for the question are better):\n"


def compared(records: Sequence[tuple[Path, Record]]) -> dict[str, Record]:
    """Choose the records that compare plans for the question with other ways, by the name of their set.

    If there are several of one set, the name says which record it is, too. Untrained embedders are left out.
    """
    chosen = [
        (Path(record["data"][0]["file"]).name.split(".")[0], path.stem, record)
        for path, record in records
        if record["kind"] == "qa" and record["data"] and record["summary"].get("focus_minus")
        if record["config"]["embedder"] != "untrained"
    ]
    names = [name for name, _, _ in chosen]
    ordered = sorted(chosen, key=lambda entry: entry[:2])
    return {name if names.count(name) == 1 else f"{name} ({stem})": record for name, stem, record in ordered}


def sections(records: Sequence[tuple[Path, Record]]) -> list[str]:
    """Write the tables; nothing if no record compares plans with other ways."""
    sets = compared(records)
    if not sets:
        return []
    scores = [
        (f"{name}, {metric_name(score)}", record, score)
        for name, record in sets.items()
        if (score := main_score(record["summary"]))
    ]
    losses = [(name, record, "loss") for name, record in sets.items() if "loss" in record["summary"]["metrics"]]
    parts = ["## At a glance\n", _INTRODUCTION + cells.trainings(sets)]
    if scores:
        parts += ["Scores:\n", _table(scores), _DIFFERENCES, _differences(scores)]
    if losses:
        parts += ["Loss of the reference answer, in nats per token:\n", _table(losses)]
        parts += [_LOSS_DIFFERENCES, _differences(losses)]
    return parts


def _table(sets: Sequence[tuple[str, Record, str]]) -> str:
    rows = []
    for name, record, metric in sets:
        arms = record["summary"]["arms"]
        shown = cells.plain_loss if metric == "loss" else cells.plain_percent
        best = min if metric == "loss" else max
        for ratio in _ratios(record):
            at = {way: arms[f"{way}/{ratio}"][metric]["mean"] for way in _WAYS if f"{way}/{ratio}" in arms}
            marked = cells.best_marked({way: shown(mean) for way, mean in at.items()}, at, best)
            rows.append(
                [
                    f"{name} (n {record['n']:,})",
                    f"{cells.positions(arms[f'extensible/{ratio}'])} (ratio {ratio})",
                    shown(arms["none"][metric]["mean"]),
                    *(marked.get(way, cells.ABSENT) for way in _WAYS),
                    shown(arms["full"][metric]["mean"]) + cells.cut(arms["full"]),
                ]
            )
    heads = [cells.code(way) for way in ("none", *_WAYS, "full")]
    return cells.table(["set", "positions", *heads], rows)


def _differences(sets: Sequence[tuple[str, Record, str]]) -> str:
    rows = []
    for name, record, metric in sets:
        for ratio in _ratios(record):
            rivals = record["summary"]["focus_minus"][str(ratio)]
            found = [rivals.get(way, {}).get(metric) for way in _RIVALS]
            shown = [cells.difference(difference, points=metric != "loss") for difference in found]
            rows.append([f"{name} (n {record['n']:,})", str(ratio), *shown])
    return cells.table(["set", "ratio", *(f"less {cells.code(way)}" for way in _RIVALS)], rows)


def _ratios(record: Record) -> list[int]:
    return sorted(map(int, record["summary"]["focus_minus"]))
