"""Numbers, names and tables as they stand on the results page."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Scored = Mapping[str, Any]
"""A "mean" with its "interval", or the reason for which it is "refused"."""

ABSENT = "–"  # noqa: RUF001
_VERDICTS = ("better", "not distinguishable", "worse", "without an interval")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> str:
    """Write a Markdown table; every column but the first is aligned to the right. Cells are Markdown already."""
    rule = ["---"] + ["---:" if right else "---"] * (len(heads) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, rule, *rows))


def bullets(lines: Iterable[str]) -> str:
    """Write a Markdown list; nothing for no lines."""
    return "".join(f"- {line}\n" for line in lines)


def trainings(records: Mapping[str, Scored]) -> str:
    """Say which records are of which weights, if records of one embedder are of several; nothing otherwise."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name, record in records.items():
        weights = str(record["fingerprint"])[:8], _dtype(record)
        found.setdefault(str(record["config"]["embedder"]), {}).setdefault(weights, []).append(name)
    return "".join(
        f"\n{code(embedder)} has several fingerprints in these records (its weights or their dtype differ): "
        + "; ".join(
            f"{code(fingerprint)} in {code(dtype)}: {', '.join(of)}" for (fingerprint, dtype), of in parts.items()
        )
        + ".\n"
        for embedder, parts in found.items()
        if len({fingerprint for fingerprint, _ in parts}) > 1
    )


def _dtype(record: Scored) -> str:
    """Return the data type of the loaded weights; "auto" is float32 on a CPU."""
    config, accelerator = record["config"], record["provenance"]["hardware"]["accelerator"]
    on_cpu = accelerator is None or config.get("device") == "cpu"
    return "float32" if config["dtype"] == "auto" and on_cpu else str(config["dtype"])


def escaped(text: str) -> str:
    """Escape a text of a record, so that Markdown shows it literally, also in a table."""
    # An underscore inside a word has no meaning in Markdown, and stays readable as text.
    return re.sub(r"([\\`*\[\]<>|#~&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", " ".join(text.split()))


def code(text: str, *, cell: bool = True) -> str:
    """Write a code span. `cell`: inside a table, where a "|" ends the cell even in code and has to be escaped."""
    text = text.replace("\n", " ")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text.replace('|', chr(92) + '|') if cell else text}{pad}{fence}"


def perplexity(arm: Scored) -> str:
    """Show a perplexity with the interval of the loss, turned into perplexities."""
    interval = arm["interval"] and [math.exp(end) for end in arm["interval"]]
    return _with_interval(arm["perplexity"], interval, lambda value: f"{value:,.{2 if value < 100 else 0}f}")


def positions(arm: Scored) -> str:
    """Show mean positions; a fraction only where there is one."""
    return f"{arm['positions']:,.1f}".removesuffix(".0")


def cut(arm: Scored) -> str:
    """Say, after an arm's result, how many texts did not fit the window; nothing if all did."""
    return f" ({arm['cut']:,} of {arm['n']:,} cut)" if arm.get("cut") else ""


def loss(scored: Scored) -> str:
    """Show nats per token with their interval."""
    return _with_interval(scored["mean"], scored["interval"], plain_loss)


def plain_loss(value: float | None) -> str:
    """Show nats per token that have no interval."""
    return ABSENT if value is None else f"{value:.3f}"


def percent(scored: Scored) -> str:
    """Show a score of 0 to 1 with its interval."""
    return _with_interval(scored["mean"], scored["interval"], lambda value: f"{100 * value:.1f}", unit="%")


def plain_percent(value: float | None) -> str:
    """Show a share of 0 to 1 that has no interval."""
    return ABSENT if value is None else f"{100 * value:.1f}%"


def difference(scored: Scored | None, *, points: bool = False) -> str:
    """Show a difference with its sign, bold where the interval excludes 0; `points`: in percentage points."""
    if scored is None:
        return ABSENT
    # Adding 0.0 turns the -0.0 that rounding leaves into 0.0, which would be shown as "-0.000" otherwise.
    shown = (lambda v: f"{round(100 * v, 1) + 0.0:+.1f}") if points else (lambda v: f"{round(v, 3) + 0.0:+.3f}")
    return _bold(_with_interval(scored["mean"], scored["interval"], shown), scored)


def best_marked(shown: Mapping[str, str], means: Mapping[str, float], best: Callable[..., str] = max) -> dict[str, str]:
    """Mark in bold the cell of the best way, and those that show the same value.

    Args:
        shown: Way -> a cell that begins with its mean.
        means: Way -> that mean.
        best: `max` or `min`.
    """
    first = shown[best(means, key=lambda way: means[way])].split(";")[0]
    return {way: f"**{cell}**" if cell.split(";")[0] == first else cell for way, cell in shown.items()}


