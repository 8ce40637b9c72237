"""Compare short trainings that differ in one thing each, on the same samples.

    python benchmarks/ablations.py benchmarks/ablations.yaml --llm smollm2-135m-instruct --data train_text.jsonl.zst \
        --dev-text dev_books.jsonl.zst --output runs/ablations --json benchmarks/results/ablations.json
    python benchmarks/ablations.py benchmarks/ablations_reader.yaml --llm smollm2-135m-reader --ratios 2 \
        --data train_text.jsonl.zst --questions train_qa.jsonl.zst --dev-questions dev_squad.jsonl.zst \
        --dev-text dev_books.jsonl.zst --output runs/ablations --json benchmarks/results/ablations_reader.json

The YAML file has `base`, fields of `TrainingConfig` that all arms share, and `arms`, by name the other fields of each.
Losses are measured, as they show small differences that answers to a few hundred questions do not:

    answers   of the reference answer after the question, with the text in several forms; with --dev-questions
    text      of the next 255 tokens of books, with 512 tokens of context in several forms

A stopped run goes on; arms that are in the JSON are not trained again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ending import run, write_json

from extemb_core.evaluation.perplexity import PerplexityConfig, PerplexityExperiment
from extemb_core.evaluation.provenance import provenance
from extemb_core.evaluation.qa import QaConfig, QaExperiment
from extemb_core.evaluation.statistics import mean_with_interval
from extemb_core.training.config import TrainingConfig
from extemb_core.training.trainable import TrainableModel
from extemb_core.training.trainer import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", type=Path, help="YAML file")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of its arms")
    parser.add_argument("--llm", required=True)
    parser.add_argument("--start-from", help="folder of an earlier run, for all arms")
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--questions", nargs="+", default=[])
    parser.add_argument("--dev-questions")
    parser.add_argument("--dev-text", required=True)
    parser.add_argument("--ratios", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    described = yaml.safe_load(args.arms.read_text(encoding="utf-8"))
    record = {"arms": {}}
    if args.json.is_file():
        record = json.loads(args.json.read_text(encoding="utf-8"))
    record["provenance"] = provenance(["python", *sys.argv])
    for name, settings in described["arms"].items():
        if name in record["arms"] or (args.only and name not in args.only):
            continue
        settings = settings or {}
        embedder = described["base"].get("embedder", {}) | settings.get("embedder", {})
        config = arm_config(args, name, described["base"] | settings | {"embedder": embedder})
        start = time.monotonic()
        trained = train(config)
        seconds = time.monotonic() - start
        measured = measure(trained, args.dev_questions, args.dev_text, tuple(args.ratios), args.limit)
        record["arms"][name] = {"settings": settings, "train_seconds": round(seconds, 1), **measured}
        write_json(record, args.json)
        print(name, f"{seconds:.0f} s", *(f"{what}: {values['mean']:.3f}" for what, values in measured.items()))


def arm_config(args: argparse.Namespace, name: str, settings: dict[str, Any]) -> TrainingConfig:
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    return TrainingConfig(
        llm=args.llm, data=tuple(args.data), questions=tuple(args.questions), output=str(args.output / name),
        cache=str(args.output / "data"), start_from=args.start_from, **plain,
    )  # fmt: skip


def measure(
    trained: TrainableModel, questions: str | None, text: str, ratios: tuple[int, ...], limit: int
) -> dict[str, dict[str, Any]]:
    """Measure losses in nats, with intervals over documents; "answers/full" and so on."""
    found: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        if questions is not None:
            losses, documents = answer_losses(trained, questions, ratios, limit)
            for arm, values in losses.items():
                found[f"answers/{arm}"] = mean_with_interval(np.array(values), np.array(documents))
        config = PerplexityConfig(
            llm="", data=(text,), ratios=ratios, contexts=(512,), target=256, limit=20, batch_size=10
        )
        experiment = PerplexityExperiment(config, trained.llm, trained.embedder)
        samples = [sample for group in experiment.groups() for sample in experiment.measure(group)]
        for arm in samples[0]["contexts"]["512"]:
            values = np.array([sample["contexts"]["512"][arm]["loss"] for sample in samples])
            found[f"text/{arm}"] = mean_with_interval(values, np.array([sample["document"] for sample in samples]))
    return found


def answer_losses(
    trained: TrainableModel, questions: str, ratios: tuple[int, ...], limit: int
) -> tuple[dict[str, list[float]], list[str]]:
    """Return arm -> mean loss per token of each question's first answer and the end of its turn; and the documents."""
    config = QaConfig(
        llm="", data=(questions,), ratios=ratios, limit=limit, controls=(), template="short", generate=False
    )
    experiment = QaExperiment(config, trained.llm, trained.embedder)
    samples = [sample for group in experiment.groups() for sample in experiment.measure(group)]
    losses = {arm: [sample["arms"][arm]["loss"] for sample in samples] for arm in samples[0]["arms"]}
    return losses, [sample["document"] for sample in samples]


if __name__ == "__main__":
    run(main)
