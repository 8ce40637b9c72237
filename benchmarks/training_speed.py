"""Measure the speed of training, beside plain matrix products of the same size, and beside one LLM call per chunk.

    python benchmarks/training_speed.py --data train_text.jsonl.zst --json benchmarks/results/training_speed.json

The floor is the time that the forward and backward passes' own floating-point operations (counted, attention
included) would take at the rate of one product of the layers' largest size, measured in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ending
import numpy as np
import torch
from timing import alternate, compare
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from extemb_core.context.assembly import Prompt, Segment
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training.attention import training_attention
from extemb_core.training.data import read_texts
from extemb_core.training.two_stream import two_stream_losses
from extemb_core.weights.resolve import short_name

_PRODUCTS = 20  # in a measurement of the floor's rate
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def main(argv: Sequence[str] | None = None) -> None:
    ending.report(_parser(), argv, measure, table)


def table(report: dict[str, Any]) -> str:
    share, single = report["against_floor"]["ratio"], report["against_one_call_per_chunk"]["ratio"]
    return (
        f"{report['tokens_per_second']:.0f} tokens/s, {1 / share:.0%} of the arithmetic floor\n"
        f"one call per chunk takes {1 / single:.2f}x as long"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", default="smollm2-135m-instruct")
    parser.add_argument("--data", type=Path, required=True, help="text to train on")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--num-layers", type=int, default=8, help="of an embedder at entry layer 0")
    parser.add_argument("--entry-layer", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sample-length", type=int, default=768)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--ratio", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    llm = LLM.from_pretrained(options.llm, dtype=options.dtype)
    layer = options.entry_layer
    embedder = ExtensibleEmbedder.from_llm(
        llm,
        entry_layer=layer,
        num_layers=layer or options.num_layers,
        chunk_size=options.chunk_size,
        ratios=(options.ratio,),
    )
    embedder.trainable_to(torch.float32)
    samples = _samples(llm, options.data, options.batch_size, options.sample_length)
    ratios = [[options.ratio]] * len(samples)
    half = llm.dtype == torch.bfloat16

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            with torch.autocast(llm.device.type, torch.bfloat16, enabled=half):
                made = loss()
            made.backward()
            embedder.zero_grad()

        return work

    packed = step(lambda: two_stream_losses(embedder, samples, ratios, options.chunk_size).mean())
    single = step(lambda: one_call_per_chunk(embedder, samples, options.ratio, options.chunk_size))
    wide = int(llm.text_config.intermediate_size)
    left = torch.randn(options.batch_size * options.sample_length, llm.hidden_size, dtype=llm.dtype, device=llm.device)
    right = torch.randn(llm.hidden_size, wide, dtype=llm.dtype, device=llm.device)
    readers = [llm.reading_model(layer)] if layer else []
    with training_attention(llm.model, embedder.stack, *readers):
        counter = FlopCounterMode(
            display=False,
            custom_mapping={_CPU_ATTENTION: sdpa_flop_count_of, _CPU_ATTENTION_BACKWARD: sdpa_backward_flop_count_of},
        )
        with counter:
            packed()
        operations = counter.get_total_flops()
        seconds = alternate(
            {
                "packed": packed,
                "one_call_per_chunk": single,
                "products": lambda: [left @ right for _ in range(_PRODUCTS)],
            },
            options.rounds,
        )
    per_product = 2 * left.shape[0] * llm.hidden_size * wide
    seconds["floor"] = [took * operations / (_PRODUCTS * per_product) for took in seconds["products"]]
    return {
        "llm": short_name(options.llm),
        "dtype": str(llm.dtype).removeprefix("torch."),
        "samples": [options.batch_size, options.sample_length],
        "entry_layer": layer,
        "chunk_size": options.chunk_size,
        "ratio": options.ratio,
        "operations_per_step": operations,
        "product_rate_gflops": median(_PRODUCTS * per_product / took / 1e9 for took in seconds["products"]),
        "tokens_per_second": options.batch_size * options.sample_length / median(seconds["packed"]),
        "against_floor": compare(seconds, "packed", "floor", 1 / 0.7),
        "against_one_call_per_chunk": compare(seconds, "packed", "one_call_per_chunk", 1 / 2),
    }


def one_call_per_chunk(embedder: ExtensibleEmbedder, samples: Sequence[Tensor], ratio: int, size: int) -> Tensor:
    """Compute the two-stream loss without packing: each chunk is compressed, and read after earlier embeddings."""
    llm = embedder.llm
    losses = []
    for sample in samples:
        chunks = list(sample.split(size))
        made: list[Segment] = [np.array([llm.bos_token_id])] if llm.bos_token_id is not None else []
        for number, chunk in enumerate(chunks):
            if number:
                whole = Prompt((*made, chunk.numpy()[:-1])).inputs(llm)
                hidden = llm.hidden_of([whole])[0, -len(chunk) :]
                losses.append(torch.nn.functional.cross_entropy(llm.logits(hidden).float(), chunk, reduction="none"))
            if number < len(chunks) - 1:
                made.append(embedder.read_out(embedder(chunk[None]), 0, len(chunk), ratio))
    return torch.cat(losses).mean()


def sdpa_flop_count_of(query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def sdpa_backward_flop_count_of(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


def _samples(llm: LLM, file: Path, count: int, length: int) -> list[Tensor]:
    made: list[Tensor] = []
    for text in read_texts(file):
        ids = llm.encode(text[: 8 * length])
        if len(ids) >= length:
            made.append(torch.from_numpy(ids[:length].astype(np.int64)))
        if len(made) == count:
            return made
    raise SystemExit(f"{file} has {len(made)} texts of {length} tokens, and {count} are needed; pass another file")


if __name__ == "__main__":
    ending.run(main)
