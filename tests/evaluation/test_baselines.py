"""What the baselines choose, against obvious slow versions that go token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_llm

from extemb_core.errors import ConfigError
from extemb_core.evaluation.baselines import (
    choose_sentences,
    head,
    nearest,
    random_embeddings,
    random_tokens,
    select_tokens,
    sinks_and_window,
    token_information,
)
from extemb_core.models.llm import LLM

COUNTS = st.integers(0, 30)


def made(architecture="llama", *, bos=None, window=256):
    """A tiny LLM with another BOS and window."""

    class Changed(LLM):
        bos_token_id = bos

        @property
        def context_window(self):
            return window

    plain = tiny_llm(architecture)
    return Changed(plain.model, plain.tokenizer)


LLAMA, GEMMA, HYBRID = {"architecture": "llama"}, {"architecture": "gemma2", "bos": 1}, {"architecture": "qwen3_next"}


def text(length, seed=0):
    return np.random.default_rng(seed).integers(3, len(tiny_llm().tokenizer), length).astype(np.int32)


def surprise(llm, before, token):
    """The negative log-likelihood of one token, or None where there is nothing to predict it from."""
    before = [llm.bos_token_id, *before] if llm.bos_token_id is not None else list(before)
    return -float(llm.score(llm.embed(before), [token])) if before else None


# -- tokens by their place ----------------------------------------------------------------------------------------


@given(COUNTS, COUNTS)
def test_nearest_and_head_are_the_ends(length, n):
    ids = text(length)
    assert nearest(ids, n).tolist() == [ids[at] for at in range(length) if at >= length - n]
    assert head(ids, n).tolist() == [ids[at] for at in range(length) if at < n]


@given(COUNTS, COUNTS, st.integers(0, 6))
def test_sinks_and_window_keeps_the_first_and_the_most_recent(length, n, sinks):
    ids = text(length)
    if length > n and sinks > n:
        with pytest.raises(ConfigError, match=f"sinks={sinks} "):
            sinks_and_window(ids, n, sinks)
        return
    kept = [ids[at] for at in range(length) if length <= n or at < sinks or at >= length - (n - sinks)]
    assert sinks_and_window(ids, n, sinks).tolist() == kept
    assert len(kept) == min(length, n)


def test_four_sinks_are_the_default():
    assert sinks_and_window(np.arange(100), 7).tolist() == [0, 1, 2, 3, 97, 98, 99]


@pytest.mark.parametrize("choose", [nearest, head, sinks_and_window, lambda ids, n: select_tokens(tiny_llm(), ids, n)])
def test_a_negative_number_of_positions_is_refused(choose):
    with pytest.raises(ConfigError, match="n=-1 "):
        choose(text(8), -1)


# -- tokens by their information ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LLAMA, GEMMA], ids=["llama", "gemma2"])
@pytest.mark.parametrize("before", [0, 1, 9])
def test_information_is_the_score_of_each_token_on_its_own(kind, before):
    llm, prefix, ids = made(**kind), text(before, seed=1), text(12)
    expected = [surprise(llm, [*prefix, *ids[:at]], ids[at]) for at in range(12)]
    if expected[0] is None:
        expected[0] = max(expected[1:])
    found = token_information(llm, ids, prefix)
    assert found.dtype == np.float32
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("bos", "before", "length", "starts"),
    # For each window: the first token it reads, and the first and last that it scores, counted with the prefix.
    [
        (None, 0, 8, [(0, 1, 8)]),
        (None, 0, 12, [(0, 1, 8), (4, 8, 12)]),
        (None, 0, 14, [(0, 1, 8), (4, 8, 12), (6, 12, 14)]),  # the last window is a full one
        (None, 3, 5, [(0, 3, 8)]),
        (None, 6, 8, [(2, 6, 10), (6, 10, 14)]),
        (None, 30, 2, [(24, 30, 32)]),
        (1, 0, 8, [(0, 0, 7), (1, 7, 8)]),  # the BOS takes a position of every window
        (1, 5, 9, [(2, 5, 9), (6, 9, 13), (7, 13, 14)]),
    ],
)
def test_long_texts_are_read_in_windows_of_8_that_overlap(bos, before, length, starts):
    llm = made(bos=bos, window=8)
    both = text(before + length)
    expected = {at: surprise(llm, both[start:at], both[at]) for start, first, end in starts for at in range(first, end)}
    found = token_information(llm, both[before:], both[:before])
    assert found[len(both) - before - len(expected) :].tolist() == pytest.approx(list(expected.values()), abs=1e-4)
    if bos is None and not before:
        assert found[0] == found[1:].max()


def test_logits_in_pieces_are_the_same(monkeypatch):
    whole = token_information(tiny_llm(), text(20))
    monkeypatch.setattr("extemb_core.evaluation.baselines._LOGITS_AT_ONCE", 3)
    assert token_information(tiny_llm(), text(20)) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(("kind", "first"), [(LLAMA, 0.0), (GEMMA, None)], ids=["llama", "gemma2"])
def test_information_of_next_to_nothing(kind, first):
    llm, ids = made(**kind), text(1)
    assert token_information(llm, ids[:0]).shape == token_information(llm, ids[:0], ids).shape == (0,)
    expected = surprise(llm, [], ids[0]) if first is None else first
    assert token_information(llm, ids).tolist() == pytest.approx([expected], abs=1e-4)


def obvious_selection(llm, ids, n, segment):
    """Token by token: what is kept of each segment, given what was kept before it."""
    room = llm.context_window - (llm.bos_token_id is not None)
    kept = []
    for start in range(0, len(ids), segment):
        part = list(ids[start : start + segment])
        budget = int(n * (start + len(part)) / len(ids) + 0.5) - len(kept)
        before = [token for at, token in enumerate(kept) if at >= len(kept) - (room - len(part))]
        surprises = [surprise(llm, [*before, *part[:at]], token) for at, token in enumerate(part)]
        if surprises[0] is None:
            surprises[0] = max(surprises[1:], default=0)
        ranked = sorted(range(len(part)), key=lambda at: (-surprises[at], at))
        kept += [part[at] for at in sorted(ranked[:budget])]
    return kept


@pytest.mark.parametrize("kind", [LLAMA, GEMMA, HYBRID], ids=["llama", "gemma2", "hybrid"])
@pytest.mark.parametrize(("length", "n", "segment"), [(20, 5, 200), (21, 9, 6), (22, 2, 4), (20, 19, 7), (9, 4, 1)])
def test_selection_is_the_obvious_one(kind, length, n, segment):
    llm, ids = made(**kind), text(length)
    assert select_tokens(llm, ids, n, segment).tolist() == obvious_selection(llm, ids, n, segment)


@pytest.mark.parametrize("bos", [None, 1])
def test_selection_sees_the_most_recent_of_what_was_kept(bos):
    ids = text(30)
    small, large = made(bos=bos, window=10), made(bos=bos)
    chosen = select_tokens(small, ids, 20, 6).tolist()
    assert chosen == obvious_selection(small, ids, 20, 6)
    assert chosen != select_tokens(large, ids, 20, 6).tolist()  # so the limit played a part


def test_a_segment_longer_than_the_window_is_judged_in_windows():
    llm, ids = made(window=8), text(20)
    kept = np.sort(np.argsort(-token_information(llm, ids), kind="stable")[:5])
    assert select_tokens(llm, ids, 5).tolist() == ids[kept].tolist()


class Indifferent:
    """An LLM that expects every token alike."""

    bos_token_id = None
    context_window = 64
    reads_in_parts = False

    def embed(self, ids):
        return torch.as_tensor(ids)[..., None].float()

    def hidden(self, inputs_embeds):
        return inputs_embeds

    def logits(self, hidden):
        return torch.zeros(*hidden.shape[:-1], 64)


def test_of_equally_informative_tokens_the_first_stay_and_each_segment_has_its_share():
    assert select_tokens(Indifferent(), np.arange(20), 5, 8).tolist() == [0, 1, 8, 9, 16]  # 5 * 8 / 20, 16 / 20, 1
    assert select_tokens(Indifferent(), np.arange(20), 1, 4).tolist() == [8]  # half of it is due in the third


@settings(max_examples=40)
@given(COUNTS, COUNTS, st.integers(1, 12))
def test_the_budget_is_exact_and_the_order_that_of_the_text(length, n, segment):
    ids = np.arange(length, dtype=np.int32) + 3  # every token tells its place
    kept = select_tokens(tiny_llm(), ids, n, segment)
    assert len(kept) == min(n, length)
    assert kept.dtype == ids.dtype
    assert (np.diff(kept) > 0).all()
    assert np.isin(kept, ids).all()


def test_a_text_that_fits_comes_back_unchanged_and_unread():
    ids = text(10)
    assert select_tokens(None, ids, 10) is ids
    assert select_tokens(None, ids, 11) is ids


def test_a_segment_holds_at_least_one_token(llm):
    with pytest.raises(ConfigError, match="segment=0 "):
        select_tokens(llm, text(10), 5, 0)


# -- sentences by their words ------------------------------------------------------------------------------------

STORY = "It rained. The mill burned in June. Some cat slept. The mill was rebuilt by masons in spring. Nobody knew."


def chosen(question, n, story=STORY):
    return tiny_llm().decode(choose_sentences(tiny_llm(), story, question, n).tolist())


def length(text):
    return len(tiny_llm().encode(text))


def test_the_best_sentences_come_first_and_stand_in_the_order_of_the_text():
    best, second = " The mill was rebuilt by masons in spring.", " The mill burned in June."
    question = "Which masons had rebuilt the mill?"
    assert chosen(question, length(best)) == best
    assert chosen(question, length(best) + length(second)) == second + best
    rest = length(best) + length(second) + length("It rained.")
    assert chosen(question, rest) == "It rained." + second + best  # of those without its words, the first


def test_the_last_sentence_is_cut_to_what_is_left():
    best, second = " The mill was rebuilt by masons in spring.", " The mill burned in June."
    for left in range(length(second)):
        ids = choose_sentences(tiny_llm(), STORY, "Which masons had rebuilt the mill?", length(best) + left)
        expected = [*tiny_llm().encode(second)[:left], *tiny_llm().encode(best)]
        assert ids.tolist() == expected


@settings(max_examples=40)
@given(st.sampled_from(["the mill", "xyz", "", "rained rained spring"]), st.integers(0, 200))
def test_chosen_sentences_fill_the_positions_exactly(question, n):
    ids = choose_sentences(tiny_llm(), STORY, question, n)
    text = tiny_llm().encode(STORY)
    assert ids.dtype == np.int32
    assert len(ids) == min(n, len(text))
    if n >= len(text):
        assert ids.tolist() == text.tolist()
    elif question in ("xyz", ""):  # nothing to go by
        assert ids.tolist() == text[:n].tolist()


def test_a_text_of_white_space_or_none_has_no_sentences_to_rank():
    assert chosen("the mill", 5, "") == ""
    assert chosen("the mill", 5, " \n") == " \n"


# -- noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_random_embeddings_have_the_norms_and_nothing_else(dtype, tolerance):
    like = torch.randn(50, 256, generator=torch.Generator().manual_seed(3)) * torch.arange(50)[:, None]
    like = like.to(dtype)
    noise = random_embeddings(like, 0)
    assert noise.dtype == dtype
    assert noise.shape == like.shape
    torch.testing.assert_close(noise.float().norm(dim=1), like.float().norm(dim=1), rtol=tolerance, atol=0)
    cosines = torch.nn.functional.cosine_similarity(noise[1:].float(), like[1:].float())
    assert cosines.abs().max() < 0.35  # of random directions in 256 dimensions: 1/16 on average
    assert not noise[0].any()  # a row of norm 0
    assert torch.equal(noise, random_embeddings(like, 0))
    assert not torch.equal(noise, random_embeddings(like, 1))


def test_random_embeddings_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    assert random_embeddings(torch.zeros(0, 8), 0).shape == (0, 8)
    random_embeddings(torch.ones(2, 8), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_tokens_are_ordinary_and_evenly_drawn():
    llm = tiny_llm()
    drawn = random_tokens(llm, 20_000, 3)
    assert drawn.dtype == np.int32
    assert set(drawn) == set(range(len(llm.tokenizer))) - set(llm.control_ids)
    assert np.bincount(drawn).max() < 2.5 * len(drawn) / len(llm.tokenizer)
    assert drawn[:50].tolist() == random_tokens(llm, 50, 3).tolist() != random_tokens(llm, 50, 4).tolist()
