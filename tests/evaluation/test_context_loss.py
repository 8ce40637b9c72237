"""The scored span against transformers itself and against numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tiny import random_embedder, tiny_llm

from extemb_core.errors import ConfigError, RatioError
from extemb_core.evaluation.context_loss import (
    Window,
    bootstrap_interval,
    context_forms,
    context_losses,
    spread_windows,
    summarise,
    target_losses,
)
from extemb_core.models.llm import LLM

CONTEXT, TARGET, RATIOS = 48, 20, (2, 4, 8)


class Bigram:
    """An LLM that reads one token back: the next number of four follows with 1/2, any other with 1/6."""

    bos_token_id = None
    device = torch.device("cpu")

    def embed(self, ids):
        return torch.nn.functional.one_hot(torch.as_tensor(ids), 4).float()

    def hidden(self, inputs_embeds):
        return inputs_embeds

    def logits(self, hidden):
        following = torch.eye(4).roll(1, dims=1)
        return hidden @ torch.log(following / 2 + (1 - following) / 6)


def documents(*lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(3, len(tiny_llm().tokenizer), length).astype(np.int32) for length in lengths]


@pytest.mark.parametrize("positions", [0, 1, 3])
def test_every_target_token_but_the_first_is_scored(positions):
    likely, unlikely = math.log(2), math.log(6)
    context = Bigram().embed([[1, 1, 1]])[:, :positions]  # 1 -> 0 is unlikely: scoring the 0 would show
    losses = target_losses(Bigram(), context, np.array([[0, 1, 3, 0]]))
    assert losses.tolist() == [pytest.approx([likely, unlikely, likely])]


def test_full_context_is_what_transformers_computes(llm):
    ids = torch.as_tensor(documents(CONTEXT + TARGET)[0][None].astype(np.int64))
    with torch.no_grad():
        scores = llm.model(input_ids=ids).logits[0].log_softmax(-1)
    expected = [-float(scores[at - 1, ids[0, at]]) for at in range(CONTEXT + 1, CONTEXT + TARGET)]
    losses = target_losses(llm, llm.embed(ids[:, :CONTEXT]), ids[:, CONTEXT:].numpy())
    assert losses[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_raw_embeddings_at_ratio_1_are_the_full_context(llm):
    losses, positions = context_losses(
        llm, documents(300), spread_windows([300], 3, 68), context=CONTEXT, target=TARGET, ratios=(1, 4)
    )
    assert losses["nearest/1"] == pytest.approx(losses["full"])
    assert losses["nearest/4"] != pytest.approx(losses["full"])
    assert positions == {"none": 0, "nearest/1": 48, "nearest/4": 12, "full": 48}


def test_arms_are_the_same_positions_and_one_pass_serves_all_ratios(llm):
    embedder = random_embedder(llm)
    contexts = documents(CONTEXT)[0][None].astype(np.int64)
    forms = context_forms(llm, contexts, RATIOS, embedder)
    for ratio in RATIOS:
        assert forms[f"extensible/{ratio}"].shape == forms[f"nearest/{ratio}"].shape == (1, CONTEXT // ratio, llm.width)
        alone = embedder.compress_ids(list(contexts), ratio=ratio)[0].embeddings
        torch.testing.assert_close(forms[f"extensible/{ratio}"][0], alone)
        torch.testing.assert_close(forms[f"nearest/{ratio}"][0], llm.embed(contexts[0, -(CONTEXT // ratio) :]))


def test_tails_of_chunks_count_as_positions(llm):
    forms = context_forms(llm, documents(21)[0][None].astype(np.int64), (2, 8), random_embedder(llm))
    assert forms["extensible/8"].shape[1] == forms["nearest/8"].shape[1] == 3  # chunks of 16 and 5 tokens


def test_a_window_does_not_depend_on_its_batch(llm):
    texts, windows = documents(300, 80), spread_windows([300, 80], 2, CONTEXT + TARGET)
    settings = {"context": CONTEXT, "target": TARGET, "ratios": RATIOS, "embedder": random_embedder(llm)}
    done = []
    together, _ = context_losses(llm, texts, windows, **settings, advance=done.append)
    alone, _ = context_losses(llm, texts, windows, **settings, batch_size=1)
    assert sum(done) == len(windows) == 3
    for arm, values in together.items():
        assert values == pytest.approx(alone[arm], abs=1e-5)


def test_a_bos_goes_first_in_every_arm():
    plain = tiny_llm()

    class WithBos(LLM):
        bos_token_id = 1

    llm = WithBos(plain.model, plain.tokenizer)
    forms = context_forms(llm, documents(CONTEXT)[0][None].astype(np.int64), (4,))
    assert [form.shape[1] for form in forms.values()] == [1, 13, 49]
    for form in forms.values():
        torch.testing.assert_close(form[0, 0], llm.embed([1])[0])


def test_an_untrained_ratio_is_refused(llm):
    with pytest.raises(RatioError, match="ratio=3 "):
        context_forms(llm, documents(CONTEXT)[0][None].astype(np.int64), (3,), random_embedder(llm))


def test_windows_are_spread_evenly_and_do_not_overlap():
    assert spread_windows([100], 4, 10) == [Window(0, start) for start in (7, 32, 57, 82)]
    assert spread_windows([9, 10, 25], 4, 10) == [Window(1, 0), Window(2, 1), Window(2, 13)]
    for length in range(10, 200):
        starts = [window.start for window in spread_windows([length], 8, 10)]
        assert starts[0] >= 0
        assert starts[-1] + 10 <= length
        assert all(b - a >= 10 for a, b in itertools.pairwise(starts))


@pytest.mark.parametrize(("context", "target"), [(0, 8), (8, 1)])
def test_there_must_be_a_context_and_two_target_tokens(llm, context, target):
    with pytest.raises(ConfigError, match=f"target={target}"):
        context_losses(llm, documents(100), [Window(0, 0)], context=context, target=target)


def test_the_interval_is_over_documents_not_windows():
    values = np.array([1.0] * 50 + [3.0] * 50)
    assert bootstrap_interval(values, np.array([0] * 50 + [1] * 50)) == (1.0, 3.0)
    low, high = bootstrap_interval(values, np.arange(100))
    assert 1.7 < low < 2 < high < 2.3
    assert bootstrap_interval(values, np.zeros(100)) is None


def test_the_share_of_the_gap_and_the_paired_difference():
    losses = {
        "none": np.array([4.0, 5.0]),
        "nearest/8": np.array([3.7, 4.7]),
        "extensible/8": np.array([3.5, 4.5]),
        "full": np.array([3.0, 4.0]),
    }
    summary = summarise(losses, dict.fromkeys(losses, 0), [Window(0, 0), Window(1, 0)], (8,))
    assert summary["arms"]["none"]["mean"] == 4.5
    assert summary["ratios"]["8"]["gap_share"] == pytest.approx(0.5)
    assert summary["ratios"]["8"]["extensible_minus_nearest"] == pytest.approx(-0.2)
    assert summary["ratios"]["8"]["interval"] == pytest.approx((-0.2, -0.2))
