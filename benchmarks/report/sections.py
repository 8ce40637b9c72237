"""Tables of one run on the results page, by its kind. Pure functions from a record's summary to Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.report import cells
from benchmarks.report.plots import METRIC_NAMES, SIDE_KINDS, arm_key, main_score

Summary = Mapping[str, Any]
Minus = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Ratio -> control -> metric or task -> difference, extensible less control."""

_NAMES = {"extensible": "the embeddings are better", "focus": "plans for the question are better"}
_WITHOUT_RATIO = ("none", "streaming", "full")
_SPEED = {
    "first_token_s": "Time to the first token, in seconds",
    "decode_tokens_per_s": "Decoding, in tokens per second",
    "peak_mib": "Peak memory beyond what was in use before (weights, text), in MiB",
    "positions": "Positions that the documents take",
    "compress_tokens_per_s": "Compressing, in tokens of documents per second",
}


def ppl(summary: Summary) -> list[str]:
    """Write a column per length of context: perplexity, positions, differences of the loss, shares of the gap."""
    by_context = {int(context): summary[context] for context in _numbered(summary)}
    heads = [f"{context:,} (n {table['n']})" for context, table in by_context.items()]
    arms = [table["arms"] for table in by_context.values()]
    parts = ["Perplexity, by tokens of context:\n", _by_arm(heads, arms, cells.perplexity)]
    parts += ["Positions that the context takes:\n", _by_arm(heads, arms, cells.positions)]
    differences: dict[tuple[str, str], dict[int, Any]] = {}
    shares: dict[str, dict[int, Any]] = {}
    for ratio in _numbered({ratio for table in by_context.values() for ratio in table["ratios"]}):
        of_ratio = {
            context: table["ratios"][ratio] for context, table in by_context.items() if ratio in table["ratios"]
        }
        shares[ratio] = {context: worth["gap_share"] for context, worth in of_ratio.items()}
        for control in sorted({name for worth in of_ratio.values() for name in worth["minus"]}, key=arm_key):
            differences[ratio, control] = {
                context: worth["minus"][control] for context, worth in of_ratio.items() if control in worth["minus"]
            }
    if not shares:
        return parts
    rows = [
        [_minus(ratio, control), *(cells.difference(by_length.get(context)) for context in by_context)]
        for (ratio, control), by_length in differences.items()
    ]
    parts += ["Difference of the loss, in nats per token (below 0: the embeddings are better):\n"]
    parts += [cells.table(["difference", *heads], rows)]
    rows = [
        [cells.code(f"extensible/{ratio}"), *(cells.share(by_length.get(context)) for context in by_context)]
        for ratio, by_length in shares.items()
    ]
    parts += ["Share of the gap, (none - extensible) / (none - full):\n", cells.table(["arm", *heads], rows)]
    remarks = cells.remarks_by_length(differences)
    return [*parts, cells.bullets([*remarks, *cells.refusals(shares)])]


def qa(summary: Summary) -> list[str]:
    """Write scores and the loss of the reference answer, paired differences, retained shares, and all by rank."""
    metrics = [metric for metric in summary["metrics"] if metric != "loss"]
    has_loss = "loss" in summary["metrics"]
    minus = summary["minus"]
    compared = {"extensible": minus, "focus": summary.get("focus_minus", {})}
    compared = {ours: table for ours, table in compared.items() if table}
    parts: list[str] = []
    if metrics:
        parts += ["Scores:\n", _scores(summary, dict.fromkeys(metrics, cells.percent))]
        for ours, table in compared.items():
            parts += [_points_title(ours), _points(table, metrics, ours)]
        title = "Retained share of what the full text gains, (extensible - none) / (full - none), by F1:\n"
        parts += _retained(title, summary.get("retained", {}))
    if has_loss:
        parts += ["Loss of the reference answer, in nats per token (lower is better):\n"]
        parts += [_scores(summary, {"loss": cells.loss})]
        for ours, table in compared.items():
            rows = [
                [_minus(ratio, control, ours), cells.difference(table[ratio][control].get("loss"))]
                for ratio in _numbered(table)
                for control in sorted(table[ratio], key=arm_key)
            ]
            parts += [f"Difference of that loss, in nats per token (below 0: {_NAMES[ours]}):\n"]
            parts += [cells.table(["difference", "loss"], rows)]
        title = "Share of what the full text gains in loss, (none - extensible) / (none - full):\n"
        parts += _retained(title, summary["retained_loss"])
    parts += _by_rank(summary)
    remarks: list[str] = []
    if metrics:
        main = main_score(summary) or metrics[0]
        remarks += _remarks(minus, main, metric_name(main))
    if has_loss:
        remarks += _remarks(minus, "loss", "loss", lower_is_better=True)
    remarks += [
        f"{scores['cut']:,} of {scores['n']:,} texts of {cells.code(arm, cell=False)} were cut to fit the window."
        for arm, scores in summary["arms"].items()
        if scores["cut"]
    ]
    return [*parts, cells.bullets(remarks)]


