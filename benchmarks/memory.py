"""Measure the peak memory of `compress` in a process that does nothing else.

    python benchmarks/memory.py --llm NAME --bytes 1000000            one JSON object on stdout

The result is the process's peak while `compress` runs, less the embeddings it returns. The LLM is a tiny random
one with the tokenizer of the one named, unless --embedder is given: memory that grows with the text (ids, chunks,
buffers) does not depend on the LLM's size, and a real one takes half an hour for 10 MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from extemb_core.errors import ExtembError

MIB = 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llm", required=True)
    parser.add_argument("--embedder", help="measure the LLM itself with this embedder")
    parser.add_argument("--bytes", type=int, required=True, help="UTF-8 bytes of text")
    options = parser.parse_args(argv)
    print(json.dumps(probe(options.llm, options.embedder, options.bytes)))


def probe(llm_name: str, embedder_name: str | None, n_bytes: int) -> dict[str, Any]:
    """Compress `n_bytes` of text in this process and report its memory."""
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.llm import LLM

    if embedder_name:
        llm = LLM.from_pretrained(llm_name)
        embedder = ExtensibleEmbedder.from_pretrained(embedder_name, llm=llm)
    else:
        llm = tiny_llm(llm_name)
        embedder = ExtensibleEmbedder.from_llm(llm, num_layers=2)
    text = sample_text(n_bytes)
    embedder.compress(text[:20_000], show_progress=False)  # allocates what is allocated only once
    before = current_bytes()
    reset = reset_peak()
    compressed = embedder.compress(text, show_progress=False)
    peak = peak_bytes()
    returned = sum(part.nbytes for part in vars(compressed).values() if hasattr(part, "nbytes"))
    return {
        "bytes": len(text.encode()),
        "tokens": compressed.n_tokens,
        "before_mib": before / MIB,
        "peak_mib": peak / MIB,
        "embeddings_mib": returned / MIB,
        "beyond_embeddings_mib": (peak - returned) / MIB,
        "added_mib": (peak - returned - before) / MIB,
        "peak_counted_from_the_call": reset,
        "llm": "the LLM itself" if embedder_name else "tiny random LLM: hidden 64, 2 layers, the real tokenizer",
    }


def growth(llm_name: str, embedder_name: str | None, sizes: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Measure two sizes of text alternately, each in fresh processes."""
    samples: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            samples[size].append(_in_a_process(llm_name, embedder_name, size))
    small, large = (median(sample["beyond_embeddings_mib"] for sample in samples[size]) for size in sizes)
    return {
        "what": "peak of the process during compress, less the returned embeddings: larger text over smaller",
        "n": rounds,
        "bytes": list(sizes),
        "median_mib": [small, large],
        "median_added_mib": [median(sample["added_mib"] for sample in samples[size]) for size in sizes],
        "ratio": large / small,
        "target": 1.05,
        "met": large / small <= 1.05,
        "samples": {str(size): found for size, found in samples.items()},
    }


def tiny_llm(name: str) -> Any:
    """Make a random LLM of width 64 with 2 layers and the tokenizer of the LLM called `name`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from extemb_core.models.llm import LLM
    from extemb_core.weights.resolve import resolve_llm

    tokenizer = AutoTokenizer.from_pretrained(resolve_llm(name), trust_remote_code=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LLM(LlamaForCausalLM(config), tokenizer, name="tiny-random")


def sample_text(n_bytes: int) -> str:
    """Return `n_bytes` of the Python language reference in every CPython, repeated if needed; all of it is ASCII."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics.values()).encode("ascii", "ignore").decode("ascii")
    return (whole * (n_bytes // len(whole) + 1))[:n_bytes]


def current_bytes() -> int:
    """Return the resident memory now, or its peak so far if the system does not say."""
    return status_bytes("VmRSS") or _maxrss()


def peak_bytes() -> int:
    """Return the peak of resident memory since the start or since `reset_peak`.

    ru_maxrss alone is not enough on Linux: a child process starts with its parent's.
    """
    return status_bytes("VmHWM") or _maxrss()


def reset_peak() -> bool:
    """Reset the peak of resident memory; False if the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def status_bytes(field: str, process: int | str = "self") -> int | None:
    """Memory of a process by the field of its status; None where the system does not tell."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _maxrss() -> int:
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def _in_a_process(llm_name: str, embedder_name: str | None, size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--llm", llm_name, "--bytes", str(size)]
    command += ["--embedder", embedder_name] if embedder_name else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExtembError(f"measuring memory ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
