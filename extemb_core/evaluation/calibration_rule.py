"""Choose the entry layer that suits an LLM, by the losses measured at each.

1. A layer at which text is read worse than no text at all, beyond noise and at any of the ratios, is out. Answers do
   not show this: some layers are equal on answers but spoil text (docs/experiments.md).
2. Of the others, the one with the lowest mean loss over the ratios above 1 is the best, by answers where there are
   questions and by text otherwise. At ratio 1 every layer reads about the same.
3. The earliest layer whose loss is not above the best one's beyond noise is taken: with fewer layers to run, text is
   compressed sooner (docs/decisions/0004-entry-layer.md).

Noise is the 95% interval of the paired difference over samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from extemb_core.evaluation.runs import Sample
from extemb_core.evaluation.statistics import mean_with_interval

Values = np.ndarray[Any, Any]


def choose_layer(
    tasks: Mapping[str, Sequence[Sample]], layers: Sequence[int], ratios: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """Choose the entry layer.

    Args:
        tasks: "text" and perhaps "answers" -> samples, each with its number of `target_tokens` and `arms`: losses of
            "none", "full", "truncated/RATIO" and "LAYER/RATIO".
        layers: Candidates, in order.
        ratios: Ratios measured.
        seed: Random seed of the bootstrap.

    Returns:
        `layer`, `best` and `reason`; `unfit`, the layers that are out, each with the ratios that show it; and `tasks`:
        for each task its `n`, every arm's mean loss over tokens with its 95% interval, and for each layer the mean over
        ratios above 1 (`mean`) and its difference from the best layer's (`minus_best`).
    """
    decisive = "answers" if "answers" in tasks else "text"
    coarse = [ratio for ratio in sorted(ratios) if ratio > 1]

    def losses(kind: str, arm: str) -> Values:
        return np.array([sample["arms"][arm] for sample in tasks[kind]])

    def mean(kind: str, values: Values) -> dict[str, Any]:
        weights = np.array([sample["target_tokens"] for sample in tasks[kind]], dtype=float)
        return mean_with_interval(values, np.arange(len(values)), seed, weights)

    def over_ratios(kind: str, layer: int) -> Values:
        values: Values = np.mean([losses(kind, f"{layer}/{ratio}") for ratio in coarse], axis=0)
        return values

    unfit: dict[str, list[int]] = {}
    for layer in layers:
        gaps = {ratio: mean("text", losses("text", f"{layer}/{ratio}") - losses("text", "none")) for ratio in coarse}
        if worse := [ratio for ratio, gap in gaps.items() if _above(gap)]:
            unfit[str(layer)] = worse
    fit = [layer for layer in layers if str(layer) not in unfit] or list(layers)
    best = min(fit, key=lambda layer: mean(decisive, over_ratios(decisive, layer))["mean"])
    table: dict[str, dict[str, Any]] = {
        kind: {
            "n": len(samples),
            "arms": {arm: mean(kind, losses(kind, arm)) for arm in samples[0]["arms"]},
            "layers": {
                str(layer): {
                    "mean": mean(kind, over_ratios(kind, layer)),
                    "minus_best": mean(kind, over_ratios(kind, layer) - over_ratios(kind, best)),
                }
                for layer in layers
            },
        }
        for kind, samples in tasks.items()
    }
    minus_best = {layer: table[decisive]["layers"][str(layer)]["minus_best"] for layer in fit}
    layer = next(layer for layer, gap in minus_best.items() if not _above(gap))
    reason = f"mean loss of {decisive} over ratios {', '.join(map(str, coarse))}"
    if layer == best:
        reason = f"the lowest {reason}"
    else:
        gap = minus_best[layer]
        low, high = gap["interval"]
        reason = (
            f"the earliest that is level with layer {best}, the best by {reason} "
            f"({gap['mean']:+.3f} nats, 95% interval {low:+.3f} to {high:+.3f})"
        )
    if len(unfit) == len(layers):
        reason += "; but text is read worse than no text at every candidate: try other layers"
    elif unfit:
        out = ", ".join(f"{layer} (ratio {', '.join(map(str, ratios))})" for layer, ratios in unfit.items())
        reason += f"; out, because text is read worse than no text there: layer {out}"
    return {"layer": layer, "best": best, "reason": reason, "unfit": unfit, "tasks": table}


def _above(difference: Mapping[str, Any]) -> bool:
    """Return whether a mean is above 0 beyond noise."""
    return bool(difference["interval"][0] > 0)
