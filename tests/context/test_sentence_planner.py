"""What is measured is planned as what is asked: one place calls `plan_focus` with what an embedder has."""

from __future__ import annotations

import pytest
from tiny import SENTENCES, entering, tool_llm

from extemb_core import ExtensibleLM
from extemb_core.context.focus import SplitDocument, plan_focus, sentence_losses
from extemb_core.context.scoring import bm25_scores
from extemb_core.context.sentence_planner import SentencePlanner
from extemb_core.context.spans import split_into_sentences
from extemb_core.documents import Document
from extemb_core.errors import ConfigError
from extemb_core.evaluation.forms import Forms

QUESTION = "When was the bridge closed?"
HEADS = [[2, 0], [1, 3]]
BUDGET = 120


@pytest.fixture(scope="module")
def llm():
    return tool_llm()  # whose window is large


def document(llm):
    text = " ".join(SENTENCES)
    return SplitDocument(split_into_sentences(text, llm.encode_with_ends(text)[1]), 2, 32)


def planned(llm, embedder, scorer=None, **settings):
    looked = []

    def compressed():
        looked.append(True)
        return embedder.compress_ids([llm.encode(" ".join(SENTENCES))], show_progress=False)

    plan = SentencePlanner(llm, embedder, scorer).plan(QUESTION, [document(llm)], BUDGET, compressed, **settings)
    return plan, bool(looked)


def test_heads_rank_where_the_embedder_names_some(llm):
    plan, looked = planned(llm, entering(llm, chunk_size=32, retrieval_heads=HEADS))
    assert looked
    assert plan.note.endswith(f"ranked by where {llm.name} looks, and by words")


@pytest.mark.parametrize("select", [False, True])
@pytest.mark.parametrize("heads", [HEADS, ()])
def test_it_calls_with_what_the_embedder_has(llm, monkeypatch, heads, select):
    calls = []
    monkeypatch.setattr(
        "extemb_core.context.sentence_planner.plan_focus",
        lambda *given, **settings: (calls.append(settings), plan_focus(*given, **settings))[1],
    )
    embedder = entering(llm, chunk_size=32, kept_ratio=4, retrieval_heads=heads)
    planned(llm, embedder, select=select)
    (settings,) = calls
    expected = sentence_losses(by_heads=bool(heads))
    assert settings["ratios"] == [ratio for ratio in embedder.config.ratios if ratio >= 4] != embedder.config.ratios
    assert (settings["losses"].alike_above, settings["losses"].many) == (expected.alike_above, expected.many)
    assert settings["select"] is select
    assert (settings["scorer"] is bm25_scores) == (not heads)


def test_a_scorer_stands_in_the_place_of_the_heads(llm):
    embedder = entering(llm, chunk_size=32, retrieval_heads=HEADS)
    plan, looked = planned(llm, embedder, lambda _, sentences: range(len(sentences), 0, -1), select=True)
    assert not looked
    assert plan.documents[0].spans[0].fidelity == "raw"
    assert "looks" not in plan.note


def test_a_table_that_is_none_is_refused_before_anything_is_planned(llm):
    with pytest.raises(ConfigError, match="is no table of losses"):
        SentencePlanner(llm, entering(llm, sentence_losses={"ranks": [1]}))


@pytest.mark.parametrize("heads", [HEADS, ()])
def test_a_measured_prompt_holds_what_an_asked_one_does(llm, heads):
    embedder = entering(llm, chunk_size=32, retrieval_heads=heads)
    text = " ".join(SENTENCES)
    forms = Forms(llm, embedder, {"a": text}, separator="\n\n", ratios=[2], controls=["focus"], seed=0)
    measured = forms.of(["a"], QUESTION)["focus/2"]
    room = sum(map(len, forms.of(["a"], QUESTION)["extensible/2"]))
    plan = ExtensibleLM(llm, embedder).builder.plan([Document(text)], room, "auto", question=QUESTION, overhead=[0])
    assert sum(map(len, measured)) == plan.documents[0].positions
