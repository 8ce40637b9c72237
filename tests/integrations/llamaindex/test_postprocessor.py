"""The postprocessor: the LLM gets refs, everybody else finds nodes as they were, and every engine can use them."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import pickle
import threading

import pytest
from llama_index.core import Document, Settings, SummaryIndex, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import CustomLLM, MockLLM
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.postprocessor import LongContextReorder
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import CitationQueryEngine, RetrieverQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen.types import BaseQuestionGenerator, SubQuestion
from llama_index.core.response_synthesizers import ResponseMode, get_response_synthesizer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import ImageNode, IndexNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool
from retrieval_encoder import by_words
from tiny import SENTENCES, random_embedder

from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.documents import text_ref
from extemb_core.errors import RatioError
from extemb_core.frameworks.refs import MARK
from extemb_core.models.embedder import ExtensibleEmbedder
from llama_index.llms.extemb import ExtensibleLLM, extensible_prompt_helper
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor, ExtensibleNode, ExtensibleTransform

LONG = " ".join(SENTENCES.split()) + " "


class Fixed(BaseRetriever):
    """Retrieves what it is given."""

    def __init__(self, nodes):
        self._nodes = nodes
        super().__init__()

    def _retrieve(self, query_bundle):
        return list(self._nodes)


class ByWords(BaseEmbedding):
    def _get_text_embedding(self, text):
        return by_words([text])[0].tolist()

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


@pytest.fixture
def long_nodes():
    """Four of about 900 tokens each, more than the window of 2,048 together."""
    return [
        NodeWithScore(
            node=TextNode(id_=str(at), text=(LONG * 9)[at : at + 3000], metadata={"at": at}), score=1 - at / 9
        )
        for at in range(4)
    ]


@pytest.fixture
def calls(lm, monkeypatch):
    """Positions of every prompt that the LLM was given."""
    made = []
    whole = lm.batcher.answer

    def answer(ready, sampling, cancelled=None):
        made.append(len(ready.prompt))
        assert len(ready.prompt) + sampling.max_new_tokens <= lm.llm.context_window
        return whole(ready, sampling, cancelled)

    monkeypatch.setattr(lm.batcher, "answer", answer)
    return made


def test_names_are_those_of_the_ecosystem():
    assert BaseNodePostprocessor.__name__ in [one.__name__ for one in ExtensibleEmbeddingPostprocessor.__mro__]
    assert "CustomLLM" in [one.__name__ for one in ExtensibleLLM.__mro__]
    for one in (ExtensibleEmbeddingPostprocessor, ExtensibleLLM, ExtensibleTransform, ExtensibleNode):
        assert one.class_name() == one.__name__


def test_the_llm_gets_refs_and_everybody_else_finds_nodes_as_they_were(llm, lm, nodes):
    before = [found.model_copy(deep=True) for found in nodes]
    processed = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4, min_tokens=20).postprocess_nodes(
        nodes, query_str="?"
    )
    assert nodes == before
    assert len(processed) == 3
    for found, old in zip(processed, before, strict=True):
        assert (found.score, found.node_id, found.text) == (old.score, old.node_id, old.text)
        for name in ("metadata", "relationships", "excluded_llm_metadata_keys", "start_char_idx", "hash", "embedding"):
            assert getattr(found.node, name) == getattr(old.node, name)
        for mode in (MetadataMode.NONE, MetadataMode.ALL, MetadataMode.EMBED):
            assert found.get_content(mode) == old.get_content(mode)
            if hasattr(old.node, "get_content_blocks"):  # not in 0.13
                assert found.node.get_content_blocks(mode) == old.node.get_content_blocks(mode)
    first = processed[0].node
    said = first.get_content(MetadataMode.LLM)
    assert said == f"file_name: 0.txt\n\n{first.extemb_mark}"
    assert [block.text for block in first.get_content_blocks(MetadataMode.LLM)] == [
        "file_name: 0.txt",
        first.extemb_mark,
    ]
    assert lm.refs.find(said)[1].text == first.text
    assert first.extemb_ratio == 4
    assert first.extemb_positions == -(-first.extemb_tokens // 4)
    short = processed[2].node
    assert (short.extemb_ratio, short.extemb_mark) == ("raw", None)
    assert short.extemb_positions == short.extemb_tokens == len(lm.llm.encode(short.text))
    assert short.get_content(MetadataMode.LLM) == before[2].get_content(MetadataMode.LLM)
    first.set_content("Other text.")
    assert first.get_content(MetadataMode.LLM) == "file_name: 0.txt\n\nOther text."


async def test_async_is_the_same(llm, nodes):
    post = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4)
    made = await post.apostprocess_nodes(nodes, query_str="?")
    assert [found.node for found in made] == [found.node for found in post.postprocess_nodes(nodes, query_str="?")]


def test_ranks_become_fidelities_within_the_budget(llm, lm, long_nodes, caplog):
    def ratios(**settings):
        made = ExtensibleEmbeddingPostprocessor(llm=llm, **settings).postprocess_nodes(long_nodes)
        return [getattr(found.node, "extemb_ratio", "raw") for found in made], made

    chosen, made = ratios(budget=800)
    assert chosen == sorted(chosen)
    assert sum(found.node.extemb_positions for found in made) <= 800
    assert chosen[0] < chosen[-1]
    assert ratios(ratio="raw")[0] == ["raw"] * 4
    assert ratios(ratio=8, top_raw=2)[0] == ["raw", "raw", 8, 8]
    assert ratios(budget=9000, ratio="auto")[0] == ["raw"] * 4
    with caplog.at_level(logging.WARNING):
        chosen, made = ratios(ratio=2, budget=1300)
    assert [found.node_id for found in made] == ["0", "1"]
    assert "2 of 4 nodes dropped: no room in budget=1300: 2, 3" in caplog.text
    huge = [NodeWithScore(node=TextNode(text=(LONG * 100)[at:20000])) for at in range(2)]
    made = ExtensibleEmbeddingPostprocessor(llm=llm).postprocess_nodes(huge)
    assert [found.node.extemb_ratio for found in made] == [lm.embedder.config.ratios[-1]] * 2


def said(lm, found):
    """Positions of what the LLM is given of a node."""
    return lm.positions_of(lm.refs.find(found.get_content(MetadataMode.LLM)))


SHORT = [f"Ship {at} was counted before the fog came in." for at in range(30)]


@pytest.mark.parametrize("settings", [{}, {"ratio": 8}, {"top_raw": 1}, {"ratio": 4, "top_raw": 40}, {"ratio": "raw"}])
@pytest.mark.parametrize("budget", [0, 5, 100, 300, 700])
def test_the_budget_holds_whatever_stays_text(llm, lm, caplog, settings, budget):
    """A long node before, among or behind short ones: what is left out is the end of the ranking, and is told."""
    for place in (0, 15, 30):
        texts = [*SHORT[:place], LONG, *SHORT[place:]]
        metadata = [{"page": "first"}, {}]
        nodes = [
            NodeWithScore(node=TextNode(id_=f"id{at}", text=text, metadata=metadata[at % 2]))
            for at, text in enumerate([*texts, "", " "])
        ]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            made = ExtensibleEmbeddingPostprocessor(llm=llm, budget=budget, **settings).postprocess_nodes(nodes)
        assert sum(said(lm, found) for found in made) <= budget
        kept = [int(found.node_id[2:]) for found in made]
        left_out = sorted(set(range(31)) - set(kept))
        alone = ExtensibleEmbeddingPostprocessor(llm=llm, budget=budget, ratio=settings.get("ratio", "auto"))
        fits = [at for at, found in enumerate(nodes[:31]) if alone.postprocess_nodes([found])]
        assert [at for at in kept if at < 31] == fits[
            : len(fits) - len(set(left_out) & set(fits))
        ]  # the worst go first
        assert all(f"id{at}" in caplog.text for at in left_out)


def test_short_and_best_nodes_are_text_while_the_budget_allows(llm, long_nodes):
    def fates(nodes, **settings):
        made = ExtensibleEmbeddingPostprocessor(llm=llm, **settings).postprocess_nodes(nodes)
        return [getattr(found.node, "extemb_ratio", "raw") for found in made]

    tokens = [len(llm.lm.llm.encode(found.node.text)) for found in long_nodes]
    heading = 20
    for_best = tokens[0] + sum(-(-count // 8) for count in tokens[1:]) + 4 * heading
    assert fates(long_nodes, ratio=8, top_raw=2, budget=for_best) == ["raw", 8, 8, 8]
    assert fates(long_nodes, ratio=8, top_raw=2, budget=for_best + tokens[1]) == ["raw", "raw", 8, 8]
    assert fates(long_nodes, ratio=8, top_raw=2, budget=tokens[0] - 1)[0] == 8
    assert fates(long_nodes, top_raw=1, budget=for_best)[0] == "raw"
    assert fates(long_nodes, budget=for_best)[0] != "raw"
    short = [NodeWithScore(node=TextNode(text=text)) for text in SHORT]
    assert fates([long_nodes[0], *short], ratio=8, budget=2000) == [8] + ["raw"] * 30
    assert fates([long_nodes[0], *short], ratio=8, budget=2000, min_tokens=0) == [8] * 31


def test_without_a_budget_of_its_own_it_aims_at_that_of_the_llm(lm, long_nodes):
    def positions(**settings):
        made = ExtensibleEmbeddingPostprocessor(llm=ExtensibleLLM.from_lm(lm, **settings)).postprocess_nodes(long_nodes)
        assert len(made) == 4
        return sum(found.node.extemb_positions for found in made)

    assert positions(budget=600) <= 600 < positions() <= lm.llm.context_window // 2
    assert positions(budget=10) == positions(budget=0)  # as coarse as can be, and nothing is left out


def test_what_the_llm_left_unread_is_warned_of(lm, nodes, caplog):
    """A query engine's response does not say it: it has no `raw`."""
    made = ExtensibleEmbeddingPostprocessor(llm=ExtensibleLLM.from_lm(lm), ratio=2).postprocess_nodes(nodes)
    prompt = " ".join(found.node.extemb_mark for found in made[:2])
    with caplog.at_level(logging.WARNING):
        ExtensibleLLM.from_lm(lm, max_tokens=2).complete(prompt)
        assert not caplog.text
        told = ExtensibleLLM.from_lm(lm, max_tokens=2, budget=20).complete(prompt).raw["extemb"]["documents"]
    assert [one["fidelity"] == "dropped" for one in told] == [False, True]
    assert "1 of 2 documents were not read: they do not fit the 20 positions for documents: 1.txt" in caplog.text


