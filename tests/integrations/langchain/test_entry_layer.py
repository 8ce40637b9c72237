"""Everything here over an embedder that nobody trained, whose embeddings enter at a layer above 0."""

from __future__ import annotations

import gc
import json

import pytest
from anchored import lm_over
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, messages_from_dict, messages_to_dict
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import ConfigurableField
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from retrieval_encoder import by_words
from tiny import SENTENCES, save_tiny, tiny_llm

from extemb_core import ExtensibleLM, Library
from extemb_core.errors import ConfigError
from extemb_core.models.entry import AnchoredPrompt
from langchain_extemb import ChatExtensible, ExtensibleCompressor, ExtensibleLLM, ExtensibleRetriever

TEXT = SENTENCES[:150]


@pytest.fixture(params=["memory", "disk"])
def lm(request, tmp_path):
    llm = tiny_llm()
    with lm_over(llm, tmp_path / "docs.extemb" if request.param == "disk" else None) as opened:
        yield opened


@pytest.fixture
def read(lm, monkeypatch):
    """What the LLM was given, prompt by prompt."""
    prompts = []
    for name in ("stream", "generate"):
        plain = getattr(type(lm.llm), name)

        def watched(self, given, *args, plain=plain, **settings):
            prompts.extend(given if isinstance(given, list) and given and not isinstance(given[0], int) else [given])
            return plain(self, given, *args, **settings)

        monkeypatch.setattr(type(lm.llm), name, watched)
    return prompts


def fates(message):
    return [(one["fidelity"], one["cached"]) for one in message.response_metadata["extemb"]["documents"]]


async def test_a_plan_for_the_question(lm, read):
    """Of the object, of a call, bound or configured, in every form; and a mixed document is told of in plain values."""
    question, texts, budget = "Why was the bridge closed in 1987?", [Document(SENTENCES)], 60
    chat = ChatExtensible.from_lm(lm, budget=budget, max_tokens=4)
    plans = {}
    for plan in (None, "focus", "select", "even"):
        expected = lm.ask(question, SENTENCES, budget=budget, plan=plan, max_new_tokens=4)
        plans[plan] = expected.to_dict()["context"][0]
        model = ChatExtensible.from_lm(lm, budget=budget, max_tokens=4, plan=plan)
        configured = chat.configurable_fields(plan=ConfigurableField(id="plan"))
        answers = [
            model.invoke(question, documents=texts),
            chat.invoke(question, documents=texts, plan=plan),
            chat.bind(plan=plan).invoke(question, documents=texts),
            configured.with_config(configurable={"plan": plan}).invoke(question, documents=texts),
            await model.ainvoke(question, documents=texts),
            *model.batch([question] * 2, documents=texts),
            *await model.abatch([question], documents=texts),
            sum(model.stream(question, documents=texts), AIMessageChunk("")),
            sum([chunk async for chunk in model.astream(question, documents=texts)], AIMessageChunk("")),
        ]
        for answer in answers:
            (told,) = answer.response_metadata["extemb"]["documents"]
            assert (answer.content, told["fidelity"]) == (expected.text, expected.context[0].fidelity)
            assert json.loads(json.dumps(told)) == told
            assert tuple(told["spans"]) == plans[plan]["spans"]
        messages = [HumanMessage([{"type": "text-plain", "text": SENTENCES}, {"type": "text", "text": question}])]
        positions = model.get_num_tokens_from_messages(messages)
        assert positions == model.invoke(messages).usage_metadata["input_tokens"]
    assert plans[None]["spans"] == plans["focus"]["spans"]
    assert [plans[plan]["fidelity"] == "mixed" for plan in ("focus", "select", "even")] == [True, True, False]
    assert plans["focus"]["spans"] != plans["select"]["spans"]


def test_answers_of_two_plans_share_no_cache_entry(lm):
    cache = InMemoryCache()
    chats = [ChatExtensible.from_lm(lm, budget=60, max_tokens=2, cache=cache, plan=plan) for plan in ("focus", "even")]
    told = [fates(chat.invoke("Which bridge?", documents=[Document(SENTENCES)], **call))[0][0]
            for call in ({}, {"plan": "select"}) for chat in chats for _ in range(2)]  # fmt: skip
    assert [kind == "mixed" for kind in told] == [True, True, False, False, True, True, True, True]


