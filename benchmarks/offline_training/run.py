"""Unpack the bundle that this file lies in, and train: python run.py --help.

Needs torch, transformers, peft, accelerate and safetensors. Every bundle holds copies of this file and of slices.py;
everything else is in its slices.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path


def main() -> None:
    bundle = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for what is left: slices to go on from")
    parser.add_argument("--work", type=Path, default=bundle / "unpacked", help="folder to unpack into and to train in")
    parser.add_argument("--max-minutes", type=float, help="of the whole call")
    parser.add_argument("--checkpoint-size-limit", default="15MiB", help="of each file that is left")
    parser.add_argument("--resume-from", help="folder of slices that an earlier call left")
    options = parser.parse_args()
    deadline = None if options.max_minutes is None else time.monotonic() + 60 * options.max_minutes
    if not options.work.exists():
        from slices import join_slices  # type: ignore[import-not-found]  # it lies beside this file

        join_slices(bundle, options.work)
    sys.path.insert(0, str(options.work.resolve() / "package"))
    from benchmarks.offline_training.bundles import run_unpacked

    run_unpacked(
        options.work,
        options.output,
        deadline=deadline,
        checkpoint_size_limit=options.checkpoint_size_limit,
        resume_from=options.resume_from,
    )


if __name__ == "__main__":
    main()