def test_what_is_no_text_stays_what_it_is(llm):
    nodes = [
        NodeWithScore(node=ImageNode(text=LONG, image_url="http://none/a.png")),
        NodeWithScore(node=TextNode(text="")),
        NodeWithScore(node=TextNode(text="  \n")),
        NodeWithScore(node=Document(text=LONG, metadata={"file_name": "a"})),
    ]
    made = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).postprocess_nodes(nodes)
    assert [type(found.node) for found in made] == [ImageNode, ExtensibleNode, ExtensibleNode, ExtensibleNode]
    assert [getattr(found.node, "extemb_ratio", None) for found in made] == [None, "raw", "raw", 4]
    assert made[1].node.extemb_positions == 0
    assert made[3].node.text == LONG


@pytest.mark.parametrize("settings", [{}, {"plan": "even"}, {"ratio": 4}, {"ratio": "raw"}])
@pytest.mark.parametrize("kinds", ["IIII", "TITI", "ITTT"])
@pytest.mark.parametrize("budget", [0, 60, 300])
def test_what_is_no_text_takes_of_the_budget_too(llm, lm, caplog, settings, kinds, budget):
    texts = [f"{at} {LONG}" for at in range(4)]
    nodes = [
        NodeWithScore(node=IndexNode(text=text, index_id="a") if kind == "I" else TextNode(text=text), score=1 - at / 9)
        for at, (kind, text) in enumerate(zip(kinds, texts, strict=True))
    ]
    post = ExtensibleEmbeddingPostprocessor(llm=llm, budget=budget, **settings)
    made = post.postprocess_nodes(nodes, query_str="When was the bridge closed?")
    left = [at for at, found in enumerate(nodes) if found.node.node_id in {one.node.node_id for one in made}]
    whole = [len(lm.llm.encode(text)) for text in texts]
    taken = {
        at: whole[at] if kinds[at] == "I" else found.node.extemb_positions for at, found in zip(left, made, strict=True)
    }
    assert sum(taken.values()) <= budget
    assert (len(left) < 4) == (f"{4 - len(left)} of 4 nodes dropped: no room in budget={budget}" in caplog.text)
    of_no_text = [at for at in range(4) if kinds[at] == "I"]
    assert [at for at in left if kinds[at] == "I"] == of_no_text[: sum(at in left for at in of_no_text)]  # the worst go
    if budget == 300:  # more than one of them in full
        assert 0 in left


