"""One run's tables on the results page, by its kind. Pure functions from a record's summary to Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from extemb_core.evaluation import report_cells as cells
from extemb_core.evaluation.plots import METRIC_NAMES, SIDE_KINDS, arm_key

Summary = Mapping[str, Any]
Minus = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Ratio -> control -> metric or task -> difference, extensible less control."""

_POINTS = "Paired differences, in percentage points (above 0: the embeddings are better):\n"
_WITHOUT_RATIO = ("none", "streaming", "full")
_SPEED = {
    "first_token_s": "Time to the first token, in seconds",
    "decode_tokens_per_s": "Decoding, in tokens per second",
    "peak_mib": "Peak memory beyond what was in use before (weights, text), in MiB",
    "positions": "Positions that the documents take",
    "compress_tokens_per_s": "Compressing, in tokens of documents per second",
}


def ppl(summary: Summary) -> list[str]:
    """A column per length of context: perplexity, positions, differences of the loss, shares of the gap."""
    by_context = {int(context): summary[context] for context in _numbered(summary)}
    heads = [f"{context:,} (n {own['n']})" for context, own in by_context.items()]
    arms = [own["arms"] for own in by_context.values()]
    parts = ["Perplexity, by tokens of context:\n", _by_arm(heads, arms, cells.perplexity)]
    parts += ["Positions that the context takes:\n", _by_arm(heads, arms, cells.positions)]
    differences: dict[tuple[str, str], dict[int, Any]] = {}
    shares: dict[str, dict[int, Any]] = {}
    for ratio in _numbered({ratio for own in by_context.values() for ratio in own["ratios"]}):
        at = {context: own["ratios"][ratio] for context, own in by_context.items() if ratio in own["ratios"]}
        shares[ratio] = {context: own["gap_share"] for context, own in at.items()}
        for control in sorted({name for own in at.values() for name in own["minus"]}, key=arm_key):
            found = {context: own["minus"][control] for context, own in at.items() if control in own["minus"]}
            differences[ratio, control] = found
    if not shares:
        return parts
    rows = [
        [_minus(ratio, control), *(cells.difference(found.get(context)) for context in by_context)]
        for (ratio, control), found in differences.items()
    ]
    parts += ["Difference of the loss, in nats per token (below 0: the embeddings are better):\n"]
    parts += [cells.table(["difference", *heads], rows)]
    rows = [
        [cells.code(f"extensible/{ratio}"), *(cells.share(found.get(context)) for context in by_context)]
        for ratio, found in shares.items()
    ]
    parts += ["Share of the gap, (none - extensible) / (none - full):\n", cells.table(["arm", *heads], rows)]
    remarks = cells.remarks_by_length(differences)
    return [*parts, cells.bullets([*remarks, *cells.refusals(shares)])]


def qa(summary: Summary) -> list[str]:
    """Scores and the loss of the reference answer, paired differences, retained shares, and all by rank."""
    metrics = [metric for metric in summary["metrics"] if metric != "loss"]
    has_loss = "loss" in summary["metrics"]
    minus = summary.get("minus", {})
    parts: list[str] = []
    if metrics:
        parts += ["Scores:\n", _scores(summary, dict.fromkeys(metrics, cells.percent))]
        parts += [_POINTS, _points(minus, metrics)] if minus else []
        title = "Retained share of what the full text gains, (extensible - none) / (full - none), by F1:\n"
        parts += _retained(title, summary.get("retained", {}))
    if has_loss:
        parts += ["Loss of the reference answer, in nats per token (lower is better):\n"]
        parts += [_scores(summary, {"loss": cells.loss})]
        if minus:
            rows = [
                [_minus(ratio, control), cells.difference(minus[ratio][control].get("loss"))]
                for ratio in _numbered(minus)
                for control in sorted(minus[ratio], key=arm_key)
            ]
            parts += ["Difference of that loss, in nats per token (below 0: the embeddings are better):\n"]
            parts += [cells.table(["difference", "loss"], rows)]
        title = "Share of what the full text gains in loss, (none - extensible) / (none - full):\n"
        parts += _retained(title, summary.get("retained_loss", {}))
    by_rank = [(rank, summary["by_rank"][rank]) for rank in _numbered(summary.get("by_rank", ()))]
    heads = [f"rank {rank} (n {max((own['n'] for own in found.values()), default=0):,})" for rank, found in by_rank]
    for metric in (metric for metric in summary["metrics"] if by_rank and metric != "em"):
        scores = [{arm: own.get(metric) for arm, own in found.items()} for _, found in by_rank]
        parts += [f"{_named(metric)} by the rank of the passage with the answer (0 stands first):\n"]
        parts += [_by_arm(heads, scores, cells.plain_loss if metric == "loss" else cells.plain_percent)]
    remarks: list[str] = []
    if metrics:
        main = "f1" if "f1" in metrics else metrics[0]
        remarks += _remarks(minus, main, _named(main))
    if has_loss:
        remarks += _remarks(minus, "loss", "loss", lower_is_better=True)
    remarks += [
        f"{own['cut']:,} of {own['n']:,} texts of {cells.code(arm, cell=False)} were cut to fit the window."
        for arm, own in summary["arms"].items()
        if own.get("cut")
    ]
    return [*parts, cells.bullets(remarks)]


