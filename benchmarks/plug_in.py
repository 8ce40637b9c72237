"""Measure an embedder, unchanged, on a fine-tuned derivative of its LLM: what is lost, and whose layers it should use.

    python benchmarks/plug_in.py --llm smollm2-135m-instruct --derivative runs/tuned/reader \
        --questions dev_squad.jsonl.zst --text dev_books.jsonl.zst --json benchmarks/results/plug_in.json

The paper's claim is that an embedder serves its LLM's derivatives as it is. One that shares the LLM's layers can do
so in two ways: with the original's layers, which have to be loaded beside the derivative, or with the derivative's own.
Losses in nats of reference answers and of the next tokens of books, as in ablations.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from ablations import measure
from ending import run, write_json

from extemb_core.evaluation.provenance import provenance
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training.trainable import TrainableModel
from extemb_core.weights.resolve import resolve_embedder, short_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2-135m-instruct", help="that the embedder was trained for")
    parser.add_argument("--embedder", help="the one shipped for the LLM when not given")
    parser.add_argument("--derivative", required=True, help="a fine-tuned relative of the LLM")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--ratios", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--limit", type=int, default=100, help="questions")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    folder = resolve_embedder(args.embedder, args.llm)
    original, derivative = LLM.from_pretrained(args.llm), LLM.from_pretrained(args.derivative)
    own = ExtensibleEmbedder.from_pretrained(folder, llm=original)
    sides = {
        "original": TrainableModel(original, own),
        "derivative, the original's layers": TrainableModel(derivative, own),
        "derivative, its own layers": TrainableModel(
            derivative, ExtensibleEmbedder.from_pretrained(folder, llm=derivative, adapt=True)
        ),
    }
    report = {
        **provenance(["python", *sys.argv]),
        "llm": short_name(args.llm),
        "derivative": short_name(args.derivative),
        "sides": {
            name: measure(side, args.questions, args.text, tuple(args.ratios), args.limit)
            for name, side in sides.items()
        },
    }
    print(json.dumps(report["sides"], indent=1))
    if args.json:
        write_json(report, args.json)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(main)