def test_what_is_no_text_stays_where_no_budget_is_given(llm):
    nodes = [NodeWithScore(node=kind(text=LONG, **more)) for kind, more in [(IndexNode, {"index_id": "a"})] * 9]
    for settings in ({}, {"ratio": 4}, {"ratio": "raw"}):
        assert len(ExtensibleEmbeddingPostprocessor(llm=llm, **settings).postprocess_nodes(nodes)) == 9


def test_a_query_without_text_is_none(llm, nodes):
    for query in (QueryBundle(query_str=None), QueryBundle(query_str=" "), None):
        assert len(ExtensibleEmbeddingPostprocessor(llm=llm).postprocess_nodes(nodes, query_bundle=query)) == len(nodes)


class Numbered(TextNode):
    number: int = 0

    def doubled(self):
        return 2 * self.number


class Summarised(TextNode):
    def get_content(self, metadata_mode=MetadataMode.NONE):
        return "In short."


def test_a_subclass_of_a_text_node_is_read_as_embeddings_and_keeps_what_it_has(llm, lm):
    kinds = ((Numbered, {"number": 7}), (Summarised, {}), (IndexNode, {"index_id": "a"}))
    nodes = [NodeWithScore(node=kind(text=LONG, **fields)) for kind, fields in kinds]
    post = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4)
    for made in (post.postprocess_nodes(nodes), post.postprocess_nodes(post.postprocess_nodes(nodes))):
        first = made[0].node
        assert isinstance(first, Numbered)
        assert (first.number, first.doubled(), first.extemb_ratio, first.text) == (7, 14, 4, LONG)
        assert MARK.search(first.get_content(MetadataMode.LLM))
        for copied in (copy.deepcopy(made[0]), pickle.loads(pickle.dumps(made[0])), made[0].model_copy(deep=True)):
            assert (type(copied.node), copied.node) == (type(first), first)
        assert [found.node for found in made[1:]] == [found.node for found in nodes[1:]]  # they make their own content
    assert llm.lm.store.get(text_ref(LONG), lm.embedder.fingerprint, 4) is not None


