"""BM25: passages with the rare words of a question first, and none without any; and its fusion with vectors."""

from __future__ import annotations

import pytest

from extemb_core.library.bm25 import WordIndex, fuse, mean_ranks

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
    assert [number for number, _ in index.search("blue", 3, [9, 5, 4])] == [5, 4, 3]  # as another ranking has them
    assert [number for number, _ in index.search("blue", 1, [5])] == [5]


CITIES = ["\u56fe\u4e66\u9986\u5728\u5317\u4eac\u3002", "\u5c0f\u5b66\u5728\u4e0a\u6d77\u3002"]
CASTLES = ["\u6771\u4eac\u30bf\u30ef\u30fc", "\u5927\u962a\u57ce\u3092\u898b\u308b"]
THAI = ["\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e", "\u0e40\u0e0a\u0e35\u0e22\u0e07\u0e43\u0e2b\u0e21\u0e48"]


@pytest.mark.parametrize(
    ("texts", "question", "best"),
    [
        ([f"Room {number} is on the left side." for number in range(40)], "Which side is room 7?", 7),
        ([f"Section {letter} is about letters." for letter in "BCDEFGHIR"], "section R", 8),
        ([f"Section {letter} is about letters." for letter in "BCDA"], "What is in section A?", 3),
        (CITIES, "\u4e0a\u6d77\u7684\u5c0f\u5b66\uff1f", 1),
        (CASTLES, "\u5927\u962a\u57ce\u306f\u3069\u3053", 1),
        (THAI, THAI[1], 1),
        (["Raum \uff15", "Raum \uff17"], "Raum 7", 1),
        (["x = 1", "y = 1"], "What is y?", 1),
    ],
)
def test_names_and_numbers_are_found_in_any_script_however_short(texts, question, best):
    assert WordIndex(range(len(texts)), texts).search(question, 1)[0][0] == best


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_nothing_to_find(texts):
    assert WordIndex(range(len(texts)), texts).search("word", 5) == []


# -- fusion with another ranking ----------------------------------------------------------------------------------


def test_scores_are_the_sums_of_reciprocal_ranks():
    found = dict(fuse([[7, 8, 9], [9, 7]]))
    assert found == pytest.approx({7: 1 / 61 + 1 / 62, 8: 1 / 62, 9: 1 / 63 + 1 / 61})
    assert [item for item, _ in fuse([[7, 8, 9], [9, 7]])] == [7, 9, 8]


def test_items_of_equal_score_share_their_rank():
    assert mean_ranks([(7, 3.0), (5, 2.0), (9, 2.0), (1, 1.0)]) == {7: 1, 5: 2.5, 9: 2.5, 1: 4}
    found = dict(fuse([[9, 5], mean_ranks([(5, 2.0), (9, 2.0)])]))
    assert found == pytest.approx({9: 1 / 61 + 1 / 61.5, 5: 1 / 62 + 1 / 61.5})


def test_ties_keep_the_order_of_the_items():
    assert [item for item, _ in fuse([[1, 2], [2, 1]])] == [1, 2]
    assert [item for item, _ in fuse([[1, 2], [2, 1], [2, 1]])] == [2, 1]
    assert fuse([[], []]) == []
