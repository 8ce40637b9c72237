"""Where heads look is the attention of plain transformers, and plans go by it."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from tiny import SENTENCES, entering, tiny_llm, tool_llm

from extemb_core import ExtensibleLM
from extemb_core.context.assembly import assemble_chat
from extemb_core.context.focus import SplitDocument
from extemb_core.context.retrieval_heads import RetrievalHeads, heads_of, of_sentences
from extemb_core.context.scoring import bm25_scores
from extemb_core.context.spans import Sentences, split_into_sentences
from extemb_core.documents import Document, ReferencedDocument
from extemb_core.errors import ConfigError
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.models.entry import reading_model
from extemb_core.store.base import MemoryStore
from extemb_core.utils.progress import stopped_by

QUESTION = "When was the bridge closed?"
HEADS = [[2, 0], [1, 3]]
RATIOS = (1, 2, 4, 8, 16)


@pytest.fixture(scope="module")
def llm():
    return tool_llm()  # whose window is large


@pytest.fixture(scope="module")
def embedder(llm):
    return entering(llm, ratios=RATIOS, chunk_size=32, retrieval_heads=HEADS)


def part(embedder, text, ratio):
    return embedder.compress_ids([embedder.llm.encode(text)], ratio=ratio, show_progress=False)[0].at_ratio(ratio).part


# -- looking ------------------------------------------------------------------------------------------------------


def attention(llm, parts, question):
    """What plain transformers says, over the whole prompt at once."""
    content = [*parts, f"\n\n{question}"]
    prompt = assemble_chat(llm, [{"role": "user", "content": content}]).inputs(llm)
    model = reading_model(llm.model, 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(
            input_ids=prompt.ids[None], entry_states=prompt.states[None], entry_mask=prompt.mask[None],
            output_attentions=True,
        ).attentions  # fmt: skip
    looks = torch.stack([shown[layer][0, head, -1, prompt.mask] for layer, head in HEADS])
    return (looks / looks.sum(1, keepdim=True)).numpy()


def test_a_look_is_the_attention_at_the_answers_first_position(llm, embedder):
    parts = [part(embedder, SENTENCES, 8), "\n\n", part(embedder, SENTENCES[40:], 8)]
    heads = RetrievalHeads(llm, 1, HEADS)
    seen = heads.look(QUESTION, parts)
    np.testing.assert_allclose(seen, attention(llm, parts, QUESTION), atol=1e-5)
    np.testing.assert_allclose(seen.sum(1), 1, atol=1e-5)
    assert RetrievalHeads(llm, 1).look(QUESTION, parts).shape == (len(llm.model.base_model.layers) * 4, seen.shape[1])


def test_a_look_that_nobody_waits_for_goes_no_further(llm, embedder):
    parts, gone, layers = [part(embedder, SENTENCES, 8)], threading.Event(), []
    heads = RetrievalHeads(llm, 1, HEADS)

    def leave(*_):
        layers.append(1)
        gone.set()

    hooks = [layer.register_forward_hook(leave) for layer in heads._model.base_model.layers]
    with stopped_by(gone), pytest.raises(CancelledError):
        heads.look(QUESTION, parts)
    assert len(layers) == 1 < len(hooks)
    np.testing.assert_allclose(heads.look(QUESTION, parts), attention(llm, parts, QUESTION), atol=1e-5)


def test_what_was_looked_at_is_not_read_again_for_another_question(llm, embedder):
    parts = [part(embedder, SENTENCES * 2, 4)]
    heads, read = RetrievalHeads(llm, 1, HEADS), []
    hook = heads._model.base_model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    for question in (QUESTION, "Who closed it?", "Who closed it?", QUESTION):
        np.testing.assert_allclose(heads.look(question, parts), attention(llm, parts, question), atol=1e-5)
    assert read[0] > 3 * max(read[1:])
    # The same anchors with other states are another document.
    moved = [type(one)(one.anchors, one.states.flip(0), one.layer) for one in parts]
    np.testing.assert_allclose(heads.look(QUESTION, moved), attention(llm, moved, QUESTION), atol=1e-5)
    assert read[-1] > 3 * max(read[1:-1])
    hook.remove()


def test_looking_leaves_the_llm_as_it_is(llm, embedder):
    before = {name: tensor.clone() for name, tensor in llm.model.state_dict().items()}
    model = llm.reading_model(1)
    attention, n_layers = llm.model.config._attn_implementation, len(llm.model.base_model.layers)
    RetrievalHeads(llm, 1, [[1, 0]]).look(QUESTION, [part(embedder, SENTENCES, 8)])
    for other in (llm.model, model, llm.reading_model(1)):
        assert other.config._attn_implementation == attention != "eager"
        assert len(other.base_model.layers) == n_layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in llm.model.state_dict().items())


def test_several_threads_may_look_at_once(llm, embedder):
    heads, parts = RetrievalHeads(llm, 1, HEADS), [[part(embedder, SENTENCES[at:], 4)] for at in range(4)]
    expected = [attention(llm, one, QUESTION) for one in parts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            for seen, one in zip(pool.map(lambda one: heads.look(QUESTION, one), parts), expected, strict=True):
                np.testing.assert_allclose(seen, one, atol=1e-5)


def test_what_positions_get_goes_to_the_sentences_of_their_tokens():
    one, other = (Sentences(np.array(borders), "", np.zeros(0)) for borders in ([0, 3, 10], [0, 6]))
    # Chunks of 8 at ratio 4: positions of 4 and 4, then of 2 tokens; the other document of 4 and 2.
    shares = np.array([[0.4, 0.2, 0.1, 0.2, 0.1], [0, 0, 0, 0, 1]])
    expected = [[0.3, 0.4, 0.3], [0, 0, 1]]
    np.testing.assert_allclose(of_sentences(shares, [one, other], 4, 8), expected, atol=1e-9)


def test_all_that_positions_get_goes_to_sentences(llm, embedder):
    ids, ends = llm.encode_with_ends(SENTENCES)
    (text,) = embedder.compress_ids([ids], ratio=8, show_progress=False)
    shares = np.random.default_rng(0).random(len(text.part))
    assert of_sentences(shares, [split_into_sentences(SENTENCES, ends)], 8, 32).sum() == pytest.approx(shares.sum())


# -- which heads, at which ratio ----------------------------------------------------------------------------------


def split(n_tokens, finest=2, overhead=3):
    return SplitDocument(Sentences(np.array([0, n_tokens]), "", np.zeros(0)), finest, 32, overhead)


@pytest.mark.parametrize(
    ("room", "finest", "expected"), [(100, 2, 8), (46, 2, 8), (45, 2, 16), (26, 2, 16), (25, 2, None), (100, 16, 16)]
)
def test_documents_are_looked_at_in_no_more_positions_than_they_may_take(llm, room, finest, expected):
    heads = RetrievalHeads(llm, 1, HEADS)
    # 64 and 256 tokens with 3 positions each besides: 8 + 32 + 6 at ratio 8.
    assert heads.ratio_for([split(64), split(256, finest)], room, RATIOS) == expected
    assert heads.ratio_for([], room, RATIOS) == 8


def test_heads_are_looked_at_where_the_llm_has_them(llm, embedder):
    assert heads_of(llm, embedder).heads == [(2, 0), (1, 3)]
    assert heads_of(llm, entering(llm)) is None
    assert heads_of(llm, entering(llm, retrieval_heads=[[9, 0]])) is None
    assert heads_of(llm, entering(llm, retrieval_heads=[[0, 9]])) is None
    sliding = tiny_llm("gemma2")
    assert heads_of(sliding, entering(sliding, retrieval_heads=HEADS)) is None


@pytest.mark.parametrize("heads", [[[1]], [1, 2], [[1, -1]], [[1, 2.5]], "12", [[1, 2, 3]], [["1", 2]], [[True, 2]]])
def test_heads_that_are_none_are_refused(heads):
    with pytest.raises(ConfigError, match=r"retrieval_heads=.* is not a list of \[layer, head\]"):
        ExtensibleEmbedderConfig(entry_layer=1, retrieval_heads=heads)


def test_heads_need_an_entry_above_layer_0():
    with pytest.raises(ConfigError, match="retrieval_heads has no meaning at entry_layer=0"):
        ExtensibleEmbedderConfig(retrieval_heads=HEADS)


def test_heads_are_kept_beside_the_embedder_and_are_none_of_its_fingerprint(llm, embedder, tmp_path):
    embedder.save_pretrained(tmp_path)
    loaded = type(embedder).from_pretrained(tmp_path, llm=llm)
    assert loaded.config.retrieval_heads == HEADS
    assert loaded.fingerprint == embedder.fingerprint == entering(llm, ratios=RATIOS, chunk_size=32).fingerprint


# -- plans --------------------------------------------------------------------------------------------------------


@pytest.fixture
def looked(monkeypatch):
    """Have all heads look at one position of what is read; yields the calls."""
    calls = []

    def look(self, question, parts):
        n = sum(len(one) for one in parts if not isinstance(one, str))
        calls.append((question, n))
        shares = np.zeros((len(self.heads), n))
        shares[:, looked_at[0]] = 1
        return shares

    looked_at = [0]
    monkeypatch.setattr(RetrievalHeads, "look", look)
    return calls, looked_at


def raw_texts(lm, document, budget, question="Anything?"):
    answer = lm.ask(question, [document], budget=budget, max_new_tokens=1)
    text = document.text
    return [text[span.start : span.stop] for span in answer.context[0].spans if span.fidelity == "raw"]


def test_what_is_looked_at_is_read_in_full(llm, embedder, looked):
    calls, looked_at = looked
    lm = ExtensibleLM(llm, embedder)
    document = Document("".join(f"Ship number {at} sailed to port {at}. " for at in range(20)))
    n = lm.builder.n_tokens(document)
    for share in (0.2, 0.5, 0.8):
        looked_at[0] = int(share * n / 8)
        (raw,) = raw_texts(lm, document, n // 3)
        middle = document.text[int(share * len(document.text)) :].split()[2]
        assert middle in raw
    assert len(calls) == 3


@pytest.mark.parametrize(("times", "in_parts"), [([12], True), ([14], False), ([6, 8], False)])
def test_heads_look_at_parts_of_long_sentences_in_few_texts_and_words_at_whole_ones(
    times, in_parts, llm, embedder, looked, monkeypatch
):
    """The words of a question stand in another part than its answer; 768 tokens together are few."""
    lengths, whole = [], RetrievalHeads.scores

    def scores(self, question, sentences, *others):
        lengths.append([len(llm.encode(sentence)) for sentence in sentences])
        return whole(self, question, sentences, *others)

    def scorer(question, sentences):
        lengths.append([len(llm.encode(sentence)) for sentence in sentences])
        return bm25_scores(question, sentences)

    monkeypatch.setattr(RetrievalHeads, "scores", scores)
    text = "The harbour has " + ", ".join(f"a crane that lifts {at} tons" for at in range(40, 43)) + ". "
    documents = [Document((text * count).strip()) for count in times]
    for lm in (ExtensibleLM(llm, embedder), ExtensibleLM(llm, embedder, scorer=scorer)):
        lm.ask("How many tons does the last crane lift?", documents, budget=100, max_new_tokens=1)
    by_heads, by_words = lengths
    assert (sum(by_words) <= 768) == in_parts
    assert 32 < max(by_words) <= 64
    assert len(by_words) == sum(times)
    assert (by_heads != by_words) == in_parts == (max(by_heads) <= 32)


def test_words_and_looks_count_alike(llm, embedder, looked):
    calls, looked_at = looked
    lm = ExtensibleLM(llm, embedder)
    text = "".join(f"Ship number {at} sailed to port {at}. " for at in range(20)) + "Zebras graze. The end."
    looked_at[0] = 3
    raw = " ".join(raw_texts(lm, Document(text), lm.builder.n_tokens(Document(text)) // 3, "Zebras?"))
    assert "Zebras" in raw
    assert "Ship" in raw
    assert calls


def test_nothing_is_looked_at_where_all_fits_or_nothing_would(llm, embedder, looked):
    calls, _ = looked
    lm, document = ExtensibleLM(llm, embedder), Document(SENTENCES * 3)
    n = lm.builder.n_tokens(document)
    lm.ask(QUESTION, [document], max_new_tokens=1)
    lm.ask(QUESTION, [document], budget=n // 32, max_new_tokens=1)
    lm.ask(QUESTION, [document], budget=n // 4, plan="even", max_new_tokens=1)
    lm.ask(QUESTION, [document], ratio=8, max_new_tokens=1)
    ExtensibleLM(llm, embedder, scorer=lambda question, sentences: [1.0] * len(sentences)).ask(
        QUESTION, [document], budget=n // 4, max_new_tokens=1
    )
    assert calls == []
    lm.ask(QUESTION, [document, Document(" ")], budget=n // 4, max_new_tokens=1)
    assert len(calls) == 1


def test_an_empty_document_with_a_finest_ratio_is_nothing_to_look_at(llm, embedder):
    (plan,) = ExtensibleLM(llm, embedder).plan(QUESTION, [ReferencedDocument("", finest=4)]).documents
    assert (plan.fidelity, plan.reason) == ("dropped", "empty")


def test_no_more_is_looked_at_than_half_the_window_holds(llm, embedder, looked):
    calls, _ = looked
    lm, document = ExtensibleLM(llm, embedder), Document(SENTENCES * 60)
    n = lm.builder.n_tokens(document)
    lm.builder.plan([document], n // 2, "auto", question=QUESTION)
    assert [seen <= llm.context_window // 2 for _, seen in calls] == [True]
    assert n // 8 > llm.context_window // 2  # so that ratio 8 was too fine


class Counted(MemoryStore):
    """A store that counts what is put into it, and may be one to read."""

    def __init__(self, *, readonly=False):
        super().__init__()
        self.puts, self._readonly = 0, readonly

    @property
    def readonly(self):
        return self._readonly

    def put(self, *texts):
        self.puts += len(texts)
        super().put(*texts)


@pytest.mark.parametrize("readonly", [False, True])
def test_a_document_is_compressed_once_to_be_looked_at_and_read(llm, embedder, monkeypatch, readonly):
    store = Counted(readonly=readonly)
    lm, document, compressed = ExtensibleLM(llm, embedder, store), Document(SENTENCES * 3), []
    whole = type(embedder).compress_ids
    monkeypatch.setattr(
        type(embedder), "compress_ids", lambda self, ids, **k: compressed.append(len(ids)) or whole(self, ids, **k)
    )
    budget = lm.builder.n_tokens(document) // 4
    first = lm.ask(QUESTION, [document], budget=budget, max_new_tokens=1)
    assert (compressed, store.puts) == ([1], 0 if readonly else 1)
    second = lm.ask(QUESTION, [document], budget=budget, max_new_tokens=1)
    assert first.context[0].fidelity == second.context[0].fidelity == "mixed"
    assert (first.context[0].cached, second.context[0].cached) == (False, not readonly)
    assert compressed == ([1, 1] if readonly else [1])