def test_answers_by_two_scorers_share_no_cache_entry(lm):
    cache, told = InMemoryCache(), []
    for best in (0, -1):

        def scorer(question, sentences, best=best):
            return [float(sentence == sentences[best]) for sentence in sentences]

        scored = ExtensibleLM(lm.llm, lm.embedder, scorer=scorer)
        chat = ChatExtensible.from_lm(scored, budget=60, max_tokens=2, cache=cache, plan="select")
        (document,) = chat.invoke("Which?", documents=[SENTENCES]).response_metadata["extemb"]["documents"]
        told.append([(span["start"], span["fidelity"]) for span in document["spans"]])
    assert told[0] != told[1]


def test_a_scorer_shares_no_cache_entry_with_one_that_is_gone(lm):
    def key():
        scored = ExtensibleLM(lm.llm, lm.embedder, scorer=lambda question, sentences: [0.0] * len(sentences))
        keys = {ChatExtensible.from_lm(scored)._get_llm_string() for _ in range(2)}
        assert len(keys) == 1
        return keys.pop()

    seen = [(key(), gc.collect())[0] for _ in range(6)]  # collected, as the next may stand where it stood
    assert len(set(seen)) == 6


async def test_a_checkpointer_keeps_what_became_of_a_mixed_document(lm):
    chat = ChatExtensible.from_lm(lm, budget=60, max_tokens=2)
    graph = StateGraph(MessagesState).add_node(
        "chat", lambda state: {"messages": chat.invoke(state["messages"], documents=[SENTENCES])}
    )
    agent = graph.add_edge(START, "chat").compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "1"}}
    said = agent.invoke({"messages": [HumanMessage("Which bridge?")]}, thread)["messages"][-1]
    for kept in (agent.get_state(thread).values["messages"][-1], messages_from_dict(messages_to_dict([said]))[0]):
        assert kept.response_metadata == said.response_metadata
    (document,) = kept.response_metadata["extemb"]["documents"]
    assert (document["fidelity"], {type(span) for span in document["spans"]}) == ("mixed", {dict})


@pytest.mark.parametrize("plan", ["focus", "select"])
def test_a_plain_prompt_is_planned_evenly_and_says_so_where_another_plan_is_asked(lm, plan):
    model = ExtensibleLLM.from_lm(lm, budget=60, max_tokens=2)
    (answer,) = model.generate(["The bridge"], documents=[SENTENCES]).generations[0]
    assert answer.generation_info["extemb"]["documents"][0]["fidelity"] == 4
    for call in (model.invoke, lambda *prompt, **settings: list(model.stream(*prompt, **settings))):
        with pytest.raises(ConfigError, match=f"plan='{plan}' needs a question"):
            call("The bridge", documents=[SENTENCES], plan=plan)


async def test_the_chat_model(lm, read):
    chat = ChatExtensible.from_lm(lm, ratio=4, max_tokens=4)
    expected = lm.ask("How many?", TEXT, ratio=4, max_new_tokens=4).text
    documents = [Document(TEXT)]
    first = chat.invoke("How many?", documents=documents)
    assert (first.content, fates(first)) == (expected, [(4, True)])
    assert "".join(chunk.content for chunk in chat.stream("How many?", documents=documents)) == expected
    assert [one.content for one in chat.batch(["How many?"] * 3, documents=documents)] == [expected] * 3
    assert (await chat.ainvoke("How many?", documents=documents)).content == expected
    inside = HumanMessage([{"type": "text-plain", "text": TEXT}, {"type": "text", "text": "How many?"}])
    assert chat.get_num_tokens_from_messages([inside]) == chat.invoke([inside]).usage_metadata["input_tokens"]
    assert len(read) == 8
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


def test_the_completion_model(lm, read):
    llm = ExtensibleLLM.from_lm(lm, ratio=4, max_tokens=4)
    expected = lm.generate("In short:", TEXT, ratio=4, max_new_tokens=4).text
    assert llm.invoke("In short:", documents=[TEXT]) == expected
    assert "".join(llm.stream("In short:", documents=[TEXT])) == expected
    assert [one[0].text for one in llm.generate(["In short:"] * 2, documents=[TEXT]).generations] == [expected] * 2
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


def test_the_compressor_s_refs(lm, read, monkeypatch):
    (found,) = ExtensibleCompressor.from_lm(lm, ratio=2).compress_documents([Document(TEXT)], "any")
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **settings: pytest.fail("compressed again"))
    prompt = f"Read {found.metadata['extemb_ref']}"
    for ratio in (2, 4, 8):
        assert fates(ChatExtensible.from_lm(lm, ratio=ratio, max_tokens=2).invoke(prompt)) == [(ratio, True)]
        assert isinstance(ExtensibleLLM.from_lm(lm, ratio=ratio, max_tokens=2).invoke(prompt), str)
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


