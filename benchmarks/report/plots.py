"""Plots of evaluation records: pure functions from a record to a matplotlib Figure.

Figures are made with matplotlib's object API on the Agg canvas, so no window opens and no global state is touched.
Every one is 900 px wide at 100 dpi. Colours are those of Okabe and Ito, which colour-blind readers tell apart; the
marker shows the kind of arm too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extemb_core.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

ARM_KINDS = (
    "none", "random", "random_states", "wrong", "anchors", "truncated", "nearest", "streaming", "lingua", "chosen",
    "extensible", "focus", "full",
)  # fmt: skip
SIDE_KINDS = ("full", "online", "offline")
METRIC_NAMES = {"em": "EM", "f1": "F1", "contained": "contained", "rouge_l": "ROUGE-L", "loss": "loss"}

# kind -> colour, marker
_STYLES = {
    "none": ("#666666", "x"),
    "random": ("#999999", "d"),
    "random_states": ("#999999", "p"),
    "wrong": ("#CC79A7", "v"),
    "anchors": ("#56B4E9", "<"),
    "truncated": ("#D55E00", "s"),
    "nearest": ("#D55E00", "s"),
    "streaming": ("#E69F00", "P"),
    "lingua": ("#009E73", "^"),
    "chosen": ("#E69F00", "D"),
    "extensible": ("#0072B2", "o"),
    "focus": ("#7B3294", "X"),
    "full": ("#000000", "*"),
    "online": ("#D55E00", "s"),
    "offline": ("#0072B2", "o"),
}
_OTHER_STYLE = ("#56B4E9", "h")
_DASHES = {"none": (0, (1, 1.5)), "full": (0, (5, 2))}
_FONT, _TITLE_FONT = 10, 11
_ABSENT = "#DDDDDD"


def arm_key(arm: str, kinds: tuple[str, ...] = ARM_KINDS) -> tuple[int, str, int]:
    """Order arms as every table and legend does: controls from weakest to strongest, then by ratio."""
    kind, ratio = split_arm(arm)
    return (kinds.index(kind) if kind in kinds else len(kinds) - 4, kind, ratio or 0)


def split_arm(arm: str) -> tuple[str, int | None]:
    """Split an arm into kind and ratio: ("nearest", 8) of "nearest/8"; an arm without a ratio has None."""
    kind, _, ratio = arm.partition("/")
    return (kind, int(ratio)) if ratio.isdigit() else (arm, None)


def source(record: Record) -> str:
    """Describe in one line what was measured: LLM, data, n."""
    files = [entry["file"] for entry in record["data"]]
    data = [files[0] if len(files) == 1 else f"{len(files)} files"] if files else []
    return ", ".join([str(record["config"]["llm"]), *data, f"n = {record['n']:,}"])


def figures(record: Record) -> dict[str, Figure]:
    """Draw every plot of a record, by a short name that goes into its file's name."""
    if record["kind"] == "qa":
        metrics = record["summary"]["metrics"]
        scores = {"quality": quality(record)} if metrics != ["loss"] else {}
        return scores | ({"loss": quality(record, "loss")} if "loss" in metrics else {})
    if record["kind"] == "ppl":
        return {"perplexity": perplexity(record)}
    if record["kind"] == "speed":
        return {"speed": speed(record)}
    return {task: needle(record, task) for task in sorted({c["task"] for c in record["summary"]["cells"]})}


def save(figure: Figure, file: Path) -> None:
    """Write a PNG. The same record and version of matplotlib give the same bytes: it holds no date or program name."""
    figure.savefig(file, format="png", metadata={"Software": None})


