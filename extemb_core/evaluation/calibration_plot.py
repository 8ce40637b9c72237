"""Plot a calibration: loss by entry layer, a line for each ratio, beside the controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extemb_core.errors import optional_import
from extemb_core.utils.files import atomic_write

# Okabe and Ito's colours, which colour-blind readers can tell apart: one per ratio; truncated text is dashed.
_COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
_MARKERS = "os^Dvp"


def plot_losses(record: Mapping[str, Any], file: Path) -> None:
    """Draw a panel for each task of a record of kind "calibration" into a PNG.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    summary, config = record["summary"], record["config"]
    figure = optional_import("matplotlib.figure", "eval", "drawing the plot", "matplotlib").Figure(
        figsize=(9, 4.6), dpi=100, layout="constrained"
    )
    figure.suptitle(f"{config['llm']}: layer {summary['layer']} is chosen", fontsize=11, parse_math=False)
    panels = figure.subplots(1, len(summary["tasks"]), squeeze=False)[0]
    for axes, (kind, table) in zip(panels, summary["tasks"].items(), strict=True):
        losses = {arm: value["mean"] for arm, value in table["arms"].items()}
        layers = [int(layer) for layer in table["layers"]]
        axes.axvspan(summary["layer"] - 0.25, summary["layer"] + 0.25, color="#999999", alpha=0.25, linewidth=0)
        axes.axhline(losses["none"], color="#666666", linestyle=":", label="no text")
        for at, ratio in enumerate(sorted(config["ratios"])):
            style = {"color": _COLOURS[at % len(_COLOURS)], "linewidth": 1.5}
            values = [losses[f"{layer}/{ratio}"] for layer in layers]
            axes.plot(layers, values, marker=_MARKERS[at % len(_MARKERS)], label=f"ratio {ratio}", **style)
            if (cut := losses.get(f"truncated/{ratio}")) is not None:
                axes.axhline(cut, linestyle="--", alpha=0.6, label=f"cut to 1/{ratio}", **style)
        axes.axhline(losses["full"], color="#000000", linestyle="-.", label="full text")
        axes.set_xticks(layers)
        axes.set_xlabel("entry layer")
        axes.set_title(f"{kind}, n = {table['n']}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("loss in nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
