"""Which entry layer and which token weights suit an LLM that nothing was trained for?

    python benchmarks/entry_layer.py --llm smollm2-135m-reader --layers 4 8 12 16 --weighting rank frequency uniform \
        --questions dev_squad.jsonl.zst --limit 100 --counts train_text.jsonl.zst \
        --text english.txt code.py german.txt --json benchmarks/results/entry_layer.json

For each layer, weighting and ratio, with an untrained embedder:

- with `--questions`, the loss of the reference answers, one question a text, as `extemb eval qa --loss-only` has it;
- with `--text`, the loss of 128 tokens of each file after 512 compressed ones, `--windows` of them, evenly spaced.

Nats per token, beside no context, the full text, and the text cut to its last tokens at as many positions (for
questions its first).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from extemb_core.context.assembly import Part, assemble_text
from extemb_core.errors import ConfigError
from extemb_core.evaluation.provenance import provenance
from extemb_core.evaluation.qa import QaConfig, QaExperiment
from extemb_core.files import write_whole
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.progress import progress
from extemb_core.readers import read_document
from extemb_core.training.data import TokenFile

Ids = np.ndarray[Any, Any]
Forms = Mapping[str, Callable[[Ids], list[Part]]]
_CONTEXT, _CONTINUED = 512, 128


def text_losses(llm: LLM, ids: Ids, windows: int, forms: Forms) -> dict[str, list[float]]:
    """Mean loss of each window's continuation after each form of its context."""
    length = _CONTEXT + _CONTINUED
    if len(ids) < length:
        raise ConfigError(f"a text of {len(ids)} tokens has no window of {length}; pass a longer one")
    starts = np.linspace(0, len(ids) - length, min(windows, len(ids) // length)).astype(int)
    losses: dict[str, list[float]] = {name: [] for name in forms}
    for start in starts:
        context, following = np.split(ids[start : start + length], [_CONTEXT])
        # The first token follows nothing where there is no context: it is not scored.
        prompts = [assemble_text(llm, [*form(context), following[:1]]).inputs(llm) for form in forms.values()]
        for name, scores in zip(forms, llm.log_probs(prompts, [following[1:]] * len(forms)), strict=True):
            losses[name].append(float(-scores.mean()))
    return losses


def compressed(embedder: ExtensibleEmbedder, ratios: list[int]) -> Forms:
    """A form for each ratio, from one pass of the embedder over each text."""
    made: dict[bytes, Any] = {}

    def part(ids: Ids, ratio: int) -> list[Part]:
        key = ids.tobytes()
        if key not in made:
            made.clear()
            made[key] = embedder.compress_ids([ids], ratio=min(ratios), show_progress=False)[0]
        return [made[key].at_ratio(ratio).part]

    return {str(ratio): lambda ids, ratio=ratio: part(ids, ratio) for ratio in ratios}  # type: ignore[misc]


def answer_losses(
    llm: LLM, embedder: ExtensibleEmbedder | None, args: argparse.Namespace, controls: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The arms of `extemb eval qa --loss-only`, summarised."""
    config = QaConfig(
        llm=args.llm, embedder="untrained", data=tuple(args.questions), ratios=tuple(args.ratios), limit=args.limit,
        controls=controls, generate=False, one_per_text=True, batch_size=4,
    )  # fmt: skip
    experiment = QaExperiment(config, llm, embedder)
    samples = [sample for group in experiment.groups() for sample in experiment.measure(group)]
    return {arm: values["loss"] for arm, values in experiment.summarise(samples)["arms"].items()}


def main() -> None:
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
    args = parser.parse_args()
    if not args.questions and not args.text:
        parser.error("pass --questions, --text, or both")

    llm = LLM.from_pretrained(args.llm, dtype=args.dtype)
    counts = None
    if "frequency" in args.weighting:
        if not args.counts:
            parser.error("--weighting frequency needs --counts FILE")
        tokens = TokenFile.build(args.counts, llm, args.json.parent / ".tokens").tokens
        counts = torch.from_numpy(np.bincount(tokens, minlength=llm.model.get_input_embeddings().num_embeddings))
    texts = {file.name: llm.encode(read_document(file).text) for file in args.text}
    plain: Forms = {"none": lambda ids: [], "full": lambda ids: [ids]} | {
        f"nearest/{ratio}": lambda ids, ratio=ratio: [ids[len(ids) - -(-len(ids) // ratio) :]]  # type: ignore[misc]
        for ratio in args.ratios
    }
    files = {name: [Path(file).name for file in vars(args)[name]] for name in ("questions", "text", "counts")}
    record: dict[str, Any] = {
        "kind": "entry_layer",
        "settings": vars(args) | files | {"json": args.json.name},
        "rows": [],
    }
    record["controls"] = {"text": {n: text_losses(llm, ids, args.windows, plain) for n, ids in texts.items()}}
    if args.questions:
        record["controls"]["questions"] = answer_losses(llm, None, args, ("truncated",))
    cells = [(layer, weighting) for layer in args.layers for weighting in args.weighting]
    with progress("entry layers", len(cells)) as advance:
        for layer, weighting in cells:
            used = {"token_counts": counts} if weighting == "frequency" else {"token_weighting": weighting}
            embedder = ExtensibleEmbedder.untrained(llm, layer, **used)
            row: dict[str, Any] = {"layer": layer, "weighting": weighting}
            forms = compressed(embedder, args.ratios)
            row["text"] = {name: text_losses(llm, ids, args.windows, forms) for name, ids in texts.items()}
            if args.questions:
                arms = answer_losses(llm, embedder, args)
                row["questions"] = {ratio: arms[f"extensible/{ratio}"] for ratio in args.ratios}
            record["rows"].append(row)
            said = [
                f"{name} {[round(float(np.mean(v)), 3) for v in own.values()]}" for name, own in row["text"].items()
            ]
            said += [f"answers {[round(v['mean'], 3) for v in row.get('questions', {}).values()]}"]
            print(layer, weighting, *said, flush=True)
            advance(1)
    record["provenance"] = provenance(["python", "benchmarks/entry_layer.py", *sys.argv[1:]])
    write_whole(args.json, json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()
