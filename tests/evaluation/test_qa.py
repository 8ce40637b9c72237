"""Every arm of a question sees what it should: against oracles, obvious constructions, and hand-made samples."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from anchored import OwnStates, scores_of, untrained
from tiny import RawEmbedder, entering, random_embedder, tiny_model, tiny_tokenizer

from extemb_core.errors import BudgetError, ConfigError
from extemb_core.evaluation.qa import QaConfig, QaExperiment
from extemb_core.evaluation.runs import run
from extemb_core.models import generation
from extemb_core.models.llm import LLM
from extemb_core.questions import templates

NEW_TOKENS = 6
PLACES = ("harbour", "bridge", "mill", "tower", "market")


@pytest.fixture(scope="module")
def llm():
    """A tiny LLM whose window holds the prompt templates, which are long in its small vocabulary."""
    return LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer(), name="tiny")


def rows(count=5, per_text=2):
    made = []
    for at in range(count):
        text = f"The {PLACES[at]} was built in 18{at}0 by {at + 3} masons. " + "It rained. " * at
        questions = [("When was it built?", f"18{at}0"), ("By how many masons?", str(at + 3))][:per_text]
        made += [
            {"id": f"{at}-{number}", "context": text, "question": question, "answers": [answer]}
            for number, (question, answer) in enumerate(questions)
        ]
    return made


@pytest.fixture
def make(tmp_path, llm, monkeypatch):
    """An experiment whose answers are short: each token is a pass of the LLM."""
    short = {name: template | {"max_new_tokens": NEW_TOKENS} for name, template in templates().items()}
    monkeypatch.setattr("extemb_core.evaluation.qa.templates", lambda: short)

    def experiment(embedder=None, data=None, **changes):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in data or rows()))
        return QaExperiment(QaConfig(llm="tiny", data=(str(file),), **({"ratios": (4,)} | changes)), llm, embedder)

    return experiment


def measured(experiment):
    found = {sample["id"]: sample for group in experiment.groups() for sample in experiment.measure(group)}
    return [found[name] for name in sorted(found)]


def alike(arm):
    """An arm's measurements, and a loss that may differ by rounding, as it does between batches."""
    return arm | {"loss": pytest.approx(arm["loss"], abs=1e-4)}


def question(experiment, name):
    return experiment._questions[name]


def test_a_perfect_embedder_answers_as_the_full_text_does(make, llm):
    for sample in measured(make(RawEmbedder(llm), ratios=(1,))):
        arms = sample["arms"]
        for arm in ("extensible/1", "truncated/1", "lingua/1", "chosen/1"):
            assert alike(arms[arm]) == arms["full"]
        assert arms["full"]["positions"] > arms["none"]["positions"] == 0
        assert arms["full"]["prediction"] != arms["none"]["prediction"]


def test_an_embedder_of_another_document_has_the_wrong_documents_row(make, llm):
    right = make(RawEmbedder(llm), ratios=(1,))

    class Elsewhere(RawEmbedder):
        def compress_ids(self, ids, **settings):
            names = {right._forms.tokens([name])[0].tobytes(): name for name in right._texts}
            others = [right._forms.tokens(right._forms.wrong([names[tokens.tobytes()]])) for tokens in ids]
            return super().compress_ids([tokens for (tokens,) in others], **settings)

    for honest, fooled in zip(measured(right), measured(make(Elsewhere(llm), ratios=(1,))), strict=True):
        assert alike(fooled["arms"]["extensible/1"]) == honest["arms"]["wrong/1"]
        assert fooled["arms"]["extensible/1"]["prediction"] != fooled["arms"]["full"]["prediction"]


