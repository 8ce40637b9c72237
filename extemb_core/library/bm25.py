"""Search passages by their words: BM25 finds the names and numbers that vectors blur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from extemb_core.errors import MissingExtraError


class WordIndex:
    """BM25 index (Lucene's form) over passages, built at once from all of them.

    Args:
        ids: (n,) of the passages.
        texts: Of the passages.

    Raises:
        MissingExtraError: bm25s is not installed.
    """

    def __init__(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise MissingExtraError("bm25s", "library", "search by words") from error
        self._bm25s: Any = bm25s
        self._ids = np.asarray(ids, np.int64)
        self._index: Any = None
        words = self._words(texts)
        if any(words):
            self._index = self._bm25s.BM25()
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