def test_half_a_surrogate_pair_of_one_page_is_no_error(llm):
    torn = TextNode(text=f"{LONG} \ud83d {LONG}")
    ExtensibleTransform(llm=llm, ratio=4, show_progress=False)([torn])
    for settings in ({"ratio": 4}, {"ratio": "raw"}):
        made = ExtensibleEmbeddingPostprocessor(llm=llm, **settings).postprocess_nodes([NodeWithScore(node=torn)])
        assert made[0].node.text == torn.text.replace("\ud83d", "\ufffd")
        assert llm.complete(made[0].get_content(MetadataMode.LLM)).raw["usage"]["completion_tokens"] == 4
    assert llm.complete(torn.text).raw["usage"]["completion_tokens"] == 4


def test_what_became_of_a_node_is_a_number_of_every_text(lm):
    """Also of one that stays text, on a first small try."""
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    texts = "The mill was built in 1820.", LONG
    index = SummaryIndex([TextNode(text=text) for text in texts])
    for settings in ({"ratio": 8}, {"ratio": "raw"}, {}):
        post = ExtensibleEmbeddingPostprocessor(llm=llm, **settings)
        found = index.as_query_engine(llm=llm, node_postprocessors=[post]).query("When?").source_nodes
        assert [one.node.extemb_tokens for one in found] == [len(lm.llm.encode(text)) for text in texts]
        assert all(0 < one.node.extemb_positions <= one.node.extemb_tokens for one in found)


def test_what_reorders_nodes_stands_behind(llm, long_nodes, caplog):
    post = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=8, budget=300)
    for first, second, kept in ((post, LongContextReorder(), {"0", "1"}), (LongContextReorder(), post, {"1", "3"})):
        caplog.clear()
        made = second.postprocess_nodes(first.postprocess_nodes(long_nodes))
        assert {found.node_id for found in made} == kept
        assert ("LongContextReorder, goes behind" in caplog.text) == (first is not post)


def test_an_engine_that_hands_out_its_context_hands_out_refs(llm, lm, nodes, monkeypatch):
    """They are what an LLM would read; it is asked nothing."""
    monkeypatch.setattr(Settings, "_llm", llm)
    post = [ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4, min_tokens=20)]
    engine = RetrieverQueryEngine.from_args(
        Fixed(nodes), llm=llm, node_postprocessors=post, response_mode=ResponseMode.CONTEXT_ONLY
    )
    response = engine.query("What is counted?")
    assert [part.text for part in lm.refs.find(str(response)) if not isinstance(part, str)] == [
        found.text for found in nodes[:2]
    ]
    assert [found.text for found in response.source_nodes] == [found.text for found in nodes]
    assert ExtensibleEmbeddingPostprocessor(llm=llm).postprocess_nodes([]) == []


