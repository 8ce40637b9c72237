"""Plan for a question: read the sentences that say most about it in full and, if they are few, the rest compressed."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from extemb_core.context.allocation import allocate
from extemb_core.context.planning import (
    DocumentPlan,
    Fidelity,
    Plan,
    check_budget,
    count_fidelities,
    fidelity_of,
    plan_of_spans,
    tokens_per_position,
)
from extemb_core.context.scoring import SentenceScorer, bm25_scores, ranking, ranks, words_added
from extemb_core.context.spans import MAX_SENTENCE_TOKENS, Array, GroupGrid, Sentences
from extemb_core.errors import ConfigError

if TYPE_CHECKING:  # loads transformers, which checking settings does not need
    from extemb_core.models.config import ExtensibleEmbedderConfig

_MIN_LOSS = 1e-6  # per token
_SCATTERED = 0.2  # if the second sentence adds more, the answer is in more places than a ranking by words finds
_MANY = 6  # sentences in full beside which compressed text distracts more than it helps (docs/experiments.md)
_MANY_BY_HEADS = 3  # the same, if retrieval heads rank the sentences
_MANY_PARTS = 9  # the same, for parts of sentences

Mode = Literal["focus", "select", "even"]
MODES: tuple[Mode, ...] = get_args(Mode)


FIDELITIES: tuple[Fidelity, ...] = ("dropped", 32, 16, 8, 4, 2, "raw")
"""In rising detail."""


@dataclass(frozen=True, eq=False)
class SentenceLosses:
    """What an answer loses when a sentence is not read in full, by how much that says about the question.

    Fitted by `extemb eval plan`.

    Attributes:
        ranks: Sentences are classed by their rank among all, from 1: up to ranks[0], up to ranks[1], and so on; then
            those below; then those that have nothing to do with the question.
        trust: Borders between levels of trust in the ranking, by what the second sentence adds (see `words_added`).
        losses: (levels, classes, F) for each of `FIDELITIES`; those of the last two classes per hundred tokens.
        alike_above: If the second sentence adds more than this, every token counts alike (docs/experiments.md).
        many: With so many whole sentences in full, nothing is compressed beside them.
    """

    ranks: tuple[int, ...]
    trust: tuple[float, ...]
    losses: Array
    alike_above: float = math.inf
    many: int = _MANY

    def classes(self, scores: Array, lengths: Array) -> tuple[Array, Array]:
        """Return the (U,) classes of U sentences, and the (U,) factors by which the losses of their classes count."""
        classes = np.searchsorted(self.ranks, ranks(scores) + 1)
        classes[scores <= 0] = len(self.ranks) + 1
        return classes, np.where(classes < len(self.ranks), 1, lengths / 100)

    def of(self, scores: Array, lengths: Array, added: float) -> Array:
        """Return the (U, F) losses of U sentences; `added` is what the second one adds (see `added_by_second`)."""
        classes, amounts = self.classes(scores, lengths)
        losses: Array = self.losses[np.searchsorted(self.trust, added)][classes] * amounts[:, None]
        return losses


@cache
def shipped_losses() -> dict[str, Any]:
    """Load the table fitted for the shipped LLM, for `sentence_losses`."""
    text = (resources.files("extemb_core") / "pretrained" / "focus.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def sentence_losses(fitted: Any = None, *, by_heads: bool = False) -> SentenceLosses:
    """Read the losses of sentences that are not read in full.

    Args:
        fitted: The `summary` of a record of `extemb eval plan`; the one fitted for the shipped LLM when not given.
        by_heads: The sentences are ranked by retrieval heads too, not by words alone.

    Raises:
        ConfigError: `fitted` is not such a summary.
    """
    values = shipped_losses() if fitted is None else fitted
    try:
        ranks, trust = tuple(values["ranks"]), tuple(values["trust"])
        losses = np.array(values["losses"], dtype=float)
        legal = losses.shape == (len(trust) + 1, len(ranks) + 2, len(FIDELITIES)) and np.isfinite(losses).all()
        legal &= (losses >= 0).all() and tuple(values["fidelities"]) == FIDELITIES
        legal &= all((np.diff(np.array(borders, dtype=float)) > 0).all() for borders in (ranks, trust))
    except (KeyError, TypeError, ValueError):
        legal = False
    if not legal:
        raise ConfigError(
            f"sentence_losses={reprlib.repr(values)} is no table of losses by trust, rank and fidelity; pass the "
            "summary of a record of `extemb eval plan`, or leave it out"
        )
    of_ranking = (math.inf, _MANY_BY_HEADS) if by_heads else (_SCATTERED, _MANY)
    return SentenceLosses(ranks, trust, losses, *of_ranking)


def added_by_second(question: str, sentences: Sequence[str], scores: Array) -> float:
    """Measure what the second sentence of a ranking adds to the first (see `words_added`); 0 if there is no second."""
    order = ranking(scores)
    if len(order) < 2 or scores[order[1]] <= 0:
        return 0.0
    return words_added(question, sentences, *order[:2].tolist())


def mode_of(plan: str | None, ratio: str | int, question: str, config: ExtensibleEmbedderConfig) -> Mode:
    """Return how documents are planned: as asked, or by default for the question if there is one and it is possible.

    Text compressed by an untrained embedder answers worse than chosen sentences in the same positions
    (docs/experiments.md). So the default is "select" for an untrained embedder without a table of losses of its own,
    and "focus" for every other.

    Raises:
        ConfigError: The plan is unknown, comes with a ratio, or needs states that enter above layer 0.
    """
    if (mode := check_plan(plan, ratio)) is None:
        if ratio != "auto" or not question.strip() or not config.entry_layer:
            return "even"
        return "select" if config.untrained and config.sentence_losses is None else "focus"
    if mode != "even" and not config.entry_layer:
        raise ConfigError(f"plan={mode!r} needs an embedder that enters above layer 0; pass plan='even' or another one")
    return mode


def check_plan(plan: str | None, ratio: str | int = "auto", *, question: bool = True) -> Mode | None:
    """Return a plan's name as it is.

    Args:
        plan, ratio: As for `mode_of`.
        question: Whether there is a question; a plain prompt has none.

    Raises:
        ConfigError: The plan is unknown, comes with a ratio, or needs a question that is missing.
    """
    if plan is not None and plan not in MODES:
        raise ConfigError(f"plan={plan!r} is none of {', '.join(MODES)}; pass one of them or leave it out")
    if plan in ("focus", "select") and ratio != "auto":
        raise ConfigError(
            f"plan={plan!r} came with ratio={ratio!r}, which is for whole documents; pass ratio='auto' or plan='even'"
        )
    if plan in ("focus", "select") and not question:
        raise ConfigError(
            f"plan={plan!r} needs a question, and a plain prompt has none; pass plan='even' or use a chat"
        )
    return plan


@dataclass(frozen=True, eq=False)
class SplitDocument:
    """A document and its sentences.

    Attributes:
        sentences: Its sentences, which together are all of its tokens.
        finest: Tokens of the smallest group that is stored.
        chunk_size: Tokens that are compressed together.
        overhead: Positions that it costs besides its content, if any of it is read.
        limit: The finest ratio at which it may be read; None is no limit.
    """

    sentences: Sentences
    finest: int
    chunk_size: int
    overhead: int = 0
    limit: int | None = None

    @property
    def n_tokens(self) -> int:
        return int(self.sentences.borders[-1])

    @cached_property
    def grid(self) -> GroupGrid:
        return GroupGrid(self.sentences, self.finest, self.chunk_size)

    def positions(self, fidelities: Sequence[Fidelity], chosen: Array) -> int:
        """Count the positions that the document takes when each sentence has its chosen fidelity."""
        content = sum(span.positions(self.chunk_size) for span in self.grid.spans(fidelities, chosen))
        return content + self.overhead if content else 0


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
    """Choose the fidelity of each sentence of some documents, so that the whole fits the budget.

    If all documents fit raw, all are raw. If so many sentences fit in full that the answer is most likely among them,
    the rest is left out: beside them, compressed text distracts more than it helps (docs/experiments.md).

    Args:
        question: The question to plan for.
        documents: Documents, best first.
        budget: Positions that they may take.
        ratios: Ratios that may be used.
        select: Read sentences in full or not at all: those that say most about the question.
        scorer: Says how much a sentence has to do with the question.
        losses: Losses to weigh with; those of the shipped LLM and a ranking by words when not given.

    Raises:
        BudgetError: budget is negative or not a whole number.
        ConfigError: The scorer did not return a number for each sentence.
    """
    budget = check_budget(budget)
    table = losses or sentence_losses()
    usable = [at for at, f in enumerate(FIDELITIES) if not isinstance(f, int) or (f in ratios and not select)]
    fidelities = [FIDELITIES[at] for at in usable]
    counts = [len(document.sentences) for document in documents]
    ends, note = np.cumsum(counts)[:-1], ""
    chosen = np.full(sum(counts), len(fidelities) - 1)
    full = sum(document.n_tokens + document.overhead for document in documents if document.n_tokens)
    if full > budget or (full and any(document.limit is not None for document in documents)):
        texts = [text for document in documents for text in document.sentences.texts]
        lengths = np.concatenate([np.diff(document.sentences.borders) for document in documents])
        scores = np.asarray(scorer(question, texts), dtype=float)
        if scores.shape != (len(texts),) or np.isnan(scores).any():
            raise ConfigError(
                f"the scorer returned scores of shape {scores.shape} for {len(texts)} sentences, or some that are no "
                "numbers; return one number for each"
            )
        added = added_by_second(question, texts, scores)
        in_full = _in_full(scores, lengths, budget)
        alike = not select and added > table.alike_above
        in_parts = all(document.sentences.max_tokens < MAX_SENTENCE_TOKENS for document in documents)
        many = in_full >= (_MANY_PARTS if in_parts else table.many)
        many &= not alike and all(document.limit is None for document in documents)
        per_position: Array = np.array([tokens_per_position(fidelity) for fidelity in fidelities])
        if select or many:  # by rank alone: length does not count
            of_each = np.full((len(scores), len(fidelities)), np.inf)
            of_each[:, 0], of_each[:, -1] = (len(scores) - ranks(scores)) * lengths, 0
        else:  # _LEAST_LOSS: positions without a measured gain are used too
            if alike:
                of_each = (table.losses.sum((0, 1)) * lengths[:, None])[:, usable]
            else:
                of_each = table.of(scores, lengths, added)[:, usable]
            of_each += _MIN_LOSS * lengths[:, None] * (1 - per_position**-0.5)
        of_each[per_position < np.repeat([document.limit or 0 for document in documents], counts)[:, None]] = np.inf

        counted: dict[tuple[int, bytes], int] = {}  # most steps change only one document

        def positions(choice: Array) -> int:
            keys = []
            for at, part in enumerate(np.split(choice, ends)):
                keys.append((at, part.tobytes()))
                if keys[-1] not in counted:
                    counted[keys[-1]] = documents[at].positions(fidelities, part)
            return sum(map(counted.__getitem__, keys))

        chosen = allocate(lengths, of_each, (1 / per_position).tolist(), budget, positions)
        note = _note(scores, added, table, alike=alike, in_full=in_full if many and not select else 0)
    plans = [
        _document_plan(at, document, fidelities, part)
        for at, (document, part) in enumerate(zip(documents, np.split(chosen, ends) if documents else (), strict=True))
    ]
    return Plan(documents=tuple(plans), budget=budget, note=note)


def _in_full(scores: Array, lengths: Array, budget: int) -> int:
    """Count the sentences that have to do with the question and, best first, fit the budget in full."""
    order = ranking(scores)
    fits: Array = np.cumsum(lengths[order]) <= budget
    return int((fits & (scores[order] > 0)).sum())


def _note(scores: Array, added: float, table: SentenceLosses, *, alike: bool, in_full: int) -> str:
    if not (scores > 0).any():
        return "no sentence has a word of the question"
    several = np.searchsorted(table.trust, added) == len(table.trust)
    where = "several places" if several else "one place"
    then = ", so that all is read alike" if alike else ""
    note = f"the question asks for {where}: its second sentence adds {added:.0%} of what is rare in it{then}"
    return f"{note}; {in_full} sentences fit in full, so that none is compressed beside them" if in_full else note


def _document_plan(index: int, document: SplitDocument, fidelities: Sequence[Fidelity], chosen: Array) -> DocumentPlan:
    spans = document.grid.spans(fidelities, chosen) if document.n_tokens else []
    fidelity = fidelity_of(spans)
    reason = f"of {len(chosen)} sentences: " + count_fidelities(fidelities[at] for at in chosen)
    if fidelity != "mixed":
        reason = {"raw": "fits raw", "dropped": "no room" if spans else "empty"}.get(str(fidelity), reason)
    return plan_of_spans(index, spans, reason, document.sentences.excerpt, document.overhead, document.chunk_size)