@pytest.mark.parametrize("generate", [True, False], ids=["generate", "loss-only"])
def test_questions_about_long_texts_are_answered_in_small_passes_as_in_one(make, llm, monkeypatch, generate):
    whole, passes, shared, cap = generation.score_at_once, [], [], 10**6

    def score_at_once(llm, prompts, targets):
        cap_here = 8 * cap if llm.shares_prefix(prompts) else cap
        passes.append((len(prompts), len(prompts) * max(map(len, prompts)) <= cap_here))
        shared.append(llm.shares_prefix(prompts))
        return whole(llm, prompts, targets)

    monkeypatch.setattr(generation, "score_at_once", score_at_once)
    monkeypatch.setattr("extemb_core.evaluation.qa.positions_at_once", lambda llm: cap)
    found = {}
    for cap in (10**6, 1, 700):
        passes.clear()
        found[cap] = measured(make(random_embedder(llm), generate=generate))
        for sample, expected in zip(found[cap], found[10**6], strict=True):
            assert {arm: alike(one) for arm, one in sample["arms"].items()} == {
                arm: alike(one) for arm, one in expected["arms"].items()
            }
        assert all(rows == 1 or small for rows, small in passes)
        assert (max(rows for rows, _ in passes) > 1) == (cap > 1)
        assert any(shared)  # the two questions about a text


def test_prompts_of_a_question_that_are_the_same_text_are_read_once(make, llm, monkeypatch):
    whole, read = generation.score_at_once, []

    def score_at_once(llm, prompts, targets):
        read.extend(tuple(prompt) for prompt in prompts if isinstance(prompt, list))
        return whole(llm, prompts, targets)

    monkeypatch.setattr(generation, "score_at_once", score_at_once)
    for sample in measured(make(entering(llm), ratios=(1,))):
        arms = sample["arms"]
        assert arms["truncated/1"] == arms["lingua/1"] == arms["chosen/1"] == arms["full"]
        assert arms["extensible/1"] != arms["full"]
    assert len(read) == 2 * len(rows())  # nothing, and all of the text


def test_questions_in_one_group_are_measured_as_each_alone(make, llm):
    together, alone = make(entering(llm), batch_size=8), make(entering(llm), batch_size=1)
    for sample, other in zip(measured(together), measured(alone), strict=True):
        assert {arm: alike(one) for arm, one in sample["arms"].items()} == {
            arm: alike(one) for arm, one in other["arms"].items()
        }


def test_controls_take_the_positions_of_the_embeddings(make, llm):
    experiment = make(random_embedder(llm), ratios=(2, 4))
    for name in experiment._questions:
        forms = experiment.forms(question(experiment, name))
        n = {arm: sum(map(len, parts)) for arm, parts in forms.items()}
        for ratio in (2, 4):
            for kind in ("truncated", "lingua", "random", "chosen"):
                assert n[f"{kind}/{ratio}"] == n[f"extensible/{ratio}"]
        assert n["none"] == 0 < n["extensible/4"] < n["extensible/2"] < n["full"]


def test_each_arm_is_what_its_name_says(make, llm):
    experiment = make(random_embedder(llm))
    forms = experiment.forms(question(experiment, "2-0"))
    text = llm.encode(rows()[4]["context"])
    np.testing.assert_array_equal(np.concatenate(forms["full"]), text)
    (truncated,), (lingua,), (ours,) = forms["truncated/4"], forms["lingua/4"], forms["extensible/4"]
    np.testing.assert_array_equal(truncated, text[: len(truncated)])
    rest = iter(text.tolist())
    assert all(index in rest for index in lingua.tolist())  # a subsequence, in order
    torch.testing.assert_close(ours, experiment.embedder.compress(rows()[4]["context"], ratio=4).embeddings)
    (drawn,) = forms["random/4"]
    torch.testing.assert_close(drawn.norm(dim=1), ours.norm(dim=1))
    assert torch.nn.functional.cosine_similarity(drawn, ours).abs().max() < 0.9
    (wrong,) = forms["wrong/4"]
    assert any(torch.equal(wrong, experiment.embedder.compress(row["context"], ratio=4).embeddings)
               for row in rows() if row["context"] != rows()[4]["context"])  # fmt: skip


