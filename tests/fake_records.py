"""Records of evaluation runs as the four kinds write them, with invented numbers that follow simple formulas."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from extemb_core.evaluation.runs import RECORD_VERSION

RATIOS = (4, 8, 16, 32)


def interval(mean: float, half: float) -> list[float]:
    return [mean - half, mean + half]


def measured(mean: float, half: float, n: int = 20) -> dict[str, Any]:
    return {"mean": mean, "interval": interval(mean, half), "n": n}


def record(kind: str, summary: dict[str, Any], n: int, data: str, **settings: Any) -> dict[str, Any]:
    return {
        "version": RECORD_VERSION,
        "kind": kind,
        "config": {
            "llm": "smollm2-135m-instruct",
            "embedder": "smollm2-135m-instruct",
            "data": [data] if data else [],
            "ratios": list(RATIOS),
            "seed": 3,
            "dtype": "auto",
            **settings,
        },
        "data": [{"file": data, "sha256": "c470b046" * 8}] if data else [],
        "fingerprint": "37db4103d6a8597be7408495ce665bcd",
        "embedder": None,
        "provenance": {
            "command": f"extemb eval {kind} --llm smollm2-135m-instruct --data {data} --json {kind}.json",
            "date": "2026-11-24",
            "git": {"revision": "469f4685b96165c3993ed1f19d36a0958723eda3", "dirty": False},
            "versions": {"python": "3.11.7"},
            "hardware": {
                "cpu": "AMD EPYC",
                "cpu_cores": 2,
                "threads": 2,
                "memory_gib": 23.5,
                "accelerator": None,
                "system": "Linux x86_64",
                "load_before": 0.1,
            },
        },
        "parts": 1,
        "n": n,
        "seconds": 510.9,
        "summary": summary,
        "samples": [{"id": str(at)} for at in range(n)],
    }


def ppl_record() -> dict[str, Any]:
    """Full text to 4,096 tokens; ratio 4 to 16,384. Against nearest: worse at 4, level at 8, better at 16 and 32."""
    summary = {}
    for context in (1024, 2048, 4096, 8192, 16384, 32768):
        gain = 0.2 + 0.03 * math.log2(context / 1024)
        losses = {"none": 3.78, "streaming": 3.78 - gain}
        positions = {"none": 0, "streaming": min(context, 7680)}
        ratios: dict[str, Any] = {}
        for ratio in RATIOS:
            if ratio == 4 and context > 16384:
                continue
            losses[f"nearest/{ratio}"] = 3.78 - gain * (0.9 - 0.16 * math.log2(ratio / 4))
            edge = {4: 0.06, 8: 0.005, 16: -0.02, 32: -0.05}[ratio]
            losses[f"extensible/{ratio}"] = losses[f"nearest/{ratio}"] + edge
            positions[f"nearest/{ratio}"] = positions[f"extensible/{ratio}"] = context // ratio
        if context <= 4096:
            losses["full"], positions["full"] = 3.78 - 1.1 * gain, context
        for ratio in (ratio for ratio in RATIOS if f"extensible/{ratio}" in losses):
            ours = losses[f"extensible/{ratio}"]
            others = {"none": "none", "nearest": f"nearest/{ratio}", "streaming": "streaming", "full": "full"}
            minus = {name: measured(ours - losses[arm], 0.016) for name, arm in others.items() if arm in losses}
            share: dict[str, Any] = {"refused": "no full text fits"}
            if "full" in losses:
                share = measured((3.78 - ours) / (1.1 * gain), 0.04)
            ratios[str(ratio)] = {"minus": minus, "gap_share": share}
        summary[str(context)] = {
            "n": 20,
            "arms": {
                arm: {
                    "n": 20,
                    "positions": positions[arm],
                    "loss": loss,
                    "interval": interval(loss, 0.1),
                    "perplexity": math.exp(loss),
                }
                for arm, loss in losses.items()
            },
            "ratios": ratios,
        }
    return record("ppl", summary, 20, "dev_books.jsonl.zst", contexts=[int(context) for context in summary])


def qa_record(passages: int = 3) -> dict[str, Any]:
    """Ours is better than random and wrong, level with truncation, worse than full; refused at ratio 32."""
    arms: dict[str, Any] = {}

    def add(arm: str, positions: float, f1: float) -> None:
        scores = {"em": 0.5 * f1, "f1": f1, "contained": 0.8 * f1}
        arms[arm] = {"n": 200, "positions": positions, "cut": 0}
        arms[arm] |= {metric: measured(value, 0.03, 200) for metric, value in scores.items()}

    add("none", 0, 0.08)
    for ratio in RATIOS:
        steps = math.log2(ratio / 4)
        for kind, f1 in (
            ("random", 0.05),
            ("wrong", 0.07),
            ("truncated", 0.33 - 0.07 * steps),
            ("lingua", 0.38 - 0.06 * steps),
            ("extensible", 0.35 - 0.06 * steps),
        ):
            add(f"{kind}/{ratio}", 180.4 * 4 / ratio, f1)
    add("full", 721.6, 0.52)
    arms["full"]["cut"] = 4
    summary = {
        "template": "short",
        "metrics": ["em", "f1", "contained"],
        "arms": dict(reversed(arms.items())),  # any order: the page has its own
        "minus": {
            str(ratio): {
                control: {
                    metric: measured(arms[f"extensible/{ratio}"][metric]["mean"] - arms[arm][metric]["mean"], 0.05, 200)
                    for metric in ("em", "f1", "contained")
                }
                for control in ("none", "truncated", "lingua", "random", "wrong", "full")
                for arm in [control if control in ("none", "full") else f"{control}/{ratio}"]
            }
            for ratio in RATIOS
        },
        "retained": {
            str(ratio): measured((arms[f"extensible/{ratio}"]["f1"]["mean"] - 0.08) / 0.44, 0.06, 200)
            for ratio in RATIOS[:-1]
        }
        | {"32": {"refused": "the gain is within noise"}},
        "by_rank": {
            str(rank): {
                arm: {"n": 67 - (rank == 2)}
                | {metric: round(scores[metric]["mean"] * (1 - 0.1 * rank), 4) for metric in ("em", "f1", "contained")}
                for arm, scores in arms.items()
            }
            for rank in (range(passages) if passages > 1 else ())
        },
    }
    return record("qa", summary, 200, "dev_squad.jsonl.zst", passages=passages)


def loss_record() -> dict[str, Any]:
    """By the loss alone, of an embedder that enters at layer 8: worse than chosen sentences at 4, level at 8."""
    losses = qa_record()
    summary = losses["summary"]
    arms = {"none": 4.0, "full": 0.75}
    for ratio in RATIOS:
        ours = 2.0 + 0.5 * math.log2(ratio / 4)
        arms |= {f"extensible/{ratio}": ours, f"anchors/{ratio}": ours + 0.6, f"truncated/{ratio}": ours + 0.3}
        arms |= {f"random_states/{ratio}": 4.1, f"chosen/{ratio}": ours + 0.2 * math.log2(ratio / 8)}
    summary |= {
        "metrics": ["loss"],
        "arms": {
            arm: {"n": 200, "positions": 0 if arm == "none" else 100.5, "cut": 0, "loss": measured(loss, 0.2, 200)}
            for arm, loss in arms.items()
        },
        "minus": {
            str(ratio): {
                kind: {"loss": measured(arms[f"extensible/{ratio}"] - arms[arm], 0.1, 200)}
                for kind in ("none", "random_states", "anchors", "truncated", "chosen", "full")
                for arm in [kind if kind in arms else f"{kind}/{ratio}"]
            }
            for ratio in RATIOS
        },
        "retained_loss": {
            str(ratio): measured((4.0 - arms[f"extensible/{ratio}"]) / 3.25, 0.05, 200) for ratio in RATIOS[:-1]
        }
        | {"32": {"refused": "the gain is within noise"}},
        "by_rank": {
            str(rank): {arm: {"n": 100, "loss": loss + 0.1 * rank} for arm, loss in arms.items()} for rank in (0, 1)
        },
    }
    del summary["retained"]
    losses["embedder"] = {"entry_layer": 8, "adaptation": "none", "downscaling": "mean", "token_weighting": "rank"}
    return losses


def needle_record() -> dict[str, Any]:
    """Raw text fits up to 8,192 tokens; embeddings at ratio 32 find nothing."""
    lengths, depths = (1024, 2048, 4096, 8192, 32768, 131072), (0.0, 0.25, 0.5, 0.75, 1.0)
    cells = []
    for task, ease in (("passkey", 1.0), ("key_value", 0.6)):
        for tokens in lengths:
            for depth in depths:
                found = {"none": 0.0}
                for ratio in RATIOS:
                    found[f"truncated/{ratio}"] = 1.0 if depth < 1 / ratio else 0.0
                    if tokens // ratio <= 8192:
                        found[f"extensible/{ratio}"] = round(ease * max(0.0, 1 - ratio / 32) * (1 - 0.2 * depth), 2)
                if tokens <= 8192:
                    found["full"] = round(ease * (1 - 0.1 * depth), 2)
                cells += [
                    {"task": task, "arm": arm, "tokens": tokens, "depth": depth, "n": 5, "correct": share}
                    for arm, share in found.items()
                ]
    arms: dict[str, Any] = {}
    for task in ("passkey", "key_value"):
        for arm in {cell["arm"]: None for cell in cells}:
            shares = [cell["correct"] for cell in cells if (cell["task"], cell["arm"]) == (task, arm)]
            score = measured(sum(shares) / len(shares), 0.05, 5 * len(shares))
            arms.setdefault(task, {})[arm] = {"n": 5 * len(shares), "correct": score}
    minus: dict[str, Any] = {}
    for task, own in arms.items():
        for ratio in RATIOS:
            others = {"none": "none", "truncated": f"truncated/{ratio}", "full": "full"}
            ours = own[f"extensible/{ratio}"]["correct"]["mean"]
            minus.setdefault(task, {})[str(ratio)] = {
                control: measured(ours - own[arm]["correct"]["mean"], 0.1, 300) for control, arm in others.items()
            }
    return record("needle", {"cells": cells, "arms": arms, "minus": minus}, 300, "", lengths=list(lengths))


def speed_record() -> dict[str, Any]:
    """Full text runs to 8,192 tokens; beyond, it is there with nothing measured (as null) or not there at all."""
    summary: dict[str, Any] = {}
    for tokens in (1024, 2048, 4096, 8192, 32768, 131072):
        full = 0.9 * tokens / 1024 * (1 + tokens / 16384)
        sides: dict[str, Any] = {}
        if tokens <= 8192:
            sides["full"] = _side(full, 1.0, 900 + 0.3 * tokens, tokens)
        elif tokens == 32768:
            sides["full"] = _side(None, None, None, None)
        for ratio in (8, 32):
            for kind, cost in (("online", 0.4), ("offline", 1 / ratio)):
                seconds = 0.05 + cost * 0.9 * tokens / 1024
                over = seconds / full if tokens <= 8192 else None
                mib = 880 + (0.02 if kind == "online" else 0.3 / ratio) * tokens
                sides[f"{kind}/{ratio}"] = _side(seconds, over, mib, tokens // ratio)
            sides[f"online/{ratio}"]["compress_tokens_per_s"] = 2000 + tokens / 1024
        summary[str(tokens)] = sides
    return record("speed", summary, 30, "", lengths=[int(tokens) for tokens in summary])


def _side(seconds: float | None, over: float | None, mib: float | None, positions: int | None) -> dict[str, Any]:
    decode = None if positions is None else 30 / (1 + positions / 8192)
    return {
        "n": 5,
        "first_token_s": seconds,
        "decode_tokens_per_s": decode,
        "peak_mib": mib,
        "positions": positions,
        "first_token_over_full": over,
    }


def write(folder: Path, name: str, content: dict[str, Any]) -> Path:
    file = folder / name
    file.write_text(json.dumps(content), encoding="utf-8")
    return file
