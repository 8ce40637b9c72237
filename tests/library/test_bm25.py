"""BM25: passages with the rare words of a question first, and none without any; and its fusion with vectors."""

from __future__ import annotations

import os
import random
import unicodedata

import bm25s
import numpy as np
import pytest
from safetensors.numpy import save_file

from extemb_core.library import bm25
from extemb_core.library.bm25 import WordIndex, fuse

TEXTS = ["The mill was built by Ada Merrow.", "The bridge was closed in 1987.", "Rivers carry sand to the sea.", ""]


def test_the_words_of_the_question_decide():
    index = WordIndex([10, 11, 12, 13], TEXTS)
    assert [number for number, _ in index.search("When was the bridge closed?", 3)] == [11]
    assert [number for number, _ in index.search("merrow", 3)] == [10]
    assert index.search("elephant", 3) == []
    assert index.search("the of", 3) == []


def test_k_and_the_order_of_equals():
    index = WordIndex([5, 3, 4], ["blue stone", "blue stone", "blue stone"])
    assert [number for number, _ in index.search("blue", 2)] == [3, 4, 5]  # the third is as good
    index = WordIndex(range(4), ["blue blue", "blue", "red", "blue"])
    assert [number for number, _ in index.search("blue", 1)] == [0]


@pytest.mark.parametrize(
    ("question", "texts"),
    [
        ("Which side is room 7?", [f"Room {number} is on the left." for number in range(10)]),
        ("What does section H say?", [f"Section {letter} says so." for letter in "ABCDEFGHIJ"]),
        (
            "谁雇用了店员",
            [
                "天气很好。",
                "桥在一九八七年关闭。",
                "河流入海。",
                "船很多。",
                "红色。",
                "蓝色。",
                "绿色。",
                "店员被雇用了。",
            ],
        ),
        ("橋はいつ閉鎖", ["天気。", "海。", "船。", "山。", "川。", "森。", "空。", "橋は1987年に閉鎖された。"]),
        ("第7章", ["第1章", "第2章", "第3章", "第4章", "第5章", "第6章", "第8章", "第7章"]),
    ],
)
def test_words_of_one_character_are_found(question, texts):
    assert WordIndex(range(len(texts)), texts).search(question, 1)[0][0] == 7


def test_what_an_apostrophe_cut_off_is_no_word():
    assert WordIndex([1, 2], ["the keeper's s", "d'année l\u2019été"]).search("What's his?", 3) == []
    assert [number for number, _ in WordIndex([1, 2], ["the keeper's", "d'année"]).search("année keeper", 2)] == [1, 2]


@pytest.mark.parametrize("question", ["finite", "\ufb01nite", "FINITE"])
@pytest.mark.parametrize("text", ["It is finite.", "It is \ufb01nite.", "It is fi\xadnite."])
def test_a_ligature_and_a_hyphen_that_is_not_shown_make_no_other_word(question, text):
    assert [at for at, _ in WordIndex([0, 1], [text, "It is large."]).search(question, 2)] == [0]


def test_an_accent_apart_from_its_letter_makes_no_other_word():
    apart = unicodedata.normalize("NFD", "résumé")
    for question, text in (("résumé", apart), (apart, "résumé")):
        assert [at for at, _ in WordIndex([0, 1], [f"Her {text}.", "His letter."]).search(question, 2)] == [0]


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_nothing_to_find(texts):
    assert WordIndex(range(len(texts)), texts).search("word", 5) == []


def random_texts(count, seed=0):
    draw = random.Random(seed)
    return [" ".join(f"{letter}ab" for letter in draw.choices("abcdefgh", k=draw.randrange(30))) for _ in range(count)]


QUESTIONS = ["aab bab zab", "cab cab", "Dab the hab"]


def test_scores_are_those_of_bm25():
    texts = random_texts(80)
    index = WordIndex(range(80), texts)
    oracle = bm25s.BM25()
    oracle.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    for question in QUESTIONS:
        words = bm25s.tokenize(question, stopwords="en", return_ids=False, show_progress=False)[0]
        scores = oracle.get_scores(words)
        assert dict(index.search(question, 80)) == pytest.approx({at: s for at, s in enumerate(scores) if s > 0})


