"""Scores against examples worked out by hand, and rules that hold for any texts."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extemb_core.errors import ConfigError
from extemb_core.evaluation.metrics import contained, exact_match, f1, normalise_answer, rouge_l

PIECES = ["the", "A", "an", "cat", "Cat!", "the cat", "grey", "42", "é", "É", "€", "$", "...", "\n", ""]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map(" ".join) | st.text(max_size=12)
ANSWERS = st.lists(TEXTS, min_size=1, max_size=3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Lighthouse-Keeper's\tcat.", "lighthousekeepers cat"),
        ("An apple, a pear & the plum", "apple pear plum"),
        ("Theatre and another banana", "theatre and another banana"),  # articles are whole words
        ("A.", ""),  # punctuation goes before articles
        ("t.h.e end", "end"),
        ("1,250.5 km²", "12505 km²"),
        ("À la Café “Ünal”", "à la café “ünal”"),  # the rules know ASCII punctuation only
        ("the€a€b", "€ €b"),  # and an article beside any other sign is a word
        ("ΑΘΗΝΑ, the city", "αθηνα city"),
        ("", ""),
    ],
)
def test_normalising(text, expected):
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f", "inside"),
    [
        ("The Red Bridge!", ["red bridge"], 1, 1, 1),
        ("the old red bridge", ["Red Bridge"], 0, 0.8, 1),  # 2 in common, of 3 and 2
        ("bridge, red", ["Red Bridge"], 0, 1, 0),  # F1 is of bags, contained is of runs
        ("red", ["Red Bridge"], 0, 2 / 3, 0),
        ("It opened in 1990, three years later.", ["1990"], 0, 0.25, 1),  # 1 in common, of 7 and 1
        ("It opened in 19905.", ["1990"], 0, 0, 0),  # tokens, not characters
        ("no no no", ["no"], 0, 0.5, 1),  # one in common, not three
        ("no no", ["no no no"], 0, 0.8, 0),
        ("north", ["the south", "the North", "northern"], 1, 1, 1),
        ("a big grey seal", ["grey whale", "grey seal", "harbour seal colony"], 0, 0.8, 1),  # the second is best
        ("Zürich", ["zürich"], 1, 1, 1),
        ("ZÜRICH, in Switzerland", ["Zürich"], 0, 0.5, 1),
        ("Zurich", ["Zürich"], 0, 0, 0),
        ("東京 Tower", ["the 東京 tower"], 1, 1, 1),
        ("", ["red bridge"], 0, 0, 0),
        ("The!", ["red bridge"], 0, 0, 0),
    ],
)
def test_squad_scores_worked_out_by_hand(prediction, answers, em, f, inside):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(f)
    assert contained(prediction, answers) == inside


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "f", "inside"),
    [
        ("A", ["A"], 1, 1, 1),
        ("", ["A"], 0, 0, 0),  # both normalise to nothing; an empty prediction is no answer
        ("the", ["A"], 0, 0, 0),
        ("option A", ["A"], 0, 2 / 3, 1),
        ("an option", ["A"], 0, 0, 0),
        ("a + b", ["+"], 0, 0.5, 1),
        ("plus", ["+", "plus"], 1, 1, 1),
        ("", [""], 1, 1, 1),
        ("  ", [""], 1, 1, 1),
        ("anything", ["", " "], 0, 0, 0),
    ],
)
def test_an_answer_of_which_nothing_is_left_is_compared_raw(prediction, answers, em, f, inside):
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(f)
    assert contained(prediction, answers) == inside


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("the bridge was closed", ["The bridge was closed."], 1),
        ("the bridge was closed", ["closed was the bridge"], 0.5),  # "the bridge", 2 of 4 and 4
        ("ships came before the fog", ["forty-one ships came in before fog"], 8 / 12),  # 4 of 5 and 7
        ("a b c d", ["b d", "a c d x"], 0.75),  # 2 of 4 and 2: 2/3; 3 of 4 and 4: 3/4
        ("x y x y", ["y x y x"], 0.75),
        ("ÉTÉ indien", ["été"], 2 / 3),
        ("snake_case", ["snake case"], 1),
        ("", ["something"], 0),
        ("nothing", ["else"], 0),
        ("...", ["..."], 1),
    ],
)
def test_rouge_l_worked_out_by_hand(prediction, answers, expected):
    assert rouge_l(prediction, answers) == pytest.approx(expected)


def obvious_common_length(a, b):
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc", max_size=15), st.text("abcd", min_size=1, max_size=15))
def test_rouge_l_is_the_obvious_table(a, b):
    expected = 2 * obvious_common_length(a, b) / (len(a) + len(b))
    assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(expected)


def test_rouge_l_of_long_texts_is_fast():
    text = " ".join(f"word{at * at % 97}" for at in range(1000))
    began = time.process_time()
    assert rouge_l(text, [text]) == 1
    assert time.process_time() - began < 1  # 1,000,000 entries: about 0.01 s in rows, well over a second one by one


@given(TEXTS, ANSWERS)
def test_scores_are_bounded_and_an_exact_match_is_the_best_of_all(prediction, answers):
    em, f, inside, rouge = (score(prediction, answers) for score in (exact_match, f1, contained, rouge_l))
    assert em in (0, 1)
    assert inside in (0, 1)
    assert 0 <= f <= 1
    assert 0 <= rouge <= 1
    if em:
        assert f == inside == 1
    if inside and prediction.strip():
        assert f > 0


@pytest.mark.parametrize("score", [exact_match, f1, contained, rouge_l])
@given(prediction=TEXTS, answers=ANSWERS)
def test_the_best_answer_counts_and_an_answer_matches_itself(score, prediction, answers):
    assert score(prediction, answers) == max(score(prediction, [answer]) for answer in answers)
    assert all(score(answer, answers) == 1 for answer in answers)


@pytest.mark.parametrize("score", [exact_match, f1, contained, rouge_l])
@pytest.mark.parametrize("answers", [[], "a lone text"])
def test_there_must_be_answers(score, answers):
    with pytest.raises(ConfigError, match="at least one text"):
        score("prediction", answers)
