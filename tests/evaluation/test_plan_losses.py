"""Random plans are put, and what reading in less detail costs is fitted from them."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from tiny import SENTENCES, entering, random_embedder, tiny_llm, tool_llm

from extemb_core.context.focus import FIDELITIES, SentenceLosses
from extemb_core.errors import ConfigError
from extemb_core.evaluation.plan_losses import RANKS, PlanExperiment, fit
from extemb_core.evaluation.runs import read_record, run
from extemb_core.evaluation.settings import PlanConfig


@pytest.fixture
def questions(tmp_path):
    lines = SENTENCES.split("\n")
    rows = [
        {"id": f"{'ab'[number % 2]}:{number}", "context": "\n".join(lines[number % 3 :]), "question": "Which bridge?",
         "answers": ["closed for repairs"]}
        for number in range(9)
    ]  # fmt: skip
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def made(questions, **settings):
    llm = tool_llm()  # whose window is large
    embedder = entering(llm, ratios=(1, 2, 4, 8, 16, 32), chunk_size=32)
    return PlanExperiment(PlanConfig(llm="llm", data=(questions,), passages=2, **settings), llm, embedder)


def test_a_run_puts_each_question_under_several_plans_and_writes_a_table(questions, tmp_path):
    record = run(made(questions, limit=4, plans=3), tmp_path / "plan.json", show_progress=False)
    assert sorted(sample["id"].split()[1][0] for sample in record["samples"]) == ["a", "a", "b", "b"]
    for sample in record["samples"]:
        assert len(sample["plans"]) == 3
        assert len(sample["losses"]) == 4  # and the full text
        assert {len(plan) for plan in sample["plans"]} == {len(sample["scores"])} == {len(sample["n_tokens"])}
    table = record["summary"]
    assert (table["questions"], table["plans"]) == (4, 12)
    losses = np.array(table["losses"])
    assert losses.shape == (len(table["trust"]) + 1, len(RANKS) + 2, len(FIDELITIES))
    assert (np.diff(losses, axis=2) <= 0).all()
    again = run(made(questions, limit=4, plans=3), tmp_path / "again.json", show_progress=False)
    assert again["summary"] == table


def samples_of(weights, lost, n=400, seed=0):
    """Samples whose losses are what a table says, of texts of 8 sentences of 100 tokens."""
    draw = np.random.default_rng(seed)
    samples = []
    for number in range(n):
        scores = np.round(draw.permutation(8) / 7, 3)
        added = [0.0, draw.uniform(0.01, 0.1), draw.uniform(0.3, 0.9)][number % 3]
        blank = SentenceLosses(RANKS, (0.0, 0.2), np.zeros((3, 6, 7)))
        classes, amounts = blank.classes(scores, np.full(8, 100))
        plans = draw.integers(0, 7, (4, 8))
        level = int(np.searchsorted((0.0, 0.2), added))
        nats = [float((weights[level][classes] * amounts * lost[plan]).sum()) for plan in plans]
        samples.append(
            {"scores": scores.tolist(), "n_tokens": [100] * 8, "added": added, "plans": plans.tolist(),
             "answer_tokens": 1, "losses": [0.01 + loss for loss in nats] + [0.01]}
        )  # fmt: skip
    return samples


def test_what_made_the_losses_is_found_again():
    lost = np.array([1, 0.8, 0.7, 0.5, 0.3, 0.1, 0])
    weights = np.array(
        [[0.4, 0.05, 0.02, 0.01, 0.0, 0.01], [0.2, 0.2, 0.02, 0.01, 0.0, 0.01], [0.05, 0.3, 0.1, 0.01, 0.0, 0.01]]
    )
    table = fit(samples_of(weights, lost))
    found = np.array(table["losses"])[:, :, 0]
    assert found[0].argmax() == 0
    assert found[2].argmax() == 1
    assert table["trust"][0] == 0
    assert 0.1 <= table["trust"][1] <= 0.3
    np.testing.assert_allclose(table["lost"], lost, atol=0.1)
    assert table["explained"] > 0.9


@pytest.mark.parametrize("change", [-1, 0])
def test_what_costs_nothing_has_no_table(change):
    samples = samples_of(np.full((3, 6), 0.1), np.linspace(1, 0, 7))
    for sample in samples:
        *losses, full = sample["losses"]
        sample["losses"] = [full + change * (loss - full) for loss in losses] + [full]
    with pytest.raises(ConfigError, match=r"made the right answers no less likely \([+-]\d"):
        fit(samples)


@pytest.mark.parametrize("embedder", [None, "at layer 0"])
def test_an_embedder_that_has_no_spans_is_refused(questions, embedder):
    llm = tiny_llm("llama")
    with pytest.raises(ConfigError, match="needs an embedder that enters above layer 0"):
        PlanExperiment(PlanConfig(llm="llm", data=(questions,)), llm, embedder and random_embedder(llm))


def test_texts_of_too_few_sentences_say_nothing(tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text(
        "".join(
            json.dumps({"id": f"a:{n}", "context": f"One {n}.", "question": "?", "answers": ["1"]}) + "\n"
            for n in range(3)
        )
    )
    with pytest.raises(ConfigError, match="fewer than two texts have several sentences"):
        run(made(str(file), plans=2), tmp_path / "plan.json", show_progress=False)


def test_the_table_that_ships_is_that_of_its_record():
    record = read_record(Path(__file__).parents[2] / "benchmarks/results/plan_joint.json")
    file = resources.files("extemb_core") / "pretrained/focus.json"
    shipped = json.loads(file.read_text(encoding="utf-8"))
    assert shipped == {name: record["summary"][name] for name in shipped}
    assert fit([sample for sample in record["samples"] if sample["plans"]])["lost"] == record["summary"]["lost"]


def test_sentences_are_ranked_and_cut_by_heads_where_the_embedder_names_any(questions, tmp_path, monkeypatch):
    def look(self, question, parts):
        shares = np.zeros((len(self.heads), len(parts[0])))
        shares[:, -1] = 1
        return shares

    monkeypatch.setattr("extemb_core.context.retrieval_heads.RetrievalHeads.look", look)
    monkeypatch.setattr("extemb_core.evaluation.plan_losses.fit", lambda samples: {})  # of an LLM of random numbers
    experiment = made(questions, limit=2, plans=1)
    by_words = run(experiment, tmp_path / "words.json", show_progress=False)
    heads = entering(experiment.llm, ratios=(1, 2, 4, 8, 16, 32), chunk_size=32, retrieval_heads=[[1, 0]])
    by_heads = run(
        PlanExperiment(experiment.config, experiment.llm, heads), tmp_path / "heads.json", show_progress=False
    )
    for one, other in zip(by_words["samples"], by_heads["samples"], strict=True):
        assert other["scores"][-1] >= max(other["scores"]) - 1 > one["scores"][-1] - 1
        assert other["scores"] != one["scores"]
        assert max(other["n_tokens"]) <= 32 < max(one["n_tokens"])