def test_the_prompt_is_the_chat_template_with_the_text_in_it(make, llm):
    experiment = make()
    one = question(experiment, "1-0")
    template = templates()["short"]
    text = template["before"] + one.context + template["after"].format(question=one.question)
    whole = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                              add_generation_prompt=True)  # fmt: skip
    prompt = experiment.prompt(one, experiment.forms(one)["full"])
    assert llm.tokenizer.decode(np.concatenate(prompt.segments)) == whole


def test_an_answer_does_not_depend_on_its_batch_nor_on_shared_prefixes(make, llm):
    embedder = random_embedder(llm)
    together = measured(make(embedder, batch_size=8))
    alone = measured(make(embedder, batch_size=1))
    for one, other in zip(together, alone, strict=True):
        assert one | {"arms": {name: alike(arm) for name, arm in one["arms"].items()}} == other


# -- the loss of the reference answer -------------------------------------------------------------------------


def test_the_loss_is_that_of_the_first_answer_and_the_end_of_the_turn(make, llm):
    data = [row | {"answers": [f" {row['answers'][0]} ", "another"]} for row in rows()]
    experiment = make(RawEmbedder(llm), data=data, ratios=(1,))
    for sample in measured(experiment):
        one = question(experiment, sample["id"])
        target = [*llm.encode(one.answers[0].strip()), llm.tokenizer.eos_token_id]
        for arm in ("none", "full", "wrong/1"):
            prompt = experiment.prompt(one, experiment.forms(one)[arm])
            scores = llm.model(inputs_embeds=prompt.embeddings(llm)[None]).logits  # of the prompt alone
            assert sample["arms"][arm]["loss"] != pytest.approx(-float(scores[0, -1].log_softmax(-1)[target[0]]))
            whole = torch.cat([prompt.embeddings(llm), llm.embed(target)])[None]
            with torch.no_grad():
                logits = llm.model(inputs_embeds=whole).logits[0].log_softmax(-1)
            expected = [-float(logits[len(prompt) - 1 + at, index]) for at, index in enumerate(target)]
            assert sample["arms"][arm]["loss"] == pytest.approx(np.mean(expected), abs=1e-5)
        assert sample["answer_tokens"] == len(target)


def test_above_layer_0_every_arm_scores_what_the_llm_with_its_states_overwritten_does(make, llm):
    experiment = make(untrained(llm), ratios=(1, 2, 4))
    for sample in measured(make(untrained(llm), ratios=(1, 2, 4), limit=3)):
        one = question(experiment, sample["id"])
        for arm, parts in experiment.forms(one).items():
            expected = scores_of(llm, experiment.prompt(one, parts).segments, experiment.reference(one))
            assert sample["arms"][arm]["loss"] == pytest.approx(-np.mean(expected), abs=1e-4), arm


def test_a_perfect_embedder_above_layer_0_answers_as_the_full_text_does(make, llm):
    """Each text's states are those that the LLM has in the very prompt, so replacing them changes nothing."""
    before = next(iter(make().prompt(question(make(), "0-0"), [np.array([5])]).segments))
    for sample in measured(make(OwnStates(llm, before), ratios=(1, 2))):
        arms = sample["arms"]
        for arm in ("extensible/1", "anchors/1", "chosen/1"):
            assert alike(arms[arm]) == arms["full"]
        names = ("none", "full", "random/1", "random_states/1", "wrong/1", "extensible/2", "anchors/2", "random/2")
        assert len({arms[arm]["loss"] for arm in names}) == len(names)  # the others read something else


def test_the_loss_alone_is_the_same_without_an_answer(make, llm, monkeypatch):
    whole = measured(make(untrained(llm), ratios=(2,)))
    monkeypatch.setattr(llm, "generate", lambda *how: pytest.fail("nothing is to be generated"))
    experiment = make(untrained(llm), ratios=(2,), generate=False)
    samples = measured(experiment)
    for one, other in zip(samples, whole, strict=True):
        for arm, own in one["arms"].items():
            assert set(own) == {"positions", "loss"}
            assert own["loss"] == pytest.approx(other["arms"][arm]["loss"], abs=1e-5)
            assert own["positions"] == other["arms"][arm]["positions"]
    summary = experiment.summarise(samples)
    assert summary["metrics"] == ["loss"]
    assert "retained" not in summary
    assert set(summary["retained_loss"]) == {"2"}
    assert set(summary["minus"]["2"]["anchors"]) == {"loss"}


