"""Search passages by their words, whose ranking is fused with that of vectors: BM25 finds names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from extemb_core.errors import optional_import

RANK_OFFSET = 60  # of reciprocal rank fusion, as its authors set it (Cormack et al., 2009)


class WordIndex:
    """BM25 index (Lucene's form) over passages, built at once from all of them.

    Args:
        ids: (n,) of the passages.
        texts: Of the passages.

    Raises:
        MissingExtraError: bm25s is not installed.
    """

    def __init__(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        self._bm25s = optional_import("bm25s", "library", "search by words")
        self._ids = np.asarray(ids, np.int64)
        words = self._words(texts)
        self._index: Any = self._bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """Return (id, score) of the passages with the question's words, best first; equal scores by id."""
        words = self._words([question])[0]
        if self._index is None or not words:
            return []
        scores = self._index.get_scores(words)
        best = np.lexsort((self._ids, -scores))[:k]
        return [(int(self._ids[at]), float(scores[at])) for at in best if scores[at] > 0]

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        tokenised = self._bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
        return [list(words) for words in tokenised]


def fuse(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Fuse rankings by reciprocal rank: an item's score is the sum of 1 / (60 + rank), ranks from 1.

    Args:
        rankings: Items, best first, of each ranking.

    Returns:
        (item, score), best first; equal scores in the order of the items.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
