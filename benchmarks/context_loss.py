"""The loss of the next tokens of held-out documents, by the form in which the LLM is given what came before.

    python benchmarks/context_loss.py --data books.jsonl.zst --embedder FOLDER --json benchmarks/results/NAME.json

The arms are described in `extemb_core/evaluation/context_loss.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance, run, short_name, write_json

from extemb_core.errors import ConfigError
from extemb_core.evaluation.context_loss import context_losses, spread_windows, summarise
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.models.sources import sha256_of
from extemb_core.progress import progress
from extemb_core.training.data import read_texts

RATIOS = (2, 4, 8, 16, 32)


def main(argv: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    llm = LLM.from_pretrained(options.llm)
    embedder = ExtensibleEmbedder.from_pretrained(options.embedder, llm=llm) if options.embedder else None
    documents = [llm.encode(text) for text in read_texts(options.data)]
    report = measure(llm, documents, embedder, options)
    data = {"file": options.data.name, "sha256": sha256_of(options.data)}
    report = {"data": data, **provenance(sys.argv if argv is None else [sys.argv[0], *argv]), **report}
    print(table(report))
    if options.json:
        write_json(report, options.json)


def measure(
    llm: LLM,
    documents: Sequence[np.ndarray[Any, Any]],
    embedder: ExtensibleEmbedder | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The report without its provenance."""
    span = options.context + options.target
    windows = spread_windows([len(document) for document in documents], options.windows_per_document, span)
    used = {window.document for window in windows}
    if options.limit is not None and options.limit < len(windows):  # evenly, so that every document has its share
        windows = [windows[int(at)] for at in np.linspace(0, len(windows) - 1, options.limit)]
    if not windows:
        raise ConfigError(f"no document has {span} tokens; pass longer ones, or a smaller --context or --target")
    ratios = sorted(options.ratios)
    start = time.perf_counter()
    with progress("windows", len(windows), None) as advance:
        losses, positions = context_losses(
            llm,
            documents,
            windows,
            context=options.context,
            target=options.target,
            ratios=ratios,
            embedder=embedder,
            batch_size=options.batch_size,
            advance=advance,
        )
    return {
        "config": {
            "llm": short_name(str(options.llm)),
            "embedder": short_name(str(options.embedder)) if options.embedder else None,
            "fingerprint": embedder.fingerprint if embedder else None,
            "dtype": str(llm.dtype).removeprefix("torch."),
            "context": options.context,
            "target": options.target,
            "scored_tokens_per_window": options.target - 1,
            "ratios": ratios,
            "windows_per_document": options.windows_per_document,
            "limit": options.limit,
            "batch_size": options.batch_size,
            "seed": options.seed,
        },
        "n_windows": len(windows),
        "n_documents": len({window.document for window in windows}),
        "documents_too_short": len(documents) - len(used),
        "seconds": round(time.perf_counter() - start, 1),
        "unit": "nats per token",
        **summarise(losses, positions, windows, ratios, options.seed),
        "windows": [[window.document, window.start] for window in windows],
        "losses": {arm: [round(value, 6) for value in values.tolist()] for arm, values in losses.items()},
    }


def table(report: dict[str, Any]) -> str:
    """The report's means as plain text."""
    lines = [f"{'arm':<14}{'positions':>10}{'loss':>9}  {'95% interval':<18}{'- nearest':>10}  {'95% interval':<19}gap"]
    for arm, row in report["arms"].items():
        line = f"{arm:<14}{row['positions']:>10}{row['mean']:>9.4f}  {_interval(row['interval']):<18}"
        kind, _, ratio = arm.partition("/")
        if kind == "extensible":
            compared = report["ratios"][ratio]
            line += f"{compared['extensible_minus_nearest']:>+10.4f}  {_interval(compared['interval'], '+'):<19}"
            line += f"{compared['gap_share']:.0%}" if compared["gap_share"] is not None else "-"
        lines.append(line.rstrip())
    config = report["config"]
    lines.append(
        f"{report['n_windows']} windows of {report['n_documents']} documents, {config['context']} tokens of context, "
        f"{config['scored_tokens_per_window']} scored tokens each; {config['llm']}; embedder: {config['embedder']}"
    )
    return "\n".join(lines)


def _interval(pair: Sequence[float] | None, sign: str = "") -> str:
    return f"{pair[0]:{sign}.4f} .. {pair[1]:{sign}.4f}" if pair else "-"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help=".jsonl or .jsonl.zst with a text field, or a text file"
    )
    parser.add_argument("--llm", default="smollm2-135m-instruct", help="known name, folder or hub id")
    parser.add_argument("--embedder", help="folder or hub id; without it only the controls are measured")
    parser.add_argument("--ratios", type=int, nargs="+", default=list(RATIOS))
    parser.add_argument("--context", type=int, default=512, help="tokens of context")
    parser.add_argument("--target", type=int, default=256, help="tokens after it; all but the first are scored")
    parser.add_argument("--windows-per-document", type=int, default=8)
    parser.add_argument("--limit", type=int, help="at most so many windows, evenly from all")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; the windows are fixed")
    parser.add_argument("--json", type=Path, help="where to write the report")
    return parser


if __name__ == "__main__":
    run(main)