# -- texts, templates -----------------------------------------------------------------------------------------


def test_the_own_passage_has_every_rank_and_parts_stay_apart(make, llm):
    experiment = make(random_embedder(llm), passages=3)
    ranks = [experiment._ranks[name] for name in experiment._questions]
    assert ranks == [0, 1, 2] * 3 + [0]
    for name in experiment._questions:
        one = question(experiment, name)
        passages = experiment.passages(one)
        assert passages.index(one.document) == experiment._ranks[name]
        assert len(set(passages)) == 3
        parts = experiment.forms(one)["extensible/4"]
        assert [isinstance(part, torch.Tensor) for part in parts] == [True, False, True, False, True]
        for part, passage in zip(parts[::2], passages, strict=True):
            torch.testing.assert_close(part, embedder_of(experiment, passage))
    samples = measured(experiment)
    assert samples[0]["rank"] == 0
    summary = experiment.summarise(samples)
    assert list(summary["by_rank"]) == ["0", "1", "2"]
    assert summary["by_rank"]["0"]["full"]["n"] == 4


def test_every_rank_has_its_share_of_the_questions_under_a_limit(make):
    experiment = make(passages=3, limit=4)  # every third question of ten
    assert sorted(experiment._ranks[name] for name in experiment._questions) == [0, 0, 1, 2]


def test_a_higher_limit_ends_in_the_record_of_one_run(make, tmp_path):
    settings = {"passages": 3, "generate": False, "controls": ()}
    run(make(limit=4, **settings), tmp_path / "parts.json")
    parts = run(make(**settings), tmp_path / "parts.json")
    once = run(make(**settings), tmp_path / "once.json")
    assert [sample["rank"] for sample in parts["samples"]] == [sample["rank"] for sample in once["samples"]]
    assert parts["summary"]["by_rank"].keys() == {"0", "1", "2"}
    for rank, arms in once["summary"]["by_rank"].items():
        for arm, values in arms.items():
            assert parts["summary"]["by_rank"][rank][arm] == pytest.approx(values, abs=1e-5)


def test_ratios_may_be_a_list(make):
    assert make(ratios=[4, 8]).config.ratios == (4, 8)


def test_a_limit_that_would_drop_finished_samples_is_refused(make, tmp_path):
    out, settings = tmp_path / "all.json", {"generate": False, "controls": ("truncated",)}
    n = run(make(**settings), out)["n"]
    before = out.read_bytes()
    for changes in ({"limit": 3}, {"limit": 3, "remeasure": ("truncated",)}):
        with pytest.raises(ConfigError, match="samples"):
            run(make(**settings, **changes), out)
        assert out.read_bytes() == before
    run(make(**settings, limit=3), tmp_path / "some.json")
    with pytest.raises(ConfigError, match="has 3 finished samples, and 1 of them are not among the 4 "):
        run(make(**settings, limit=4), tmp_path / "some.json")
    assert run(make(**settings, limit=5), tmp_path / "some.json")["parts"] == 2
    assert n > 5


def test_arms_that_are_measured_anew_alone_are_as_among_all(make, llm, monkeypatch):
    embedder = untrained(llm)
    whole = measured(make(embedder))
    alone = make(embedder, remeasure=("focus", "extensible"))
    monkeypatch.setattr("extemb_core.evaluation.baselines.select_tokens", None)  # nothing else is made
    for before, now in zip(whole, measured(alone), strict=True):
        assert now["arms"].keys() == {"extensible/4", "focus/4"}
        for arm, values in now["arms"].items():
            assert values == alike(before["arms"][arm])