@pytest.mark.parametrize(
    ("mode", "plain_calls", "ours"),
    [
        (ResponseMode.COMPACT, None, 1),
        (ResponseMode.REFINE, 4, 4),
        (ResponseMode.TREE_SUMMARIZE, None, 1),
        (ResponseMode.SIMPLE_SUMMARIZE, 1, 1),
        (ResponseMode.ACCUMULATE, 4, 4),
        (ResponseMode.COMPACT_ACCUMULATE, None, 1),
    ],
)
def test_every_response_mode_with_and_without(mode, plain_calls, ours, llm, lm, calls, long_nodes, monkeypatch):
    """How often the LLM is called, that no call overflows the window (`calls`), and what the sources are."""
    monkeypatch.setattr(Settings, "_prompt_helper", extensible_prompt_helper(llm))

    def ask(*post):
        calls.clear()
        engine = RetrieverQueryEngine.from_args(
            Fixed(long_nodes), llm=llm, response_mode=mode, node_postprocessors=list(post)
        )
        return engine.query("What is counted?"), len(calls)

    _, without = ask()
    response, count = ask(ExtensibleEmbeddingPostprocessor(llm=llm))
    assert count == ours
    assert without == plain_calls if plain_calls else without > ours
    assert [node.text for node in response.source_nodes] == [node.text for node in long_nodes]
    assert [node.score for node in response.source_nodes] == [node.score for node in long_nodes]
    assert str(response)


def test_the_helper_of_llamaindex_itself_does_as_well(llm, calls, long_nodes):
    """A ref is counted as the text that it looks like there, which is little; the plan already fits the window."""
    engine = RetrieverQueryEngine.from_args(
        Fixed(long_nodes), llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm)]
    )
    engine.query("What is counted?")
    assert len(calls) == 1


def test_the_helper_counts_positions_and_splits_no_ref(llm, lm, long_nodes):
    helper = extensible_prompt_helper(llm)
    made = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=2).postprocess_nodes(long_nodes)
    chunks = [found.get_content(MetadataMode.LLM) for found in made]
    from llama_index.core import PromptTemplate

    prompt = PromptTemplate("Context: {context_str}\nQuestion: {query_str}")
    packed = helper.repack(prompt, [*chunks, LONG * 12])
    assert len(packed) > 2
    assert sum(len(MARK.findall(text)) for text in packed) == 4
    for text in packed:
        assert lm.positions_of(lm.refs.find(text)) <= lm.llm.context_window
    assert "".join("".join(packed).split()).count("forty-one") >= 12
    cut = helper.truncate(prompt, [*chunks[:2], LONG * 12])
    assert cut[:2] == chunks[:2]
    assert LONG.startswith(cut[2][:200])
    assert sum(lm.positions_of(lm.refs.find(text)) for text in cut) <= lm.llm.context_window
    plain = [LONG * 12, LONG]
    from llama_index.core import PromptHelper

    assert helper.repack(prompt, plain) == PromptHelper.repack(helper, prompt, plain)
    assert helper.truncate(prompt, plain) == PromptHelper.truncate(helper, prompt, plain)


def test_chat_engines_and_streams(llm, nodes, calls):
    post = [ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4, min_tokens=20)]
    for kind in (ContextChatEngine, CondensePlusContextChatEngine):
        memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
        engine = kind.from_defaults(retriever=Fixed(nodes), llm=llm, node_postprocessors=post, memory=memory)
        assert [node.text for node in engine.chat("What is counted?").source_nodes] == [node.text for node in nodes]
        assert "".join(engine.stream_chat("And then?").response_gen)
        assert len(engine.chat_history) == 4
    engine = RetrieverQueryEngine.from_args(Fixed(nodes), llm=llm, node_postprocessors=post, streaming=True)
    streamed = engine.query("What is counted?")
    assert "".join(streamed.response_gen)
    assert len(streamed.source_nodes) == 3


