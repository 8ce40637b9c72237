"""Search passages by their words, whose ranking is fused with that of vectors: BM25 finds names and numbers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from extemb_core.errors import optional_import

# Scripts without spaces: Thai, Lao, Burmese, Khmer, and those of Chinese and Japanese.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Each of their characters is a word. So is a letter or digit alone, but not what an apostrophe cut off.
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}|(?<!['\u2019])[^\W{_UNSPACED}]"
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
        """Return (id, score) of the passages with the question's words, best first; equal scores by id.

        More than `k` if others are as good as the last of them: which of them are older says nothing.
        """
        words = self._words([question])[0]
        if self._index is None or not words:
            return []
        scores = self._index.get_scores(words)
        best = np.lexsort((self._ids, -scores))
        least = max(scores[best[:k][-1]], np.finfo(scores.dtype).tiny)
        return [(int(self._ids[at]), float(scores[at])) for at in best if scores[at] >= least]

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        settings = {"token_pattern": _WORD, "stopwords": "en", "return_ids": False, "show_progress": False}
        return [list(words) for words in self._bm25s.tokenize(list(texts), **settings)]


def fuse(rankings: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Fuse rankings by reciprocal rank: an item's score is the sum of 1 / (60 + rank), ranks from 1.

    Items of equal score share a rank, the last of them.

    Args:
        rankings: (item, score), best first, of each ranking.

    Returns:
        (item, score), best first; equal scores in the order of the items.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        rank = 0
        for _, equals in itertools.groupby(ranking, operator.itemgetter(1)):
            items = [item for item, _ in equals]
            rank += len(items)
            for item in items:
                scores[item] = scores.get(item, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