def quality(record: Record, metric: str | None = None) -> Figure:
    """Draw question answering: a score, or the loss, against the mean positions that the text takes.

    One line per kind of arm, a point per ratio with its 95% interval; "none" and "full", which take no ratio, are
    horizontal lines over bands of their intervals.

    Args:
        record: Record of kind "qa".
        metric: One of the record's; F1 when not given, or else its first.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    summary = record["summary"]
    metric = metric or main_score(summary) or "loss"
    name = METRIC_NAMES.get(metric, metric)
    title = "Loss of the reference answer" if metric == "loss" else name
    figure = _figure(4.6, f"{title} against the positions that the text takes", source(record))
    from matplotlib.ticker import PercentFormatter

    axes = figure.add_subplot()
    points = {arm: point[metric] | {"positions": point["positions"]} for arm, point in summary["arms"].items()}
    _against_positions(figure, axes, points)
    if metric == "loss":
        axes.set_ylabel("loss in nats per token (mean, 95% interval)")
        return figure
    axes.set_ylabel(f"{name} (mean, 95% interval)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    return figure


def overview(sets: Mapping[str, Record], loss: bool = False) -> Figure:
    """Draw several sets of questions side by side, as `quality` draws one: a panel for each.

    Args:
        sets: Name of a panel -> its record, of kind "qa".
        loss: Draw the loss of the reference answer instead of the set's main score.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    what = "Loss of the reference answer, in nats per token," if loss else "Quality"
    figure, panels = _panels_of(sets, f"{what} against positions of the LLM's window", "one point per ratio, means")
    for axes, (name, record) in zip(panels, sets.items(), strict=True):
        metric = "loss" if loss else str(main_score(record["summary"]))
        arms = {arm: point for arm, point in record["summary"]["arms"].items() if metric in point}
        _panel(axes, name, arms, metric, {arm: point["positions"] for arm, point in arms.items()})
        _ratio_ticks(axes, arms, _by_kind(arms)["extensible"], short=True)
        _finish(axes)
    _legend(figure, loc="outside lower center", ncols=7)
    return figure


def quality_by_time(sets: Mapping[str, Record], times: Mapping[str, Record]) -> Figure:
    """Draw quality against the time to the first token, a panel for each set of questions that was timed.

    Args:
        sets: Name of a panel -> its record, of kind "qa".
        times: The same names -> times from `benchmarks/first_token.py`; ways without one are left out.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    subtitle = "one point per ratio, means; times as shares of those with the full text, text compressed before"
    figure, panels = _panels_of(times, "Quality against the time to the first token", subtitle)
    for axes, (name, timed) in zip(panels, times.items(), strict=True):
        summary = sets[name]["summary"]
        x = {way: row["over_full"] for way, row in timed["ways"].items()}
        arms = {arm: point for arm, point in summary["arms"].items() if arm in x or arm == "none"}
        seconds = f"{timed['ways']['full']['median_seconds']:.1f} s"
        _panel(axes, f"{name} (full {seconds})", arms, str(main_score(summary)), x)
        ticks = [
            tick
            for tick in (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
            if min(x.values()) / 1.4 <= tick <= max(x.values()) * 1.4
        ]
        axes.set_xticks(ticks, [f"1/{1 / tick:.0f}" if tick < 1 else f"{tick:.0f}" for tick in ticks])
        axes.set_xticks([], minor=True)
        _finish(axes)
    _legend(figure, loc="outside lower center", ncols=7)
    return figure


def _panels_of(sets: Iterable[str], title: str, subtitle: str) -> tuple[Figure, list[Axes]]:
    """Make a figure with a panel for each set, three side by side."""
    count = len(list(sets))
    columns = min(3, count)
    rows = -(-count // columns)
    figure = _figure(0.9 + 2.6 * rows, title, subtitle)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _panel(axes: Axes, name: str, arms: Mapping[str, Any], metric: str, x: Mapping[str, float]) -> None:
    """Draw the means of a metric: a line for each kind of arm with a ratio, a level line for others."""
    from matplotlib.ticker import PercentFormatter

    for kind, by_ratio in _by_kind(arms).items():
        means = [arms[arm][metric]["mean"] for arm in by_ratio.values()]
        if None in by_ratio:
            axes.axhline(means[0], color=_STYLES[kind][0], linestyle=_DASHES.get(kind, "-"), label=kind)
        else:
            axes.plot([x[arm] for arm in by_ratio.values()], means, label=kind, **_line_style(kind))
    axes.set_xscale("log")
    score = "" if metric == "loss" else f", {METRIC_NAMES.get(metric, metric)}"
    axes.set_title(f"{name}{score}", fontsize=_FONT, parse_math=False)
    if metric != "loss":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(bottom=0)


def main_score(summary: Mapping[str, Any]) -> str | None:
    """Return the main score of a set: F1, or else its first score; None if there is only the loss."""
    scores = [metric for metric in summary["metrics"] if metric != "loss"]
    return "f1" if "f1" in scores else next(iter(scores), None)


def perplexity(record: Record) -> Figure:
    """Draw perplexity against the length of context: one line per arm, lighter the coarser the ratio.

    With a single length, perplexity is drawn against the positions that the context takes.

    Args:
        record: Record of kind "ppl".

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    summary = record["summary"]
    contexts = sorted(summary, key=int)
    if len(contexts) == 1:
        return _perplexity_by_positions(record, contexts[0])
    figure = _figure(4.6, "Perplexity by length of context", source(record))
    axes = figure.add_subplot()
    arms = {arm for context in contexts for arm in summary[context]["arms"]}
    lines = {
        arm: {int(c): summary[c]["arms"][arm]["perplexity"] for c in contexts if arm in summary[c]["arms"]}
        for arm in arms
    }
    _draw_lines(axes, lines)
    _length_axis(axes, map(int, contexts), "tokens of context (log, 1K = 1,024)")
    values = [value for line in lines.values() for value in line.values()]
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
        _plain_ticks(axes)
    axes.set_ylabel("perplexity (lower is better)")
    _finish(axes)
    _legend(figure, loc="outside right center")
    return figure


