"""Compare entry layers and token weights for an LLM for which nothing was trained.

    python benchmarks/entry_layer.py --llm smollm2-135m-reader --layers 4 8 12 16 --weighting rank frequency uniform \
        --questions dev_squad.jsonl.zst --limit 100 --counts train_text.jsonl.zst \
        --text english.txt code.py german.txt --json benchmarks/results/entry_layer.json

`extemb calibrate` measures the same and chooses; this compares several weightings and kinds of text side by side. For
each layer, weighting and ratio, with an untrained embedder:

- with `--questions`, the loss of the reference answers, one question a text, as `extemb eval qa --loss-only` has it;
- with `--text`, the loss of 127 tokens of each file after 512 compressed ones, in `--windows` places, evenly spread.

Losses are in nats per token, beside those with no context, with the full text, and with the text truncated to its last
tokens (for questions, its first) at as many positions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ending import run

from extemb_core.evaluation.calibration import count_tokens
from extemb_core.evaluation.calibration_samples import Answers, Continuations, Task, arm_losses
from extemb_core.evaluation.provenance import provenance
from extemb_core.evaluation.statistics import mean_with_interval
from extemb_core.loaders import read_document
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.utils.files import atomic_write_text
from extemb_core.utils.progress import progress

_QUESTIONS = "questions"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--weighting", nargs="+", default=["rank"])
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--questions", nargs="*", default=[])
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--text", type=Path, nargs="*", default=[])
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--counts", type=Path, nargs="*", default=[], help="text to count tokens in, for frequency")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    if not args.questions and not args.text:
        parser.error("pass --questions, --text, or both")
    if "frequency" in args.weighting and not args.counts:
        parser.error("--weighting frequency needs --counts FILE")

    llm = LLM.from_pretrained(args.llm, dtype=args.dtype)
    weights: dict[str, dict[str, Any]] = {each: {"token_weighting": each} for each in args.weighting}
    if "frequency" in weights:
        weights["frequency"]["token_counts"] = count_tokens(llm, args.counts)
    embedders = {
        f"{layer} {weighting}": ExtensibleEmbedder.untrained(llm, layer, **own)
        for layer in args.layers
        for weighting, own in weights.items()
    }
    tasks: dict[str, Task] = {
        file.name: Continuations(llm, [read_document(file).text], args.ratios, args.windows) for file in args.text
    }
    if args.questions:
        tasks[_QUESTIONS] = Answers(llm, args.questions, args.ratios, args.limit)

    files = {name: [Path(file).name for file in vars(args)[name]] for name in ("questions", "text", "counts")}
    record: dict[str, Any] = {
        "kind": "entry_layer",
        "settings": vars(args) | files | {"json": args.json.name},
        "rows": [{"layer": int(name.split()[0]), "weighting": name.split()[1], "text": {}} for name in embedders],
        "controls": {"text": {}},
    }
    with progress("entry layers", sum(len(task.names) for task in tasks.values())) as advance:
        for kind, task in tasks.items():
            found: dict[str, list[float]] = {}
            tokens = []
            for name in task.names:
                reading = task.reading(name)
                tokens.append(len(reading.target))
                (losses,) = arm_losses(llm, [reading], embedders, args.ratios)
                for arm, loss in losses.items():
                    found.setdefault(arm, []).append(loss)
                advance(1)
            controls = {arm: each for arm, each in found.items() if arm.split("/")[0] not in embedders}
            arms = [{str(ratio): found[f"{name}/{ratio}"] for ratio in args.ratios} for name in embedders]
            for place, own in zip([record["controls"], *record["rows"]], [controls, *arms], strict=True):
                if kind == _QUESTIONS:
                    place[kind] = {arm: _mean(each, tokens) for arm, each in own.items()}
                else:
                    place["text"][kind] = {arm.replace("truncated", "nearest"): each for arm, each in own.items()}
            print(kind, {arm: round(float(np.average(each, weights=tokens)), 3) for arm, each in found.items()})
    record["provenance"] = provenance(["python", "benchmarks/entry_layer.py", *sys.argv[1:]])
    atomic_write_text(args.json, json.dumps(record, indent=1, default=str))


def _mean(losses: list[float], tokens: list[int]) -> dict[str, Any]:
    """Compute the mean over tokens, with its interval over samples."""
    return mean_with_interval(np.array(losses), np.arange(len(losses)), weights=np.array(tokens, dtype=float))


if __name__ == "__main__":
    run(main)
