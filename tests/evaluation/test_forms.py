"""What each arm is made of, at entry layer 0 and above it, and which arms an embedder allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anchored import LAYER, OwnStates, untrained
from tiny import entering, random_embedder, tiny_llm, tool_llm

from extemb_core.context.retrieval_heads import RetrievalHeads
from extemb_core.errors import ConfigError
from extemb_core.evaluation.baselines import choose_sentences
from extemb_core.evaluation.forms import CONTROLS, Forms, controls_for
from extemb_core.models.entry import AnchoredStates

TEXTS = {
    "a": "The mill burned in May. It rained. The mill was rebuilt by masons.",
    "b": "A grey cat slept on the wall. Nobody saw it leave before the fog.",
    "c": "Rivers carry sand.",
}


def forms(embedder, *, controls=None, ratios=(2, 4), texts=TEXTS, seed=0):
    chosen = controls_for(embedder, controls)
    return Forms(tiny_llm(), embedder, texts, separator="\n\n", ratios=ratios, controls=chosen, seed=seed)


def at_layer_0(llm):
    return random_embedder(llm)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (None, {"none", "truncated", "chosen", "lingua", "full"}),
        (at_layer_0, set(CONTROLS) - {"focus", "anchors", "random_states"}),
        (untrained, set(CONTROLS)),
    ],
)
def test_by_default_all_controls_are_made_that_can_be(make, expected):
    embedder = make and make(tiny_llm())
    assert set(controls_for(embedder)) == expected
    made = forms(embedder, ratios=(4,)).of(["a"], "the mill?")
    ours = {"extensible/4"} if make else set()
    assert set(made) == ours | {name if name in ("none", "full") else f"{name}/4" for name in expected}
    assert controls_for(embedder, ("truncated", "none")) == ("none", "truncated")
    assert controls_for(embedder, ()) == ()


@pytest.mark.parametrize(
    ("make", "asked", "message"),
    [
        (None, "wrong", "controls='wrong' needs an embedder, and there is none; leave it out or pass another"),
        (None, "anchors", "controls='anchors' needs an embedder with an entry layer above 0, and there is none"),
        (at_layer_0, "anchors", "controls='anchors' needs .*an entry layer above 0, and this one's is 0"),
        (at_layer_0, "random_states", "controls='random_states' needs .* and this one's is 0; leave it out"),
    ],
)
def test_a_control_that_cannot_be_made_is_refused_where_it_is_asked_for(make, asked, message):
    with pytest.raises(ConfigError, match=message):
        controls_for(make and make(tiny_llm()), ("truncated", asked))


def test_every_arm_of_a_ratio_takes_the_same_positions_above_layer_0():
    made = forms(untrained(tiny_llm()), ratios=(1, 2, 8)).of(["a"], "Which masons rebuilt the mill?")
    for ratio in (1, 2, 8):
        n = sum(-(-length // ratio) for length in (16, 16, len(tiny_llm().encode(TEXTS["a"])) - 32))
        kinds = [arm for arm in made if arm.endswith(f"/{ratio}") and not arm.startswith("wrong")]
        assert len(kinds) == 8
        assert {sum(map(len, made[arm])) for arm in kinds if not arm.startswith("focus")} == {n}
        assert 0.8 * n <= sum(map(len, made[f"focus/{ratio}"])) <= n  # a sentence more would not fit


def test_above_layer_0_controls_take_anchors_and_states_apart():
    llm = tiny_llm()
    made = forms(embedder := untrained(llm)).of(["a"], "")
    (ours,), (anchors,), (states,), (noise,), (wrong,) = (
        made[f"{kind}/4"] for kind in ("extensible", "anchors", "random_states", "random", "wrong")
    )
    compressed = embedder.compress_ids([llm.encode(TEXTS["a"])], ratio=4)[0]
    assert (ours.layer, ours.anchors.tolist()) == (LAYER, compressed.anchors.tolist())
    torch.testing.assert_close(ours.states, compressed.embeddings)
    assert isinstance(anchors, np.ndarray)
    assert anchors.tolist() == states.anchors.tolist() == ours.anchors.tolist()
    for control in (states, noise):
        assert control.layer == LAYER
        torch.testing.assert_close(control.states.norm(dim=1), ours.states.norm(dim=1))
        assert torch.nn.functional.cosine_similarity(control.states, ours.states).abs().max() < 0.9
    assert np.mean(noise.anchors == ours.anchors) < 0.2
    assert not np.isin(noise.anchors, llm.control_ids).any()
    other = embedder.compress_ids([llm.encode(TEXTS["b"])], ratio=4)[0]  # the nearest in length
    assert wrong.anchors.tolist() == other.anchors.tolist()
    torch.testing.assert_close(wrong.states, other.embeddings)


def test_noise_depends_on_the_seed_and_differs_between_passages():
    one, same, other = (forms(untrained(tiny_llm()), seed=seed).of(["a", "a"], "")["random/4"] for seed in (0, 0, 1))
    for part, twin, changed in zip(one[::2], same[::2], other[::2], strict=True):
        assert part.anchors.tolist() == twin.anchors.tolist() != changed.anchors.tolist()
        assert torch.equal(part.states, twin.states)
        assert not torch.equal(part.states, changed.states)
    assert one[0].anchors.tolist() != one[2].anchors.tolist()


def test_passages_are_compressed_apart_and_separators_stay_text():
    made = forms(untrained(tiny_llm()), controls=("anchors", "random", "random_states")).of(["a", "b"], "")
    separator = tiny_llm().encode("\n\n").tolist()
    for arm in ("extensible/2", "anchors/2", "random/2", "random_states/2"):
        first, between, second = made[arm]
        assert between.tolist() == separator
        assert isinstance(first, np.ndarray if arm == "anchors/2" else AnchoredStates)
        assert len(second) == len(made["extensible/2"][2])


def test_chosen_sentences_go_by_the_question_and_the_rest_is_made_once(monkeypatch):
    embedder = OwnStates(tiny_llm())
    calls = []
    compress = embedder.compress_ids
    monkeypatch.setattr(embedder, "compress_ids", lambda ids, **how: calls.append(len(ids)) or compress(ids, **how))
    made = forms(embedder, controls=("chosen",), ratios=(1, 4))
    text = "\n\n".join([TEXTS["a"], TEXTS["c"]])
    arms = {question: made.of(["a", "c"], question) for question in ("sand?", "Which masons?")}
    assert calls == [2]
    for question, own in arms.items():
        (chosen,), n = own["chosen/4"], sum(map(len, own["extensible/4"]))
        assert chosen.tolist() == choose_sentences(tiny_llm(), text, question, n).tolist()
        assert own["chosen/1"][0].tolist() == tiny_llm().encode(text).tolist()
    assert arms["sand?"]["chosen/4"][0].tolist() != arms["Which masons?"]["chosen/4"][0].tolist()
    made.of(["c"], "sand?")
    assert calls == [2, 1]


def test_the_wrong_text_is_the_nearest_in_length_that_is_none_of_the_passages():
    made = forms(None)
    assert made.wrong(["a"]) == ["b"]
    assert made.wrong(["a", "b"]) == ["c", "c"]
    with pytest.raises(ConfigError, match="all 3 texts are used as passages"):
        made.wrong(["a", "b", "c"])


def test_states_of_the_llm_itself_are_what_the_perfect_embedder_hands_over():
    ids = tiny_llm().encode(TEXTS["c"])
    (part,) = forms(OwnStates(tiny_llm()), ratios=(1,), controls=()).of(["c"], "")["extensible/1"]
    assert part.anchors.tolist() == ids.tolist()
    hidden = tiny_llm().model.base_model(torch.as_tensor(ids[None].astype(np.int64)), output_hidden_states=True)
    torch.testing.assert_close(part.states, hidden.hidden_states[LAYER][0])


@pytest.mark.parametrize(("passages", "in_parts"), [("a", True), ("ab", False)])
def test_a_plan_is_of_parts_of_sentences_where_heads_look_at_few_texts(passages, in_parts, monkeypatch):
    llm, seen, whole = tool_llm(), [], RetrievalHeads.scores

    def scores(self, question, sentences, *others):
        seen.extend(len(llm.encode(sentence)) for sentence in sentences)
        return whole(self, question, sentences, *others)

    monkeypatch.setattr(RetrievalHeads, "scores", scores)
    embedder = entering(llm, ratios=(1, 2, 4, 8, 16), chunk_size=32, retrieval_heads=[[1, 0]])
    text = "The harbour has " + ", ".join(f"a crane that lifts {at} tons" for at in range(40, 43)) + ". "
    Forms(llm, embedder, {"a": text * 7, "b": text * 7}, "\n\n", (4,), ("focus",), 0).of(passages, "the last crane?")
    assert (sum(seen) <= 768) == in_parts
    assert (max(seen) <= 32) == in_parts
    assert len(llm.encode(text)) > 32
