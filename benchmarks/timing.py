"""Time two sides alternately within one run, so that a busy moment hits both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from extemb_core.context import scoring
from extemb_core.context.assembly import assemble_chat
from extemb_core.documents import Document
from extemb_core.errors import ExtembError
from extemb_core.lm import ExtensibleLM
from extemb_core.models.chunks import chunk_lengths
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import FINAL_NORMS
from extemb_core.models.llm import LLM

IMPORT = "import time; start = time.perf_counter(); import extemb_core; print(time.perf_counter() - start)"
PLANS = ("focus", "even")
HELP = "import sys; sys.argv = ['extemb', '--help']; from extemb_core.cli.main import main; main()"


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time each side in each round, in seconds, reversing the order every round; a first round is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-1, rounds):
        for name in list(sides) if number % 2 else list(sides)[::-1]:
            start = time.perf_counter()
            sides[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                samples[name].append(time.perf_counter() - start)
    return samples


def compare(samples: Mapping[str, Sequence[float]], ours: str, base: str, target: float) -> dict[str, Any]:
    """Compute how many times the base's seconds ours takes: the median over the rounds of their ratio."""
    ratios = [a / b for a, b in zip(samples[ours], samples[base], strict=True)]
    return {
        "n": len(ratios),
        "ratio": median(ratios),
        "ratio_lowest_highest": [min(ratios), max(ratios)],
        "ratio_of_fastest": min(samples[ours]) / min(samples[base]),
        "target": target,
        "met": median(ratios) <= target,
        "median_seconds": {name: median(values) for name, values in samples.items()},
        "samples_seconds": {name: list(values) for name, values in samples.items()},
    }


# -- start of the process -------------------------------------------------------------------------------------


def cold_start(runs: int) -> dict[str, Any]:
    """Time the import and `extemb --help`, each in fresh interpreters."""
    imports, helps, interpreters = [], [], []
    for _ in range(runs):
        imports.append(float(_python(IMPORT)[1]))
        helps.append(_python(HELP)[0])
        interpreters.append(_python("pass")[0])
    return {
        "import": _against(imports, 0.3, "seconds of `import extemb_core` alone"),
        "help": _against(helps, 1.0, "wall seconds of the whole process"),
        "empty_interpreter": {"median_seconds": median(interpreters), "samples_seconds": interpreters},
    }


def _against(samples: list[float], target: float, what: str) -> dict[str, Any]:
    middle = median(samples)
    return {
        "what": what,
        "n": len(samples),
        "median_seconds": middle,
        "target": target,
        "met": middle < target,
        "samples_seconds": samples,
    }