@pytest.mark.parametrize(("turns", "compressed"), [(8, True), (32, True), (32, False)])
def test_a_chat_engine_goes_on_past_the_window(lm, long_nodes, calls, monkeypatch, turns, compressed):
    """With texts, and with embeddings; `calls` sees that no call overflows the window."""
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    monkeypatch.setattr(Settings, "_prompt_helper", extensible_prompt_helper(llm))
    monkeypatch.setattr(Settings, "_llm", llm)
    roles = MessageRole.USER, MessageRole.ASSISTANT
    talk = [ChatMessage(f"{at}. {LONG[:200]}", role=roles[at % 2]) for at in range(turns)]
    assert (len(lm.llm.encode("".join(said.content for said in talk))) > lm.llm.context_window) == (turns == 32)
    post = [ExtensibleEmbeddingPostprocessor(llm=llm, ratio=8)] if compressed else []
    memory = ChatMemoryBuffer.from_defaults(token_limit=10**6)
    engine = ContextChatEngine.from_defaults(
        retriever=Fixed(long_nodes[:2]), llm=llm, node_postprocessors=post, memory=memory, system_prompt="Be brief."
    )
    assert str(engine.chat("What is counted?", chat_history=talk))
    assert "".join(engine.stream_chat("And then?").response_gen)
    assert str(asyncio.run(engine.achat("And last?")))
    assert len(calls) >= 2


@pytest.mark.parametrize("kind", ["condense_question", "condense_plus_context"])
def test_an_engine_that_condenses_a_question_needs_a_memory_that_counts_as_the_llm_does(lm, nodes, calls, kind):
    """It puts the conversation into one question as text, so the memory has to see to its length."""
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    roles = MessageRole.USER, MessageRole.ASSISTANT
    talk = [ChatMessage(f"{at}. {LONG[:200]}", role=roles[at % 2]) for at in range(40)]
    memory = ChatMemoryBuffer.from_defaults(chat_history=talk, token_limit=1000, tokenizer_fn=llm.get_token_ids)
    index = SummaryIndex([found.node for found in nodes])
    engine = index.as_chat_engine(chat_mode=kind, llm=llm, memory=memory)
    assert str(engine.chat("What is counted?"))


def test_an_engine_that_cuts_texts_up_gets_texts(llm, nodes, calls):
    """CitationQueryEngine numbers pieces of the nodes' texts, so they are read as text."""
    engine = CitationQueryEngine.from_args(
        VectorStoreIndex([found.node for found in nodes], embed_model=ByWords()),
        llm=llm,
        retriever=Fixed(nodes),
        node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4)],
    )
    response = engine.query("What is counted?")
    assert response.source_nodes[0].text.startswith("Source 1:\n" + nodes[0].text[:40])
    assert not any(MARK.search(found.get_content(MetadataMode.LLM)) for found in response.source_nodes)


def test_another_llm_gets_the_text(llm, nodes):
    class Plain(CustomLLM):
        """Says how long its prompt is."""

        @property
        def metadata(self):
            return llm.metadata.model_copy(update={"is_chat_model": False})

        def complete(self, prompt, formatted=False, **kwargs):
            from llama_index.core.base.llms.types import CompletionResponse

            return CompletionResponse(text=prompt)

        def stream_complete(self, prompt, formatted=False, **kwargs):
            raise NotImplementedError

    made = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).postprocess_nodes(nodes)
    texts = [found.node.get_content() for found in made]
    assert Plain().complete(texts[0]).text == nodes[0].text


def test_processed_nodes_are_kept_as_json(llm, nodes, tmp_path):
    made = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).postprocess_nodes(nodes)
    store = SimpleDocumentStore()
    store.add_documents([found.node for found in made])
    store.persist(str(tmp_path / "docs.json"))
    again = SimpleDocumentStore.from_persist_path(str(tmp_path / "docs.json"))
    for found in nodes:
        kept = again.get_document(found.node_id)
        assert (kept.text, kept.metadata, kept.hash) == (found.text, found.metadata, found.node.hash)
    json.dumps(ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).to_dict())


def test_names_of_files_that_are_no_unicode_are_metadata_as_others(llm):
    node = NodeWithScore(node=TextNode(text=LONG * 2, metadata={"file_path": "/docs/caf\udce9.txt"}))
    (made,) = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).postprocess_nodes([node], query_str="ships?")
    assert llm.complete(made.node.get_content(MetadataMode.LLM)).raw["extemb"]["documents"]