@pytest.mark.parametrize("where", ["system", "human"])
async def test_a_chain_with_refs_is_planned_for_the_question_that_the_model_is_asked(lm, read, where):
    """Not for the query that the compressor saw."""
    documents = [Document(SENTENCES, metadata={"source": "a"}), Document(SENTENCES[72:] + " Ships.")]
    form = {
        "system": [("system", "Answer from this:\n{context}"), ("human", "{input}")],
        "human": [("human", "{context}\n\nQuestion: {input}")],
    }
    chat = ChatExtensible.from_lm(lm, budget=100, max_tokens=4)
    told = []
    for query in ("Why was the bridge closed?", "How many ships?"):
        found = await ExtensibleCompressor.from_lm(lm).acompress_documents(documents, "any")
        context = "\n\n".join(one.metadata["extemb_ref"] for one in found)
        chain = ChatPromptTemplate.from_messages(form[where]) | chat
        message = chain.invoke({"context": context, "input": query})
        assert [kind for kind, _ in fates(message)] == ["mixed"] * 2
        assert all(cached for _, cached in fates(message))
        entries = message.response_metadata["extemb"]["documents"]
        assert sum(one["positions"] for one in entries) <= 100
        assert not any("planned" in one["reason"] for one in entries)
        assert (await chain.ainvoke({"context": context, "input": query})).content == message.content
        told.append([one["reason"] for one in entries])
    assert told[0] != told[1]
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


def test_a_retriever_s_passages(lm, tmp_path, read):
    with Library(tmp_path / "library", lm, encoder=by_words, passage_tokens=60) as library:
        library.add([{"text": SENTENCES, "source": "notes.txt"}])
        found = ExtensibleRetriever(library=library, k=2).invoke("ships")
        assert [one.metadata["source"] for one in found] == ["notes.txt"] * 2
        chat = ChatExtensible.from_lm(library.lm, ratio=4, max_tokens=2)
        assert fates(chat.invoke("How many?", documents=found)) == [(4, True)] * 2
    assert all(isinstance(prompt, AnchoredPrompt) for prompt in read)


def test_a_conversation_past_the_window(lm, read):
    talk = [kind(f"{at}. {SENTENCES[at:][:100]}") for at in range(12) for kind in (HumanMessage, AIMessage)]
    talk.append(HumanMessage("So?"))
    chat = ChatExtensible.from_lm(lm, budget=60, ratio=4, max_tokens=4)
    message = chat.invoke(talk, documents=[TEXT])
    document, *turns = message.response_metadata["extemb"]["documents"]
    assert document["fidelity"] == 4
    assert any(isinstance(turn["fidelity"], int) for turn in turns)
    assert message.usage_metadata["input_tokens"] <= lm.llm.context_window - 4
    assert isinstance(read[0], AnchoredPrompt)
    assert lm.store.get(turns[0]["id"], lm.embedder.fingerprint, 8) is None


@pytest.mark.parametrize("store", [None, "docs.extemb"])
def test_a_model_named_by_text_reads_at_its_entry_layer(tmp_path, store):
    """`embedder="untrained"` of each class, over one model and one store."""
    save_tiny(tmp_path)
    settings = {"embedder": "untrained", "store": None if store is None else str(tmp_path / store), "device": "cpu"}
    name = str(tmp_path / "llm")
    (found,) = ExtensibleCompressor.from_model_id(name, ratio=2, **settings).compress_documents([Document(TEXT)], "any")
    chat = ChatExtensible.from_model_id(name, max_tokens=2, ratio=4, **settings)
    assert fates(chat.invoke(f"Read {found.metadata['extemb_ref']}")) == [(4, True)]
    assert chat.lm.embedder.config.entry_layer == 1
    llm = ExtensibleLLM.from_model_id(name, max_tokens=2, ratio=4, **settings)
    told = llm.generate([found.metadata["extemb_ref"]]).generations[0][0].generation_info["extemb"]["documents"]
    assert [(one["fidelity"], one["cached"]) for one in told] == [(4, True)]
    assert llm.lm is chat.lm
    if store is not None:
        chat.lm.store.close()
