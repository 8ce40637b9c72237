"""The LLM: all forms give the core's answers, documents in blocks are read, and loops are not blocked."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import subprocess
import sys
import threading
from typing import Any

import pytest
from llama_index.core import SummaryIndex
from llama_index.core.base.llms import types
from llama_index.core.base.llms.types import (
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    MessageRole,
    TextBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import Document, NodeWithScore, TextNode
from passes import passes_of
from pydantic import BaseModel
from tiny import SENTENCES, random_embedder, save_tiny, tiny_model, tiny_tokenizer

from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.errors import ConfigError, ExtembError
from extemb_core.models.llm import LLM
from llama_index.llms.extemb import ExtensibleLLM, ExtensibleLLMError
from llama_index.llms.extemb.messages import to_messages

QUESTION = "How many ships?"


def told(response):
    return [(one["source"], one["fidelity"]) for one in response.raw["extemb"]["documents"]]


def test_all_forms_give_the_answer_of_the_core(llm, lm):
    wanted = lm.ask(QUESTION, max_new_tokens=4).text
    messages = [ChatMessage(QUESTION)]
    assert llm.complete(QUESTION).text == wanted
    chat = llm.chat(messages)
    assert (chat.message.content, chat.message.role) == (wanted, MessageRole.ASSISTANT)
    pieces = list(llm.stream_chat(messages))
    assert "".join(piece.delta for piece in pieces) == pieces[-1].message.content == wanted
    pieces = list(llm.stream_complete(QUESTION))
    assert "".join(piece.delta for piece in pieces) == pieces[-1].text == wanted
    assert pieces[-1].raw["usage"] == chat.raw["usage"]
    assert llm.predict(PromptTemplate("{question}"), question=QUESTION) == wanted
    plain = lm.generate(QUESTION, max_new_tokens=4).text
    assert llm.complete(QUESTION, formatted=True).text == plain
    assert "".join(piece.delta for piece in llm.stream_complete(QUESTION, formatted=True)) == plain


async def test_async_forms_give_it_too(llm, lm):
    wanted = lm.ask(QUESTION, max_new_tokens=4).text
    messages = [ChatMessage(QUESTION)]
    assert (await llm.acomplete(QUESTION)).text == wanted
    assert (await llm.achat(messages)).message.content == wanted
    assert "".join([piece.delta async for piece in await llm.astream_chat(messages)]) == wanted
    assert "".join([piece.delta async for piece in await llm.astream_complete(QUESTION)]) == wanted


@pytest.mark.parametrize(
    ("block", "source"),
    [
        (CitableBlock(title="Ships", source="ships.txt", content=[TextBlock(text=SENTENCES)]), "ships.txt"),
        (CitableBlock(title="Ships", source="ships.txt", content=SENTENCES), "ships.txt"),
        (DocumentBlock(data=base64.b64encode(SENTENCES.encode()), title="ships.txt"), "ships.txt"),
    ],
)
def test_documents_in_blocks_are_read_where_they_stand(llm, lm, block, source):
    message = ChatMessage(blocks=[block, TextBlock(text="\n" + QUESTION)])
    response = llm.chat([message], ratio=4)
    assert told(response) == [(source, 4)]
    assert response.raw["usage"]["prompt_tokens"] < len(lm.llm.encode(SENTENCES))
    for documents in ([SENTENCES], TextNode(text=SENTENCES), NodeWithScore(node=TextNode(text=SENTENCES))):
        handed = llm.chat([ChatMessage(QUESTION)], documents=documents, ratio=4)
        assert [one["fidelity"] for one in handed.raw["extemb"]["documents"]] == [4]


@pytest.mark.parametrize(
    ("metadata", "source"),
    [
        ({"file_path": "/docs/ships.txt", "file_name": "ships.txt"}, "/docs/ships.txt"),
        ({"file_path": "/docs/ships.pdf", "page_label": "3"}, "/docs/ships.pdf, page 3"),
        ({"url": "https://ships.example", "source": "ships"}, "ships"),
        ({"file_name": "ships.txt", "title": "Ships"}, "Ships"),
    ],
)
def test_nodes_cite_the_file_that_they_were_made_of(llm, metadata, source):
    whole = Document(text=SENTENCES, metadata=metadata)
    first, *_ = nodes = SentenceSplitter(chunk_size=100, chunk_overlap=0).get_nodes_from_documents([whole])
    assert len(nodes) > 1
    assert told(llm.chat([ChatMessage(QUESTION)], documents=[whole], ratio=4)) == [(source, 4)]
    passage = source if {"source", "title"} & metadata.keys() else f"{source}:0-{len(first.text)}"
    for node in (first, NodeWithScore(node=first, score=0.5)):
        assert told(llm.chat([ChatMessage(QUESTION)], documents=[node]))[0][0] == passage


def test_documents_of_files(llm, tmp_path):
    file = tmp_path / "ships.md"
    file.write_text(SENTENCES, encoding="utf-8")
    response = llm.chat([ChatMessage(blocks=[DocumentBlock(path=file, title="Ships"), TextBlock(text="?")])], ratio=4)
    assert told(response) == [(str(file), 4)]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (ImageBlock(url="http://none/a.png"), "a ImageBlock holds no text"),
        (DocumentBlock(url="http://none/a.txt", title="a"), "is a URL, and nothing is fetched"),
        (DocumentBlock(data=base64.b64encode(b"\xff\xfe\x00"), title="a"), "is not UTF-8 text"),
    ],
)
def test_blocks_without_text_are_an_error(llm, block, said):
    with pytest.raises(ExtensibleLLMError, match=said):
        llm.chat([ChatMessage(blocks=[block, TextBlock(text="?")])])


@pytest.mark.parametrize("role", [MessageRole.ASSISTANT, MessageRole.CHATBOT, MessageRole.MODEL])
def test_what_other_models_made_is_left_out_of_a_history(llm, role):
    picture, text = ImageBlock(url="http://none/a.png"), TextBlock(text="Here.")

    def read(*blocks):
        talk = [ChatMessage("Draw."), ChatMessage(blocks=list(blocks), role=role), ChatMessage("Why?")]
        return llm.chat(talk).raw["usage"]["prompt_tokens"]

    assert read(text, picture) == read(text)


@pytest.mark.parametrize("call", ["acomplete", "achat", "astream_complete", "astream_chat"])
def test_weights_are_not_loaded_on_the_event_loop(call, lm, monkeypatch):
    threads = []
    monkeypatch.setattr(
        "extemb_core.frameworks.settings.share",
        lambda *args, **settings: threads.append(threading.current_thread()) or lm,
    )
    llm = ExtensibleLLM.from_model_id("tiny", max_tokens=2)

    async def ask():
        answer = await getattr(llm, call)([ChatMessage(QUESTION)] if "chat" in call else QUESTION)
        if "stream" in call:
            assert [piece async for piece in answer]
        return threading.current_thread()

    loop = asyncio.run(ask())
    assert threads
    assert loop not in threads
    assert llm.to_payload()["model_name"] == "tiny"


@pytest.mark.parametrize("stop", ["END", ["END"]])
def test_a_text_that_ends_an_answer_is_one_text(lm, stop):
    whole = ExtensibleLLM.from_lm(lm, max_tokens=4).complete(QUESTION).text
    assert ExtensibleLLM.from_lm(lm, max_tokens=4, stop=stop).complete(QUESTION).text == whole
    assert ExtensibleLLM.from_lm(lm, max_tokens=4).complete(QUESTION, stop=stop).text == whole


@pytest.mark.parametrize("name", ["messages_to_prompt", "completion_to_prompt"])
def test_a_prompt_of_ones_own_is_an_error_that_names_the_way(name):
    with pytest.raises(ConfigError, match=f"{name}= makes no difference: .* formatted=True"):
        ExtensibleLLM.from_model_id("nobody/knows", **{name: str})
    assert ExtensibleLLM.from_model_id("nobody/knows", **{name: None}).model == "nobody/knows"


def test_other_blocks_and_roles(llm, lm):
    thought = [types.ThinkingBlock(content="hm")] if hasattr(types, "ThinkingBlock") else []  # not in 0.13
    cited = CitationBlock(cited_content="41 ships", source="a", title="a", additional_location_info={})
    messages = [
        ChatMessage("Be brief.", role=MessageRole.DEVELOPER),
        ChatMessage("How many?", role=MessageRole.USER),
        ChatMessage(blocks=[*thought, TextBlock(text="41 "), cited], role=MessageRole.MODEL),
        ChatMessage("Why?", role=MessageRole.USER),
    ]
    ours = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "41 41 ships"},
        {"role": "user", "content": "Why?"},
    ]
    assert llm.chat(messages).message.content == lm.chat(ours, max_new_tokens=4).text


@pytest.mark.parametrize("kind", ["citable", "document"])
def test_a_title_that_is_no_unicode_is_one_with_a_mark(llm, kind):
    block = {
        "citable": lambda: CitableBlock(title="caf\udce9", source="s", content=[TextBlock(text="A text.")]),
        "document": lambda: DocumentBlock(
            title="caf\udce9", data=base64.b64encode(b"A text."), document_mimetype="text/plain"
        ),
    }[kind]()
    assert llm.chat([ChatMessage(blocks=[block, TextBlock(text="?")])]).raw["extemb"]["documents"]


def test_a_turn_without_calls_has_no_field_for_them(lm):
    (said,) = to_messages([ChatMessage("It is Bob.", role=MessageRole.ASSISTANT)], lm.refs)
    assert said == {"role": "assistant", "content": ["It is Bob."]}


class Call(BaseModel):
    """A call as the client of another LLM has it."""

    id: str = "1"
    function: dict[str, Any]


def calling(form, arguments):
    """A turn of the assistant that is a call."""
    function = {"name": "weather", "arguments": arguments}
    if form == "block":
        if not hasattr(types, "ToolCallBlock"):
            pytest.skip("LlamaIndex 0.13 has none")
        call = types.ToolCallBlock(tool_name="weather", tool_kwargs=arguments)
        return ChatMessage(blocks=[call], role=MessageRole.ASSISTANT)
    kept = {
        "mapping": {"id": "1", "type": "function", "function": function},
        "object": Call(function=function),
        "input": {"id": "1", "name": "weather", "input": arguments},
    }[form]
    return ChatMessage("", role=MessageRole.ASSISTANT, additional_kwargs={"tool_calls": [kept]})


@pytest.mark.parametrize("form", ["block", "mapping", "object", "input"])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_calls_in_a_history_are_read(llm, lm, form, arguments):
    talk = [
        ChatMessage("What?"),
        calling(form, arguments),
        ChatMessage("rain", role=MessageRole.TOOL),
        ChatMessage("Where?"),
    ]
    written = f"\n<tool_call>\n{json.dumps({'name': 'weather', 'arguments': arguments})}\n</tool_call>"
    ours = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": written},
        {"role": "tool", "content": "rain"},
        {"role": "user", "content": "Where?"},
    ]
    assert llm.chat(talk).raw["usage"]["prompt_tokens"] == lm.positions(ours)


@pytest.mark.parametrize("call", [{"function": {"name": None, "arguments": {}}}, {"name": None, "input": {}}])
def test_a_call_in_a_history_without_a_name_is_left_out(lm, call):
    turn = ChatMessage("So.", role=MessageRole.ASSISTANT, additional_kwargs={"tool_calls": [call]})
    assert to_messages([turn], lm.refs) == [{"role": "assistant", "content": ["So."]}]


def test_settings_of_a_call_go_before_those_of_the_object(llm, lm):
    assert llm.complete(QUESTION, max_tokens=2).raw["usage"]["completion_tokens"] == 2
    first = llm.complete(QUESTION).text[0]
    assert first not in llm.complete(QUESTION, stop=first).text
    with pytest.raises(ExtensibleLLMError, match="unknown setting colour='red'") as raised:
        llm.complete(QUESTION, colour="red")
    assert isinstance(raised.value.__cause__, ConfigError)
    assert isinstance(raised.value, ExtembError)


@pytest.mark.parametrize("mode", ["refine", "compact", "tree_summarize", "simple_summarize"])
@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 7}, {"ratio": 3}, {"budget": "many"}, {"stop": [7]}])
def test_a_wrong_setting_is_an_error_and_no_empty_answer(lm, mode, wrong):
    index = SummaryIndex([TextNode(text="The mill was built in 1820 by Ada Moss.")])
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    for name, value in wrong.items():
        object.__setattr__(llm, name, value)  # pydantic knows some of them at once
    engine = index.as_query_engine(llm=llm, response_mode=mode)
    for ask in (engine.query, lambda question: asyncio.run(engine.aquery(question))):
        with pytest.raises(ExtensibleLLMError):
            ask("When?")


@pytest.mark.parametrize("form", ["complete", "stream_complete", "stream_chat", "astream_chat"])
async def test_a_model_that_cannot_be_loaded_is_the_same_error_in_every_form(form, tmp_path):
    save_tiny(tmp_path)
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "llm")  # whose embedder is another's
    llm = ExtensibleLLM(model=tmp_path / "llm", embedder=tmp_path / "embedder")

    async def answer():
        if form == "astream_chat":
            return [piece async for piece in await llm.astream_chat([ChatMessage(QUESTION)])]
        return list(getattr(llm, form)(QUESTION if "complete" in form else [ChatMessage(QUESTION)]))

    with pytest.raises(ExtensibleLLMError, match="load it with its own LLM"):
        await answer()


def test_a_prompt_larger_than_the_window_is_an_error_and_no_empty_answer(lm):
    class Long(ExtensibleLLM):
        @property
        def metadata(self):
            return super().metadata.model_copy(update={"context_window": 100_000})

    index = SummaryIndex([TextNode(text=" ".join(map(str, range(2000))))])
    with pytest.raises(ExtensibleLLMError, match="positions"):
        index.as_query_engine(llm=Long.from_lm(lm, max_tokens=4)).query("Which?")


def test_the_metadata_is_the_llms(llm, lm):
    assert (llm.metadata.context_window, llm.metadata.num_output) == (lm.llm.context_window, 4)
    assert llm.metadata.is_chat_model
    assert ExtensibleLLM.from_model_id("smollm2-135m-joint").metadata.model_name == "smollm2-135m-joint"
    assert "from_model_id" not in llm.to_dict()


def test_a_chat_goes_on_past_three_windows():
    small = LLM(tiny_model("llama", max_position_embeddings=512), tiny_tokenizer(), name="small")
    lm = ExtensibleLM(small, random_embedder(small))
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4)
    messages = []
    for number in range(18):
        messages.append(ChatMessage(f"Question {number}: " + SENTENCES[:250], role=MessageRole.USER))
        response = llm.chat(messages)
        messages.append(response.message)
    assert response.raw["usage"]["total_tokens"] <= lm.llm.context_window
    assert len(lm.llm.encode("".join(str(one.content) for one in messages))) > 3 * lm.llm.context_window
    assert {one["fidelity"] for one in response.raw["extemb"]["documents"]} & {2, 4, 8}


@pytest.mark.parametrize("budget", [None, 1024, 9999])
def test_a_completion_is_the_same_with_a_budget(lm, budget):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=4, budget=budget, ratio=4)
    assert llm.complete("So?").text == lm.ask("So?", max_new_tokens=4).text
    assert llm.complete("So?", formatted=True).text == lm.generate("So?", max_new_tokens=4).text


@pytest.mark.parametrize("turns", [1, 9, 17, 25, 33])
def test_a_chat_of_any_length_is_answered_with_a_budget(lm, turns, tmp_path):
    """Nothing to it without documents; room for them with them; and what was said is in no store on disk."""
    roles = MessageRole.USER, MessageRole.ASSISTANT
    talk = [ChatMessage(f"{at}. {SENTENCES[at:][:300]}", role=roles[at % 2]) for at in range(turns - 1)]
    talk.append(ChatMessage("So?", role=MessageRole.USER))
    with EmbeddingStore.open(tmp_path / "docs.extemb") as store:
        stored = ExtensibleLM(lm.llm, lm.embedder, store)
        for budget in (None, 1024, 9999):
            llm = ExtensibleLLM.from_lm(stored, max_tokens=4, budget=budget, ratio=4)
            response = llm.chat(talk)
            assert all(source.startswith("turn ") for source, _ in told(response))
            assert [*llm.stream_chat(talk)][-1].message.content == response.message.content
            assert len(store) == 0
        for budget in (100, 9999):
            llm = ExtensibleLLM.from_lm(stored, max_tokens=4, budget=budget, ratio=4)
            response = llm.chat(talk, documents=[SENTENCES[:200]])
            assert response.raw["extemb"]["documents"][0]["fidelity"] == 4
            assert response.raw["extemb"]["budget"] <= budget
        assert len(store) == 1
    for wrong in (-1, "many"):
        with pytest.raises(ExtensibleLLMError, match=f"budget={wrong!r}"):
            ExtensibleLLM.from_lm(lm).chat(talk, budget=wrong)


def test_tokens_are_counted_by_the_callbacks_of_llamaindex(llm):
    counter = TokenCountingHandler(tokenizer=lambda text: [0] * 1000)
    llm.callback_manager = CallbackManager([counter])
    usage = llm.complete(QUESTION).raw["usage"]
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]


@pytest.fixture
def passes(lm, monkeypatch):
    with passes_of(lm.llm, monkeypatch) as passes:
        yield passes


async def test_the_loop_is_not_blocked_and_cancelling_stops_the_llm(llm, passes):
    async def until_held():  # which only a loop that is not blocked comes to
        while not passes.held.is_set():
            await asyncio.sleep(0.005)

    meanwhile = asyncio.create_task(until_held())
    working = asyncio.create_task(llm.achat([ChatMessage(QUESTION)], max_tokens=400))
    await meanwhile
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    passes.let(8)  # it is told between two pieces of text
    assert await asyncio.to_thread(passes.stopped)


async def test_who_stops_reading_stops_the_llm(llm, passes):
    stream = await llm.astream_chat([ChatMessage(QUESTION)], max_tokens=400)
    async for _ in stream:
        break
    await stream.aclose()
    assert await asyncio.to_thread(passes.stopped)


def test_who_closes_a_stream_stops_the_llm(llm, passes):
    pieces = llm.stream_chat([ChatMessage(QUESTION)], max_tokens=400)
    next(pieces)
    pieces.close()
    gc.collect()
    assert passes.stopped()


def test_importing_and_naming_a_model_loads_neither_torch_nor_transformers():
    code = (
        "import sys; from llama_index.llms.extemb import ExtensibleLLM; "
        "from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor as Post; "
        "Post(llm=ExtensibleLLM.from_model_id('smollm2-135m-instruct')); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    import llama_index.llms.extemb as package

    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = package.other
