"""Measure the cost of an answer about a text: first token, decoding, memory, by length (twin paper, Table 3).

For each length the same text is read in several ways, one question after it:

    full         as it is, all tokens
    online/k     compressed at ratio k, then read: both count
    offline/k    the embeddings were made before; making or loading them does not count, reading them does

A side that does not fit the window, beside the prompt and the answer, is absent. Within a round the sides take turns,
and every round reverses their order, so that a busy moment hits all of them; `first_token_over_full` compares within
a round. Tokenising the text counts nowhere; building the prompt counts everywhere.

**First token**: from the token ids of the text (offline: from its embeddings, in main memory) until the first token
of the answer is known. **Decoding**: the tokens after it, one forward pass each, over the time they took. Tokens are
chosen greedily by a plain loop over the LLM (`greedy`): always as many as asked for, while a real answer would end at
the first stop token, and each is timed when it is known, while streamed text may wait for the next.

**Peak memory**: the highest use while a side runs, less what was in use before (the models' weights, the text, the
offline embeddings). It is measured once per length, in an untimed pass before the first round. On CUDA it is what
PyTorch's allocator hands out. On the CPU it is the process's resident set, whose peak the Linux kernel keeps: null on
other systems and if the process may not reset that peak. Its limits: memory that an earlier side freed and the C
library kept counts as in use before (on glibc it is handed back first, as far as possible); work of other threads in
the process is counted; and so are pages that are touched for the first time, which is why a short text goes through
every side before the first length.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import DynamicCache

from extemb_core.context.assembly import Prompt, Segment, assemble_chat
from extemb_core.evaluation.baselines import Ids
from extemb_core.evaluation.forms import compress_at_ratios
from extemb_core.evaluation.needle import filler, positions_at, read_filler
from extemb_core.evaluation.provenance import cpu_name
from extemb_core.evaluation.runs import Experiment, Sample, groups_of
from extemb_core.evaluation.settings import SpeedConfig
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import PromptInputs
from extemb_core.models.llm import LLM
from extemb_core.models.stoppable import CACHE
from extemb_core.utils.jsonl import evenly

BEFORE = "Read the text.\n\nText:\n"
AFTER = "\n\nIn one sentence, what is this text about?"
_FIRST_TOKENS = 64  # of the text that goes through every side before anything is measured
_MIB = 2**20
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Document:
    """Text of one length: (T,) `ids`, the compressed text by ratio, and the sides that fit, with their positions."""

    ids: Ids
    compressed: dict[int, Segment]
    sides: dict[str, int]


class SpeedExperiment(Experiment):
    """Times answers. Without an embedder only "full" is measured."""

    kind: ClassVar[str] = "speed"

    def __init__(self, config: SpeedConfig, llm: LLM, embedder: ExtensibleEmbedder | None = None) -> None:
        super().__init__(config, llm, embedder)
        accelerator = torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else None
        self.hardware = {"cpu": cpu_name(), "device": llm.device.type, "accelerator": accelerator}
        longest = max(config.tokens)
        draw = np.random.default_rng(config.seed)
        self._ids = filler(llm, max(longest, _FIRST_TOKENS), draw, read_filler(llm, config.data))[0]
        fitting = [tokens for tokens in sorted(config.tokens) if self.sides(tokens)]
        rounds = [(tokens, number) for tokens in fitting for number in range(config.rounds)]
        self._rounds = {f"{tokens}:{number}": (tokens, number) for tokens, number in evenly(rounds, config.limit)}
        self._document: Document | None = None
        self._peaks: dict[str, float | None] = {}

    def groups(self) -> list[list[str]]:
        """List one round of one length per group; a length at which no side fits has none."""
        return groups_of(list(self._rounds), 1)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        for name in group:
            tokens, number = self._rounds[name]
            document = self._prepared(tokens)
            order = list(document.sides)
            timed = {side: self.answer(side, document) for side in (order[::-1] if number % 2 else order)}
            rate = _median_of([timed[side].get("compress_tokens_per_s") for side in order])
            sides = {
                side: timed[side] | {"peak_mib": self._peaks[side], "positions": document.sides[side]} for side in order
            }
            yield {"id": name, "tokens": tokens, "round": number, "compress_tokens_per_s": rate, "sides": sides}

    def sides(self, tokens: int) -> dict[str, int]:
        """Return the sides that fit, with the positions that the text takes in each."""
        room = self.llm.context_window - len(self.prompt(self._ids[:0])) - self.config.new_tokens
        positions = {"full": tokens}
        for kind in ("online", "offline") if self.embedder is not None else ():
            positions |= {f"{kind}/{k}": positions_at(tokens, k, self.embedder) for k in self.config.ratios}
        return {side: count for side, count in positions.items() if count <= room}

    def prompt(self, form: Segment) -> Prompt:
        """Make the chat prompt with this form of the text: (T,) token ids, or compressed text."""
        return assemble_chat(self.llm, [{"role": "user", "content": [BEFORE, form, AFTER]}])

    @torch.no_grad()
    def answer(self, side: str, document: Document) -> dict[str, Any]:
        """Answer once and time it."""
        kind, _, ratio = side.partition("/")
        rate = {}
        start = time.perf_counter()
        if kind == "online" and self.embedder is not None:
            (text,) = self.embedder.compress_ids([document.ids], ratio=int(ratio), show_progress=False)
            rate["compress_tokens_per_s"] = round(len(document.ids) / (time.perf_counter() - start), 3)
            form: Segment = text.part
        else:
            form = document.compressed[int(ratio)] if ratio else document.ids
        _, times = greedy(self.llm, self.prompt(form).inputs(self.llm), self.config.new_tokens)
        first_token, decoding = round(times[0] - start, 6), round((len(times) - 1) / (times[-1] - times[0]), 3)
        return {"first_token_s": first_token, "decode_tokens_per_s": decoding, **rate}

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        tables: dict[str, list[Any]] = {}
        for sample in sorted(samples, key=lambda sample: sample["tokens"]):
            tables.setdefault(str(sample["tokens"]), []).append(sample["sides"])
        return {tokens: {side: _medians(rows, side) for side in rows[0]} for tokens, rows in tables.items()}

    def _document_of(self, tokens: int) -> Document:
        ids, sides = self._ids[:tokens], self.sides(tokens)
        ratios = [ratio for ratio in self.config.ratios if f"offline/{ratio}" in sides]
        compressed = compress_at_ratios(self.embedder, [ids], ratios)
        return Document(ids, {ratio: part for ratio, (part,) in compressed.items()}, sides)

    def _prepared(self, tokens: int) -> Document:
        """Prepare the text of a length; for a new length, run the untimed pass first."""
        if self._document is None:
            self._untimed_pass(self._document_of(_FIRST_TOKENS))
        if self._document is None or len(self._document.ids) != tokens:
            self._document = None  # frees the last one's memory
            document = self._document_of(tokens)
            self._peaks = self._untimed_pass(document)
            self._document = document
        return self._document

    def _untimed_pass(self, document: Document) -> dict[str, float | None]:
        """Run every side once, to measure its memory in MiB."""
        return {side: peak_mib(partial(self.answer, side, document), self.llm.device) for side in document.sides}


@torch.no_grad()
def greedy(llm: LLM, prompt: PromptInputs, count: int) -> tuple[list[int], list[float]]:
    """Take the LLM's likeliest next token, `count` times in a row; stop tokens are treated like any other.

    Args:
        llm: LLM that continues the prompt.
        prompt: Prompt of at least one position.
        count: Number of tokens, at least 1.

    Returns:
        The token ids, and the time (`time.perf_counter`) at which each was known.
    """
    model, rows = llm.rows_of([prompt])
    inputs: dict[str, Any] = {name: row[None] for name, (row,) in rows.items()}
    cache = DynamicCache(config=llm.model.config)
    ids: list[int] = []
    times: list[float] = []
    for _ in range(count):
        output = model(**inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        ids.append(int(output.logits[0, -1].argmax()))  # waits for the device
        times.append(time.perf_counter())
        inputs = {"input_ids": torch.tensor([[ids[-1]]], device=llm.device)}
    return ids, times


def peak_mib(work: Callable[[], object], device: torch.device) -> float | None:
    """Measure the peak of memory of some work, beyond what was in use before; None if the system cannot.

    Args:
        work: Function that does the work.
        device: A CUDA device, to measure its memory; for others, the process's resident set is measured.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return round((torch.cuda.max_memory_allocated(device) - before) / _MIB, 1)
    is_reset = _reset_resident_peak()
    resident = _status_mib("VmRSS")
    work()
    peak = _status_mib("VmHWM")
    return round(max(0.0, peak - resident), 1) if is_reset and peak is not None and resident is not None else None


def _reset_resident_peak() -> bool:
    """Reset the peak of the resident set; False if the system cannot."""
    if not _CLEAR_REFS.exists():
        return False
    with suppress(AttributeError):  # not every C library can hand back freed memory
        ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status_mib(name: str) -> float | None:
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def _medians(rows: Sequence[dict[str, dict[str, Any]]], side: str) -> dict[str, Any]:
    """Summarise one side of one length over its rounds."""
    timed = [row[side] for row in rows]
    names = ("first_token_s", "decode_tokens_per_s", "peak_mib", "compress_tokens_per_s")
    columns = {name: [row[name] for row in timed] for name in names if name in timed[0]}
    columns["first_token_over_full"] = [
        row[side]["first_token_s"] / row["full"]["first_token_s"] for row in rows if "full" in row
    ]
    medians = {name: _median_of(values) for name, values in columns.items()}
    return {"n": len(timed), "positions": timed[0]["positions"]} | medians


def _median_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