def speed(summary: Summary) -> list[str]:
    """Write a table per metric, a column per length; in brackets the ratio to "full" at that length."""
    by_length = {f"{int(tokens):,}": summary[tokens] for tokens in _numbered(summary)}
    counts = sorted({medians["n"] for sides in by_length.values() for medians in sides.values()})
    rounds = " to ".join(dict.fromkeys(f"{count:,}" for count in counts[:: max(1, len(counts) - 1)]))
    parts = [
        f"Medians of {rounds} rounds; in brackets the ratio to `full` at the same length (of times: the median of the "
        "ratios within a round).\n"
    ]
    for metric, title in _SPEED.items():
        columns = [
            {side: _beside_full(sides, side, metric) for side, medians in sides.items() if metric in medians}
            for sides in by_length.values()
        ]
        if not any(columns):
            continue
        parts += [f"{title}, by tokens of documents:\n"]
        parts += [_by_arm(list(by_length), columns, lambda text: text, ("side", SIDE_KINDS))]
    return parts


def needle(summary: Summary) -> list[str]:
    """Write the share of correct answers: over all that was measured of an arm, then by length."""
    tasks = sorted(summary["arms"])
    overall = [{arm: scores["correct"] for arm, scores in summary["arms"][task].items()} for task in tasks]
    heads = [metric_name(task) for task in tasks]
    parts = ["Share of correct answers, over all that was measured of an arm (not every arm fits every length):\n"]
    parts += [_by_arm(heads, overall, cells.percent)]
    minus = _by_ratio(summary["minus"])
    for ours, table in (("extensible", minus), ("focus", _by_ratio(summary.get("focus_minus", {})))):
        if table:
            parts += [_points_title(ours), _points(table, tasks, ours)]
    lengths = sorted({cell["tokens"] for cell in summary["cells"]})
    for task in tasks:
        columns: list[dict[str, list[tuple[float, int]]]] = [{} for _ in lengths]
        for cell in (cell for cell in summary["cells"] if cell["task"] == task):
            columns[lengths.index(cell["tokens"])].setdefault(cell["arm"], []).append((cell["correct"], cell["n"]))
        parts += [f"{metric_name(task)}, share of correct answers by tokens of text, over all depths:\n"]
        parts += [_by_arm([f"{length:,}" for length in lengths], columns, _pooled)]
    remarks = [line for task in tasks for line in _remarks(minus, task, f"{metric_name(task)} answers")]
    return [*parts, cells.bullets(remarks)]


