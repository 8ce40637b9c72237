"""Embedders that enter above layer 0, and what an LLM reads from them, worked out with a plain hook on its layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

LAYER = 1


class OwnStates:
    """A perfect embedder at entry layer 1: its states are those that the LLM has itself where `before` stands first."""

    def __init__(self, llm: Any, before: Sequence[int] = ()) -> None:
        from extemb_core.models.config import ExtensibleEmbedderConfig

        self.llm = llm
        self.before = list(before)
        self.fingerprint = "own-states"
        self.config = ExtensibleEmbedderConfig(
            entry_layer=LAYER, adaptation="none", ratios=(1, 2, 4), chunk_size=16, token_weighting="uniform"
        )

    @torch.no_grad()
    def compress_ids(self, ids: Any, *, ratio: int | None = None, **settings: Any) -> list[Any]:
        from extemb_core.models.compressed import Compressed

        made = []
        for tokens in ids:
            row = torch.tensor([[*self.before, *map(int, tokens)]])
            states = self.llm.model.base_model(row, output_hidden_states=True).hidden_states[LAYER][0]
            states = states[len(self.before) :]
            norms = states.norm(dim=-1)
            made.append(
                Compressed(
                    embeddings=states, ratio=1, n_tokens=len(tokens), ref="", fingerprint=self.fingerprint,
                    chunk_size=16, ratios=(1, 2, 4), downscaling="mean", entry_layer=LAYER,
                    anchors=np.asarray(tokens, np.int32), mean_norms=norms, norms=norms, weights=torch.ones(len(norms)),
                ).at_ratio(ratio or 1)
            )  # fmt: skip
        return made


@contextmanager
def lm_over(llm: Any, folder: Path | None) -> Iterator[Any]:
    """An `ExtensibleLM` whose embeddings enter above layer 0, kept in memory or exactly in a folder."""
    from tiny import shared_embedder

    from extemb_core import EmbeddingStore, ExtensibleLM
    from extemb_core.store.base import MemoryStore

    if folder is None:
        yield ExtensibleLM(llm, shared_embedder(llm, 1), MemoryStore())
        return
    with EmbeddingStore.open(folder, dtype="float32") as store:
        yield ExtensibleLM(llm, shared_embedder(llm, 1), store)


def untrained(llm: Any, **settings: Any) -> Any:
    from extemb_core.models.embedder import ExtensibleEmbedder

    return ExtensibleEmbedder.untrained(llm, LAYER, **{"chunk_size": 16, "ratios": (1, 2, 4, 8)} | settings)


def scores_of(llm: Any, segments: Sequence[Any], targets: Sequence[int]) -> list[float]:
    """Log-probability of each target after a prompt's segments."""
    return [float(row[int(target)]) for row, target in zip(rows_of(llm, segments, targets), targets, strict=True)]


@torch.no_grad()
def rows_of(llm: Any, segments: Sequence[Any], targets: Sequence[int]) -> Any:
    """(S, V) log-probabilities in the place of each target: of the LLM itself, with layer 1's input overwritten."""
    ids: list[int] = []
    states: dict[int, torch.Tensor] = {}
    for segment in segments:
        if hasattr(segment, "anchors"):
            states |= {len(ids) + at: state for at, state in enumerate(segment.states)}
        ids += map(int, getattr(segment, "anchors", segment))

    def overwrite(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        hidden = inputs[0].clone()
        for at, state in states.items():
            hidden[0, at] = state
        return (hidden, *inputs[1:]), named

    hook = llm.model.base_model.layers[LAYER].register_forward_pre_hook(overwrite, with_kwargs=True)
    try:
        logits = llm.model(torch.tensor([[*ids, *map(int, targets)]])).logits[0].log_softmax(-1)
    finally:
        hook.remove()
    return logits[len(ids) - 1 : -1]