@pytest.mark.parametrize("through_a_file", [False, True])
def test_what_came_and_went_leaves_what_the_rest_gives_by_itself(tmp_path, through_a_file):
    texts = random_texts(60)
    index = WordIndex()
    for start in range(0, 60, 20):
        index.add(range(start, start + 20), texts[start : start + 20])
        index.remove([start + 3, start + 7, 999])
        if through_a_file:
            index.save(tmp_path / "words")
            index = WordIndex.load(tmp_path / "words")
    left = [at for at in range(60) if at % 20 not in (3, 7)]
    assert index.ids == set(left)
    rest = WordIndex(left, [texts[at] for at in left])
    for question in QUESTIONS:
        assert index.search(question, 60) == rest.search(question, 60) != []
    assert not index.should_be_made_anew()
    index.remove(range(20))
    assert index.should_be_made_anew()
    index.remove(range(60))
    assert index.search(QUESTIONS[0], 5) == []


def test_what_is_interrupted_can_be_added_again(monkeypatch):
    index = WordIndex([1], TEXTS[:1])
    with monkeypatch.context() as patched:
        patched.setattr(bm25, "Counter", lambda words: {"mill": 1} if "1987" not in words else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            index.add([2, 3], [TEXTS[2], TEXTS[1]])
    assert index.ids == {1}
    index.add([2, 3], [TEXTS[2], TEXTS[1]])
    anew = WordIndex([1, 2, 3], [TEXTS[0], TEXTS[2], TEXTS[1]])
    assert [index.search(question, 3) for question in ("mill", "1987")] == [
        anew.search("mill", 3),
        anew.search("1987", 3),
    ]


def test_a_file_that_is_not_whole_is_not_read(tmp_path):
    file = tmp_path / "words"
    assert WordIndex.load(file) is None
    WordIndex().save(file)
    assert WordIndex.load(file).search("mill", 3) == []
    WordIndex([1, 2], TEXTS[:2]).save(file)
    content = file.read_bytes()
    for damaged in (b"", content[:-5], content[:-1] + b"9", b"nothing"):
        file.write_bytes(damaged)
        assert WordIndex.load(file) is None


@pytest.mark.parametrize(
    "made_up",
    [
        {"ids": np.zeros(3)},
        {"rows": np.array([9], np.uint32)},
        {"lengths": np.arange(2)},
        {"counts": np.zeros(0, np.uint32)},
        {"words": np.frombuffer(b"\xff", np.uint8)},
        None,
    ],
)
def test_a_made_up_file_with_a_right_checksum_is_not_read(tmp_path, made_up):
    tensors = {
        "ids": np.arange(3), "lengths": np.arange(3), "words": np.frombuffer(b"mill", np.uint8),
        "ends": np.array([1]), "rows": np.array([0], np.uint32), "counts": np.array([1], np.uint32),
    }  # fmt: skip

    def loaded(tensors):
        save_file(tensors, tmp_path / "words", {"version": bm25._VERSION, "checksum": bm25._checksum_of(tensors)})
        return WordIndex.load(tmp_path / "words")

    assert loaded(tensors).ids == {0, 1, 2}
    assert loaded({} if made_up is None else tensors | made_up) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_is_none(tmp_path):
    os.mkfifo(tmp_path / "words")
    assert WordIndex.load(tmp_path / "words") is None


# -- fusion with another ranking ----------------------------------------------------------------------------------


def ranked(*items):
    return [(item, -float(rank)) for rank, item in enumerate(items)]


def test_equals_share_a_rank_so_that_the_other_ranking_decides():
    words = [(1, 2.0), (2, 1.0), (3, 1.0), (4, 1.0)]
    found = fuse([words, ranked(4, 3, 2)])
    assert dict(found) == pytest.approx({1: 1 / 61, 2: 1 / 64 + 1 / 63, 3: 1 / 64 + 1 / 62, 4: 1 / 64 + 1 / 61})
    assert [item for item, _ in found] == [4, 3, 2, 1]


def test_scores_are_the_sums_of_reciprocal_ranks():
    found = dict(fuse([ranked(7, 8, 9), ranked(9, 7)]))
    assert found == pytest.approx({7: 1 / 61 + 1 / 62, 8: 1 / 62, 9: 1 / 63 + 1 / 61})
    assert [item for item, _ in fuse([ranked(7, 8, 9), ranked(9, 7)])] == [7, 9, 8]


def test_ties_keep_the_order_of_the_items():
    assert [item for item, _ in fuse([ranked(1, 2), ranked(2, 1)])] == [1, 2]
    assert [item for item, _ in fuse([ranked(1, 2), ranked(2, 1), ranked(2, 1)])] == [2, 1]
    assert fuse([[], []]) == []