def _perplexity_by_positions(record: Record, context: str) -> Figure:
    """Draw one length of context. Without intervals: those of single arms are wide, and comparisons are paired."""
    figure = _figure(4.6, f"Perplexity after {int(context):,} tokens of context, by positions", source(record))
    axes = figure.add_subplot()
    arms = record["summary"][context]["arms"]
    points = {
        arm: {"positions": point["positions"], "mean": point["perplexity"], "interval": None}
        for arm, point in arms.items()
        if arm != "streaming" or "full" not in arms  # "streaming" equals "full" where the full text fits
    }
    _against_positions(figure, axes, points)
    axes.set_ylabel("perplexity (lower is better)")
    return figure


def needle(record: Record, task: str) -> Figure:
    """Draw heat maps of a needle task, a panel per arm: share of correct answers by length and depth.

    A cell that was not measured, for instance because the text does not fit, is grey and hatched.

    Args:
        record: Record of kind "needle".
        task: "passkey" or "key_value".

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    import numpy as np

    cells = [cell for cell in record["summary"]["cells"] if cell["task"] == task]
    lengths = sorted({cell["tokens"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    panel_of_arm = _panels({cell["arm"] for cell in cells})
    rows, columns = (1 + max(at) for at in zip(*panel_of_arm.values(), strict=True))
    figure = _figure(
        1.5 + rows * (0.4 + 0.24 * max(len(depths), 5)),
        f"{task.replace('_', '-')}: share of correct answers",
        source(record),
    )
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat:
        axes.set_axis_off()
    for arm, (row, column) in panel_of_arm.items():
        shares = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell["arm"] == arm:
                shares[depths.index(cell["depth"]), lengths.index(cell["tokens"])] = cell["correct"]
        axes = panels[row, column]
        axes.set_axis_on()
        axes.patch.set(facecolor=_ABSENT, hatch="////", edgecolor="#AAAAAA", linewidth=0)
        corners = [np.arange(size + 1) - 0.5 for size in (len(lengths), len(depths))]
        image = axes.pcolormesh(*corners, shares, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        axes.set_title(arm, fontsize=_FONT, parse_math=False)
        axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths], rotation=90, fontsize=_FONT - 1)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=_FONT - 1)
        axes.set_ylim(len(depths) - 0.5, -0.5)
        axes.tick_params(length=0, labelbottom=(row + 1, column) not in panel_of_arm.values(), labelleft=column == 0)
        axes.spines[:].set_visible(False)
    figure.supxlabel("tokens of text (1K = 1,024)", fontsize=_FONT)
    figure.supylabel("depth of the needle (0% = start)", fontsize=_FONT)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02)
    bar.set_label("share correct", fontsize=_FONT)
    bar.ax.tick_params(labelsize=_FONT - 1)
    return figure


def speed(record: Record) -> Figure:
    """Draw time to the first token and peak memory against the length of the documents, one line per side.

    Args:
        record: Record of kind "speed".

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    summary = record["summary"]
    lengths = sorted(summary, key=int)
    figure = _figure(4.4, "Time to first token and peak memory, by length", source(record))
    sides = {side for length in lengths for side in summary[length]}
    panels = figure.subplots(1, 2)
    for axes, (key, label) in zip(
        panels,
        (("first_token_s", "time to first token, s (log)"), ("peak_mib", "memory beyond the weights, MiB (log)")),
        strict=True,
    ):
        lines = {  # a log axis has no 0
            side: {int(n): summary[n][side][key] for n in lengths if summary[n].get(side, {}).get(key)}
            for side in sides
        }
        _draw_lines(axes, lines, SIDE_KINDS)
        _length_axis(axes, map(int, lengths), "tokens of documents (log, 1K = 1,024)")
        if axes.lines and any(len(line.get_xdata()) for line in axes.lines):
            axes.set_yscale("log")
            _plain_ticks(axes)
        else:
            axes.set_yticks([])
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", fontsize=_FONT)
        axes.set_ylabel(label)
        _finish(axes)
    _legend(figure, SIDE_KINDS, loc="outside lower center", ncols=5)
    return figure


