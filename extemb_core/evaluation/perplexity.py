"""Measure the perplexity of the last tokens of a text, by how much comes before them and in what form.

A window is a place in a document: S target tokens, and before them contexts of several lengths C that all end where
the target begins. Each arm puts another form of the context before the same target tokens:

    none            nothing
    nearest/k       the last ceil(C / k) tokens: as many positions as ratio k takes, spent on raw text
    streaming       the first tokens and the most recent ones, as many as the window holds (`sinks_and_window`)
    extensible/k    the context as extensible embeddings at ratio k
    full            all C tokens

The first target token is given and not scored, in every arm: with no context there is nothing to predict it from.
So every arm scores exactly the same S - 1 tokens. An LLM that starts texts with a BOS gets it first in every arm.
An arm that does not fit the window is absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import Prompt, Segment, assemble_text
from extemb_core.errors import ConfigError
from extemb_core.evaluation.baselines import Ids, nearest, sinks_and_window
from extemb_core.evaluation.forms import arm_name, arm_names, compress_at_ratios
from extemb_core.evaluation.runs import Experiment, Sample, groups_of
from extemb_core.evaluation.settings import PerplexityConfig
from extemb_core.evaluation.statistics import differences, mean_with_interval, paired, share
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training.data import read_texts
from extemb_core.utils.jsonl import evenly


@dataclass(frozen=True)
class Window:
    """One place in document number `document`: `start` is its first target token, `contexts` the lengths that fit."""

    document: int
    start: int
    contexts: tuple[int, ...]


class PerplexityExperiment(Experiment):
    """Measures windows. Without an embedder only the controls are measured."""

    kind: ClassVar[str] = "ppl"

    def __init__(self, config: PerplexityConfig, llm: LLM, embedder: ExtensibleEmbedder | None = None) -> None:
        super().__init__(config, llm, embedder)
        window = config.window or llm.context_window
        room = window - int(llm.bos_token_id is not None) - config.target
        if room < 1 or window > llm.context_window:
            raise ConfigError(
                f"target={config.target} in a window of {window} leaves no room for a context, or the window is larger "
                f"than the {llm.context_window} of {llm.name}; pass a smaller target or another window"
            )
        self._room = room
        self._documents = [llm.encode(text) for file in config.data for text in read_texts(Path(file))]
        lengths = [len(document) for document in self._documents]
        windows = spread_windows(lengths, config.windows, config.contexts, config.target)
        self._windows = {f"{window.document}:{window.start}": window for window in evenly(windows, config.limit)}

    def groups(self) -> list[list[str]]:
        return groups_of(list(self._windows), self.config.batch_size)

    def measure(self, group: Sequence[str]) -> Iterator[Sample]:
        windows = [self._windows[name] for name in group]
        tables: list[dict[str, dict[str, Any]]] = [{} for _ in windows]
        known: list[dict[str, float]] = [{} for _ in windows]
        for context in sorted(self.config.contexts):
            rows = [row for row, window in enumerate(windows) if context in window.contexts]
            if not rows:
                continue
            spans = np.stack([self._span(windows[row], context) for row in rows]).astype(np.int64)
            forms = self.forms(spans[:, :context])
            own = [known[row] for row in rows]
            arms = {arm: self._losses(form, spans[:, context:], own) for arm, form in forms.items()}
            for at, row in enumerate(rows):
                tables[row][str(context)] = table = {
                    arm: {"loss": round(losses[at], 6), "positions": len(forms[arm][at])}
                    for arm, losses in arms.items()
                }
                if "full" in table:  # the whole context fits, so that streaming has the same input
                    table["streaming"] = table["full"]
        for name, window, contexts in zip(group, windows, tables, strict=True):
            yield {"id": name, "document": window.document, "contexts": contexts}

    def forms(self, contexts: Ids) -> dict[str, list[Prompt]]:
        """Make the prompts that each arm puts before the target tokens.

        Args:
            contexts: (B, C) token ids.

        Returns:
            Arm -> B prompts of one length; arms that do not fit are absent, and so is "streaming" where "full" fits.
        """
        length = contexts.shape[1]
        compressed = compress_at_ratios(self.embedder, list(contexts), self.config.ratios)
        segments: dict[str, list[Segment]] = {"none": list(contexts[:, :0])}
        segments |= {f"extensible/{ratio}": list(parts) for ratio, parts in compressed.items()}
        for ratio in self.config.ratios:
            count = len(compressed[ratio][0]) if compressed else -(-length // ratio)
            segments[f"nearest/{ratio}"] = [nearest(row, count) for row in contexts]
        if length <= self._room:
            segments["full"] = list(contexts)
        else:
            segments["streaming"] = [sinks_and_window(row, self._room, self.config.sinks) for row in contexts]
        return {
            arm: [assemble_text(self.llm, [part]) for part in parts]
            for arm, parts in segments.items()
            if len(parts[0]) <= self._room
        }

    def _losses(self, prompts: Sequence[Prompt], targets: Ids, known: Sequence[dict[str, float]]) -> list[float]:
        """Compute each window's mean loss; `known` caches losses of each window by the text before it.

        The same text comes up repeatedly: the nearest tokens at ratio 2 of 1,024 are the whole context of 512.
        """
        keys = [str(prompt.inputs(self.llm)) if prompt.text_only else None for prompt in prompts]
        losses = {at: known[at][key] for at, key in enumerate(keys) if key is not None and key in known[at]}
        if new := [at for at in range(len(prompts)) if at not in losses]:
            found = target_losses(self.llm, [prompts[at] for at in new], targets[new]).mean(1)
            losses |= dict(zip(new, map(float, found), strict=True))
        for at, key in enumerate(keys):
            if key is not None:
                known[at][key] = losses[at]
        return [losses[at] for at in range(len(prompts))]

    def summarise(self, samples: Sequence[Sample]) -> dict[str, Any]:
        by_context = {
            context: [sample for sample in samples if context in sample["contexts"]]
            for context in map(str, sorted(self.config.contexts))
        }
        return {context: _table(having, context, self.config) for context, having in by_context.items() if having}

    def _span(self, window: Window, context: int) -> Ids:
        return self._documents[window.document][window.start - context : window.start + self.config.target]


def spread_windows(lengths: Sequence[int], per_document: int, contexts: Sequence[int], target: int) -> list[Window]:
    """Spread windows evenly over each document; with their longest contexts they never overlap.

    Args:
        lengths: Tokens of each document; one without room for the shortest context gets no window.
        per_document: Windows per document; fewer if they do not fit side by side.
        contexts: Lengths of context; a document gets those for which it has room.
        target: Tokens after the context.
    """
    windows = []
    for document, length in enumerate(lengths):
        fitting = tuple(sorted(context for context in contexts if context + target <= length))
        if not fitting:
            continue
        span = fitting[-1] + target
        count = min(per_document, length // span)
        for i in range(count):
            start = (2 * i + 1) * length // (2 * count) - span // 2
            windows.append(Window(document, start + fitting[-1], fitting))
    return windows


def target_losses(llm: LLM, prompts: Sequence[Prompt], targets: Ids) -> Tensor:
    """Compute the negative log-likelihood in nats of every target token but the first.

    Args:
        llm: LLM that predicts them.
        prompts: B prompts that stand before the target tokens; they may be empty.
        targets: (B, S) ids.

    Returns:
        (B, S - 1) in float32, on the CPU.
    """
    inputs = [Prompt((*prompt.segments, row[:1])).inputs(llm) for prompt, row in zip(prompts, targets, strict=True)]
    return -torch.stack(llm.log_probs(inputs, [row[1:] for row in targets])).cpu()


def _table(samples: Sequence[Sample], context: str, config: PerplexityConfig) -> dict[str, Any]:
    """Summarise one context length: every arm, and the extensible ones compared with the others."""
    rows = [sample["contexts"][context] for sample in samples]
    groups = np.array([sample["document"] for sample in samples])
    arms = {}
    for arm in arm_names(("none", "nearest", "streaming", "extensible", "full"), config.ratios):
        if positions := [row[arm]["positions"] for row in rows if arm in row]:
            (losses,), documents = paired(rows, groups, "loss", arm)
            summary = mean_with_interval(losses, documents, config.seed)
            loss = summary.pop("mean")
            mean_positions = round(float(np.mean(positions)), 1)
            arms[arm] = {"positions": mean_positions, "loss": loss, "perplexity": math.exp(loss), **summary}
    ratios = {}
    for ratio in config.ratios:
        ours = f"extensible/{ratio}"
        controls = {control: arm_name(control, ratio) for control in ("none", "nearest", "streaming", "full")}
        if minus := differences(rows, groups, "loss", ours, controls, config.seed):
            (extensible, none, full), documents = paired(rows, groups, "loss", ours, "none", "full")
            gap = {"refused": "no full text fits"}
            if len(documents):
                gap = share(none - extensible, none - full, documents, config.seed)
            ratios[str(ratio)] = {"minus": minus, "gap_share": gap}
    return {"n": len(samples), "arms": arms, "ratios": ratios}
