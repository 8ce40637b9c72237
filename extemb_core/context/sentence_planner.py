"""Plan documents by their sentences with an embedder's settings, for answers and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from extemb_core.context.focus import SplitDocument, plan_focus, sentence_losses
from extemb_core.context.planning import Plan
from extemb_core.context.retrieval_heads import heads_of, max_sentence_tokens
from extemb_core.context.scoring import SentenceScorer, bm25_scores
from extemb_core.errors import ConfigError
from extemb_core.models.compressed import Compressed
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM


class SentencePlanner:
    """Calls `plan_focus` with an embedder's ratios and losses, and with its retrieval heads if the LLM has them.

    Safe for several threads.

    Args:
        llm: LLM that reads the documents.
        embedder: Embedder that compresses them.
        scorer: Says how much a sentence has to do with the question. When not given, BM25 and the embedder's
            `retrieval_heads` together, or BM25 alone if the LLM has no such heads.

    Raises:
        ConfigError: The scorer is not a function, or the embedder's table of losses is not valid.
    """

    def __init__(self, llm: LLM, embedder: ExtensibleEmbedder, scorer: SentenceScorer | None = None) -> None:
        if scorer is not None and not callable(scorer):
            raise ConfigError(
                f"scorer={scorer!r:.80} is no function; pass one of a question and its sentences, or None"
            )
        self.scorer = scorer
        self._name = llm.name
        self._ratios = embedder.config.ratios
        self._usable = [ratio for ratio in self._ratios if ratio >= embedder.config.kept_ratio]
        self._heads = heads_of(llm, embedder) if scorer is None else None
        fitted = embedder.config.sentence_losses
        self._losses = {by_heads: sentence_losses(fitted, by_heads=by_heads) for by_heads in (False, True)}

    def max_sentence_tokens(self, n_tokens: int) -> int:
        """Return the maximum length of a sentence, in tokens, when texts of `n_tokens` in all are planned."""
        return max_sentence_tokens(self._heads, n_tokens)

    def plan(
        self,
        question: str,
        documents: Sequence[SplitDocument],
        budget: int,
        compressed: Callable[[], Sequence[Compressed]],
        *,
        select: bool = False,
    ) -> Plan:
        """Plan for a question; see `plan_focus`.

        Args:
            question, documents, budget, select: See `plan_focus`.
            compressed: Returns the documents compressed at their finest ratio; called if the heads look at them.
        """
        looking = self._heads and self._heads.scorer(documents, budget, self._ratios, compressed)
        plan = plan_focus(
            question, documents, budget, ratios=self._usable, select=select,
            scorer=self.scorer or looking or bm25_scores, losses=self._losses[looking is not None],
        )  # fmt: skip
        by = f"; ranked by where {self._name} looks, and by words" if looking is not None else ""
        return replace(plan, note=plan.note and plan.note + by)
