"""Train on a machine without a network and without this package: pack everything needed, run it there, get it back.

    python -m benchmarks.offline_training pack --recipe joint --llm runs/text/reader --data text.jsonl.zst \
        --questions questions.jsonl.zst --total-tokens 50000000 --output bundle
    python bundle/run.py --output left --max-minutes 9        # there, as often as needed
    python -m benchmarks.offline_training unpack left --output runs/trained

Run it from the root of the repository. The bundle holds the LLM's weights, text as tokens, questions, the recipe and
this package's code; the other machine needs torch, transformers, peft, accelerate and safetensors. `run` does here what
`run.py` does there, to check that a bundle works.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.ending import note
from benchmarks.ending import run as run_script
from benchmarks.offline_training import bundles
from extemb_core.training.recipes import read_recipe


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    {"pack": pack, "run": run, "unpack": unpack}[options.verb](options)


def pack(options: argparse.Namespace) -> None:
    """Write a bundle, and print its size and what to do with it."""
    settings: dict[str, Any] = {"seed": options.seed}
    if options.batch_size is not None:
        settings["batch_size"] = options.batch_size
    slices = bundles.pack(
        read_recipe(options.recipe),
        options.output,
        llm=options.llm,
        total_tokens=options.total_tokens,
        data=options.data,
        questions=options.questions,
        start_from=options.start_from,
        max_tokens=options.max_tokens,
        max_questions=options.max_questions,
        slice_size=options.slice_size,
        dtype=options.dtype,
        **settings,
    )
    size = sum(file.stat().st_size for file in slices)
    print(options.output)
    note(f"{len(slices)} slices, {size / 2**20:.0f} MiB; copy the folder, then there:")
    note("python run.py --output left --max-minutes 9")


def run(options: argparse.Namespace) -> None:
    """Train in a bundle, and print whether the training is finished."""
    finished = bundles.run(
        options.bundle,
        options.output,
        work=options.work,
        max_minutes=options.max_minutes,
        checkpoint_size_limit=options.checkpoint_size_limit,
        resume_from=options.resume_from,
    )
    print(options.output)
    note(
        f"finished; get it out: python -m benchmarks.offline_training unpack {options.output} --output DIR"
        if finished
        else "the time is up; the same command goes on, or another machine with --resume-from"
    )


def unpack(options: argparse.Namespace) -> None:
    """Join slices, and print where the result is."""
    bundles.unpack(options.slices, options.output)
    print(options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.offline_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="write a bundle of slices")
    packing.add_argument("--output", required=True, metavar="DIR", help="the bundle's folder; it must not exist")
    packing.add_argument("--llm", required=True, metavar="NAME", help="a known name, a folder or a Hugging Face id")
    packing.add_argument("--recipe", default="default", metavar="NAME", help="a recipe's name, or a YAML file")
    packing.add_argument("--data", nargs="+", default=[], metavar="FILE", help="training text")
    packing.add_argument("--questions", nargs="+", default=[], metavar="FILE", help="training questions")
    packing.add_argument("--total-tokens", type=int, default=1_500_000, metavar="N", help="tokens to train on")
    packing.add_argument("--start-from", metavar="PATH", help="go on from this embedder")
    packing.add_argument("--max-tokens", type=int, metavar="N", help="tokens of text that travel; all if not given")
    packing.add_argument("--max-questions", type=int, metavar="N", help="questions that travel; all if not given")
    packing.add_argument("--slice-size", default="60MiB", metavar="SIZE", help="of each file, such as 60MiB")
    packing.add_argument("--batch-size", type=int, metavar="N", help="samples per batch; the recipe's if not given")
    packing.add_argument("--dtype", default="bfloat16", metavar="NAME", help="of the weights and of the running LLM")
    packing.add_argument("--seed", type=int, default=0, metavar="N", help="random seed")
    running = verbs.add_parser("run", help="unpack a bundle, train within the time, and leave slices, as run.py does")
    running.add_argument("bundle", metavar="DIR", help="a bundle")
    running.add_argument("--output", required=True, metavar="DIR", help="folder for what is left: slices to go on from")
    running.add_argument(
        "--work", metavar="DIR", help="folder to unpack into and to train in; DIR/unpacked if not given"
    )
    running.add_argument("--max-minutes", type=float, metavar="X", help="of the whole call")
    running.add_argument("--checkpoint-size-limit", default="15MiB", metavar="SIZE", help="of each file that is left")
    running.add_argument("--resume-from", metavar="DIR", help="slices that an earlier call left")
    unpacking = verbs.add_parser("unpack", help="verify slices and join them")
    unpacking.add_argument("slices", metavar="DIR", help="slices: a bundle, or what `run` left")
    unpacking.add_argument("--output", required=True, metavar="DIR", help="where to; it must not exist")
    return parser


if __name__ == "__main__":
    run_script(main)