def test_an_arm_that_is_not_measured_is_not_measured_anew(make, llm):
    with pytest.raises(ConfigError, match="remeasure='focus'"):
        make(untrained(llm), controls=("chosen",), remeasure=("focus",))
    with pytest.raises(ConfigError, match="remeasure='extensible'"):
        make(remeasure=("extensible",))


def embedder_of(experiment, passage):
    return experiment.embedder.compress(experiment._texts[passage], ratio=4).embeddings


def test_full_text_beyond_the_window_is_cut_and_says_so(make, llm):
    long = rows()
    long[0]["context"] = long[1]["context"] = "The mill turned slowly all day. " * 100
    experiment = make(data=long, ratios=(8,))
    samples = measured(experiment)
    sample = next(sample for sample in samples if sample["id"] == "0-0")
    room = llm.context_window - len(experiment.prompt(question(experiment, "0-0"), [])) - NEW_TOKENS
    assert sample["arms"]["full"]["cut"] is True
    assert sample["arms"]["full"]["positions"] == room
    assert experiment.summarise(samples)["arms"]["full"]["cut"] == 2
    with pytest.raises(BudgetError, match="'0-0'.*coarser --ratios"):
        measured(make(data=long, ratios=(1,)))


def test_a_long_reference_answer_fits_the_window_after_the_full_text(make, llm):
    data = rows()
    data[0] |= {"context": "The mill turned slowly all day. " * 100, "answers": ["the answer goes on and on " * 8]}
    experiment = make(data=data, ratios=(8,), template="short", generate=False)
    one = question(experiment, "0-0")
    assert len(experiment.reference(one)) > experiment._sampling.max_new_tokens
    full = experiment.prompt(one, experiment.forms(one)["full"])
    assert len(full) + len(experiment.reference(one)) == llm.context_window


def test_questions_about_one_text_are_side_by_side(make):
    groups = make(batch_size=4).groups()
    assert [len(group) for group in groups] == [4, 4, 2]
    assert groups[0] == ["0-0", "0-1", "1-0", "1-1"]


def test_a_limit_takes_questions_evenly(make):
    ids = {name for group in make(limit=3).groups() for name in group}
    assert ids == {"0-0", "2-0", "4-1"}


def test_one_question_per_text_is_drawn_by_the_seed(make):
    def asked(**changes):
        return sorted(name for group in make(one_per_text=True, **changes).groups() for name in group)

    drawn = {seed: asked(seed=seed) for seed in range(8)}
    for ids in drawn.values():
        assert [name[0] for name in ids] == ["0", "1", "2", "3", "4"]
    assert asked() == drawn[0]
    assert {name for ids in drawn.values() for name in ids} == {row["id"] for row in rows()}
    assert asked(data=rows(3)) == drawn[0][:3]  # other texts do not matter
    assert asked(limit=2) == [drawn[0][0], drawn[0][4]]
    assert any(len({name[-1] for name in ids}) == 2 for ids in drawn.values())  # each text has a draw of its own
    experiment = make(one_per_text=True, passages=3)
    assert [experiment._ranks[name] for name in experiment._questions] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("answers", "template"),
    [(["yes", "No"], "yes_no"), (["yes", "1870"], "short"), (["a sentence that goes on " * 4], "long")],
)
def test_the_template_goes_by_the_answers(make, answers, template):
    data = [row | {"answers": [answers[at % len(answers)]]} for at, row in enumerate(rows())]
    experiment = make(data=data)
    assert experiment.template_name == template
    (sample, *_) = measured(make(data=data, limit=1))
    assert set(templates()[template]["metrics"]) < set(sample["arms"]["full"])


def hand_made(none, full, ours):
    return [
        {"id": str(at), "document": str(at), "rank": None, "answer_tokens": 1 + 2 * at, "arms": {
            arm: {"positions": 10, "prediction": "", "em": 0.0, "f1": values[at], "contained": 0.0,
                  "loss": 3.0 - 2 * values[at]}
            for arm, values in {"none": none, "extensible/4": ours, "full": full}.items()
        }}
        for at in range(len(none))
    ]  # fmt: skip


