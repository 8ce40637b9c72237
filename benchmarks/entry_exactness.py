"""Measure how exact reading at ratio 1 is if a document has several chunks, or text before it.

    python benchmarks/entry_exactness.py --text dev_books.jsonl.zst --json benchmarks/results/entry_exactness.json

A document of one chunk that opens the prompt is read exactly. A later chunk is compressed without those before it, and
every chunk without a chat's opening: this measures what that costs. For `--windows` places in the text and each number
of chunks, an untrained embedder's states at ratio 1 are compared with the same prompt as ids: the next-token logits
over the 64 tokens after the document (`opening`), and over a chat's question, turn and 64 tokens after it (`chat`). For
each, the report has the greatest difference of a logit, the Kullback-Leibler divergence from the text's distribution in
nats, the share of positions with the same likeliest token, and the loss of the following tokens, both ways.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from ending import parser, report, run

from extemb_core.context.assembly import Part, Prompt, assemble_chat, assemble_text
from extemb_core.errors import ConfigError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training.data import TokenFile
from extemb_core.utils.progress import progress
from extemb_core.weights.resolve import short_name

NEXT = 64
PLACES = ("opening", "chat")
BEFORE, AFTER = "Read this text:\n\n", "\n\nHow does it go on?"


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, PLACES)
    made.add_argument("--text", type=Path, required=True, help="JSON Lines with a text in each row")
    made.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 8])
    made.add_argument("--entry-layer", type=int, help="that of an untrained embedder when not given")
    made.add_argument("--windows", type=int, default=8, help="places in the text, evenly spaced")
    made.add_argument("--dtype", default="float32")
    report(made, argv, measure, table)


@torch.no_grad()
def measure(options: Namespace) -> dict[str, Any]:
    if options.embedder not in (None, "untrained"):
        raise ConfigError(
            f"embedder={options.embedder!r}: only an untrained one is exact; leave it out, or choose its --entry-layer"
        )
    llm = LLM.from_pretrained(options.llm, dtype=options.dtype)
    embedder = ExtensibleEmbedder.untrained(llm, options.entry_layer)
    size = embedder.config.chunk_size
    with TemporaryDirectory() as folder:
        tokens = np.array(TokenFile.build([options.text], llm, Path(folder)).tokens)
    chunks = options.chunks[:1] if options.quick else options.chunks
    windows = 1 if options.quick else options.windows
    longest = max(chunks) * size + NEXT
    starts = np.linspace(0, len(tokens) - longest, windows).astype(int)
    cells: dict[str, dict[str, Any]] = {place: {} for place in options.only or PLACES}
    with progress("read", windows * len(chunks) * len(cells)) as advance:
        for count in chunks:
            rows: dict[str, list[dict[str, float]]] = {place: [] for place in cells}
            for start in starts:
                ids = np.asarray(tokens[start : start + count * size], np.int32)
                after = np.asarray(tokens[start + count * size :][:NEXT], np.int32)
                states = embedder.compress_ids([ids], ratio=1, show_progress=False)[0].part
                for place in cells:
                    rows[place].append(compared(llm, place, ids, states, after))
                    advance(1)
            for place, own in rows.items():
                cells[place][str(count)] = {"n": len(own), **summary(own), "samples": own}
    return {
        "llm": short_name(options.llm),
        "entry_layer": embedder.config.entry_layer,
        "chunk_tokens": size,
        "dtype": str(llm.dtype).removeprefix("torch."),
        "text": options.text.name,
        "chunks": cells,
    }


def prompt_of(llm: LLM, place: str, document: Part, after: Part) -> Prompt:
    if place == "opening":
        return assemble_text(llm, [document, after])
    chat = assemble_chat(llm, [{"role": "user", "content": [BEFORE, document, AFTER]}])
    return Prompt((*chat.segments, after))  # type: ignore[arg-type]


def compared(llm: LLM, place: str, ids: Any, states: Any, after: Any) -> dict[str, float]:
    text, read = (prompt_of(llm, place, document, after) for document in (ids, states))
    first = next(i for i, segment in enumerate(read.segments) if segment is states)
    places = 1 + sum(len(segment) for segment in read.segments[first + 1 :])  # the document's last and all after it
    logits = [llm.logits(llm.hidden_of([prompt.inputs(llm)])[0, -places:]).float() for prompt in (text, read)]
    plain, other = (each.log_softmax(-1) for each in logits)
    targets = torch.from_numpy(after).long()
    losses = [-each[-NEXT - 1 : -1].gather(1, targets[:, None]).mean().item() for each in (plain, other)]
    return {
        "max_logit_difference": (logits[0] - logits[1]).abs().max().item(),
        "kl_nats": (plain.exp() * (plain - other)).sum(-1).mean().item(),
        "same_likeliest": (plain.argmax(-1) == other.argmax(-1)).float().mean().item(),
        "loss_text": losses[0],
        "loss_read": losses[1],
    }


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the maximum of the greatest differences, and means of the others."""
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return found | {"max_logit_difference": max(row["max_logit_difference"] for row in rows)}


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['llm']}, entry layer {found['entry_layer']}, {found['dtype']}, ratio 1 against the text",
        f"{'place':<10}{'chunks':>7}{'n':>4}{'max logit':>12}{'KL, nats':>12}{'same':>8}{'loss text':>11}{'read':>8}",
    ]
    for place, counts in found["chunks"].items():
        lines += [
            f"{place:<10}{count:>7}{cell['n']:>4}{cell['max_logit_difference']:>12.4g}{cell['kl_nats']:>12.3g}"
            f"{cell['same_likeliest']:>8.1%}{cell['loss_text']:>11.3f}{cell['loss_read']:>8.3f}"
            for count, cell in counts.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
