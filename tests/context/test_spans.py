"""Sentences of a document among its tokens, and the spans that a plan makes of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SENTENCES, tiny_llm

from extemb_core.context import spans
from extemb_core.context.spans import GroupGrid, Sentences, split_into_sentences

FIDELITIES = ("dropped", 8, 4, 2, "raw")


def split(text, **settings):
    return split_into_sentences(text, tiny_llm("llama").encode_with_ends(text)[1], **settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Ito left at 7 a.m. on foot. Did he? Yes!", ["Dr. Ito left at 7 a.m. on foot.", " Did he?", " Yes!"]),
        ("One.\r\n\r\nTwo.\n", ["One.", "\r\n\r\nTwo.\n"]),
        ("雨が降った。川が増えた。", ["雨が降った。", "川が増えた。"]),
        ("By J.\u00a0Ito and A.\u2028B. They left.", ["By J.\u00a0Ito and A.\u2028B.", " They left."]),
        ("The lock of J\u00a0. Ito is old. It holds.", ["The lock of J\u00a0. Ito is old.", " It holds."]),
        ("no full stop", ["no full stop"]),
        (" \n ", [" \n "]),
        ("", []),
    ],
)
def test_sentences_end_where_they_do_in_the_language(text, expected):
    assert split(text).texts == expected


def test_a_splitter_that_panics_leaves_the_lines(monkeypatch):
    class Panic(BaseException):
        pass

    def panic(language, text):
        raise Panic

    monkeypatch.setattr(spans.sentencex, "get_sentence_boundaries", panic)
    assert split("One. Two.").texts == ["One. Two."]
    rows = "".join(f"| {number} | {number * 7} |\n" for number in range(40))
    assert "".join(split(rows).texts) == rows
    assert len(split(rows)) > 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the mill that stood there, of stone and wood", ["the mill that stood there,", " of stone and wood"]),
        ("the mill that stood there of stone and wood", ["the mill that stood", " there of stone and wood"]),
        ("over 10,000 men\nstood there, of old", ["over 10,000 men", "\nstood there, of old"]),
        ("磨坊在河边、用石头建成", ["磨坊在河边、", "用石头建成"]),
    ],
)
def test_a_long_sentence_is_cut_near_its_middle_after_a_line_a_clause_or_a_word(text, expected):
    n_tokens = len(tiny_llm("llama").encode(text))
    assert split(text).texts == [text]
    assert split(text, max_tokens=n_tokens * 2 // 3).texts == expected


def test_what_has_no_full_stop_is_cut_after_lines_and_else_after_so_many_tokens():
    rows = "".join(f"| {number} | {number * 7} |\n" for number in range(40))
    table = split(rows, max_tokens=32)
    assert all(row.count("|") % 3 == 0 for row in table.texts)
    assert len(split("x" * 500, max_tokens=32)) > 1
    for sentences in (table, split("x" * 500, max_tokens=32)):
        assert np.diff(sentences.borders).max() <= 32


@given(text=st.text("aB.!? \n|é東🙂<>im_end\u00a0\u2028\u3000\u0301", max_size=300), max_tokens=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_sentences_are_all_of_the_text(text, max_tokens):
    made = split(text, max_tokens=max_tokens)
    assert "".join(made.texts) == text
    assert made.borders[-1] == len(tiny_llm("llama").encode(text))
    assert (np.diff(made.borders) <= max_tokens).all()
    assert (np.diff(made.borders) > 0).all()


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    finest=st.sampled_from([1, 2, 4]),
    chunk_size=st.sampled_from([8, 12, 100]),
    data=st.data(),
)
def test_every_token_is_in_one_span_which_has_the_detail_that_was_chosen_or_more(lengths, finest, chunk_size, data):
    borders = np.cumsum([0, *lengths])
    chosen = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths))))
    spans = GroupGrid(Sentences(borders, "", np.empty(0)), finest, chunk_size).spans(FIDELITIES, chosen)
    assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
    assert spans[-1].stop == borders[-1]
    assert all(a.fidelity != b.fidelity for a, b in itertools.pairwise(spans))
    assert all(span.start % chunk_size % finest == 0 for span in spans)
    levels = np.concatenate([[FIDELITIES.index(span.fidelity)] * (span.stop - span.start) for span in spans])
    wanted = np.repeat(chosen, lengths)
    assert (levels >= wanted).all()
    for at in np.flatnonzero(levels > wanted):  # only where its group is also of a sentence that has more
        chunk = at // chunk_size * chunk_size
        first = chunk + (at - chunk) // finest * finest
        assert levels[at] == wanted[first : min(first + finest, chunk + chunk_size)].max()


def test_a_document_at_one_fidelity_is_one_span_across_chunks():
    grid = GroupGrid(split(SENTENCES), 2, 16)
    (span,) = grid.spans(FIDELITIES, np.full(len(split(SENTENCES)), 2))
    assert span.fidelity == 4
    assert span.positions(16) == sum(-(-size // 4) for size in [16] * (span.stop // 16) + [span.stop % 16])
