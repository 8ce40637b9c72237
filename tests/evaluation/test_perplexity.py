"""The scored span against transformers itself, against numbers worked out by hand, and against an oracle."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from anchored import OwnStates, scores_of, untrained
from tiny import SENTENCES, RawEmbedder, random_embedder, tiny_llm, tiny_model, tiny_tokenizer

from extemb_core.context.assembly import Prompt
from extemb_core.errors import ConfigError, RatioError
from extemb_core.evaluation import perplexity
from extemb_core.evaluation.perplexity import (
    PerplexityConfig,
    PerplexityExperiment,
    Window,
    spread_windows,
    target_losses,
)
from extemb_core.models.llm import LLM

CONTEXT, TARGET, RATIOS = 48, 20, (2, 4, 8)


class Bigram:
    """An LLM that reads one token back: the next number of four follows with 1/2, any other with 1/6."""

    def log_probs(self, prompts, targets):
        found = []
        for prompt, own in zip(prompts, targets, strict=True):
            read = [*prompt, *own]
            pairs = itertools.pairwise(read[len(prompt) - 1 :])
            found.append(
                torch.tensor([math.log(1 / 2 if after == (before + 1) % 4 else 1 / 6) for before, after in pairs])
            )
        return found


@pytest.fixture
def make(tmp_path, llm):
    """An experiment on texts written here."""

    def experiment(embedder=None, llm=llm, texts=(SENTENCES * 3, SENTENCES[::-1] * 2), **changes):
        files = []
        for at, text in enumerate(texts):
            (tmp_path / f"{at}.txt").write_text(text)
            files.append(str(tmp_path / f"{at}.txt"))
        settings = {"contexts": (CONTEXT, 112), "target": TARGET, "ratios": RATIOS} | changes
        return PerplexityExperiment(PerplexityConfig(llm="tiny", data=tuple(files), **settings), llm, embedder)

    return experiment


def measured(experiment):
    return [sample for group in experiment.groups() for sample in experiment.measure(group)]


def ids(length, seed=0):
    return np.random.default_rng(seed).integers(3, len(tiny_llm().tokenizer), length)


@pytest.mark.parametrize("positions", [0, 1, 3])
def test_every_target_token_but_the_first_is_scored(positions):
    likely, unlikely = math.log(2), math.log(6)
    context = Prompt((np.array([1, 1, 1])[:positions],))  # 1 -> 0 is unlikely: scoring the 0 would show
    losses = target_losses(Bigram(), [context], np.array([[0, 1, 3, 0]]))
    assert losses.tolist() == [pytest.approx([likely, unlikely, likely])]


def test_full_context_is_what_transformers_computes(make, llm):
    experiment = make()
    (first, *_) = measured(experiment)
    document, start = experiment._documents[0].astype(np.int64), int(first["id"].split(":")[1])
    window = torch.as_tensor(document[start - CONTEXT : start + TARGET])[None]
    with torch.no_grad():
        scores = llm.model(input_ids=window).logits[0].log_softmax(-1)
    expected = np.mean([-float(scores[at - 1, window[0, at]]) for at in range(CONTEXT + 1, CONTEXT + TARGET)])
    assert first["contexts"][str(CONTEXT)]["full"] == {
        "loss": pytest.approx(expected, abs=1e-5),
        "positions": CONTEXT,
    }


def test_a_perfect_embedder_has_the_full_texts_numbers_exactly(make, llm):
    samples = measured(make(RawEmbedder(llm), ratios=(1,)))
    assert len(samples) == 2
    for sample in samples:
        for arms in sample["contexts"].values():
            assert arms["extensible/1"] == arms["nearest/1"] == arms["streaming"] == arms["full"] != arms["none"]


def test_above_layer_0_the_loss_is_that_of_the_llm_with_its_states_overwritten(make, llm):
    experiment = make(untrained(llm), contexts=(CONTEXT,))
    for sample in measured(experiment):
        span = experiment._span(experiment._windows[sample["id"]], CONTEXT).astype(np.int64)
        for ratio in RATIOS:
            (prompt,) = experiment.forms(span[None, :CONTEXT])[f"extensible/{ratio}"]
            expected = scores_of(llm, [*prompt.segments, span[CONTEXT : CONTEXT + 1]], span[CONTEXT + 1 :])
            found = sample["contexts"][str(CONTEXT)][f"extensible/{ratio}"]
            assert found == {"loss": pytest.approx(-np.mean(expected), abs=1e-5), "positions": CONTEXT // ratio}


def test_a_perfect_embedder_above_layer_0_has_the_full_texts_numbers(make, llm):
    for sample in measured(make(OwnStates(llm), ratios=(1, 2))):
        for arms in sample["contexts"].values():
            assert arms["extensible/1"]["loss"] == pytest.approx(arms["full"]["loss"], abs=1e-5)
            assert arms["extensible/2"]["loss"] != pytest.approx(arms["full"]["loss"], abs=1e-3)


def test_the_same_text_is_read_once_for_all_lengths_of_context(make, llm, monkeypatch):
    read = []

    def counted(llm, prompts, targets):
        read.extend(tuple(map(int, [*prompt.inputs(llm), *own])) for prompt, own in zip(prompts, targets, strict=True))
        return target_losses(llm, prompts, targets)

    experiment = make(contexts=(16, 32, 64))  # nearest/2 of 32 are all 16, as nearest/4 of 64 are
    losses = experiment._losses
    apart = lambda prompts, targets, known: losses(prompts, targets, [{} for _ in prompts])  # noqa: E731
    monkeypatch.setattr(experiment, "_losses", apart)
    expected = measured(experiment)
    monkeypatch.setattr(experiment, "_losses", losses)
    monkeypatch.setattr(perplexity, "target_losses", counted)
    assert measured(experiment) == expected
    assert len(read) == len(set(read)) == len(expected) * 7  # none, 2, 4, 8, 16, 32 and 64 tokens


def test_embeddings_of_another_text_are_not_those_of_the_right_one(make, llm):
    class Shuffled(RawEmbedder):
        def compress_ids(self, ids, **settings):
            return super().compress_ids([tokens[::-1].copy() for tokens in ids], **settings)

    for sample in measured(make(Shuffled(llm), ratios=(1,))):
        arms = sample["contexts"][str(CONTEXT)]
        assert abs(arms["extensible/1"]["loss"] - arms["full"]["loss"]) > 1e-4


def test_a_span_off_by_one_changes_the_loss(make):
    experiment = make()
    (first, *_) = measured(experiment)
    (name, window), *_ = experiment._windows.items()
    experiment._windows[name] = Window(window.document, window.start + 1, window.contexts)
    (moved,) = experiment.measure([name])
    assert moved["contexts"][str(CONTEXT)]["full"]["loss"] != first["contexts"][str(CONTEXT)]["full"]["loss"]


def test_arms_take_the_same_positions_and_one_pass_serves_all_ratios(make, llm):
    embedder = random_embedder(llm)
    context = ids(CONTEXT)[None]
    forms = make(embedder).forms(context)
    for ratio in RATIOS:
        (ours,), (nearest,) = (forms[f"{kind}/{ratio}"][0].segments for kind in ("extensible", "nearest"))
        assert len(ours) == len(nearest) == CONTEXT // ratio
        torch.testing.assert_close(ours, embedder.compress_ids(list(context), ratio=ratio)[0].embeddings)
        assert nearest.tolist() == context[0, -(CONTEXT // ratio) :].tolist()


def test_tails_of_chunks_count_as_positions(make, llm):
    forms = make(random_embedder(llm), ratios=(2, 8)).forms(ids(21)[None])
    assert len(forms["extensible/8"][0]) == len(forms["nearest/8"][0]) == 3  # chunks of 16 and 5 tokens


def test_what_does_not_fit_the_window_is_absent_and_streaming_keeps_both_ends(make, llm):
    context = ids(112)[None]
    forms = make(random_embedder(llm), window=60, sinks=3).forms(context)
    assert {arm: len(form[0]) for arm, form in forms.items()} == {
        "none": 0, "extensible/4": 28, "nearest/4": 28, "extensible/8": 14, "nearest/8": 14, "streaming": 40,
    }  # fmt: skip
    assert forms["streaming"][0].segments[0].tolist() == [*context[0, :3], *context[0, -37:]]


def test_a_window_does_not_depend_on_its_batch(make, llm):
    embedder = random_embedder(llm)
    together = measured(make(embedder, windows=2))
    alone = measured(make(embedder, windows=2, batch_size=1))
    assert len(together) == 4
    for one, other in zip(together, alone, strict=True):
        assert one["id"] == other["id"]
        for context, arms in one["contexts"].items():
            for arm, found in arms.items():
                assert found["loss"] == pytest.approx(other["contexts"][context][arm]["loss"], abs=1e-5)


def test_short_documents_have_the_contexts_that_fit(make):
    samples = measured(make(texts=(SENTENCES * 3, SENTENCES[:200])))
    assert [list(sample["contexts"]) for sample in samples] == [["48", "112"], ["48"]]
    summary = make(texts=(SENTENCES * 3, SENTENCES[:200])).summarise(samples)
    assert (summary["48"]["n"], summary["112"]["n"]) == (2, 1)


def test_a_bos_goes_first_in_every_arm(make):
    class WithBos(LLM):
        bos_token_id = 1

    llm = WithBos(tiny_model("llama"), tiny_tokenizer())
    forms = make(llm=llm, ratios=(4,)).forms(ids(CONTEXT)[None])
    assert {arm: len(form[0]) for arm, form in forms.items()} == {"none": 1, "nearest/4": 13, "full": 49}
    for (prompt,) in forms.values():
        assert prompt.segments[0].tolist() == [1]


def test_windows_are_spread_evenly_and_do_not_overlap():
    starts = [window.start for window in spread_windows([100], 4, (8,), 2)]
    assert starts == [start + 8 for start in (7, 32, 57, 82)]
    assert spread_windows([4, 9, 10, 25], 4, (8, 3), 2) == [
        Window(1, 5, (3,)), Window(2, 8, (3, 8)), Window(3, 9, (3, 8)), Window(3, 21, (3, 8)),
    ]  # fmt: skip
    for length in range(10, 200):
        starts = [window.start - 8 for window in spread_windows([length], 8, (8,), 2)]
        assert starts[0] >= 0
        assert starts[-1] + 10 <= length
        assert all(b - a >= 10 for a, b in itertools.pairwise(starts))


def test_the_tables_are_those_of_hand_made_samples(make):
    def sample(document, none, nearest, ours, full):
        losses = {"none": none, "nearest/8": nearest, "extensible/8": ours, "full": full}
        arms = {arm: {"loss": loss, "positions": 6} for arm, loss in losses.items()}
        return {"id": str(document), "document": document, "contexts": {"48": arms}}

    summary = make(ratios=(8,)).summarise([sample(0, 4.0, 3.7, 3.5, 3.0), sample(1, 5.0, 4.7, 4.5, 4.0)])["48"]
    assert summary["arms"]["none"] == {
        "n": 2, "positions": 6.0, "loss": 4.5, "interval": [4.0, 5.0], "perplexity": pytest.approx(math.exp(4.5)),
    }  # fmt: skip
    assert summary["ratios"]["8"]["minus"]["nearest"]["mean"] == pytest.approx(-0.2)
    assert summary["ratios"]["8"]["minus"]["nearest"]["interval"] == pytest.approx([-0.2, -0.2])
    assert summary["ratios"]["8"]["gap_share"]["mean"] == pytest.approx(0.5)


def test_without_an_embedder_there_are_only_the_controls(make):
    samples = measured(make(ratios=(4,)))
    assert list(samples[0]["contexts"]["48"]) == ["none", "nearest/4", "full", "streaming"]
    assert make(ratios=(4,)).summarise(samples)["48"]["ratios"] == {}


def test_a_limit_takes_windows_evenly(make):
    everything = [name for group in make(windows=2).groups() for name in group]
    some = [name for group in make(windows=2, limit=2).groups() for name in group]
    assert some == [everything[0], everything[-1]]


def test_illegal_settings_are_refused(make, llm):
    with pytest.raises(RatioError, match="ratio=3 "):
        make(random_embedder(llm), ratios=(3,))
    with pytest.raises(ConfigError, match="target=20 in a window of 20 leaves no room"):
        make(window=20)
    with pytest.raises(ConfigError, match="larger than the 256"):
        make(window=257)
    for name, value in [
        ("target", 1),
        ("contexts", ()),
        ("contexts", (8, 8)),
        ("windows", 0),
        ("window", 0),
        ("ratios", (0,)),
    ]:
        with pytest.raises(ConfigError, match=name):
            make(**{name: value})