def test_the_tables_are_those_of_hand_made_samples(make, llm):
    summary = make(random_embedder(llm)).summarise(hand_made([0.0, 0.2], [0.8, 1.0], [0.4, 0.6]))
    assert summary["arms"]["full"]["f1"] == {"mean": 0.9, "interval": pytest.approx([0.8, 1.0]), "n": 2}
    assert summary["minus"]["4"]["full"]["f1"]["mean"] == pytest.approx(-0.4)
    assert set(summary["minus"]["4"]) == {"none", "full"}
    assert summary["retained"]["4"]["mean"] == pytest.approx(0.5)
    assert summary["metrics"] == ["em", "f1", "contained", "loss"]


def test_tables_by_rank_are_means_of_the_same_kind(make, llm):
    samples = hand_made([0.0, 0.2, 0.9], [0.8, 0.4, 1.0], [0.4, 0.6, 0.5])
    samples[0]["rank"] = samples[1]["rank"] = 0
    samples[2]["rank"] = 1
    by_rank = make(random_embedder(llm), passages=2).summarise(samples)["by_rank"]
    assert by_rank["0"]["full"] == {
        "n": 2, "em": 0.0, "f1": pytest.approx(0.6), "contained": 0.0, "loss": pytest.approx((1.4 + 3 * 2.2) / 4),
    }  # fmt: skip
    assert by_rank["1"]["none"]["loss"] == pytest.approx(1.2)


def test_every_token_counts_the_same_for_the_loss(make, llm):
    """Of 1 and of 3 tokens: 3.0 and 2.6 without a text, 2.2 and 1.8 from the embeddings, 1.4 and 2.0 from all of it."""
    summary = make(random_embedder(llm)).summarise(hand_made([0.0, 0.2], [0.8, 0.5], [0.4, 0.6]))
    found = summary["arms"]["extensible/4"]["loss"]
    assert found == {"mean": pytest.approx(1.9), "interval": pytest.approx([1.8, 2.2]), "n": 2}
    found = summary["minus"]["4"]["full"]["loss"]
    assert found == {"mean": pytest.approx((0.8 - 3 * 0.2) / 4), "interval": pytest.approx([-0.2, 0.8]), "n": 2}
    found = summary["retained_loss"]["4"]
    assert found["mean"] == pytest.approx((0.8 + 3 * 0.8) / (1.6 + 3 * 0.6))
    assert found["interval"] == pytest.approx([0.5, 0.8 / 0.6])


def test_the_retained_share_is_refused_where_the_full_text_gains_nothing(make, llm):
    summary = make(random_embedder(llm)).summarise(hand_made([0.5, 0.2, 0.9], [0.6, 0.3, 0.5], [0.4, 0.6, 0.1]))
    for retained in (summary["retained"]["4"], summary["retained_loss"]["4"]):
        assert "mean" not in retained
        assert retained["refused"]


def test_the_record_says_which_controls_were_measured(make, llm):
    assert make().config.controls == ("none", "truncated", "chosen", "lingua", "full")
    with pytest.raises(ConfigError, match="controls='anchors' needs an embedder with an entry layer above 0"):
        make(random_embedder(llm), controls=("anchors",))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("template", "verse"),
        ("controls", ("none", "magic")),
        ("remeasure", ("focus", "magic")),
        ("passages", 0),
        ("data", ()),
    ],
)
def test_illegal_settings_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        QaConfig(**({"llm": "tiny", "data": ("rows.jsonl",)} | {name: value}))


def test_one_text_has_no_wrong_one(make, llm):
    with pytest.raises(ConfigError, match="1 different texts and 2 are needed .one of them as the wrong one"):
        make(random_embedder(llm), data=rows(1))
    with pytest.raises(ConfigError, match="1 different texts and 2 are needed; pass more rows"):
        make(data=rows(1), passages=2)
    assert len(measured(make(data=rows(1), controls=("none",)))) == 2  # questions