def speed(summary: Summary) -> list[str]:
    """A table per metric, a column per length; in brackets the ratio to "full" at that length."""
    by_length = {f"{int(tokens):,}": summary[tokens] for tokens in _numbered(summary)}
    counts = sorted({own["n"] for sides in by_length.values() for own in sides.values()})
    rounds = " to ".join(dict.fromkeys(f"{count:,}" for count in counts[:: max(1, len(counts) - 1)]))
    parts = [
        f"Medians of {rounds} rounds; in brackets the ratio to `full` at the same length (of times: the median of the "
        "ratios within a round).\n"
    ]
    for metric, title in _SPEED.items():
        shown = [
            {side: _beside_full(sides, side, metric) for side, own in sides.items() if metric in own}
            for sides in by_length.values()
        ]
        if not any(shown):
            continue
        parts += [f"{title}, by tokens of documents:\n"]
        parts += [_by_arm(list(by_length), shown, lambda text: text, ("side", SIDE_KINDS))]
    return parts


def needle(summary: Summary) -> list[str]:
    """Share of correct answers: over all that was measured of an arm, then by length."""
    tasks = sorted(summary["arms"])
    overall = [{arm: own["correct"] for arm, own in summary["arms"][task].items()} for task in tasks]
    heads = [_named(task) for task in tasks]
    parts = ["Share of correct answers, over all that was measured of an arm (not every arm fits every length):\n"]
    parts += [_by_arm(heads, overall, cells.percent)]
    minus: dict[str, dict[str, dict[str, Any]]] = {}
    for task, by_ratio in summary.get("minus", {}).items():
        for ratio, controls in by_ratio.items():
            for control, own in controls.items():
                minus.setdefault(ratio, {}).setdefault(control, {})[task] = own
    if minus:
        parts += [_POINTS, _points(minus, tasks)]
    lengths = sorted({cell["tokens"] for cell in summary["cells"]})
    for task in tasks:
        found: list[dict[str, list[tuple[float, int]]]] = [{} for _ in lengths]
        for cell in (cell for cell in summary["cells"] if cell["task"] == task):
            found[lengths.index(cell["tokens"])].setdefault(cell["arm"], []).append((cell["correct"], cell["n"]))
        parts += [f"{_named(task)}, share of correct answers by tokens of text, over all depths:\n"]
        parts += [_by_arm([f"{length:,}" for length in lengths], found, _pooled)]
    remarks = [line for task in tasks for line in _remarks(minus, task, f"{_named(task)} answers")]
    return [*parts, cells.bullets(remarks)]


SECTIONS: dict[str, Callable[[Summary], list[str]]] = {"ppl": ppl, "qa": qa, "speed": speed, "needle": needle}


def _by_arm(
    heads: list[str],
    columns: list[Any],
    shown: Callable[[Any], str],
    first: tuple[str, tuple[str, ...] | None] = ("arm", None),
) -> str:
    """A row per arm; a column per mapping from arm to what `shown` turns into a cell."""
    name, kinds = first
    order = (lambda arm: arm_key(arm, kinds)) if kinds else arm_key
    arms = sorted({arm for column in columns for arm in column}, key=order)
    rows = [
        [cells.code(arm), *(shown(column[arm]) if arm in column else cells.ABSENT for column in columns)]
        for arm in arms
    ]
    return cells.table([name, *heads], rows)


def _scores(summary: Summary, shown: Mapping[str, Callable[[Any], str]]) -> str:
    """A row per arm: the positions of its text, and a column per metric."""
    rows = [
        [cells.code(arm), cells.positions(own), *(show(own[metric]) for metric, show in shown.items())]
        for arm, own in ((arm, summary["arms"][arm]) for arm in sorted(summary["arms"], key=arm_key))
    ]
    return cells.table(["arm", "positions", *map(_named, shown)], rows)


def _retained(title: str, shares: Mapping[str, Any]) -> list[str]:
    """A row per ratio, with the reason where a share is refused."""
    rows = [
        [
            cells.code(f"extensible/{ratio}"),
            f"refused: {cells.escaped(own['refused'])}" if "refused" in own else cells.share(own),
        ]
        for ratio, own in ((ratio, shares[ratio]) for ratio in _numbered(shares))
    ]
    return [title, cells.table(["arm", "retained"], rows)] if rows else []


def _points(minus: Minus, columns: Sequence[str]) -> str:
    """A row per ratio and control, a column per metric or task."""
    rows = [
        [_minus(ratio, control), *(cells.difference(minus[ratio][control].get(name), points=True) for name in columns)]
        for ratio in _numbered(minus)
        for control in sorted(minus[ratio], key=arm_key)
    ]
    return cells.table(["difference", *map(_named, columns)], rows)


def _remarks(minus: Minus, column: str, name: str, *, lower_is_better: bool = False) -> list[str]:
    """What the intervals of one metric's differences say."""
    found = {
        ratio: {
            control: minus[ratio][control][column]
            for control in sorted(minus[ratio], key=arm_key)
            if column in minus[ratio][control]
        }
        for ratio in _numbered(minus)
    }
    return cells.remarks_by_control(found, name, lower_is_better=lower_is_better)


def _beside_full(sides: Mapping[str, Any], side: str, metric: str) -> str:
    value, full = sides[side].get(metric), sides.get("full", {}).get(metric)
    if value is None:
        return cells.ABSENT
    if metric == "positions":
        return cells.positions(sides[side])
    ratio = sides[side]["first_token_over_full"] if metric == "first_token_s" else value / full if full else None
    return cells.three_digits(value) + (f" ({ratio:.2f}x)" if ratio is not None and side != "full" else "")


def _pooled(found: list[tuple[float, int]]) -> str:
    total = sum(n for _, n in found)
    return cells.plain_percent(sum(share * n for share, n in found) / total if total else None)


def _minus(ratio: str, control: str) -> str:
    other = control if control in _WITHOUT_RATIO else f"{control}/{ratio}"
    return f"{cells.code(f'extensible/{ratio}')} - {cells.code(other)}"


def _named(name: str) -> str:
    return METRIC_NAMES.get(name) or cells.escaped(name.replace("_", "-"))


def _numbered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=int)
