"""Prompts with documents in them: each text goes one way, once."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny import SENTENCES, entering, roomy_llm, shared_embedder, tiny_llm, tiny_model, tiny_tokenizer
from tokenizers import trainers

from extemb_core import Document, EmbeddingStore, ExtensibleLM
from extemb_core.context.assembly import assemble_chat
from extemb_core.context.builder import parts_of
from extemb_core.context.planning import Span
from extemb_core.documents import ReferencedDocument, text_ref
from extemb_core.errors import RatioError, StoreCorruptError
from extemb_core.models import generation
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.store.base import MemoryStore

QUESTION = "How many ships?"
DOCUMENTS = [Document(SENTENCES, title="Notes"), Document(SENTENCES[40:300]), Document("Nine ships.")]


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, shared_embedder(llm, 1))


@pytest.fixture
def roomy():
    llm = roomy_llm()
    return ExtensibleLM(llm, shared_embedder(llm, 1))


@pytest.fixture
def tokenised(lm, monkeypatch):
    """How often each text was tokenised, and how often the chat template was rendered."""
    counts = Counter()
    for name in ("encode_with_ends", "encode_template"):
        whole = getattr(LLM, name)

        def counting(self, text, whole=whole):
            counts[text] += 1
            return whole(self, text)

        monkeypatch.setattr(LLM, name, counting)
    render = lm.llm.tokenizer.apply_chat_template

    def rendering(*args, **settings):
        counts["rendered"] += 1
        return render(*args, **settings)

    monkeypatch.setattr(lm.llm.tokenizer, "apply_chat_template", rendering)
    return counts


@pytest.mark.parametrize("condense", [False, True])
@pytest.mark.parametrize("ratio", ["auto", 4])
def test_a_question_is_rendered_once_and_its_texts_are_tokenised_once(lm, tokenised, ratio, condense):
    prepared, _ = lm.prepare(QUESTION, DOCUMENTS, ratio=ratio, condense=condense, max_new_tokens=4)
    assert any(entry.fidelity not in ("raw", "dropped") for entry in prepared.context)
    assert tokenised["rendered"] == 1
    headings = {f"\n\n[{rank}] {title}\n" for rank, title in enumerate(("Notes", "Document", "Document"), 1)}
    assert [text for text, count in tokenised.items() if count > 1 and text not in headings] == []


def test_a_plain_prompt_is_tokenised_once(lm, tokenised):
    prepared, _ = lm.prepare_text(["Read ", DOCUMENTS[0], QUESTION], ratio=4, max_new_tokens=4)
    assert prepared.context[0].fidelity == 4
    assert set(tokenised.values()) == {1}


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: {"embeddings": text.embeddings[:, :16]},
        lambda text: {"n_tokens": text.n_tokens - 1},
        lambda text: {"chunk_size": 2 * text.chunk_size},
        lambda text: {"downscaling": "random"},
    ],
)
def test_what_a_store_has_and_the_embedder_cannot_have_made_is_refused(layer, change):
    llm = tiny_llm()
    lm = ExtensibleLM(llm, shared_embedder(llm, layer), MemoryStore())
    text = lm.embedder.compress(SENTENCES, ratio=4)
    lm.store.put(text)
    assert lm.ask(QUESTION, SENTENCES, ratio=4, max_new_tokens=1).context[0].cached
    lm.store = lm.builder.store = MemoryStore()
    lm.store.put(replace(text, **change(text)))
    with pytest.raises(StoreCorruptError, match="is not what this embedder makes of that text; remove it"):
        lm.ask(QUESTION, SENTENCES, ratio=4, max_new_tokens=1)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_was_kept_before_an_embedder_got_more_ratios_is_read_at_them(tmp_path, layer, on_disk):
    def of_ratios(*ratios):
        torch.manual_seed(0)
        if layer:
            return ExtensibleEmbedder.untrained(llm, layer, chunk_size=32, ratios=ratios)
        return ExtensibleEmbedder.from_llm(llm, num_layers=2, chunk_size=32, ratios=ratios)

    llm = roomy_llm()
    embedder, more = of_ratios(2, 4, 8), of_ratios(2, 4, 8, 16)
    assert more.fingerprint == embedder.fingerprint
    with EmbeddingStore.open(tmp_path / "s", dtype="float32") if on_disk else nullcontext(MemoryStore()) as store:
        ExtensibleLM(llm, embedder, store).ask(QUESTION, SENTENCES, ratio=4, max_new_tokens=1)
        for ratio in (16, 8):
            found = ExtensibleLM(llm, more, store).ask(QUESTION, SENTENCES, ratio=ratio, max_new_tokens=1).context[0]
            assert (found.fidelity, found.cached) == (ratio, True)
        text = store.get(text_ref(SENTENCES), more.fingerprint, 4)
        assert text.ratios == (2, 4, 8)
        assert ExtensibleLM(llm, more, store).builder._own(text, text.n_tokens).at_ratio(16).ratio == 16
        beside = of_ratios(2, 4, 12).compress(SENTENCES, ratio=12, show_progress=False).embeddings
        torch.testing.assert_close(store.get(text.ref, more.fingerprint, 12).embeddings, beside)
        for other in (0, 64):
            with pytest.raises(RatioError):
                store.get(text.ref, more.fingerprint, other)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_prompt_has_what_later_ones_will_read_from_disk(layer, tmp_path):
    llm = tiny_llm()
    with EmbeddingStore.open(tmp_path) as store:
        lm = ExtensibleLM(llm, shared_embedder(llm, layer), store)
        messages = [{"role": "user", "content": [Document(SENTENCES), QUESTION]}]
        both = [lm.prepare(messages, ratio=4, max_new_tokens=4)[0] for _ in range(2)]
    assert [one.context[0].cached for one in both] == [False, True]
    first, second = (one.prompt.inputs(llm) for one in both)
    assert torch.equal(*((first, second) if layer == 0 else (first.states, second.states)))


@pytest.mark.parametrize("verb", ["ask", "chat", "generate", "stream"])
def test_only_a_stream_runs_the_llm_in_a_thread_of_its_own(lm, monkeypatch, verb):
    threads = []
    run = generation._run

    def running(*args, **settings):
        threads.append(threading.current_thread())
        return run(*args, **settings)

    monkeypatch.setattr(generation, "_run", running)
    asked = [{"role": "user", "content": QUESTION}] if verb == "chat" else QUESTION
    made = getattr(lm, verb)(asked, DOCUMENTS[:1], ratio=4, max_new_tokens=3)
    text = "".join(made) if verb == "stream" else made.text
    answer = made.answer if verb == "stream" else made
    assert (answer.text, answer.new_tokens) == (text, 3)
    assert 0 < answer.seconds["first_token"] < answer.seconds["total"]
    assert [thread is threading.current_thread() for thread in threads] == [verb != "stream"]


# -- documents beside text --------------------------------------------------------------------------------------------


def test_text_around_documents_is_counted_as_they_cut_it(roomy):
    assert len(roomy.llm.encode("the fog")) < len(roomy.llm.encode("the ")) + len(roomy.llm.encode("fog"))
    content = [part for start in range(30) for part in (Document(SENTENCES[start:]), "the ", Document("fog"))]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": QUESTION}]
    prepared, _ = roomy.prepare(messages, ratio=4, max_new_tokens=4)
    assert len(prepared.prompt) == roomy.positions(messages, ratio=4, budget=prepared.budget)
    assert len(prepared.prompt) + 4 <= roomy.llm.context_window


@pytest.mark.parametrize(("condense", "n_earlier"), [(False, 0), (True, 0), (True, 3)])
def test_text_that_is_more_tokens_beside_other_text_keeps_to_its_budget(condense, n_earlier):
    tokenizer = deepcopy(tiny_tokenizer())
    trainer = trainers.BpeTrainer(special_tokens=list(tokenizer.added_tokens_encoder), show_progress=False)
    tokenizer.backend_tokenizer.train_from_iterator([*SENTENCES.splitlines(), *["\n\n"] * 9], trainer)
    llm = LLM(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer, name="tiny-lines")
    lm = ExtensibleLM(llm, entering(llm))
    document = Document("ships\n\n")
    assert len(llm.encode("ships\n\nships\n\n")) > 2 * len(llm.encode("ships\n\n"))
    earlier = [{"role": role, "content": SENTENCES[:300]} for role in ("user", "assistant")] * n_earlier
    messages = [*earlier, {"role": "user", "content": [*[document] * 5, QUESTION]}]
    without, _ = lm.prepare(messages, budget=0, max_new_tokens=4, condense=condense)
    bare = len(without.prompt) - sum(entry.positions for entry in without.context)
    assert n_earlier or bare == len(assemble_chat(llm, [{"role": "user", "content": QUESTION}]))
    for budget in range(5 * len(llm.encode("ships\n\n")) + 1):
        prepared, _ = lm.prepare(messages, budget=budget, max_new_tokens=4, condense=condense)
        documents = sum(entry.positions for entry in prepared.context[:5])
        turns = sum(entry.positions for entry in prepared.context[5:])
        assert len(prepared.prompt) - bare - turns <= documents <= budget
        assert bool(turns) == bool(n_earlier)


# -- documents that were planned before -------------------------------------------------------------------------------

SHIPS = Document(SENTENCES, title="Ships", metadata={"source": "ships.txt"})
WIRES = Document(SENTENCES[72:] + " Copper wires again.", metadata={"source": "wires.txt"})


def with_spans(roomy, *documents, budget=80, question=QUESTION, **settings):
    """Documents that carry the spans of a plan for a question."""
    plans = roomy.plan(question, list(documents), budget=budget, plan="focus").documents
    assert "mixed" in {plan.fidelity for plan in plans}
    return [
        ReferencedDocument(
            document.text, title=document.title, metadata=document.metadata, spans=plan.spans, **settings
        )
        for document, plan in zip(documents, plans, strict=True)
    ]


def inside(*parts):
    return [{"role": "user", "content": [*parts]}]


def test_documents_that_carry_spans_are_read_as_these_say_whatever_is_asked(roomy):
    carried = with_spans(roomy, SHIPS, WIRES)
    expected = roomy.prepare(QUESTION, [SHIPS, WIRES], budget=80)[0]
    joined = roomy.prepare("Why was the bridge closed?", carried, budget=80)[0]
    assert [entry.spans for entry in joined.context] == [entry.spans for entry in expected.context]
    assert [entry.positions for entry in joined.context] == [entry.positions for entry in expected.context]
    assert {entry.reason for entry in joined.context} == {"as planned before"}
    prepared, _ = roomy.prepare(inside(*carried, QUESTION), condense=True, max_new_tokens=4)
    by_hand = [
        part
        for document, entry in zip(carried, prepared.context, strict=True)
        for part in parts_of(
            [Span(*span) for span in document.spans],
            roomy.builder.token_ids(document.text),
            roomy.store.get(document.ref, roomy.embedder.fingerprint, roomy.embedder.config.kept_ratio),
        )
    ]
    assert len(prepared.prompt) == len(roomy.prepare(inside(*by_hand, QUESTION), max_new_tokens=4)[0].prompt)
    assert sum(entry.positions for entry in prepared.context) == roomy.positions_of(carried)
    assert roomy.chat(inside(*carried, QUESTION), max_new_tokens=4).text == roomy.chat(
        inside(*by_hand, QUESTION), max_new_tokens=4).text  # fmt: skip
    continued = roomy.generate([*carried, QUESTION], max_new_tokens=4).context
    assert [(entry.fidelity, entry.reason) for entry in continued] == [("mixed", "as planned before")] * 2


def test_what_was_planned_before_is_explained_as_the_plan_that_it_came_from(roomy):
    carried = with_spans(roomy, SHIPS, WIRES)
    spans, again = (
        [row for row in roomy.plan(QUESTION, documents, budget=80).explain().split("\n") if not row[:6].strip()]
        for documents in ([SHIPS, WIRES], carried)
    )
    assert len(spans) > 2
    assert again == spans


def test_documents_without_spans_have_what_those_with_spans_leave(roomy):
    (carried,) = with_spans(roomy, SHIPS, budget=40)
    other = Document("Nine ships. " * 20)
    for budget in range(0, 180, 10):
        planned = roomy.plan(inside(other, carried, QUESTION), [], budget=budget, max_new_tokens=4)
        assert planned.positions <= planned.budget == budget
        assert [plan.index for plan in planned.documents] == [0, 1]
        first, second = planned.documents
        if budget - roomy.positions_of([carried]) >= len(roomy.builder.token_ids(other.text)) / 8 + 2:
            assert (second.spans, second.reason) == (carried.spans, "as planned before")
            assert first.positions > 0
        elif budget < roomy.positions_of([carried]):
            assert "; planned anew, as no room was left for what was planned" in second.reason
        assert "anew" not in first.reason
    raw = roomy.plan(inside(other, carried, QUESTION), [], max_new_tokens=1).documents
    assert [plan.fidelity for plan in raw] == ["raw", "mixed"]


def test_what_no_longer_fits_is_planned_anew_from_the_question(roomy):
    carried = with_spans(roomy, SHIPS, WIRES, budget=100)
    anew, fresh = (
        roomy.plan("Why was the bridge closed?", documents, budget=60) for documents in (carried, [SHIPS, WIRES])
    )
    assert [plan.spans for plan in anew.documents] == [plan.spans for plan in fresh.documents]
    assert anew.positions <= 60
    assert all("planned anew" in plan.reason for plan in anew.documents)
    answer = roomy.ask("Why was the bridge closed?", carried, budget=60, max_new_tokens=2)
    assert [entry.fidelity for entry in answer.context] == [plan.fidelity for plan in fresh.documents]


@pytest.mark.parametrize("ratio", [4, "raw"])
def test_a_ratio_that_is_asked_for_is_that_of_documents_with_spans_too(roomy, ratio):
    (entry,) = roomy.ask(QUESTION, with_spans(roomy, SHIPS), ratio=ratio, max_new_tokens=2).context
    assert entry.fidelity == ratio


@pytest.mark.parametrize(
    "change",
    [
        lambda spans: spans[1:],
        lambda spans: spans[:-1],
        lambda spans: ((0, 0, 2), *spans),
        lambda spans: (spans[0], spans[0], *spans[1:]),
        lambda spans: ((0, 1, "raw"), (1, *spans[0][1:]), *spans[1:]),
        lambda spans: (*spans[:-1], (spans[-1][0], spans[-1][1] + 1, "raw")),
        lambda spans: tuple((start, stop, 3) for start, stop, _ in spans),
        lambda spans: tuple((start, stop, 1) for start, stop, _ in spans),  # finer than what is kept
        lambda spans: tuple((start, stop, "mixed") for start, stop, _ in spans),
        lambda spans: (),
    ],
)
def test_spans_that_the_embedder_cannot_have_made_are_refused(roomy, change):
    (carried,) = with_spans(roomy, SHIPS)
    wrong = replace(carried, spans=change(carried.spans))
    for call in (lambda: roomy.ask(QUESTION, wrong, max_new_tokens=1), lambda: roomy.positions_of([wrong])):
        with pytest.raises(StoreCorruptError, match=r"the spans that a ref of ships.txt carries .* make the ref again"):
            call()


def test_spans_stand_on_the_grid_of_a_limit_and_need_an_entry_layer(roomy):
    (carried,) = with_spans(roomy, SHIPS)
    with pytest.raises(StoreCorruptError, match="make the ref again"):
        roomy.positions_of([replace(carried, finest=8)])
    n_tokens = len(roomy.builder.token_ids(SHIPS.text))
    limited = replace(carried, finest=8, spans=((0, 8, 8), (8, n_tokens, "dropped")))
    assert roomy.positions_of([limited]) == 1
    plain = ExtensibleLM(roomy.llm, shared_embedder(roomy.llm))
    with pytest.raises(StoreCorruptError, match="make the ref again"):
        plain.positions_of([replace(limited, finest=None)])
