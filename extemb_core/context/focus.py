"""Plan for a question: what says most about it is read in full, the rest compressed around it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import Any, Literal, get_args

import numpy as np

from extemb_core.context.allocation import allocate
from extemb_core.context.planning import DocumentPlan, Fidelity, Plan, Span, check_budget, fidelity_of
from extemb_core.context.scoring import SentenceScorer, bm25_scores, words_held
from extemb_core.context.spans import Array, GroupGrid, Sentences
from extemb_core.errors import ConfigError

_LEAST_LOSS = 1e-6  # per token

Mode = Literal["focus", "select", "even"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True, eq=False)
class SentenceLosses:
    """What it costs the answer when a sentence is not read in full, by what it has to do with the question.

    Attributes:
        fidelities: In rising detail, from "dropped" to "raw".
        ranks: Sentences are classed by their rank among all, from 1: up to ranks[0], up to ranks[1], and so on; then
            those below; then those that have nothing to do with the question.
        trust: Borders between the levels of trust in the ranking (see `words_held`).
        losses: (levels of trust, classes, fidelities) nats per token of the answer; of the last two classes per
            hundred of their own tokens.
    """

    fidelities: tuple[Fidelity, ...]
    ranks: tuple[int, ...]
    trust: tuple[float, ...]
    losses: Array

    def of(self, scores: Array, lengths: Array, trust: float) -> Array:
        """Return (U, F) losses of U sentences with these scores and lengths in tokens."""
        order = np.argsort(-scores, kind="stable")
        ranks = np.empty(len(scores), np.int64)
        ranks[order] = np.arange(1, len(scores) + 1)
        classes = np.searchsorted(self.ranks, ranks)
        classes[scores <= 0] = len(self.ranks) + 1
        losses = self.losses[np.searchsorted(self.trust, trust)][classes]
        weighted: Array = np.where((classes >= len(self.ranks))[:, None], losses * lengths[:, None] / 100, losses)
        return weighted


@cache
def sentence_losses(name: str = "focus.json") -> SentenceLosses:
    """Load the losses that ship."""
    text = (resources.files("extemb_core") / "pretrained" / name).read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return SentenceLosses(
        tuple(values["fidelities"]), tuple(values["ranks"]), tuple(values["trust"]), np.array(values["losses"])
    )


def mode_of(plan: str | None, ratio: str | int, question: str, entry_layer: int) -> Mode:
    """Return how documents are planned: as asked, or "focus" where there is a question and nothing against it.

    Raises:
        ConfigError: The plan is unknown, comes with a ratio, or needs states that enter above layer 0.
    """
    if plan is None:
        return "focus" if ratio == "auto" and question.strip() and entry_layer else "even"
    if plan not in MODES:
        raise ConfigError(f"plan={plan!r} is none of {', '.join(MODES)}; pass one of them, or None")
    if plan != "even" and ratio != "auto":
        raise ConfigError(
            f"plan={plan!r} came with ratio={ratio!r}, which is for whole documents; leave one of them out"
        )
    if plan != "even" and not entry_layer:
        raise ConfigError(f"plan={plan!r} needs an embedder that enters above layer 0; pass plan='even' or another one")
    return plan


@dataclass(frozen=True, eq=False)
class SplitDocument:
    """A document and its sentences.

    Attributes:
        sentences: All of its tokens.
        finest: Tokens of the smallest group that is stored.
        chunk_size: Tokens that are compressed together.
        overhead: Positions that it costs besides its content, where any of it is read.
        limit: The finest ratio that it may be read at; None is no limit.
    """

    sentences: Sentences
    finest: int
    chunk_size: int
    overhead: int = 0
    limit: int | None = None
    _positions: dict[bytes, int] = field(default_factory=dict, repr=False)

    @property
    def n_tokens(self) -> int:
        return int(self.sentences.borders[-1])

    @cached_property
    def grid(self) -> GroupGrid:
        return GroupGrid(self.sentences, self.finest, self.chunk_size)

    def spans(self, fidelities: Sequence[Fidelity], chosen: Array) -> list[Span]:
        return self.grid.spans(fidelities, chosen)

    def positions(self, fidelities: Sequence[Fidelity], chosen: Array) -> int:
        """Count the positions that the document takes when its sentences are read so."""
        key = chosen.tobytes()
        if key not in self._positions:
            content = sum(span.positions(self.chunk_size) for span in self.spans(fidelities, chosen))
            self._positions[key] = content + (self.overhead if content else 0)
        return self._positions[key]


def plan_focus(
    question: str,
    documents: Sequence[SplitDocument],
    budget: int,
    *,
    ratios: Sequence[int],
    select: bool = False,
    scorer: SentenceScorer = bm25_scores,
    losses: SentenceLosses | None = None,
) -> Plan:
    """Choose what becomes of each sentence of some documents, so that the whole fits the budget.

    Where all documents fit raw, all are raw.

    Args:
        question: What is asked.
        documents: Best first.
        budget: Positions that they may take.
        ratios: That may be used.
        select: Read sentences in full or not at all: those that say most about the question.
        scorer: Says how much a sentence has to do with the question.
        losses: What to weigh with; what was fitted for the shipped LLM when not given.

    Raises:
        BudgetError: budget is negative or not a whole number.
    """
    budget = check_budget(budget)
    table = losses or sentence_losses()
    usable = [at for at, f in enumerate(table.fidelities) if not isinstance(f, int) or (f in ratios and not select)]
    fidelities = [table.fidelities[at] for at in usable]
    counts = [len(document.sentences) for document in documents]
    ends, note = np.cumsum(counts)[:-1], ""
    chosen = np.full(sum(counts), len(fidelities) - 1)
    full = sum(document.n_tokens + document.overhead for document in documents if document.n_tokens)
    if full > budget or any(document.limit is not None for document in documents):
        texts = [text for document in documents for text in document.sentences.texts]
        lengths = np.concatenate([np.diff(document.sentences.borders) for document in documents])
        scores = np.asarray(scorer(question, texts), dtype=float)
        trust = words_held(question, texts, int(scores.argmax())) if scores.max(initial=0) > 0 else 0.0
        per_position: Array = np.array([_tokens_per_position(fidelity) for fidelity in fidelities])
        if select:  # by rank alone, whatever a sentence's length
            ranks = np.argsort(np.argsort(-scores, kind="stable"), kind="stable")
            of_each = np.stack([(len(ranks) - ranks) * lengths, np.zeros(len(ranks))], axis=1)
        else:  # positions that nothing was measured to gain by are used too
            of_each = table.of(scores, lengths, trust)[:, usable]
            of_each += _LEAST_LOSS * lengths[:, None] * (1 - per_position**-0.5)
        of_each[per_position < np.repeat([document.limit or 0 for document in documents], counts)[:, None]] = np.inf

        def positions(choice: Array) -> int:
            parts = zip(documents, np.split(choice, ends), strict=True)
            return sum(document.positions(fidelities, part) for document, part in parts)

        chosen = allocate(lengths, of_each, (1 / per_position).tolist(), budget, positions)
        note = f"the best sentence holds {trust:.0%} of what is rare in the question"
    plans = [
        _document_plan(at, document, fidelities, part)
        for at, (document, part) in enumerate(zip(documents, np.split(chosen, ends) if documents else (), strict=True))
    ]
    return Plan(documents=tuple(plans), budget=budget, note=note)


def _tokens_per_position(fidelity: Fidelity) -> float:
    return float(fidelity) if isinstance(fidelity, int) else 1.0 if fidelity == "raw" else math.inf


def _document_plan(index: int, document: SplitDocument, fidelities: Sequence[Fidelity], chosen: Array) -> DocumentPlan:
    spans = document.spans(fidelities, chosen) if document.n_tokens else []
    counts = [(int((chosen == at).sum()), fidelity) for at, fidelity in enumerate(fidelities)][::-1]
    said = [f"{count} at ratio {f}" if isinstance(f, int) else f"{count} {f}" for count, f in counts if count]
    fidelity = fidelity_of(spans)
    reason = f"of {len(chosen)} sentences: " + ", ".join(said)
    if fidelity != "mixed":
        reason = {"raw": "fits raw", "dropped": "no room" if spans else "empty"}.get(str(fidelity), reason)
    return DocumentPlan(
        index=index,
        n_tokens=document.n_tokens,
        fidelity=fidelity,
        positions=document.positions(fidelities, chosen) if spans else 0,
        reason=reason,
        spans=tuple(spans),
    )