def share(scored: Scored | None) -> str:
    """Show a share of a gain, bold where the interval excludes 0; "refused" without the reason."""
    if scored is None:
        return ABSENT
    return "refused" if "refused" in scored else _bold(percent(scored), scored)


def three_digits(value: float) -> str:
    """Show a measured quantity to three digits, or to whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def remarks_by_length(differences: Mapping[tuple[str, str], Mapping[int, Scored]]) -> list[str]:
    """Say what the intervals of differences of a loss show; ratios with the same remark share a line.

    Args:
        differences: (ratio, control) -> length -> difference of the loss, extensible minus control.
    """
    controls = [control for _, control in differences]
    ratios_by_remark: dict[tuple[str, str], list[str]] = {}
    for (ratio, control), by_length in differences.items():
        lengths_by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
        for length, scored in sorted(by_length.items()):
            lengths_by_verdict[_verdict(scored, lower_is_better=True)].append(f"{length:,}")
        clauses = [
            f"{verdict} at {'every length measured' if len(lengths) == len(by_length) else ', '.join(lengths)}"
            for verdict, lengths in lengths_by_verdict.items()
            if lengths
        ]
        ratios_by_remark.setdefault((control, "; ".join(clauses)), []).append(ratio)
    return [
        f"At {_ratios(ratios)} against {code(control, cell=False)}, by loss: {remark}."
        for (control, remark), ratios in sorted(ratios_by_remark.items(), key=lambda entry: controls.index(entry[0][0]))
    ]


def remarks_by_control(
    differences: Mapping[str, Mapping[str, Scored]], metric: str, *, lower_is_better: bool = False
) -> list[str]:
    """Say what the intervals of differences of a score show; ratios with the same remark share a line.

    Args:
        differences: Ratio -> control -> difference of the score, extensible minus control.
        metric: The score's name.
        lower_is_better: Whether lower scores are better.
    """
    words = ("better than", "not distinguishable from", "worse than", "without an interval against")
    ratios_by_remark: dict[str, list[str]] = {}
    for ratio, by_control in differences.items():
        controls_by_verdict: dict[str, list[str]] = {verdict: [] for verdict in _VERDICTS}
        for control, scored in by_control.items():
            controls_by_verdict[_verdict(scored, lower_is_better=lower_is_better)].append(code(control, cell=False))
        clauses = [
            f"{word} {', '.join(controls)}"
            for word, controls in zip(words, controls_by_verdict.values(), strict=True)
            if controls
        ]
        ratios_by_remark.setdefault("; ".join(clauses), []).append(ratio)
    return [f"At {_ratios(ratios)}, by {metric}: {remark}." for remark, ratios in ratios_by_remark.items() if remark]


def refusals(shares: Mapping[str, Mapping[int, Scored]]) -> list[str]:
    """Say why shares are refused; ratios with the same reason at the same lengths share a line.

    Args:
        shares: Ratio -> length -> share.
    """
    ratios_by_refusal: dict[tuple[str, str], list[str]] = {}
    for ratio, by_length in shares.items():
        lengths_by_reason: dict[str, list[str]] = {}
        for length, scored in sorted(by_length.items()):
            if "refused" in scored:
                lengths_by_reason.setdefault(scored["refused"], []).append(f"{length:,}")
        for reason, lengths in lengths_by_reason.items():
            ratios_by_refusal.setdefault((reason, ", ".join(lengths)), []).append(ratio)
    return [
        f"Share of the gap refused at {_ratios(ratios)}, length {lengths}: {escaped(reason).rstrip('.')}."
        for (reason, lengths), ratios in ratios_by_refusal.items()
    ]


def _ratios(ratios: Sequence[str]) -> str:
    return f"ratio{'s' * (len(ratios) > 1)} {', '.join(ratios)}"


def _verdict(scored: Scored, *, lower_is_better: bool = False) -> str:
    """Choose one of `_VERDICTS`, from the interval alone."""
    if scored["interval"] is None:
        return _VERDICTS[3]
    low, high = scored["interval"]
    if low <= 0 <= high:
        return _VERDICTS[1]
    return _VERDICTS[0] if (high < 0) == lower_is_better else _VERDICTS[2]


def _with_interval(
    value: float, interval: Sequence[float] | None, shown: Callable[[float], str], unit: str = ""
) -> str:
    return shown(value) + unit + (f" [{shown(interval[0])}, {shown(interval[1])}]" if interval else "")


def _bold(text: str, scored: Scored) -> str:
    interval = scored["interval"]
    return f"**{text}**" if interval and not interval[0] <= 0 <= interval[1] else text