@pytest.mark.parametrize("kind", [ExtensibleEmbeddingPostprocessor, ExtensibleTransform])
def test_what_was_saved_beside_an_llm_has_its_model_and_store(kind, lm, tmp_path):
    settings = {"embedder": "mine", "store": tmp_path / "docs", "device": "cpu", "dtype": "bfloat16"}
    llm = ExtensibleLLM.from_model_id("another", **settings)
    saved = json.loads(kind(llm=llm, ratio=4, batch_size=2).to_json())
    again = kind.from_dict(saved)
    assert saved["class_name"] == kind.class_name()
    assert (again.model, again.ratio, again.batch_size) == ("another", 4, 2)
    for name, value in settings.items():
        assert getattr(again, name) == (str(value) if name == "store" else value)
    assert kind.from_dict(kind(llm=ExtensibleLLM.from_lm(lm)).to_dict()).model == lm.llm.name


async def test_16_queries_at_once(llm, nodes):
    def engine(found):
        return RetrieverQueryEngine.from_args(
            Fixed(found), llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4)]
        )

    engines = [engine(nodes[at % 2 : at % 2 + 1]) for at in range(16)]
    alone = [str(engines[at].query("What is counted?")) for at in range(2)]
    together = await asyncio.gather(*(one.aquery("What is counted?") for one in engines))
    assert [str(one) for one in together] == alone * 8


def test_ingestion_compresses_each_text_once(lm, tmp_path, monkeypatch, nodes):
    compressed = []
    whole = ExtensibleEmbedder.compress_ids

    def count(self, ids, **settings):
        compressed.extend(settings["refs"])
        return whole(self, ids, **settings)

    monkeypatch.setattr(ExtensibleEmbedder, "compress_ids", count)
    with EmbeddingStore.open(tmp_path / "store") as store:
        stored = ExtensibleLLM.from_lm(ExtensibleLM(lm.llm, lm.embedder, store), max_tokens=2)
        transform = ExtensibleTransform(llm=stored, ratio=4, show_progress=False)
        pipeline = IngestionPipeline(transformations=[transform], disable_cache=True)
        texts = [found.node for found in nodes[:2]]
        assert pipeline.run(nodes=[*texts, texts[0].model_copy(update={"id_": "again"})]) is not None
        assert len(compressed) == 2
        pipeline.run(nodes=[*texts, TextNode(text="One more node, " + LONG)])
        assert len(compressed) == 3
        made = ExtensibleEmbeddingPostprocessor(llm=stored, ratio=4).postprocess_nodes(nodes[:2])
        assert len(compressed) == 3
        assert all(isinstance(found.node, ExtensibleNode) for found in made)
    json.dumps(transform.to_dict())


def test_a_pipelines_cache_leaves_no_store_empty(lm, tmp_path, nodes):
    texts = [found.node for found in nodes[:2]]
    cache = None
    for name in ("one", "two"):
        with EmbeddingStore.open(tmp_path / name) as store:
            stored = ExtensibleLLM.from_lm(ExtensibleLM(lm.llm, lm.embedder, store))
            transform = ExtensibleTransform(llm=stored, ratio=4, show_progress=False)
            pipeline = IngestionPipeline(transformations=[transform], **({"cache": cache} if cache else {}))
            for _ in range(2):
                pipeline.run(nodes=texts)
            assert len(store) == 2
            cache = pipeline.cache
            assert ExtensibleTransform.from_dict(transform.to_dict()).ratio == 4


def test_a_pipelines_cache_is_of_one_embedder(lm, tmp_path, nodes):
    texts = [found.node for found in nodes[:2]]
    cache = None
    with EmbeddingStore.open(tmp_path / "both") as store:
        for embedder in (lm.embedder, random_embedder(lm.llm, seed=9)):
            stored = ExtensibleLLM.from_lm(ExtensibleLM(lm.llm, embedder, store))
            transform = ExtensibleTransform(llm=stored, ratio=4, show_progress=False)
            pipeline = IngestionPipeline(transformations=[transform], **({"cache": cache} if cache else {}))
            pipeline.run(nodes=texts)
            cache = pipeline.cache
        assert len(store) == 4


async def test_an_event_loop_goes_on_while_nodes_are_taken_in(llm, nodes, monkeypatch):
    started, goes_on = threading.Event(), threading.Event()

    def compress(*args, **settings):
        started.set()
        assert goes_on.wait(300)

    monkeypatch.setattr(llm.lm, "compress", compress)
    work = asyncio.create_task(ExtensibleTransform(llm=llm).acall([found.node for found in nodes]))
    while not started.is_set():
        await asyncio.sleep(0.01)
    goes_on.set()
    assert await work == [found.node for found in nodes]


