"""The chat model: documents from everywhere, answers as the core's, many at once, and what is told about them."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.load import dumpd
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
    message_chunk_to_message,
    trim_messages,
)
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from passes import PATIENCE, passes_of
from tiny import SENTENCES, random_embedder, tiny_llm

import langchain_extemb
from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.documents import text_ref
from extemb_core.errors import BudgetError, ConfigError, DocumentError, ExtembError
from extemb_core.models import generation
from extemb_core.models.llm import LLM
from langchain_extemb import ChatExtensible, ExtensibleCompressor, ExtensibleLLM
from langchain_extemb.chat import _as_chunk
from langchain_extemb.messages import to_documents, to_messages


@pytest.fixture
def passes(lm, monkeypatch):
    with passes_of(lm.llm, monkeypatch) as passes:
        yield passes


def fates(message):
    return [(one["source"], one["fidelity"]) for one in message.response_metadata["extemb"]["documents"]]


def test_documents_of_a_call_are_compressed_and_told_of(chat, lm, documents):
    message = chat.invoke("How many ships?", documents=documents)
    expected = lm.ask("How many ships?", documents, ratio=4, max_new_tokens=4)
    assert message.content == expected.text
    assert fates(message) == [("ships.txt", 4), ("wires.txt", 4)]
    told = message.response_metadata["extemb"]["documents"][0]
    assert told["raw_tokens"] == len(lm.llm.encode(documents[0].page_content))
    assert told["id"] == expected.context[0].ref
    assert message.usage_metadata == {
        "input_tokens": expected.prompt_positions, "output_tokens": 4,
        "total_tokens": expected.prompt_positions + 4}  # fmt: skip
    assert (message.response_metadata["finish_reason"], message.response_metadata["model_name"]) == (
        "length", "tiny-llama")  # fmt: skip
    assert chat.invoke("How many ships?", documents=documents).response_metadata["extemb"]["documents"][0]["cached"]


@pytest.mark.parametrize(
    "handed",
    [
        lambda text: Document(page_content=text),
        lambda text: text,
        lambda text: {"text": text},
        lambda text: {"id": "1", "data": text},
        lambda text: {"id": "1", "data": {"text": text}},
        lambda text: [{"page_content": text, "metadata": {"source": "x"}}],
    ],
)
def test_documents_come_in_many_shapes(chat, documents, handed):
    text = documents[0].page_content
    message = chat.bind(documents=handed(text)).invoke("How many?")
    (told,) = message.response_metadata["extemb"]["documents"]
    assert told["id"].startswith("ext:")
    assert told["raw_tokens"] == len(chat.lm.llm.encode(text))


def test_documents_in_a_chain_are_read_as_the_guide_says(chat, documents):
    prompt = ChatPromptTemplate.from_template("{question}")
    asked = {"question": "How many ships?"}
    lost = [prompt | chat, (prompt | chat).bind(documents=documents)]  # LangChain gives them to the prompt alone
    assert fates(lost[0].invoke(asked, documents=documents)) == fates(lost[1].invoke(asked)) == []

    guide = (Path(__file__).resolve().parents[3] / "docs" / "langchain.md").read_text(encoding="utf-8")
    example = re.search(r"<!-- chain -->\n```python\n(.*?)```", guide, re.DOTALL)[1]
    retriever = RunnableLambda(lambda question: documents if question == asked["question"] else [])
    names = {"llm": chat, "prompt": prompt, "docs": documents, "retriever": retriever, **asked}
    exec(compile(example, "langchain.md", "exec"), names)
    expected = chat.invoke("How many ships?", documents=documents)
    assert fates(expected) == fates(names["bound"]) == fates(names["retrieved"])
    assert expected.content == names["bound"].content == names["retrieved"].content
    assert [fate for _, fate in fates(names["inside"])] == [4, 4]
    chunks = list(names["chain"].stream(asked))
    assert len(chunks) > 2
    assert "".join(chunk.content for chunk in chunks) == expected.content


@pytest.mark.parametrize(
    "block",
    [
        lambda text: {"type": "text-plain", "text": text, "mime_type": "text/plain", "title": "Log"},
        lambda text: {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": text}},
        lambda text: {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": text}]}},
        lambda text: {"type": "search_result", "source": "log.txt", "title": "Log", "content": [
            {"type": "text", "text": text}]},
    ],
)  # fmt: skip
def test_documents_in_blocks_are_read_where_they_stand(chat, lm, documents, block):
    text = documents[0].page_content
    message = chat.invoke([HumanMessage([block(text), {"type": "text", "text": "How many?"}])])
    vectors = lm.embedder.compress(text, ratio=4).embeddings
    assert message.content == lm.chat([{"role": "user", "content": [vectors, "How many?"]}], max_new_tokens=4).text
    assert message.response_metadata["extemb"]["documents"][0]["positions"] == len(vectors)


def test_the_documents_of_a_retriever_tool_take_the_place_of_its_text(chat, documents):
    called = AIMessage("", tool_calls=[{"name": "search", "args": {"query": "ships"}, "id": "1"}])
    serialised = "\n\n".join(one.page_content for one in documents)
    result = ToolMessage(serialised, tool_call_id="1", artifact=documents)
    message = chat.invoke([HumanMessage("How many ships?"), called, result])
    assert fates(message) == [("ships.txt", 4), ("wires.txt", 4)]
    plain = chat.invoke([HumanMessage("How many ships?"), called, ToolMessage("none", tool_call_id="1", artifact=[])])
    assert fates(plain) == []
    assert message.usage_metadata["input_tokens"] < plain.usage_metadata["input_tokens"] + 80


def as_mappings(documents):
    """What a checkpointer gives back."""
    return [one.model_dump() for one in documents]


@pytest.mark.parametrize("keep", [list, tuple, as_mappings, dumpd], ids=["live", "tuple", "checkpoint", "dumped"])
def test_what_a_tool_says_beside_its_documents_is_read(lm, documents, keep):
    said = "\n\n".join(f"Source: {one.metadata['source']}\n{one.page_content}" for one in documents)
    tool = ToolMessage(said, tool_call_id="1", artifact=keep(documents))
    (message,) = to_messages([tool], lm.refs)
    ships, wires = message["content"][1], message["content"][3]
    assert message["content"] == ["Source: ships.txt\n", ships, "\n\nSource: wires.txt\n", wires]
    assert [ships.text, wires.text] == [one.page_content for one in documents]
    assert [ships.source, wires.source] == ["ships.txt", "wires.txt"]


@pytest.mark.parametrize("artifact", [None, [], "rows", [1, 2], {"rows": 3}, [Document("Monday: 17.")]])
def test_an_artifact_that_the_content_does_not_hold_is_not_read(lm, artifact):
    tool = ToolMessage("The Monday: 17.5 of it.", tool_call_id="1", artifact=artifact)
    assert to_messages([tool], lm.refs)[0]["content"] == ["The Monday: 17.5 of it."]


def test_a_document_within_a_block_of_what_a_tool_says(lm):
    said = [{"type": "text", "text": "Paid on Monday: 17."}]
    tool = ToolMessage(said, tool_call_id="1", artifact=[Document("Monday: 17.")])
    before, document = to_messages([tool], lm.refs)[0]["content"]
    assert (before, document.text) == ("Paid on ", "Monday: 17.")


def test_equal_and_nested_documents_of_a_tool_take_one_place_each(lm):
    long, short = "The mill was built in 1820 by Ada Moss.", "in 1820"
    artifact = [Document(short), Document(long), Document(long), Document("")]
    content = to_messages([ToolMessage(f"{long} {long} And {short}.", tool_call_id="1", artifact=artifact)], lm.refs)
    assert [part if isinstance(part, str) else [part.text] for part in content[0]["content"]] == [
        [long], " ", [long], " And ", [short], "."]  # fmt: skip


@pytest.mark.parametrize(
    "block",
    [
        {"type": "thinking", "thinking": "..."},
        {"type": "redacted_thinking", "data": "..."},
        {"type": "refusal", "refusal": "I may not."},
        {"type": "function_call", "name": "find", "arguments": "{}", "call_id": "1"},
        {"type": "server_tool_call", "name": "web_search", "args": {}, "id": "1"},
        {"type": "non_standard", "value": {}},
        {"cachePoint": {"type": "default"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    ],
)
def test_traces_of_other_models_in_a_history_are_left_out(lm, block):
    text = {"type": "text", "text": "In 1820."}
    assert to_messages([AIMessage([text, block])], lm.refs)[0]["content"] == ["In 1820."]
    with pytest.raises(DocumentError, match="holds no text"):
        to_messages([HumanMessage([text, block])], lm.refs)


def test_calls_in_a_history_are_read_where_the_template_has_no_place_for_them(chat):
    def positions(**calls):
        rain = ToolMessage("rain", tool_call_id="1")
        talk = [HumanMessage("What?"), AIMessage("", **calls), rain, HumanMessage("Where?")]
        return chat.invoke(talk).usage_metadata["input_tokens"]

    def call(city):
        return {"tool_calls": [{"name": "weather", "args": {"city": city}, "id": "1"}]}

    bad = {"name": None, "args": '{"name": "weat', "id": "1", "error": "no JSON", "type": "invalid_tool_call"}
    named = {**bad, "name": "weather"}
    assert positions() < positions(**call("Oslo")) < positions(**call("Llanfairpwll on the sea"))
    assert positions() < positions(invalid_tool_calls=[bad]) < positions(invalid_tool_calls=[named])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image", "url": "https://example.org/a.png"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "document", "source": {"type": "base64", "data": "AAAA", "media_type": "application/pdf"}},
        {"type": "text-plain", "file_id": "7", "mime_type": "text/plain"},
    ],
)
def test_blocks_without_text_are_an_error(chat, block):
    with pytest.raises(DocumentError, match="holds no text that can be read here; pass text"):
        chat.invoke([HumanMessage([block, {"type": "text", "text": "What?"}])])


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_a_block_of_text_without_any_is_nothing_and_one_of_something_else_is_an_error(lm, kind):
    none = [{"type": kind, "text": None}, {"type": "text", "text": "What?"}]
    for message in (HumanMessage(none), AIMessage(none), ToolMessage(none, tool_call_id="1")):
        assert to_messages([message], lm.refs)[0]["content"] == ["What?"]
    value = [{"type": kind, "text": {"value": "Why?"}}, {"type": "text", "text": "What?"}]
    with pytest.raises(DocumentError, match=f"a content block of type '{kind}' holds no text that can be read here"):
        to_messages([HumanMessage(value)], lm.refs)
    assert to_messages([AIMessage(value)], lm.refs)[0]["content"] == ["What?"]


def test_a_field_of_a_document_without_a_value_is_nothing():
    fields = {"title": "Log", "snippet": None, "year": 1805, "by": None}
    assert [one.text for one in to_documents({"data": fields})] == ["title: Log\nyear: 1805"]


def test_half_a_surrogate_pair_of_one_page_is_no_error(chat, lm):
    torn, mended = "Page one \ud83d ends here. " * 9, "Page one \ufffd ends here. " * 9
    artifact = [Document(torn)]
    tool = ToolMessage(f"Found: {torn}", tool_call_id="1", artifact=artifact)
    call = AIMessage("", tool_calls=[{"name": "find", "args": {}, "id": "1"}])
    (ref,) = ExtensibleCompressor.from_lm(lm).compress_documents(artifact, "any")
    for answer in (
        chat.invoke("What?", documents=[Document(torn)]),
        chat.invoke("What?", documents=[{"text": torn}]),
        chat.invoke([HumanMessage([{"type": "text-plain", "text": torn}])]),
        chat.invoke([HumanMessage("What?"), call, tool]),
        chat.invoke(f"{ref.metadata['extemb_ref']} What?"),
    ):
        assert [one["id"] for one in answer.response_metadata["extemb"]["documents"]] == [text_ref(mended)]
    assert chat.invoke(torn).content == chat.invoke(mended).content
    assert ref.page_content == torn


def test_bad_input_is_an_error_or_told(chat, documents):
    assert fates(chat.invoke("How many?", documents=[])) == []
    assert fates(chat.invoke("How many?", documents=None)) == []
    empty = chat.invoke("How many?", documents=[Document(page_content=""), documents[0]])
    assert fates(empty)[1] == ("ships.txt", 4)
    assert empty.response_metadata["extemb"]["documents"][0]["reason"] == "empty"
    twice = chat.invoke("How many?", documents=[documents[0], documents[0]])
    assert fates(twice) == [("ships.txt", 4)] * 2
    tight = chat.invoke("How many?", documents=documents, budget=40)
    assert fates(tight)[1] == ("wires.txt", "dropped")
    huge = Document(page_content="Short.", metadata={"blob": "x" * 10**6})
    assert len(fates(chat.invoke("How many?", documents=[huge]))) == 1
    with pytest.raises(DocumentError, match="a tuple is not a document; of pairs with scores the first of each"):
        chat.invoke("How many?", documents=[(documents[0], 0.7)])
    with pytest.raises(DocumentError, match="documents is a int"):
        chat.invoke("How many?", documents=7)
    generous = chat.invoke("How many?", documents=documents, budget=9999)
    assert fates(generous) == fates(chat.invoke("How many?", documents=documents))
    assert generous.response_metadata["extemb"]["budget"] < 256
    for wrong in (-1, "many"):
        with pytest.raises(BudgetError, match=f"budget={wrong!r} is not a whole number"):
            chat.invoke("How many?", documents=documents, budget=wrong)
    with pytest.raises(ConfigError, match="unknown setting frequency_penalty=1"):
        chat.invoke("How many?", frequency_penalty=1)


def test_settings_of_a_call_go_before_those_of_the_model(chat, lm):
    assert chat.invoke("Count.", max_tokens=2).usage_metadata["output_tokens"] == 2
    drawn = [chat.invoke("Count.", temperature=1.0, seed=seed, max_tokens=8).content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0] == lm.ask("Count.", temperature=1.0, seed=1, max_new_tokens=8).text
    text = chat.invoke("Count.", max_tokens=8).content
    assert chat.invoke("Count.", max_tokens=8, stop=[text[3]]).content == text[: text.index(text[3])]


def test_a_stream_is_the_answer_in_pieces(chat, documents):
    chunks = list(chat.stream("How many?", documents=documents))
    whole = chat.invoke("How many?", documents=documents)
    merged = chunks[0]
    for chunk in chunks[1:]:
        merged += chunk
    assert merged.content == whole.content
    assert merged.usage_metadata == whole.usage_metadata
    assert fates(merged) == fates(whole)
    assert len([chunk for chunk in chunks if chunk.content]) > 1


def test_who_stops_reading_a_stream_stops_the_llm(chat, passes):
    stream = chat.stream("How many?", max_tokens=150)
    next(stream)
    stream.close()
    assert passes.stopped()


async def test_who_stops_reading_an_async_stream_stops_the_llm(chat, passes):
    async for chunk in chat.astream("How many?", max_tokens=150):
        if chunk.content:
            break
    await asyncio.sleep(0)
    gc.collect()
    assert await asyncio.to_thread(passes.stopped)


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
@pytest.mark.parametrize("questions", ["How many?", ["How many?", "Why?"]])
async def test_a_cancelled_call_stops_the_llm(kind, lm, passes, questions):
    model = kind.from_lm(lm, max_tokens=180)
    call = asyncio.create_task(model.ainvoke(questions) if isinstance(questions, str) else model.abatch(questions))
    assert await asyncio.to_thread(passes.held.wait, PATIENCE)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    passes.let(8)  # it is told between two pieces of text
    assert await asyncio.to_thread(passes.stopped)


def test_a_batch_is_answered_together_as_each_alone(chat, monkeypatch):
    sizes = []
    whole = LLM.generate
    monkeypatch.setattr("extemb_core.frameworks.batching._GATHER_SECONDS", 60)  # for all eight
    monkeypatch.setattr(
        LLM, "generate", lambda self, prompts, *how: (sizes.append(len(prompts)), whole(self, prompts, *how))[1]
    )
    questions = [f"What is {at} and {at}?" for at in range(8)]
    answers = chat.batch(questions)
    assert sizes == [8]
    assert [one.content for one in answers] == [chat.invoke(question).content for question in questions]
    sizes.clear()
    chat.batch(questions, config={"max_concurrency": 2})
    assert max(sizes) == 2
    assert chat.batch([]) == []


async def test_32_at_once_do_not_block_the_loop(chat, passes):
    async def let_go():  # which only a loop that is not blocked comes to
        while not passes.held.is_set():
            await asyncio.sleep(0.01)
        passes.let_go()

    meanwhile = asyncio.create_task(let_go())
    answers = await chat.abatch([f"What is {at}?" for at in range(32)], max_tokens=20)
    await meanwhile
    assert len(answers) == 32
    assert answers[7].content == chat.invoke("What is 7?", max_tokens=20).content
    assert await chat.abatch([]) == []


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
def test_an_error_in_a_batch_is_of_its_own_prompt(kind, lm):
    model, questions = kind.from_lm(lm, max_tokens=4), ["a?", "b " * 400, "c?"]
    for made in (
        model.batch(questions, return_exceptions=True),
        asyncio.run(model.abatch(questions, return_exceptions=True)),
    ):
        assert [isinstance(one, BudgetError) for one in made] == [False, True, False]
    answers = model.with_fallbacks([RunnableLambda(lambda question: "plan B")]).batch(questions)
    assert [answer == "plan B" for answer in answers] == [False, True, False]
    with pytest.raises(BudgetError, match="shorten the question, allow a shorter answer"):
        model.batch(questions)


def test_16_threads_get_their_own_answers(chat, documents):
    expected = {at: chat.invoke(f"What is {at}?", documents=documents[: at % 3]).content for at in range(16)}
    with ThreadPoolExecutor(16) as pool:
        made = list(
            pool.map(
                lambda at: chat.invoke(f"What is {at % 16}?", documents=documents[: at % 16 % 3]).content, range(48)
            )
        )
    assert made == [expected[at % 16] for at in range(48)]


def test_answers_at_two_ratios_or_of_two_documents_share_no_cache_entry(lm, documents):
    calls = []
    cache = InMemoryCache()
    lookup = cache.lookup
    cache.lookup = lambda prompt, llm_string: (calls.append(llm_string), lookup(prompt, llm_string))[1]
    two, four = (ChatExtensible.from_lm(lm, ratio=ratio, max_tokens=3, cache=cache) for ratio in (2, 4))
    for chat in (two, four):
        for handed in (documents[:1], documents[1:]):
            chat.invoke("How many?", documents=handed)
    assert len(set(calls)) == 4
    again = four.invoke("How many?", documents=documents[1:])
    assert len(set(calls)) == 4
    assert again.response_metadata["extemb"]["documents"][0]["source"] == "wires.txt"
    other = ExtensibleLM(lm.llm, random_embedder(lm.llm, seed=9))
    ChatExtensible.from_lm(other, ratio=4, max_tokens=3, cache=cache).invoke("How many?", documents=documents[1:])
    assert len(set(calls)) == 5


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
def test_answers_of_models_that_end_at_other_texts_share_no_cache_entry(kind, lm):
    cache = InMemoryCache()
    (whole,) = text_of([kind.from_lm(lm, max_tokens=8, cache=cache).invoke("How many?")])
    ended = kind.from_lm(lm, max_tokens=8, cache=cache, stop=whole[1:3])
    assert text_of([ended.invoke("How many?"), ended.bind(stop=[]).invoke("How many?")]) == [whole[0], whole]


def test_no_weights_are_loaded_before_they_are_needed(monkeypatch):
    loaded = []
    monkeypatch.setattr("extemb_core.frameworks.settings.share", lambda *args, **kwargs: loaded.append(args))
    chat = ChatExtensible.from_model_id("smollm2-135m-instruct", budget=100)
    repr(chat)
    ChatPromptTemplate.from_messages([("human", "{question}")]) | chat.bind(documents=["a"])
    assert loaded == []


def test_weights_are_shared_within_a_process(tmp_path):
    from tiny import save_tiny

    save_tiny(tmp_path)
    settings = {"model": str(tmp_path / "llm"), "embedder": str(tmp_path / "embedder")}
    one, two = ChatExtensible(**settings), ChatExtensible(**settings, ratio=8)
    stored = ChatExtensible(**settings, store=str(tmp_path / "store"))
    assert one.lm is two.lm
    assert stored.lm is not one.lm
    assert stored.lm.llm is one.lm.llm
    assert stored.lm.store.path == tmp_path / "store"
    stored.lm.store.close()


@pytest.mark.parametrize("turns", range(1, 12, 2))
def test_a_conversation_of_any_length_is_answered_with_a_budget(lm, documents, turns, tmp_path, caplog):
    """Nothing to it without documents; room for them with them; and what was said is in no store on disk."""
    talk = [kind(f"{at}. {SENTENCES[at:][:100]}") for at in range(6) for kind in (HumanMessage, AIMessage)][:turns]
    talk = [*talk[turns % 2 == 0 :], *([AIMessage("Go on.")] if turns % 2 else []), HumanMessage("So?")]
    with EmbeddingStore.open(tmp_path / "docs.extemb") as store:
        stored = ExtensibleLM(lm.llm, lm.embedder, store)
        for budget in (None, 60, 9999):
            chat = ChatExtensible.from_lm(stored, budget=budget, max_tokens=4, ratio=4)
            without = chat.invoke(talk)
            assert all(source.startswith("turn ") for source, _ in fates(without))
            assert len(store) == 0
            assert "".join(chunk.content for chunk in chat.stream(talk)) == without.content
        for budget in (40, 9999):
            chat = ChatExtensible.from_lm(stored, budget=budget, max_tokens=4, ratio=4)
            source, fidelity = fates(chat.invoke(talk, documents=documents[:1]))[0]
            assert (source, fidelity) == ("ships.txt", 4)
        assert len(store) == 1


@pytest.mark.parametrize("turns", [1, 4, 14])
def test_a_document_of_an_older_turn_is_told_of_and_planned_however_long_the_conversation(lm, turns):
    block = {"type": "text-plain", "text": SENTENCES, "title": "Contract", "source": "contract.pdf"}
    talk = [HumanMessage([{"type": "text", "text": "Read this."}, block, {"type": "text", "text": "Who signed it?"}])]
    talk += [kind("So it is. " * 8) for _ in range(turns) for kind in (AIMessage, HumanMessage)]
    chat = ChatExtensible.from_lm(lm, max_tokens=4, ratio=4)
    told = chat.invoke(talk).response_metadata["extemb"]["documents"]
    assert [(one["source"], one["id"], one["turn"]) for one in told if not one["turn"]] == [
        ("contract.pdf", text_ref(SENTENCES), False)
    ]
    assert all(one["source"].startswith("turn ") for one in told if one["turn"])
    assert ("turn 1, user" in [one["source"] for one in told]) == (turns > 1)


def test_what_was_not_read_is_warned_of(chat, documents, caplog):
    with caplog.at_level("WARNING"):
        chat.invoke("How many?", documents=documents)
        chat.invoke("How many?", documents=[""])
        assert not caplog.text
        chat.invoke("How many?", documents=documents, budget=40)
        assert "1 of 2 documents were not read: they do not fit the 40 positions for documents: wires" in caplog.text
        caplog.clear()
        list(chat.stream("How many?", documents=documents, budget=40))
        assert caplog.text.count("were not read") == 1


def test_a_conversation_that_is_too_long_is_counted_so_that_it_can_be_trimmed(chat, documents):
    doc = {"type": "text-plain", "text": documents[0].page_content}
    turn = "The mill stands by the river and grinds corn for the town. " * 4
    talk = [kind(turn) for _ in range(8) for kind in (HumanMessage, AIMessage)]
    for last in (HumanMessage("When?"), HumanMessage([doc, {"type": "text", "text": "When?"}])):
        trimmed = trim_messages([*talk, last], max_tokens=200, token_counter=chat, start_on="human")
        assert 1 <= len(trimmed) < len(talk)
        assert trimmed[-1] == last


def test_turns_are_counted_and_read_by_a_template_that_asks_for_them_in_turn(lm, monkeypatch):
    strict = """{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('in turn') }}{% endif %}{{ m.content }}|{% endfor %}"""
    monkeypatch.setattr(lm.llm.tokenizer, "chat_template", strict)
    chat = ChatExtensible.from_lm(lm, max_tokens=2)
    talk = [AIMessage("Hello! How can I help?"), HumanMessage("One."), HumanMessage("Two.")]
    assert [chat.get_num_tokens_from_messages(talk[at : at + 1]) > 0 for at in range(3)] == [True] * 3
    assert trim_messages(talk, max_tokens=200, token_counter=chat) == talk
    assert chat.invoke(talk).usage_metadata["input_tokens"] == chat.get_num_tokens_from_messages(talk)


def test_tokens_are_counted_as_the_caller_says(lm):
    assert ChatExtensible.from_lm(lm, custom_get_token_ids=lambda text: [7]).get_num_tokens("How many ships?") == 1


def test_positions_are_counted_as_they_are_used(chat, documents):
    content = [{"type": "text-plain", "text": documents[0].page_content}, {"type": "text", "text": "How many?"}]
    messages = [SystemMessage("Be brief."), HumanMessage(content)]
    assert chat.get_num_tokens_from_messages(messages) == chat.invoke(messages).usage_metadata["input_tokens"]
    assert chat.get_num_tokens("one two") == len(tiny_llm().encode("one two"))


@pytest.mark.parametrize(
    "settings", [{"ratio": 4}, {"ratio": 8}, {"budget": 40}, {"ratio": "raw"}, {}, {"max_tokens": 150}]
)
def test_refs_are_counted_as_the_positions_that_a_call_reads_them_in(lm, documents, settings, monkeypatch):
    refs = [one.metadata["extemb_ref"] for one in ExtensibleCompressor.from_lm(lm).compress_documents(documents, "")]
    chat = ChatExtensible.from_lm(lm, **{"max_tokens": 4, **settings})
    texts = [f"Read {refs[0]} and {refs[1]} for me.", refs[0], "How many?"]
    used = [chat.invoke(text).usage_metadata["input_tokens"] for text in texts]
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **kwargs: pytest.fail("compressed"))
    template = used[-1] - len(lm.llm.encode(texts[-1]))
    assert [chat.get_num_tokens(text) + template for text in texts] == used
    assert [chat.get_num_tokens_from_messages([HumanMessage(text)]) for text in texts] == used


def test_the_profile_says_what_is_known_before_weights_are_loaded(chat, lm):
    from tiny import tool_llm

    named = ChatExtensible.from_model_id("nobody/knows", max_tokens=7).profile
    assert named["max_output_tokens"] == 7
    assert not named["image_inputs"]
    assert not {"max_input_tokens", "tool_calling"} & named.keys()
    assert chat.profile["max_input_tokens"] == lm.llm.context_window
    assert not chat.profile["tool_calling"]
    with_tools = tool_llm()
    assert ChatExtensible.from_lm(ExtensibleLM(with_tools, random_embedder(with_tools))).profile["tool_calling"]
    assert ChatExtensible.from_lm(lm, profile={"max_input_tokens": 9}).profile == {"max_input_tokens": 9}


def test_parameters_of_models_elsewhere_are_taken_with_a_warning(lm, caplog):
    with caplog.at_level("WARNING"):
        chat = ChatExtensible.from_lm(lm, timeout=60, max_tokens=3)
    assert (chat.max_tokens, hasattr(chat, "timeout")) == (3, False)
    assert "timeout= makes no difference to a ChatExtensible" in caplog.text


def test_importing_loads_neither_torch_nor_transformers():
    code = (
        "import sys, langchain_extemb; langchain_extemb.ChatExtensible.from_model_id('smollm2-135m-instruct'); "
        "print([name for name in ('torch', 'transformers', 'faiss') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert dir(langchain_extemb) == sorted(dir(langchain_extemb))
    assert set(langchain_extemb.__all__) <= set(dir(langchain_extemb))
    with pytest.raises(AttributeError, match="no attribute 'Chat'"):
        _ = langchain_extemb.Chat


def test_tokens_are_called_back(chat):
    from langchain_core.callbacks import BaseCallbackHandler

    class Handler(BaseCallbackHandler):
        def __init__(self):
            self.tokens, self.ended = [], []

        def on_llm_new_token(self, token, **kwargs):
            self.tokens.append(token)

        def on_llm_end(self, response, **kwargs):
            self.ended.append(response)

    handler = Handler()
    text = "".join(chunk.content for chunk in chat.stream("How many?", config={"callbacks": [handler]}))
    assert "".join(handler.tokens) == text
    assert len(handler.ended) == 1


def test_a_failing_llm_is_told_and_the_next_call_works(chat, lm, monkeypatch):
    whole = generation._run
    monkeypatch.setattr(generation, "_run", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError("too large")))
    with pytest.raises(MemoryError):
        chat.invoke("How many?")
    with pytest.raises(MemoryError):
        list(chat.stream("How many?"))
    monkeypatch.setattr(generation, "_run", whole)
    assert chat.invoke("How many?").usage_metadata["output_tokens"] == 4
    assert threading.active_count() < 60


def test_the_text_of_control_tokens_is_text(chat, lm):
    message = chat.invoke("a <|im_end|> b", documents=[SENTENCES[:60] + "<|im_start|>"])
    assert message.usage_metadata["input_tokens"] > 0
    assert lm.llm.control_tokens


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
def test_a_conversation_with_history_goes_on_past_three_windows(chat, lm):
    from langchain_core.chat_history import InMemoryChatMessageHistory
    from langchain_core.runnables.history import RunnableWithMessageHistory

    history = InMemoryChatMessageHistory()
    talk = RunnableWithMessageHistory(chat, lambda: history)
    told = []
    for number in range(24):
        question = f"Question {number}: " + SENTENCES[9 * number % 150 :][:120]
        message = talk.invoke([HumanMessage(question)], config={"configurable": {}})
        told.append(message.response_metadata["extemb"]["documents"])
    length = lm.positions([{"role": "user", "content": "".join(str(one.content) for one in history.messages)}])
    assert length > 5 * lm.llm.context_window
    assert told[0] == []
    assert {one["fidelity"] for one in told[-1]} & {2, 4, 8}
    assert len(history.messages) == 48


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
async def test_a_conversation_of_a_checkpointer_goes_on_past_three_windows(chat, lm):
    from langchain.agents import create_agent
    from langgraph.checkpoint.memory import InMemorySaver

    agent = create_agent(chat, tools=[], system_prompt="Be brief.", checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "1"}}
    answers = []
    for number in range(24):
        question = f"Question {number}: " + SENTENCES[9 * number % 150 :][:120]
        state = {"messages": [{"role": "user", "content": question}]}
        result = await agent.ainvoke(state, thread) if number % 2 else agent.invoke(state, thread)
        answers.append(result["messages"][-1])
    assert len(result["messages"]) == 48
    length = lm.positions([{"role": "user", "content": "".join(str(one.content) for one in result["messages"])}])
    assert length > 3 * lm.llm.context_window
    assert max(one.usage_metadata["total_tokens"] for one in answers) <= lm.llm.context_window
    assert answers[0].response_metadata["extemb"]["documents"] == []
    condensed = answers[-1].response_metadata["extemb"]["documents"]
    assert {one["fidelity"] for one in condensed} & {2, 4, 8}
    assert (
        agent.invoke({"messages": [{"role": "user", "content": "Hm?"}]}, {"configurable": {"thread_id": "2"}})[
            "messages"
        ][-1].response_metadata["extemb"]["documents"]
        == []
    )


@pytest.mark.parametrize("stop", ["END", ["END"]])
def test_a_text_that_ends_an_answer_is_one_text(lm, stop):
    whole = ChatExtensible.from_lm(lm, max_tokens=4).invoke("How many?").content
    assert ChatExtensible.from_lm(lm, max_tokens=4, stop=stop).invoke("How many?").content == whole
    assert ChatExtensible.from_lm(lm, max_tokens=4).invoke("How many?", stop=stop).content == whole
    assert ChatExtensible.from_lm(lm, max_tokens=4).bind(stop=stop).invoke("How many?").content == whole
    assert ChatExtensible.from_lm(lm, stop=stop)._get_ls_params()["ls_stop"] == ["END"]


def unloadable(kind):
    return kind.from_model_id("no/such/folder/", max_tokens=4)


class Errors(BaseCallbackHandler):
    def __init__(self, errors):
        self.errors = errors

    def on_llm_error(self, error, **run):
        self.errors.append(error)


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
def test_a_call_that_names_its_model_needs_no_other(kind, lm, monkeypatch):
    def load(model, embedder, **settings):
        if model != "tiny":
            raise ConfigError(f"{model} does not exist")
        return lm

    monkeypatch.setattr("extemb_core.frameworks.settings.share", load)
    bound = unloadable(kind).bind(model="tiny")
    assert text_of([bound.invoke("Hello"), asyncio.run(bound.ainvoke("Hello"))]) == text_of(
        [kind.from_lm(lm, max_tokens=4).invoke("Hello")] * 2
    )


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
def test_a_model_that_cannot_be_loaded_fails_in_each_call(kind):
    plan_b = RunnableLambda(lambda question: "plan B")
    for model in (unloadable(kind).with_fallbacks([plan_b]),):
        assert model.invoke("Hello") == "plan B"
        assert model.batch(["Hello", "Hi"]) == ["plan B"] * 2
        assert asyncio.run(model.abatch(["Hello", "Hi"])) == ["plan B"] * 2
    told = []
    failed = unloadable(kind).batch(["Hello", "Hi"], {"callbacks": [Errors(told)]}, return_exceptions=True)
    assert told == failed
    for call in (unloadable(kind).invoke, lambda *how: asyncio.run(unloadable(kind).ainvoke(*how))):
        told.clear()
        with pytest.raises(ExtembError) as caught:
            call("Hello", {"callbacks": [Errors(told)]})
        assert told == [caught.value]
    assert [isinstance(one, ExtembError) for one in failed] == [True, True]
    assert "no/such/folder/ does not exist" in str(failed[0])


@pytest.mark.parametrize(
    ("kind", "call"),
    [*product([ChatExtensible, ExtensibleLLM], ["ainvoke", "astream", "abatch"]), (ChatExtensible, "astream_events")],
)
@pytest.mark.filterwarnings("ignore:.*_v3. is in beta")
def test_weights_are_not_loaded_on_the_event_loop(kind, call, lm, monkeypatch):
    threads = []

    def load(*args, **settings):
        threads.append(threading.current_thread())
        return lm

    monkeypatch.setattr("extemb_core.frameworks.settings.share", load)
    model = kind.from_model_id("tiny", max_tokens=2)

    async def ask():
        loop = threading.current_thread()
        if call == "astream":
            async for _ in model.astream("Hello"):
                pass
        elif call == "astream_events":
            assert (await (await model.astream_events("Hello", version="v3"))).content
        else:
            await getattr(model, call)("Hello" if call == "ainvoke" else ["Hello"])
        return loop

    loop = asyncio.run(ask())
    assert threads
    assert threads[0] is not loop


def test_a_call_that_is_cut_off_is_invalid_also_when_streamed():
    cut = '{"name": "add", "arguments": {"a": 2, "b'
    bad = {"name": None, "args": cut, "id": "1", "error": "no call of a tool in JSON", "type": "invalid_tool_call"}
    good = {"name": "add", "args": {"a": 1}, "id": "2", "type": "tool_call"}
    for calls in ([], [good]):
        chunk = _as_chunk(AIMessage("", tool_calls=calls, invalid_tool_calls=[bad])).message
        for message in (chunk, chunk + AIMessageChunk(""), message_chunk_to_message(chunk + AIMessageChunk(""))):
            assert [call["name"] for call in message.tool_calls] == [call["name"] for call in calls]
            assert [json.loads(call["args"]) for call in message.invalid_tool_calls] == [cut]


def test_the_cache_of_an_llm_knows_documents_and_settings_of_a_call(lm, documents):
    cached = ExtensibleLLM.from_lm(lm, max_tokens=3, ratio=4, cache=InMemoryCache())

    def read(**settings):
        (answer,) = cached.generate(["In short:"], **settings).generations[0]
        return [one["source"] for one in answer.generation_info["extemb"]["documents"]]

    assert read(documents=[documents[0]]) == ["ships.txt"]
    assert read(documents=[documents[1]]) == ["wires.txt"]
    assert read() == []
    answers = [asyncio.run(cached.agenerate(["In short:"], documents=[one])) for one in documents]
    told = [answer.generations[0][0].generation_info["extemb"]["documents"][0]["source"] for answer in answers]
    assert told == ["ships.txt", "wires.txt"]
    assert len(cached.invoke("How many?", max_tokens=1)) < len(cached.invoke("How many?"))
    hits = []
    cached.cache.lookup = lambda *key: hits.append(key)
    cached.invoke("How many?", max_tokens=2)
    assert not hits
    cached.invoke("How many?")
    assert hits


@pytest.mark.parametrize("kind", [ChatExtensible, ExtensibleLLM])
def test_documents_that_come_one_by_one_are_the_same_for_every_prompt_and_the_cache(kind, lm, documents):
    model = kind.from_lm(lm, max_tokens=2, ratio=4, cache=InMemoryCache())
    whole = kind.from_lm(lm, max_tokens=2, ratio=4)
    for one in documents * 2:
        asked = [model.invoke("How many?", documents=iter([one])), whole.invoke("How many?", documents=[one])]
        assert len(set(text_of(asked))) == 1
        if kind is ChatExtensible:
            assert fates(asked[0]) == fates(asked[1])
    expected = whole.batch(["How many?", "Why?"], documents=documents)
    for at_once in (1, 2):
        config = {"max_concurrency": at_once}
        assert text_of(model.batch(["How many?", "Why?"], config, documents=iter(documents))) == text_of(expected)
        answers = asyncio.run(model.abatch(["How many?", "Why?"], config, documents=(one for one in documents)))
        assert text_of(answers) == text_of(expected)
    for bound in (
        model.bind(documents=filter(None, documents)),
        model.bind(stop=["\n\n"]).bind(documents=iter(documents)),
    ):
        assert text_of([bound.invoke("How many?"), bound.invoke("Why?")]) == text_of(expected)
    done = dict(model.batch_as_completed(["How many?", "Why?"], documents=iter(documents)))
    assert text_of([done[0], done[1]]) == text_of(expected)

    async def all_done():
        batch = model.abatch_as_completed(["How many?", "Why?"], documents=iter(documents))
        return {at: answer async for at, answer in batch}

    done = asyncio.run(all_done())
    assert text_of([done[0], done[1]]) == text_of(expected)


def test_documents_that_were_read_before_are_told_of(chat, documents, caplog):
    bound = chat.with_config(tags=["a"]).bind(documents=iter(documents))
    assert len(fates(bound.invoke("How many?"))) == 2
    assert not caplog.text
    for call in (bound.invoke, lambda question: list(bound.stream(question))):
        call("How many?")
        assert "documents is a list_iterator that gives none" in caplog.text
        caplog.clear()


class Report(Document):
    def __repr__(self):
        return "Report"


class Row:
    def __init__(self, page_content):
        self.text = page_content

    def __repr__(self):
        return "Row"


def test_what_a_function_said_is_what_a_tool_said(lm):
    said = [FunctionMessage("12 degrees", name="weather"), ToolMessage("12 degrees", tool_call_id="1")]
    assert to_messages(said[:1], lm.refs) == to_messages(said[1:], lm.refs)


@pytest.mark.parametrize("kind", [Report, Row])
def test_the_cache_tells_documents_apart_that_look_alike(kind, lm, documents):
    cached = ChatExtensible.from_lm(lm, max_tokens=2, ratio=4, cache=InMemoryCache())
    for one in documents:
        answer = cached.invoke("How many?", documents=[kind(page_content=one.page_content)])
        assert answer.response_metadata["extemb"]["documents"][0]["id"] == text_ref(one.page_content)


def test_a_text_that_is_the_name_of_a_file_is_warned_of_once_with_a_cache_too(lm, caplog):
    cached = ChatExtensible.from_lm(lm, max_tokens=2, cache=InMemoryCache())
    assert cached.invoke("How many?", documents=[__file__]).content
    assert caplog.text.count("is the name of a file") == 1


def text_of(answers):
    return [getattr(answer, "content", answer) for answer in answers]
