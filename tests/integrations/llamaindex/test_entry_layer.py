"""Everything here over an embedder that nobody trained, whose embeddings enter at a layer above 0."""

from __future__ import annotations

import json

import pytest
from anchored import lm_over
from llama_index.core import SummaryIndex
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from tiny import SENTENCES, save_tiny, tiny_model, tiny_tokenizer

from extemb_core.models.entry import AnchoredPrompt
from extemb_core.models.llm import LLM
from llama_index.llms.extemb import ExtensibleLLM, ExtensibleLLMError, extensible_prompt_helper
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor, ExtensibleNode, ExtensibleTransform

TEXT = SENTENCES[:300]


@pytest.fixture(params=["memory", "disk"])
def lm(request, tmp_path):
    llm = LLM(tiny_model("llama", max_position_embeddings=1024), tiny_tokenizer(), name="tiny")
    with lm_over(llm, tmp_path / "docs.extemb" if request.param == "disk" else None) as opened:
        yield opened


@pytest.fixture
def read(lm, monkeypatch):
    """What the LLM was given, prompt by prompt."""
    prompts = []
    plain = type(lm.llm).stream

    def watched(self, given, *args, **settings):
        prompts.append(given)
        return plain(self, given, *args, **settings)

    monkeypatch.setattr(type(lm.llm), "stream", watched)
    return prompts


def fates(response):
    return [(one["fidelity"], one["cached"]) for one in response.raw["extemb"]["documents"]]


async def test_the_llm(lm, read):
    llm = ExtensibleLLM.from_lm(lm, ratio=4, max_tokens=4)
    expected = lm.ask("How many?", TEXT, ratio=4, max_new_tokens=4).text
    made = llm.complete("How many?", documents=[TEXT])
    assert (made.text, fates(made)) == (expected, [(4, True)])
    assert llm.chat([ChatMessage("How many?")], documents=[TEXT]).message.content == expected
    assert [*llm.stream_complete("How many?", documents=[TEXT])][-1].text == expected
    assert (await llm.acomplete("How many?", documents=[TEXT])).text == expected
    formatted = llm.complete("In short:", formatted=True, documents=[TEXT]).text
    assert formatted == lm.generate("In short:", TEXT, ratio=4, max_new_tokens=4).text
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


@pytest.mark.parametrize("plan", [None, "focus", "select", "even"])
async def test_a_plan_for_the_question(lm, plan):
    """Of the object and of a call, in every form; and a mixed document is told of in plain values."""
    question, given = "Why was the bridge closed in 1987?", {"documents": [SENTENCES]}
    expected = lm.ask(question, SENTENCES, budget=60, plan=plan, max_new_tokens=4)
    (entry,) = expected.to_dict()["context"]
    messages = [ChatMessage(question)]
    for made, called in (({"plan": plan}, {}), ({}, {"plan": plan})):
        llm, call = ExtensibleLLM.from_lm(lm, budget=60, max_tokens=4, **made), given | called
        answers = [
            llm.complete(question, **call),
            await llm.acomplete(question, **call),
            [*llm.stream_complete(question, **call)][-1],
            [piece async for piece in await llm.astream_complete(question, **call)][-1],
            llm.chat(messages, **call),
            await llm.achat(messages, **call),
            [*llm.stream_chat(messages, **call)][-1],
            [piece async for piece in await llm.astream_chat(messages, **call)][-1],
        ]
        for answer in answers:
            (told,) = answer.raw["extemb"]["documents"]
            assert (told["fidelity"], tuple(told["spans"])) == (entry["fidelity"], entry["spans"])
            assert json.loads(json.dumps(told)) == told
            assert (answer.message.content if hasattr(answer, "message") else answer.text) == expected.text
        if plan in ("focus", "select"):
            with pytest.raises(ExtensibleLLMError, match=f"plan='{plan}' needs a question"):
                llm.complete(question, formatted=True, **call)
        else:
            whole = llm.complete(question, formatted=True, **call)
            assert whole.text == lm.generate(question, SENTENCES, budget=60, max_new_tokens=4).text
    assert (entry["fidelity"] == "mixed") == (plan != "even")
    assert json.loads(llm.to_json())["plan"] == llm.plan


