"""Passages: the whole text, none too long, cut where a reader would."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extemb_core.errors import ConfigError
from extemb_core.library.passages import split_passages


def words(texts):
    return [len(text.split()) for text in texts]


@given(st.text(alphabet="ab .!\n\t\u00e9", max_size=200), st.integers(1, 12))
def test_passages_are_the_whole_text_and_none_is_too_long(text, most):
    spans = split_passages(text, most, words)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert all(len(text[start:end].split()) <= most for start, end in spans)


def test_cuts_are_after_paragraphs_then_sentences():
    text = "One two three.\n\nFour five. Six seven eight.\n\nNine."
    assert [text[a:b] for a, b in split_passages(text, 5, words)] == [
        "One two three.\n\n", "Four five. Six seven eight.\n\n", "Nine."]  # fmt: skip
    assert [text[a:b] for a, b in split_passages(text, 3, words)] == [
        "One two three.\n\n", "Four five. ", "Six seven eight.\n\n", "Nine."]  # fmt: skip


def test_a_word_longer_than_a_passage_is_cut_too():
    def count(texts):
        return [len(text) for text in texts]

    spans = split_passages("x" * 50, 8, count)
    assert max(end - start for start, end in spans) <= 8
    assert spans[-1][1] == 50


def test_an_empty_text_has_none():
    assert split_passages("", 5, words) == []
    with pytest.raises(ConfigError, match="max_tokens=0 is not a whole number of at least 1"):
        split_passages("a", 0, words)