def _python(code: str) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise ExtembError(f"python -c {code!r} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return seconds, done.stdout


# -- compressing ----------------------------------------------------------------------------------------------


def bare_layers(llm: LLM, count: int) -> nn.Module:
    """Return the LLM's own decoder, cut to its first layers, without adapters, connector or final norm.

    The decoder object is a shallow copy with the LLM's own layers in it, so the LLM is not touched.
    """
    decoder: Any = llm.model.base_model
    bare: Any = decoder.__new__(type(decoder))
    bare.__dict__ = {**decoder.__dict__, "_modules": dict(decoder._modules)}
    bare.layers = nn.ModuleList(decoder.layers[:count])
    for name in FINAL_NORMS:
        if hasattr(decoder, name):
            setattr(bare, name, nn.Identity())
    return bare  # type: ignore[no-any-return]


def batches(ids: Sequence[np.ndarray[Any, Any]], chunk_size: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Make (B, T) ids: the chunks of all texts as `compress` batches them, longest first, padded with 0."""
    chunks = []
    for tokens in ids:
        ends = np.cumsum(chunk_lengths(len(tokens), chunk_size))
        chunks += [chunk for chunk in np.split(tokens, ends[:-1]) if len(chunk)]
    chunks.sort(key=lambda chunk: -len(chunk))
    for at in range(0, len(chunks), batch_size):
        batch = chunks[at : at + batch_size]
        padded = np.zeros((len(batch), len(batch[0])), dtype=np.int64)
        for row, chunk in enumerate(batch):
            padded[row, : len(chunk)] = chunk
        yield torch.from_numpy(padded)


def compress_cost(embedder: ExtensibleEmbedder, text: str, *, rounds: int, batch_size: int = 4) -> dict[str, Any]:
    """Time `compress` at the finest ratio beside a bare forward pass of the same layers over the same tokens."""
    llm = embedder.llm
    bare = bare_layers(llm, embedder.config.num_layers)
    ids = [llm.encode(text)]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches(ids, embedder.config.chunk_size, batch_size):
                bare(input_ids=batch.to(llm.device), use_cache=False)

    samples = alternate(
        {
            "bare": forward,
            "compress": lambda: embedder.compress_ids(ids, batch_size=batch_size, show_progress=False),
            "tokenise": lambda: llm.encode(text),
        },
        rounds,
    )
    result = compare(samples, "compress", "bare", 1.10)
    whole = [a + b for a, b in zip(samples["compress"], samples["tokenise"], strict=True)]
    return {
        "what": "compress_ids against the same layers of the LLM itself, no gradients",
        **result,
        "ratio_with_tokenising": median(a / b for a, b in zip(whole, samples["bare"], strict=True)),
        "tokens": len(ids[0]),
        "compressed_tokens_per_second": len(ids[0]) / result["median_seconds"]["compress"],
        "layers": embedder.config.num_layers,
        "adaptation": embedder.config.adaptation,
        "lora_rank": embedder.config.lora_rank if embedder.config.adaptation == "lora" else None,
        "connector": embedder.config.connector,
        "ratio_of_embeddings": min(embedder.config.ratios),
        "chunk_size": embedder.config.chunk_size,
        "batch_size": batch_size,
    }


# -- first token ----------------------------------------------------------------------------------------------


def first_token(lm: ExtensibleLM, text: str, *, embeddings: int, ratio: int, rounds: int) -> dict[str, Any]:
    """Time the first token of a question about a compressed document, beside a plain prompt of as many positions.

    Both go through `ExtensibleLM.stream`. The document has been compressed before, as usual.
    """
    document = Document(lm.llm.decode(lm.llm.encode(text)[: embeddings * ratio].tolist()))
    question = "In one sentence, what is this text about?"

    def compressed() -> Any:
        return lm.stream(question, [document], ratio=ratio, max_new_tokens=1).finish()

    answer = compressed()
    plain = _plain_question(lm.llm, text, answer.prompt_positions)

    def raw() -> Any:
        return lm.stream(plain, max_new_tokens=1).finish()

    result = compare(alternate({"plain": raw, "extensible": compressed}, rounds), "extensible", "plain", 1.05)
    return {
        "what": "ExtensibleLM.stream to the first token, document in the store, against a plain prompt as long",
        **result,
        "positions": {"extensible": answer.prompt_positions, "plain": raw().prompt_positions},
        "extensible_embeddings": answer.context[0].positions,
        "document_tokens": answer.context[0].n_tokens,
        "ratio_of_embeddings": ratio,
    }


def planning(lm: ExtensibleLM, text: str, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Time the first token with a plan for the question, beside an even one in as many positions.

    The document has been compressed before; its sentences are found, indexed and looked at anew in each round, as for a
    new document. A third side asks again about a document whose sentences are known.
    """
    document = Document(lm.llm.decode(lm.llm.encode(text)[:tokens].tolist()))
    budget, going_on, number = tokens // 8 + 16, ExtensibleLM(lm.llm, lm.embedder, lm.store), count()

    def asked(plan: str, of: ExtensibleLM | None = None) -> Any:
        if of is None:
            scoring.index_of.cache_clear()
            of = ExtensibleLM(lm.llm, lm.embedder, lm.store)  # it knows no sentences yet
        question = f"What is said about names? Question {next(number)}."
        return of.stream(question, [document], budget=budget, plan=plan, max_new_tokens=1).finish()

    sides: dict[str, Callable[[], Any]] = {name: partial(asked, name) for name in PLANS}
    samples = alternate(sides | {"next": partial(asked, "focus", going_on)}, rounds)
    result = compare({name: samples[name] for name in PLANS}, *PLANS, 1.05)
    entries = {name: asked(name).context[0] for name in PLANS}
    return {
        "what": "ExtensibleLM.stream to the first token, document in the store, by plan",
        **result,
        "next_question": compare({name: samples[name] for name in ("next", "even")}, "next", "even", 1.05),
        "positions": {name: entry.positions for name, entry in entries.items()},
        "fidelity": {name: entry.fidelity for name, entry in entries.items()},
        "document_tokens": entries["focus"].n_tokens,
    }


def _plain_question(llm: LLM, text: str, positions: int) -> str:
    """Cut the beginning of a text so that the chat prompt with it takes `positions`, or slightly fewer."""
    ids = llm.encode(text)
    best, best_positions = "", 0
    kept = positions
    for _ in range(16):
        question = llm.decode(ids[:kept].tolist())
        found = len(assemble_chat(llm, [{"role": "user", "content": question}]))
        if best_positions < found <= positions:
            best, best_positions = question, found
        if found == positions:
            break
        kept -= (found - positions) or 1
    return best