def _by_ratio(by_task: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Turn task -> ratio -> control into ratio -> control -> task."""
    minus: dict[str, dict[str, dict[str, Any]]] = {}
    for task, by_ratio in by_task.items():
        for ratio, controls in by_ratio.items():
            for control, difference in controls.items():
                minus.setdefault(ratio, {}).setdefault(control, {})[task] = difference
    return minus


SECTIONS: dict[str, Callable[[Summary], list[str]]] = {"ppl": ppl, "qa": qa, "speed": speed, "needle": needle}


def _by_arm(
    heads: list[str],
    columns: list[Any],
    shown: Callable[[Any], str],
    first: tuple[str, tuple[str, ...] | None] = ("arm", None),
) -> str:
    """Write a row per arm, and a column per mapping from arm to a value, which `shown` turns into a cell."""
    name, kinds = first
    order = (lambda arm: arm_key(arm, kinds)) if kinds else arm_key
    arms = sorted({arm for column in columns for arm in column}, key=order)
    rows = [
        [cells.code(arm), *(shown(column[arm]) if arm in column else cells.ABSENT for column in columns)]
        for arm in arms
    ]
    return cells.table([name, *heads], rows)


def _scores(summary: Summary, shown: Mapping[str, Callable[[Any], str]]) -> str:
    """Write a row per arm: the positions of its text, and a column per metric."""
    rows = [
        [cells.code(arm), cells.positions(scores), *(show(scores[metric]) for metric, show in shown.items())]
        for arm, scores in ((arm, summary["arms"][arm]) for arm in sorted(summary["arms"], key=arm_key))
    ]
    return cells.table(["arm", "positions", *map(metric_name, shown)], rows)


def _by_rank(summary: Summary) -> list[str]:
    """Write a table per metric, a column per rank of the passage with the answer; nothing where there are no ranks."""
    tables = [(rank, summary["by_rank"][rank]) for rank in _numbered(summary["by_rank"])]
    heads = [f"rank {rank} (n {max((scores['n'] for scores in arms.values()), default=0):,})" for rank, arms in tables]
    parts: list[str] = []
    for metric in (metric for metric in summary["metrics"] if tables and metric != "em"):
        columns = [{arm: scores.get(metric) for arm, scores in arms.items()} for _, arms in tables]
        parts += [f"{metric_name(metric)} by the rank of the passage with the answer (0 stands first):\n"]
        parts += [_by_arm(heads, columns, cells.plain_loss if metric == "loss" else cells.plain_percent)]
    return parts


def _retained(title: str, shares: Mapping[str, Any]) -> list[str]:
    """Write a row per ratio, with the reason where a share is refused."""
    rows = [
        [
            cells.code(f"extensible/{ratio}"),
            f"refused: {cells.escaped(share['refused'])}" if "refused" in share else cells.share(share),
        ]
        for ratio, share in ((ratio, shares[ratio]) for ratio in _numbered(shares))
    ]
    return [title, cells.table(["arm", "retained"], rows)] if rows else []


def _points_title(ours: str = "extensible") -> str:
    return f"Paired differences, in percentage points (above 0: {_NAMES[ours]}):\n"


def _points(minus: Minus, columns: Sequence[str], ours: str = "extensible") -> str:
    """Write a row per ratio and control, a column per metric or task."""
    rows = [
        [
            _minus(ratio, control, ours),
            *(cells.difference(minus[ratio][control].get(name), points=True) for name in columns),
        ]
        for ratio in _numbered(minus)
        for control in sorted(minus[ratio], key=arm_key)
    ]
    return cells.table(["difference", *map(metric_name, columns)], rows)


def _remarks(minus: Minus, column: str, name: str, *, lower_is_better: bool = False) -> list[str]:
    """Say what the intervals of one metric's differences show."""
    differences = {
        ratio: {
            control: minus[ratio][control][column]
            for control in sorted(minus[ratio], key=arm_key)
            if column in minus[ratio][control]
        }
        for ratio in _numbered(minus)
    }
    return cells.remarks_by_control(differences, name, lower_is_better=lower_is_better)


def _beside_full(sides: Mapping[str, Any], side: str, metric: str) -> str:
    value, full = sides[side].get(metric), sides.get("full", {}).get(metric)
    if value is None:
        return cells.ABSENT
    if metric == "positions":
        return cells.positions(sides[side])
    ratio = sides[side]["first_token_over_full"] if metric == "first_token_s" else value / full if full else None
    return cells.three_digits(value) + (f" ({ratio:.2f}x)" if ratio is not None and side != "full" else "")


def _pooled(shares: list[tuple[float, int]]) -> str:
    total = sum(n for _, n in shares)
    return cells.plain_percent(sum(share * n for share, n in shares) / total if total else None)


def _minus(ratio: str, control: str, ours: str = "extensible") -> str:
    other = control if control in _WITHOUT_RATIO else f"{control}/{ratio}"
    return f"{cells.code(f'{ours}/{ratio}')} - {cells.code(other)}"


def metric_name(name: str) -> str:
    """Name a metric or a task as people write it."""
    return METRIC_NAMES.get(name) or cells.escaped(name.replace("_", "-"))


def _numbered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=int)