def _figure(height: float, title: str, subtitle: str) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "eval", "drawing plots") from error
    figure = Figure(figsize=(9, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{subtitle}", fontsize=_TITLE_FONT, parse_math=False)  # a name may hold a "$"
    return figure


def _draw_lines(axes: Axes, lines: Mapping[str, Mapping[int, float]], kinds: tuple[str, ...] = ARM_KINDS) -> None:
    """Draw one line per arm through its (x, y), lighter the coarser the ratio."""
    for kind, arms in _by_kind(lines, kinds).items():
        for rank, arm in enumerate(arms.values()):
            style = _line_style(kind, coarse=rank / max(1, len(arms) - 1))
            axes.plot(list(lines[arm]), list(lines[arm].values()), label=arm, **style)


def _against_positions(figure: Figure, axes: Axes, points: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw one line per kind of arm, a point per ratio; arms without a ratio are lines over bands of their intervals.

    Args:
        figure: Figure of `axes`.
        axes: Axes to draw on.
        points: Arm -> positions, mean, interval (two ends, or None).
    """
    from matplotlib.transforms import ScaledTranslation

    kinds = _by_kind(points)
    lines = [kind for kind, arms in kinds.items() if None not in arms]
    for at, kind in enumerate(lines):
        of_kind = [points[arm] for arm in kinds[kind].values()]
        line, caps, bars = axes.errorbar(
            [point["positions"] for point in of_kind],
            [point["mean"] for point in of_kind],
            yerr=_bars(of_kind),
            label=kind,
            capsize=2,
            elinewidth=1,
            **_line_style(kind),
        )
        # Shifted by a few typographic points, so that bars do not hide each other; the data stay unchanged.
        aside = ScaledTranslation((at - (len(lines) - 1) / 2) * 5 / 72, 0, figure.dpi_scale_trans)
        for artist in (line, *caps, *bars):
            artist.set_transform(axes.transData + aside)
    for kind in ("none", "streaming", "full"):
        if kind in points:
            colour = _STYLES[kind][0]
            if points[kind]["interval"]:
                axes.axhspan(*points[kind]["interval"], color=colour, alpha=0.08, linewidth=0)
            axes.axhline(
                points[kind]["mean"], color=colour, linestyle=_DASHES.get(kind, "-"), linewidth=1.5, label=kind
            )
    axes.set_xscale("log")
    if lines:
        _ratio_ticks(axes, points, kinds["extensible" if "extensible" in lines else lines[-1]])
    axes.set_xlabel("mean positions of the LLM's window (log)")
    _finish(axes)
    _legend(figure, loc="outside right center")


def _by_kind(arms: Iterable[str], kinds: tuple[str, ...] = ARM_KINDS) -> dict[str, dict[int | None, str]]:
    """Group arms: kind -> ratio -> arm, all in the order of tables and legends."""
    grouped: dict[str, dict[int | None, str]] = {}
    for arm in sorted(set(arms), key=lambda arm: arm_key(arm, kinds)):
        kind, ratio = split_arm(arm)
        grouped.setdefault(kind, {})[ratio] = arm
    return grouped


def _panels(arms: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Give each arm's panel a row and a column: those without a ratio first, then a row per kind, a column per ratio.

    With at most one ratio, all panels form one row.
    """
    kinds = _by_kind(arms)
    single = [by_ratio[None] for by_ratio in kinds.values() if None in by_ratio]
    several = [by_ratio for by_ratio in kinds.values() if None not in by_ratio]
    ratios = sorted({ratio or 0 for by_ratio in several for ratio in by_ratio})
    if len(ratios) <= 1:
        in_order = (arm for by_ratio in kinds.values() for arm in by_ratio.values())
        return {arm: (0, column) for column, arm in enumerate(in_order)}
    panels = {arm: (0, column) for column, arm in enumerate(single)}
    for row, by_ratio in enumerate(several, start=bool(single)):
        panels |= {arm: (row, ratios.index(ratio or 0)) for ratio, arm in by_ratio.items()}
    return panels


def _line_style(kind: str, coarse: float = 0.0) -> dict[str, Any]:
    """Choose colour, marker and width of a kind's lines.

    `coarse` goes from 0 for its finest ratio to 1 for its coarsest: coarser lines are lighter, with smaller markers, so
    that they do not hide finer ones below them.
    """
    colour, marker = _STYLES.get(kind, _OTHER_STYLE)
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return {
        "color": tuple(channel + (1 - channel) * 0.62 * coarse for channel in channels),
        "marker": marker,
        "markersize": 8 if marker == "*" else 7.5 - 3.5 * coarse,
        "linestyle": _DASHES.get(kind, "-"),
        "linewidth": 2.0 if kind in ("extensible", "offline") else 1.3,
    }


def _bars(scores: list[Mapping[str, Any]]) -> list[list[float]]:
    """Return the error bars below and above each mean, 0 without an interval or if it does not include the mean."""
    ends = [score["interval"] or (score["mean"], score["mean"]) for score in scores]
    return [
        [max(0.0, score["mean"] - low) for score, (low, _) in zip(scores, ends, strict=True)],
        [max(0.0, high - score["mean"]) for score, (_, high) in zip(scores, ends, strict=True)],
    ]


def _ratio_ticks(
    axes: Axes, arms: Mapping[str, Any], by_ratio: Mapping[int | None, str], *, short: bool = False
) -> None:
    """Put ticks at the ratios, labelled with their mean positions and, unless `short`, the ratios themselves."""
    positions = [arms[arm]["positions"] for arm in by_ratio.values()]
    pairs = zip(positions, by_ratio, strict=True)
    labels = [f"{mean:,.0f}" + ("" if short else f"\nratio {ratio}") for mean, ratio in pairs]
    axes.set_xlim(max(min(positions) / 1.4, 0.5), max(positions) * 1.4)
    axes.set_xticks(positions, labels)
    axes.set_xticks([], minor=True)


def _length_axis(axes: Axes, lengths: Iterable[int], label: str) -> None:
    """Make a log axis with a tick at every measured length."""
    lengths = list(lengths)
    axes.set_xscale("log", base=2)
    crowded = len(lengths) > 6
    axes.set_xticks(lengths, [_tokens(length) for length in lengths], rotation=45 if crowded else 0)
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)


def _plain_ticks(axes: Axes) -> None:
    """Write the numbers of a log axis in plain form, at 1, 2 and 5 of every decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    written: Callable[[float, int], str] = lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"  # noqa: E731
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(written))
    axes.yaxis.set_minor_locator(NullLocator())


def _legend(figure: Figure, kinds: tuple[str, ...] = ARM_KINDS, **where: Any) -> None:
    """Put one legend beside all axes, in the order of tables."""
    found = [zip(*reversed(axes.get_legend_handles_labels()), strict=True) for axes in figure.axes]
    by_label = dict(entry for of_axes in found for entry in of_axes)
    labels = sorted(by_label, key=lambda arm: arm_key(arm, kinds))
    figure.legend([by_label[label] for label in labels], labels, frameon=False, fontsize=_FONT, **where)


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=_FONT)
    axes.xaxis.label.set_fontsize(_FONT)
    axes.yaxis.label.set_fontsize(_FONT)


def _tokens(length: int) -> str:
    return f"{length // 1024:,}K" if length and length % 1024 == 0 else f"{length:,}"
