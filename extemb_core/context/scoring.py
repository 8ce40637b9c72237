"""Score sentences against a question, and judge how far the scores can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from extemb_core.library.bm25 import WordIndex

_KEPT_INDICES = 8  # for recent documents: a conversation asks about the same ones again


class SentenceScorer(Protocol):
    """Scores sentences by what they say of a question: BM25, or your own, such as a cross-encoder."""

    def __call__(self, question: str, sentences: Sequence[str]) -> Sequence[float]:
        """Return a score for each sentence, higher if it says more; 0 or less if it is unrelated to the question."""


@lru_cache(_KEPT_INDICES)
def index_of(sentences: tuple[str, ...]) -> WordIndex:
    """Index sentences by their words; recent indices are remembered."""
    return WordIndex(range(len(sentences)), sentences)


def bm25_scores(question: str, sentences: Sequence[str]) -> list[float]:
    """Score sentences by BM25: words that are rare among them count most."""
    scores = dict(index_of(tuple(sentences)).search(question, len(sentences)))
    return [scores.get(at, 0.0) for at in range(len(sentences))]


def ranking(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return sentences by their scores, best first; equal ones in their order. (U,) -> (U,)."""
    return np.argsort(-scores, kind="stable")


def ranks(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rank of each sentence in the `ranking`, from 0. (U,) -> (U,)."""
    return np.argsort(ranking(scores), kind="stable")


def words_added(question: str, sentences: Sequence[str], best: int, second: int) -> float:
    """Measure how much of a question the second-best sentence holds that the best one lacks, from 0 to 1.

    Each word of the question counts by how rare it is among the sentences. If little is added, the answer stands in one
    place, and the ranking can be trusted to have found it; if much is added, several places have to be combined.
    """
    words = index_of(tuple(sentences)).words(question)
    total = sum(rarity for rarity, _ in words)
    return sum(rarity for rarity, held in words if second in held and best not in held) / total if total else 0.0
