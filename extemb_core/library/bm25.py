"""Search passages by their words, whose ranking is fused with that of vectors: BM25 finds names and numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import count, groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from extemb_core.errors import optional_import

RANK_OFFSET = 60  # of reciprocal rank fusion, as its authors set it (Cormack et al., 2009)

# Thai, Lao, Burmese, Khmer, Japanese, Chinese and Korean are written without spaces, or with few.
_RANGES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff"
)
_UNSPACED = re.compile(f"[{_RANGES}]")
_WORD = re.compile(rf"[{_RANGES}]+|[^\W{_RANGES}]+")
_STOPWORDS = re.compile(
    "an?|and|are|as|at|be|but|by|for|if|in|into|is|it|no|not|of|on|or|such|that|the|their|then|there|these|they|this|to|"
    "was|will|with"
)


class WordIndex:
    """BM25 index (Lucene's form) over passages, built at once from all of them.

    Args:
        ids: (n,) of the passages.
        texts: Of the passages.

    Raises:
        MissingExtraError: bm25s is not installed.
    """

    def __init__(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        bm25s = optional_import("bm25s", "library", "search by words")
        self._ids = np.asarray(ids, np.int64)
        words = [_words(text) for text in texts]
        self._index: Any = bm25s.BM25() if any(words) else None
        if self._index is not None:
            self._index.index(words, show_progress=False)

    def search(self, question: str, k: int, preferred: Sequence[int] = ()) -> list[tuple[int, float]]:
        """Return (id, score) of the passages with the question's words, best first.

        Equal scores are in the order of `preferred`, another ranking, and those that are not in it by id.
        """
        words = _words(question)
        if self._index is None or not words:
            return []
        scores = self._index.get_scores(words)
        places = {number: place for place, number in enumerate(preferred)}
        order = np.array([places.get(int(number), len(places)) for number in self._ids])
        best = np.lexsort((self._ids, order, -scores))[:k]
        return [(int(self._ids[at]), float(scores[at])) for at in best if scores[at] > 0]


def _words(text: str) -> list[str]:
    """List the words of a text, without the commonest English ones: names and numbers of one character too.

    Where words stand together without spaces each character is one, and each two.
    """
    words = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", text)):
        if _UNSPACED.match(word):
            words += [*word, *map("".join, pairwise(word))]
        elif (len(word) == 1 and word.isupper()) or not _STOPWORDS.fullmatch(word.lower()):  # "Section A"
            words.append(word.lower())
    return words


def mean_ranks(scored: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Map the items of a ranking to their ranks, from 1; those of equal score share the mean of theirs."""
    ranks: dict[int, float] = {}
    for _, group in groupby(scored, itemgetter(1)):
        items = [item for item, _ in group]
        ranks |= dict.fromkeys(items, len(ranks) + (len(items) + 1) / 2)
    return ranks


def fuse(rankings: Sequence[Sequence[int] | Mapping[int, float]]) -> list[tuple[int, float]]:
    """Fuse rankings by reciprocal rank: an item's score is the sum of 1 / (60 + rank), ranks from 1.

    Args:
        rankings: Items, best first, of each ranking, or the rank of each item.

    Returns:
        (item, score), best first; equal scores in the order of the items.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        ranks = ranking.items() if isinstance(ranking, Mapping) else zip(ranking, count(1))
        for item, rank in ranks:
            scores[item] = scores.get(item, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
