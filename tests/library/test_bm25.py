"""BM25: passages with the rare words of a question first, and none without any; and its fusion with vectors."""

from __future__ import annotations

import pytest

from extemb_core.library.bm25 import WordIndex, fuse

pytest.importorskip("bm25s")
TEXTS = ["The mill was built by Ada Merrow.", "The bridge was closed in 1987.", "Rivers carry sand to the sea.", ""]


def test_the_words_of_the_question_decide():
    index = WordIndex([10, 11, 12, 13], TEXTS)
    assert [number for number, _ in index.search("When was the bridge closed?", 3)] == [11]
    assert [number for number, _ in index.search("merrow", 3)] == [10]
    assert index.search("elephant", 3) == []
    assert index.search("the of", 3) == []


def test_k_and_the_order_of_equals():
    index = WordIndex([5, 3, 4], ["blue stone", "blue stone", "blue stone"])
    assert [number for number, _ in index.search("blue", 2)] == [3, 4]


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_nothing_to_find(texts):
    assert WordIndex(range(len(texts)), texts).search("word", 5) == []


# -- fusion with another ranking ----------------------------------------------------------------------------------


def test_scores_are_the_sums_of_reciprocal_ranks():
    found = dict(fuse([[7, 8, 9], [9, 7]]))
    assert found == pytest.approx({7: 1 / 61 + 1 / 62, 8: 1 / 62, 9: 1 / 63 + 1 / 61})
    assert [item for item, _ in fuse([[7, 8, 9], [9, 7]])] == [7, 9, 8]


def test_ties_keep_the_order_of_the_items():
    assert [item for item, _ in fuse([[1, 2], [2, 1]])] == [1, 2]
    assert [item for item, _ in fuse([[1, 2], [2, 1], [2, 1]])] == [2, 1]
    assert fuse([[], []]) == []