@pytest.mark.parametrize("settings", [{"ratio": 4}, {"ratio": 2}, {"budget": 60}, {"budget": 200, "top_raw": 1}])
def test_the_postprocessor_in_an_engine(lm, read, settings):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    post = ExtensibleEmbeddingPostprocessor(llm=llm, **settings)
    nodes = [TextNode(text=f"{at}. {TEXT}", metadata={"at": at}) for at in range(3)]
    made = post.postprocess_nodes([NodeWithScore(node=node, score=1.0) for node in nodes])
    said = [lm.positions_of(lm.refs.find(found.get_content(MetadataMode.LLM))) for found in made]
    assert sum(said) <= settings.get("budget", 1024)
    assert {getattr(found.node, "extemb_ratio", "raw") for found in made} <= {1, 2, 4, 8, "raw"}
    engine = SummaryIndex(nodes).as_query_engine(llm=llm, node_postprocessors=[post])
    response = engine.query("How many ships?")
    assert [node.text for node in response.source_nodes] == [found.node.text for found in made]
    assert isinstance(read[-1], AnchoredPrompt)


def test_the_transform_and_what_it_left_in_the_store(lm, read, monkeypatch):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    nodes = [TextNode(text=f"{at}. {TEXT}") for at in range(3)]
    transform = ExtensibleTransform(llm=llm, ratio=2, show_progress=False)
    IngestionPipeline(transformations=[transform], disable_cache=True).run(nodes=nodes)
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **settings: pytest.fail("compressed again"))
    found = [NodeWithScore(node=node) for node in nodes]
    for ratio in (2, 4, 8):
        made = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=ratio).postprocess_nodes(found)
        response = llm.complete(" ".join(one.get_content(MetadataMode.LLM) for one in made))
        assert fates(response) == [(ratio, True)] * 3
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


def test_the_prompt_helper_counts_what_is_read(lm):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    (made,) = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=4).postprocess_nodes(
        [NodeWithScore(node=TextNode(text=TEXT))]
    )
    counted = extensible_prompt_helper(llm)._token_counter.get_string_tokens(made.get_content(MetadataMode.LLM))
    assert counted == made.node.extemb_positions == len(lm.embedder.compress(TEXT, ratio=4))


def test_a_chat_past_the_window(lm, read):
    roles = MessageRole.USER, MessageRole.ASSISTANT
    talk = [ChatMessage(f"{at}. {SENTENCES[at:][:200]}", role=role) for at in range(12) for role in roles]
    llm = ExtensibleLLM.from_lm(lm, budget=60, ratio=4, max_tokens=4)
    response = llm.chat([*talk, ChatMessage("So?")], documents=[SENTENCES[:150]])
    document, *turns = response.raw["extemb"]["documents"]
    assert document["fidelity"] == 4
    assert any(isinstance(turn["fidelity"], int) for turn in turns)
    assert response.raw["usage"]["prompt_tokens"] <= lm.llm.context_window - 4
    assert isinstance(read[0], AnchoredPrompt)
    assert lm.store.get(turns[0]["id"], lm.embedder.fingerprint, 8) is None


@pytest.mark.parametrize("store", [None, "docs.extemb"])
def test_by_name(tmp_path, store):
    """`embedder="untrained"` of each class, over one model and one store."""
    save_tiny(tmp_path)
    settings = {"embedder": "untrained", "store": None if store is None else str(tmp_path / store), "device": "cpu"}
    name = str(tmp_path / "llm")
    nodes = [TextNode(text=TEXT)]
    ExtensibleTransform.from_model_id(name, ratio=2, show_progress=False, **settings)(nodes)
    post = ExtensibleEmbeddingPostprocessor.from_model_id(name, ratio=4, **settings)
    (made,) = post.postprocess_nodes([NodeWithScore(node=nodes[0])])
    assert isinstance(made.node, ExtensibleNode)
    llm = ExtensibleLLM.from_model_id(name, max_tokens=2, **settings)
    assert fates(llm.complete(made.get_content(MetadataMode.LLM))) == [(4, True)]
    assert llm.lm is post.lm
    assert llm.lm.embedder.config.entry_layer == 1
    if store is not None:
        llm.lm.store.close()