@pytest.mark.parametrize("kind", [ExtensibleEmbeddingPostprocessor, ExtensibleTransform])
def test_the_batch_size_reaches_the_embedder(llm, nodes, monkeypatch, kind):
    sizes = []
    monkeypatch.setattr(llm.lm, "compress", lambda *args, **settings: sizes.append(settings["batch_size"]))
    for given in ({}, {"batch_size": 7}):
        made = kind(llm=llm, ratio=4, **given)
        made.postprocess_nodes(nodes) if hasattr(made, "postprocess_nodes") else made([found.node for found in nodes])
    assert sizes == [None, 7]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        kind(llm=llm, batch_size=0)


def test_a_model_and_store_instead_of_an_llm(lm, nodes, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "extemb_core.frameworks.settings.share", lambda *args, **settings: asked.append((args, settings)) or lm
    )
    post = ExtensibleEmbeddingPostprocessor.from_model_id("some-llm", store="docs.extemb", ratio=4)
    assert asked == []
    assert isinstance(post.postprocess_nodes(nodes)[0].node, ExtensibleNode)
    assert asked[0] == (("some-llm", None), {"store": "docs.extemb", "device": "auto", "dtype": "auto"})


def test_refs_of_another_store_are_text(llm, lm, nodes):
    other = ExtensibleLLM.from_lm(ExtensibleLM(lm.llm, random_embedder(lm.llm)), max_tokens=2)
    made = ExtensibleEmbeddingPostprocessor(llm=other, ratio=4).postprocess_nodes(nodes)
    response = llm.chat([ChatMessage(made[0].get_content(MetadataMode.LLM), role=MessageRole.USER)])
    assert response.raw["extemb"]["documents"] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"llm": MockLLM()}, "a MockLLM reads text alone; pass an ExtensibleLLM"),
        ({"min_tokens": -1}, "greater than or equal to 0"),
        ({"top_raw": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_settings_are_an_error(settings, said):
    with pytest.raises(ValueError, match=said):
        ExtensibleEmbeddingPostprocessor(**settings)


def test_a_ratio_that_was_not_trained_is_an_error(llm, nodes):
    with pytest.raises(RatioError, match="ratio=3 is not one of the ratios"):
        ExtensibleEmbeddingPostprocessor(llm=llm, ratio=3).postprocess_nodes(nodes)


def test_sub_questions_are_answered_from_embeddings(llm, nodes, calls):
    class Two(BaseQuestionGenerator):
        def generate(self, tools, query):
            return [SubQuestion(sub_question=f"Part {at}?", tool_name="ships") for at in range(2)]

        async def agenerate(self, tools, query):
            return self.generate(tools, query)

        def _get_prompts(self):
            return {}

        def _update_prompts(self, prompts):
            pass

    post = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4, min_tokens=20)
    inner = RetrieverQueryEngine.from_args(Fixed(nodes), llm=llm, node_postprocessors=[post])
    tool = QueryEngineTool.from_defaults(inner, name="ships", description="Ships.")
    engine = SubQuestionQueryEngine.from_defaults([tool], llm=llm, question_gen=Two(), use_async=False, verbose=False)
    response = engine.query("What is counted?")
    assert len(calls) == 3
    assert [node.text for node in response.source_nodes if node.text in {one.text for one in nodes}] == 2 * [
        node.text for node in nodes
    ]


@pytest.mark.skipif(not hasattr(TextNode, "get_content_blocks"), reason="LlamaIndex 0.13 has none")
def test_synthesizers_of_blocks_read_embeddings_too(llm, nodes, calls):
    post = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4, min_tokens=20)
    synthesizer = get_response_synthesizer(llm=llm, response_mode=ResponseMode.COMPACT, multimodal=True)
    with_blocks = RetrieverQueryEngine(Fixed(nodes), synthesizer, node_postprocessors=[post]).query("What is counted?")
    assert len(calls) == 1
    as_text = RetrieverQueryEngine(Fixed(nodes), synthesizer).query("What is counted?")
    assert calls[0] < calls[1]
    assert [found.text for found in with_blocks.source_nodes] == [found.text for found in as_text.source_nodes]
