"""What a plan for a question makes of documents, sentence by sentence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SENTENCES, entering, save_tiny, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.context.focus import FIDELITIES, SentenceLosses, SplitDocument, mode_of, plan_focus, sentence_losses
from extemb_core.context.scoring import bm25_scores
from extemb_core.context.spans import split_into_sentences
from extemb_core.documents import Document, ReferencedDocument
from extemb_core.errors import BudgetError, ConfigError
from extemb_core.models.config import ExtensibleEmbedderConfig

RATIOS = (2, 4, 8, 16, 32)
ABOVE = {"entry_layer": 1, "adaptation": "none"}
AT_INPUT, TRAINED = ExtensibleEmbedderConfig(), ExtensibleEmbedderConfig(entry_layer=1)
UNTRAINED = ExtensibleEmbedderConfig(**ABOVE)
QUESTION = "Why was the bridge closed in 1987?"
BRIDGE = "In 1987 the bridge was closed for repairs"


def split(text, *, overhead=0, limit=None, chunk_size=64, max_tokens=64):
    sentences = split_into_sentences(text, tiny_llm("llama").encode_with_ends(text)[1], max_tokens=max_tokens)
    return SplitDocument(sentences, max(2, limit or 1), chunk_size, overhead, limit)


def raw_texts(document, plan):
    """The texts of the sentences that are read in full."""
    borders, texts = document.sentences.borders.tolist(), document.sentences.texts
    raw = [range(span.start, span.stop) for span in plan.spans if span.fidelity == "raw"]
    return [text for text, start in zip(texts, borders, strict=False) if any(start in tokens for tokens in raw)]


def planned(question, documents, budget, **settings):
    made = plan_focus(question, documents, budget, ratios=RATIOS, **settings)
    assert made.positions <= budget
    for document, plan in zip(documents, made.documents, strict=True):
        content = sum(span.positions(document.chunk_size) for span in plan.spans)
        assert plan.positions == (content + document.overhead if content else 0)
        assert sum(span.stop - span.start for span in plan.spans) == plan.n_tokens == document.n_tokens
    return made


def test_the_sentence_that_answers_is_read_in_full_and_the_rest_compressed():
    document = split(SENTENCES * 3)
    (plan,) = planned(QUESTION, [document], document.n_tokens // 4).documents
    assert plan.fidelity == "mixed"
    assert any(BRIDGE in text for text in raw_texts(document, plan))
    assert not any("Copper" in text for text in raw_texts(document, plan))
    assert any(isinstance(span.fidelity, int) for span in plan.spans)
    assert "raw" in plan.reason


def test_selecting_reads_sentences_in_full_or_not_at_all_by_their_rank_alone():
    document = split(SENTENCES)
    ranked = np.argsort(-np.array(bm25_scores(QUESTION, document.sentences.texts)), kind="stable").tolist()
    budget = int(np.diff(document.sentences.borders)[ranked[0]]) + 2  # borders of groups
    (plan,) = planned(QUESTION, [document], budget, select=True).documents
    assert {span.fidelity for span in plan.spans} == {"raw", "dropped"}
    assert any(BRIDGE in text for text in raw_texts(document, plan))


@pytest.mark.parametrize("below", [0, 1])
@pytest.mark.parametrize(("many", "max_tokens", "by_heads"), [(6, 64, False), (3, 64, True), (9, 32, True)])
def test_beside_many_sentences_in_full_none_is_compressed(many, max_tokens, by_heads, below):
    """Of sentences of one length, all of which have a word of the question; nine are many where they are cut short."""
    in_full = many - below
    text = " ".join(f"The bridge was closed in {year}." for year in range(1900, 1930))
    document = split(text, max_tokens=max_tokens)
    length = int(np.diff(document.sentences.borders).max())
    budget = in_full * length + length // 2
    made = planned(QUESTION, [document], budget, losses=sentence_losses(by_heads=by_heads))
    assert {isinstance(span.fidelity, int) for span in made.documents[0].spans} == {False, in_full < many}
    assert ("sentences fit in full" in made.note) == (in_full >= many)
    (selected,) = planned(QUESTION, [document], budget, select=True).documents
    assert (made.documents[0].spans == selected.spans) == (in_full >= many)


def test_sentences_that_have_nothing_to_do_with_the_question_are_not_many():
    document = split(f"{BRIDGE}. " + "Copper and oats are sold. " * 60)
    made = planned(QUESTION, [document], document.n_tokens // 3)
    assert any(isinstance(span.fidelity, int) for span in made.documents[0].spans)
    assert "sentences fit" not in made.note


def test_a_document_that_may_not_stand_in_full_is_compressed_beside_many_sentences():
    text = " ".join(f"The bridge was closed in {year}." for year in range(1900, 1930))
    documents = [split(text), split(text.replace("bridge", "old bridge"), limit=8)]
    made = planned(QUESTION, documents, documents[0].n_tokens)
    assert any(isinstance(span.fidelity, int) for span in made.documents[1].spans)


def test_what_fits_is_raw_and_no_scorer_is_asked():
    def scorer(question, sentences):
        raise AssertionError

    documents = [split(SENTENCES, overhead=3), split(""), split("Short.", overhead=2)]
    full = sum(document.n_tokens + document.overhead for document in documents)
    made = plan_focus(QUESTION, documents, full, ratios=RATIOS, scorer=scorer)
    assert [plan.fidelity for plan in made.documents] == ["raw", "dropped", "raw"]
    assert (made.documents[1].reason, made.positions) == ("empty", full)


@pytest.mark.parametrize("budget", [0, 1])
def test_a_budget_of_next_to_nothing_is_held(budget):
    made = planned(QUESTION, [split(SENTENCES), split("One."), split("")], budget)
    assert made.positions <= budget
    assert "no room" in {plan.reason for plan in made.documents}


def test_a_question_that_matches_nothing_still_fills_the_budget():
    document = split(SENTENCES * 3)
    made = planned("Zymurgy?", [document], document.n_tokens // 4)
    assert made.positions > 0.9 * made.budget
    assert made.note == "no sentence has a word of the question"


def test_positions_that_nothing_was_measured_to_gain_by_are_used_too():
    nothing = SentenceLosses((1,), (), np.zeros((1, 3, len(FIDELITIES))))
    made = planned(QUESTION, [split(SENTENCES * 3)], 60, losses=nothing)
    assert made.positions > 50


def test_documents_of_one_sentence_compete_with_each_other():
    documents = [split(text, overhead=2) for text in SENTENCES.split("\n")]
    made = planned(QUESTION, documents, sum(document.n_tokens for document in documents) // 3)
    best = max(made.documents, key=lambda plan: plan.positions / max(1, plan.n_tokens))
    assert BRIDGE in documents[best.index].sentences.texts[0]


def test_a_thousand_documents_are_planned_at_once():
    documents = [split(f"Harbour {number} has {number % 7} cranes. It opened late.") for number in range(1000)]
    made = planned("How many cranes has harbour 731?", documents, 2000)
    assert made.positions > 0.9 * 2000
    assert raw_texts(documents[731], made.documents[731])


@pytest.mark.parametrize("limit", [2, 8, 32])
def test_a_document_with_a_finest_ratio_is_read_no_finer(limit):
    limited, free = split(SENTENCES, limit=limit), split(SENTENCES)
    made = planned(QUESTION, [limited, free], 10 * limited.n_tokens)
    assert {span.fidelity for span in made.documents[0].spans} == {limit}
    assert made.documents[1].fidelity == "raw"


@given(
    texts=st.lists(st.sampled_from([SENTENCES, SENTENCES[:150], "One.", "", "bridge " * 90]), max_size=4),
    budget=st.integers(0, 300),
    overhead=st.integers(0, 9),
    chunk_size=st.sampled_from([32, 40, 512]),
    select=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_plan_fits_and_covers_every_token_once(texts, budget, overhead, chunk_size, select):
    documents = [split(text, overhead=overhead, chunk_size=chunk_size) for text in texts]
    planned(QUESTION, documents, budget, select=select)


def test_a_scorer_of_ones_own_decides_what_is_read_in_full():
    document = split(SENTENCES)
    wanted = [float("Copper" in text) for text in document.sentences.texts]
    (plan,) = planned(QUESTION, [document], document.n_tokens // 3, scorer=lambda question, texts: wanted).documents
    assert any("Copper" in text for text in raw_texts(document, plan))


def test_a_question_about_many_places_has_all_of_a_text_read_alike():
    text = (
        "Fog came at dawn. A bridge was closed. Bread is cheap. The moor is wide. " + 8 * "Copper and oats are sold. "
    )
    document = split(text)
    alike, ranked = (
        planned(question, [document], document.n_tokens // 4)
        for question in ("Was a bridge closed by fog at dawn?", "Is bread cheap?")
    )
    assert "several places" in alike.note
    assert "all is read alike" in alike.note
    assert {span.fidelity for span in alike.documents[0].spans} <= {8, 4, 2}
    assert "one place" in ranked.note
    assert "alike" not in ranked.note
    selected = planned("Was a bridge closed by fog at dawn?", [document], document.n_tokens // 4, select=True)
    assert "several places" in selected.note
    assert "alike" not in selected.note
    assert "raw" in {span.fidelity for span in ranked.documents[0].spans}


def test_a_question_about_many_places_has_all_read_alike_beside_many_sentences_too():
    text = "Fog came at dawn. A bridge was closed. " + "The dawn was red. " * 8 + "Copper and oats are sold. " * 30
    document = split(text)
    made = planned("Was a bridge closed by fog at dawn?", [document], document.n_tokens // 2)
    assert "all is read alike" in made.note
    assert "sentences fit" not in made.note
    assert "dropped" not in {span.fidelity for span in made.documents[0].spans}


def test_what_was_fitted_says_that_less_detail_costs_more():
    table = sentence_losses()
    assert (np.diff(table.losses, axis=2) <= 0).all()
    assert table.losses[0, 0, 0] == table.losses[0, : len(table.ranks), 0].max()  # one place: the best sentence has it
    assert table.losses.shape == (len(table.trust) + 1, len(table.ranks) + 2, len(FIDELITIES))


FITTED = {
    "fidelities": list(FIDELITIES),
    "ranks": [1],
    "trust": [],
    "losses": np.linspace(np.full(len(FIDELITIES), 3.0), np.zeros(len(FIDELITIES)), 3)[None].tolist(),
}


def test_an_embedder_that_names_a_table_of_its_own_is_planned_by_it(tmp_path):
    """The shipped one has what falls with less detail; in this one detail costs nothing, so that all is compressed."""
    llm = tiny_llm("llama")
    embedder, shipped = entering(llm, sentence_losses=FITTED), entering(llm)
    embedder.save_pretrained(tmp_path)
    loaded = type(embedder).from_pretrained(tmp_path, llm=llm)
    assert loaded.config.sentence_losses == FITTED
    assert loaded.fingerprint == shipped.fingerprint
    own, of_shipped = (
        ExtensibleLM(llm, one).plan(QUESTION, [SENTENCES], budget=60, plan="focus", max_new_tokens=4)
        for one in (loaded, shipped)
    )
    assert own.documents[0].spans != of_shipped.documents[0].spans
    assert "dropped" not in {span.fidelity for span in own.documents[0].spans}


@pytest.mark.parametrize(
    "values",
    [
        [], {"ranks": [1]}, FITTED | {"fidelities": ["raw"]}, FITTED | {"ranks": [2, 1]}, FITTED | {"trust": ["much"]},
        FITTED | {"losses": FITTED["losses"][0]}, FITTED | {"losses": "none"},
        FITTED | {"losses": (-np.array(FITTED["losses"])).tolist()},
        FITTED | {"losses": (np.array(FITTED["losses"]) + np.inf).tolist()},
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(values):
    llm = tiny_llm("llama")
    with pytest.raises(ConfigError, match="sentence_losses=.* pass the summary of a record of `extemb eval plan`"):
        ExtensibleLM(llm, entering(llm, sentence_losses=values))


def test_losses_go_by_rank_and_below_the_ranks_by_length():
    losses = np.arange(6.0).reshape(2, 3, 1) * np.ones(len(FIDELITIES))
    table = SentenceLosses((1,), (0.5,), losses)
    assert table.of(np.array([0.0, 2.0, 5.0]), np.array([50, 50, 50]), 0.9)[:, 0].tolist() == [2.5, 2, 3]
    assert table.of(np.array([0.0, 2.0, 5.0]), np.array([50, 10, 50]), 0.1)[:, 0].tolist() == [1, 0.1, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("best", "auto", "q", TRAINED), "plan='best' is none of focus, select, even"),
        (("focus", 8, "q", TRAINED), "came with ratio=8"),
        (("select", "raw", "q", TRAINED), "came with ratio='raw'"),
        (("focus", "auto", "q", AT_INPUT), "enters above layer 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        mode_of(*arguments)


@pytest.mark.parametrize("plan", ["focus", "select"])
def test_a_plain_prompt_has_no_question_to_plan_for(lm, plan):
    for call in (lm.generate, lm.prepare_text):
        with pytest.raises(ConfigError, match=f"plan='{plan}' needs a question"):
            call("Ships:", [SENTENCES], plan=plan)
    assert lm.generate("Ships:", [SENTENCES], plan="even", budget=60, max_new_tokens=1).context[0].fidelity != "mixed"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((None, "auto", "q", TRAINED), "focus"),
        ((None, "auto", " ", TRAINED), "even"),
        ((None, "auto", "q", AT_INPUT), "even"),
        ((None, 8, "q", TRAINED), "even"),
        (("even", 8, "q", AT_INPUT), "even"),
        (("select", "auto", "q", TRAINED), "select"),
        ((None, "auto", "q", UNTRAINED), "select"),
        ((None, "auto", " ", UNTRAINED), "even"),
        (("focus", "auto", "q", UNTRAINED), "focus"),
        ((None, "auto", "q", ExtensibleEmbedderConfig(**ABOVE, sentence_losses=FITTED)), "focus"),
        ((None, "auto", "q", ExtensibleEmbedderConfig(**ABOVE, connector="linear")), "focus"),
    ],
)
def test_without_a_plan_the_question_and_the_embedder_decide(arguments, expected):
    assert mode_of(*arguments) == expected


def test_nothing_is_dropped_unread_because_it_may_not_stand_in_full():
    """An untrained embedder has chosen sentences where no plan is asked for; a ref that is all there is has none."""
    llm = tiny_llm("llama")
    lm = ExtensibleLM(llm, entering(llm, sentence_losses=None))
    text = Document(SENTENCES * 2)
    ref = ReferencedDocument(SENTENCES * 2, finest=4)
    spans = {span.fidelity for span in lm.plan(QUESTION, [text], budget=60, max_new_tokens=4).documents[0].spans}
    assert spans == {"raw", "dropped"}
    for documents in ([ref], [text, ref]):
        planned = lm.plan(QUESTION, documents, budget=200, max_new_tokens=4).documents[-1]
        assert planned.fidelity != "dropped"


def test_a_negative_budget_is_refused():
    with pytest.raises(BudgetError):
        plan_focus(QUESTION, [split(SENTENCES)], -1, ratios=RATIOS)


# -- in a prompt --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    llm = tiny_llm("llama")
    return ExtensibleLM(llm, entering(llm))


@pytest.mark.parametrize("plan", ["focus", "select", "even"])
def test_a_prompt_takes_what_was_planned_and_the_context_says_what_became_of_each_character(lm, plan):
    documents = [Document(SENTENCES, title="Notes"), Document(SENTENCES * 2), Document("")]
    bare = len(lm.builder.render([{"role": "user", "content": QUESTION}]).fill({}))
    for budget in (0, 1, 40, 100, 200):
        prepared, _ = lm.prepare(QUESTION, documents, budget=budget, plan=plan, max_new_tokens=4)
        assert len(prepared.prompt) - bare <= sum(entry.positions for entry in prepared.context) <= budget
        for document, entry in zip(documents, prepared.context, strict=True):
            assert bool(entry.spans) == (entry.fidelity == "mixed")
            if entry.spans:
                assert [span.start for span in entry.spans] == [0, *(span.stop for span in entry.spans[:-1])]
                assert entry.spans[-1].stop == len(document.text)
                assert sum(span.positions for span in entry.spans) < entry.positions


def test_spans_come_from_the_one_encoding_that_is_stored(lm, monkeypatch):
    calls = []
    compress = lm.embedder.compress_ids
    monkeypatch.setattr(lm.embedder, "compress_ids", lambda ids, **k: calls.append(k["ratio"]) or compress(ids, **k))
    document = "The mill stood by the river. " + SENTENCES * 2
    first = lm.ask(QUESTION, document, budget=60, max_new_tokens=1)
    other = lm.ask("Who counted ships?", document, budget=80, max_new_tokens=1)
    assert calls == [lm.embedder.config.kept_ratio]
    assert ([entry.cached for entry in first.context], [entry.cached for entry in other.context]) == ([False], [True])
    assert first.context[0].spans != other.context[0].spans


def test_the_question_before_the_last_one_counts_too(lm):
    messages = [
        {"role": "user", "content": "Tell me about the bridge."},
        {"role": "assistant", "content": "It is old."},
        {"role": "user", "content": "Why?"},
    ]
    documents = [SENTENCES * 2]
    together = lm.plan(messages, documents, budget=60, max_new_tokens=4).documents[0].spans
    assert (
        together
        == lm.plan("Tell me about the bridge.\nWhy?", documents, budget=60, max_new_tokens=4).documents[0].spans
    )
    assert together != lm.plan("Why?", documents, budget=60, max_new_tokens=4).documents[0].spans


def test_a_plan_explains_what_becomes_of_each_span(lm):
    plan = lm.plan(QUESTION, [SENTENCES * 2], budget=60, max_new_tokens=4)
    (document,) = plan.documents
    borders = lm.builder._sentences(SENTENCES * 2, 64).character
    for span, excerpt in zip(document.spans, document.excerpts, strict=True):
        assert excerpt == (SENTENCES * 2)[borders(span.start) : borders(span.stop)][:200]
    rows = plan.explain().split("\n")[2:-2]
    shown = [row.split(maxsplit=2) for row in rows if "more span" not in row]
    assert {fidelity for _, fidelity, _ in shown} >= {"raw"}
    assert any(BRIDGE[:20] in row for row in rows)
    assert "of what is rare in it" in plan.explain()


def test_an_excerpt_of_a_long_span_is_short():
    document = split("The mill turned. " * 500 + "\n" + SENTENCES)
    (plan,) = planned(QUESTION, [document], document.n_tokens // 8).documents
    assert plan.fidelity == "mixed"
    assert max(map(len, plan.excerpts)) == 200


@pytest.mark.parametrize("loaded", [False, True])
def test_a_scorer_of_ones_own_is_asked_wherever_sentences_are_planned(loaded, tmp_path):
    asked = []

    def copper(question, sentences):
        asked.append(question)
        return [float("Copper" in sentence) for sentence in sentences]

    if loaded:
        save_tiny(tmp_path)
        lm = ExtensibleLM.from_pretrained(tmp_path / "llm", "untrained", device="cpu", scorer=copper)
    else:
        llm = tiny_llm("llama")
        lm = ExtensibleLM(llm, entering(llm), scorer=copper)
    for plan in ("focus", "select"):
        entry = lm.ask(QUESTION, [SENTENCES * 2], budget=60, plan=plan, max_new_tokens=1).context[0]
        raw = "".join((SENTENCES * 2)[span.start : span.stop] for span in entry.spans if span.fidelity == "raw")
        assert "Copper" in raw
        assert BRIDGE not in raw
    lm.ask(QUESTION, [SENTENCES * 2], budget=60, plan="even", max_new_tokens=1)
    assert asked == [QUESTION] * 2


@pytest.mark.parametrize("scores", [[1.0], [[1.0]], 1.0, [float("nan")] * 7, [None] * 7])
def test_scores_that_are_not_one_number_for_each_sentence_are_refused(scores):
    document = split(SENTENCES)
    with pytest.raises(ConfigError, match="return one number for each"):
        planned(QUESTION, [document], 20, scorer=lambda question, texts: scores)


def test_a_session_and_a_plain_prompt_have_even_plans(lm):
    session = lm.session([SENTENCES * 2], budget=60)
    assert session.send("Why was the bridge closed?", max_new_tokens=1).context[0].fidelity != "mixed"
    assert lm.generate("Why?", [SENTENCES * 2], budget=60, max_new_tokens=1).context[0].fidelity != "mixed"


def test_a_conversation_that_fits_is_planned_once(lm, monkeypatch):
    calls = []
    plan = lm.builder.plan
    monkeypatch.setattr(lm.builder, "plan", lambda *args, **settings: calls.append(args) or plan(*args, **settings))
    prepared, _ = lm.prepare(QUESTION, [SENTENCES * 2], budget=40, condense=True, max_new_tokens=4)
    assert prepared.context[0].fidelity == "mixed"
    assert len(calls) == 1
