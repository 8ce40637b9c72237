"""Tools and agents, with an LLM whose template has a place for tools and whose words are written here."""

from __future__ import annotations

import asyncio
import json

import pytest
from langchain.agents import create_agent
from langchain_core.caches import InMemoryCache
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel
from tiny import shared_embedder, tiny_llm, tool_llm

from extemb_core import ExtensibleLM, Library
from extemb_core.errors import ConfigError
from extemb_core.models.generation import Generated
from extemb_core.models.llm import LLM
from langchain_extemb import ChatExtensible, ExtensibleLLM, ExtensibleRetriever


class Mill(BaseModel):
    """A mill."""

    name: str
    year: int


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@pytest.fixture
def lm():
    llm = tool_llm()
    return ExtensibleLM(llm, shared_embedder(llm))


@pytest.fixture
def says(monkeypatch):
    """What the LLM will write, and the prompts it was given, as text."""
    words, prompts = [], []

    def stream(self, prompt, sampling, result=None):
        prompts.append(self.decode(prompt) if isinstance(prompt, list) else prompt)
        result.text, result.token_ids, result.finish_reason = words.pop(0), [1], "stop"
        yield result.text

    monkeypatch.setattr(LLM, "stream", stream)
    monkeypatch.setattr(LLM, "generate", lambda *args: pytest.fail("one prompt at a time here"))
    return words, prompts


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_come_back_as_calls(lm, says):
    words, prompts = says
    words.append("Adding. " + call("add", a=2, b=3))
    message = ChatExtensible.from_lm(lm).bind_tools([add]).invoke("What is 2 and 3?")
    assert message.content == "Adding."
    (made,) = message.tool_calls
    assert (made["name"], made["args"]) == ("add", {"a": 2, "b": 3})
    assert made["id"].startswith("call_")
    assert '"name": "add"' in prompts[0]


def test_a_chosen_tool_is_begun_and_what_is_no_call_is_told(lm, says):
    words, prompts = says
    words += ['{"a": 1, "b": 2}}\n</tool_call>', '{"a": 1', call("add", a=1, b=1), "No call."]
    chat = ChatExtensible.from_lm(lm)
    message = chat.bind_tools([add], tool_choice="add").invoke("Add.")
    assert message.tool_calls[0]["args"] == {"a": 1, "b": 2}
    assert prompts[0].endswith('<tool_call>\n{"name": "add", "arguments": ')
    message = chat.bind_tools([add], tool_choice="any").invoke("Add.")
    assert message.tool_calls == []
    assert '{"a": 1' in message.invalid_tool_calls[0]["args"]
    streamed = list(chat.bind_tools([add]).stream("Add."))
    assert [chunk.tool_calls[0]["args"] for chunk in streamed if chunk.tool_calls] == [{"a": 1, "b": 1}]
    assert chat.bind_tools([add], tool_choice="none").invoke("Add.").content == "No call."
    assert '"name": "add"' not in prompts[-1]
    for wrong in ("sub", {"type": "function", "function": {"name": "sub"}}):
        with pytest.raises(ConfigError, match="tool_choice='sub' is none of the tools add"):
            chat.bind_tools([add], tool_choice=wrong)


def test_a_call_that_is_cut_off_is_read_as_it_was_written_however_it_came(lm, says):
    words, prompts = says
    chat = ChatExtensible.from_lm(lm).bind_tools([add])
    cut = '{"name": "add", "arguments": {"a": 2, "b'
    words += [f"<tool_call>\n{cut}"] * 2 + ["No."] * 2
    whole, (streamed,) = chat.invoke("What is 2 and 3?"), chat.stream("What is 2 and 3?")
    assert len(whole.invalid_tool_calls) == len(streamed.invalid_tool_calls) == 1
    for message in (whole, streamed):
        chat.invoke([HumanMessage("What is 2 and 3?"), message, HumanMessage("Try again.")])
    assert f"<tool_call>\n{cut}\n</tool_call>" in prompts[2]
    assert prompts[2] == prompts[3]


@pytest.mark.parametrize(
    ("choice", "begun"),
    [
        ({"type": "function", "function": {"name": "add"}}, '"add", "arguments": '),
        ({"type": "tool", "name": "add"}, '"add", "arguments": '),
        ({"type": "any"}, '"add", "arguments": '),
        (True, '"add", "arguments": '),
        ({"type": "auto"}, None),
        (False, None),
        ({"type": "none"}, None),
    ],
)
def test_a_tool_is_chosen_in_the_forms_of_other_models(lm, says, choice, begun):
    words, prompts = says
    words += ["{}}"] * 2
    chat = ChatExtensible.from_lm(lm)
    formatted = [convert_to_openai_tool(add)]
    chat.bind_tools([add], tool_choice=choice).invoke("Add.")
    chat.invoke("Add.", tools=formatted, tool_choice=choice)
    for prompt in prompts:
        assert prompt.endswith(f'<tool_call>\n{{"name": {begun}' if begun else "assistant\n")


@pytest.mark.parametrize("choice", ["none", {"type": "none"}])
def test_without_a_choice_of_tools_what_looks_like_a_call_is_text(lm, says, choice):
    words, prompts = says
    example = f"An example: {call('add', a=1, b=2)}"
    words += [example] * 2
    bound = ChatExtensible.from_lm(lm).bind_tools([add], tool_choice=choice)
    whole, streamed = bound.invoke("How are calls written?"), list(bound.stream("How are calls written?"))
    assert (whole.content, whole.tool_calls, whole.invalid_tool_calls) == (example, [], [])
    assert len(streamed) > 1  # in pieces
    assert "".join(chunk.content for chunk in streamed) == example
    assert not any("Add two numbers" in prompt for prompt in prompts)


def product(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


@pytest.mark.parametrize("given", [product, add, Mill, Mill.model_json_schema(), convert_to_openai_tool(product)])
def test_tools_of_a_call_are_those_of_bind_tools(lm, says, given):
    words, prompts = says
    words += ["None."] * 3
    chat = ChatExtensible.from_lm(lm, cache=InMemoryCache())
    chat.bind_tools([given]).invoke("Multiply.")
    for one in (given, convert_to_openai_tool(given)):  # which the cache knows by what they come to
        chat.invoke("Multiply.", tools=[one])
    list(chat.stream("Multiply.", tools=[given]))
    assert len({*prompts}) == 1
    assert len(prompts) == 3


BOUND = {
    "tools": lambda bound: bound.bind_tools([Mill]).invoke("q"),
    "tools after others": lambda bound: bound.with_config(tags=["a"]).bind(seed=3).bind_tools([Mill]).invoke("q"),
    "schema": lambda bound: bound.with_structured_output(Mill, include_raw=True).invoke("q")["raw"],
    "agent": lambda bound: create_agent(bound, [add]).invoke({"messages": [("user", "q")]})["messages"][-1],
}


@pytest.mark.parametrize("use", BOUND.values(), ids=BOUND)
def test_what_was_bound_before_tools_stays_bound(lm, says, use):
    words, prompts = says
    words.append("Done.")
    bound = ChatExtensible.from_lm(lm, max_tokens=4).bind(documents=["The mill was built in 1805."])
    (entry,) = use(bound).response_metadata["extemb"]["documents"]
    assert entry["fidelity"] == "raw"
    assert "The mill was built in 1805." in prompts[0]


def test_settings_of_the_tools_go_before_those_that_were_bound(lm):
    chat = ChatExtensible.from_lm(lm).bind(tools=[Mill], seed=3, max_tokens=9)
    bound = chat.bind_tools([add], tool_choice="add", seed=4)
    assert [one["function"]["name"] for one in bound.kwargs["tools"]] == ["add"]
    assert (bound.kwargs["seed"], bound.kwargs["max_tokens"]) == (4, 9)
    assert chat.lc_id()[-1] == "RunnableBinding"


def test_an_agent_goes_on_past_the_window(lm, says):
    words, prompts = says

    @tool
    def log(day: int) -> str:
        """Read the log of a day."""
        return f"Day {day}. " + "The keeper counted ships. " * 60

    chat = ChatExtensible.from_lm(lm, max_tokens=8)
    words += [call("log", day=day) for day in range(8)] + ["Done."]
    *_, last, said = create_agent(chat, [log]).invoke({"messages": [("user", "How many ships?")]})["messages"]
    assert said.content == "Done."
    assert lm.llm.context_window < sum(len(lm.llm.encode(log.invoke({"day": day}))) for day in range(8))
    assert last.content.startswith("Day 7.")
    condensed = {one["source"]: one["fidelity"] for one in said.response_metadata["extemb"]["documents"]}
    assert len(condensed) == 7  # the newest is text
    assert set(condensed.values()) - {"raw"}
    assert len(prompts[-1]) <= lm.llm.context_window - 8


def test_half_an_emoji_in_a_call_does_not_end_an_agent(lm, says):
    words, _ = says
    words += ['<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "\\ud83d"}}\n</tool_call>', "Done."]
    asked = {"messages": [("user", "Add.")]}
    *_, said = create_agent(ChatExtensible.from_lm(lm, max_tokens=4), [add]).invoke(asked)["messages"]
    assert said.content == "Done."


CALLS = {
    "invoke": lambda model, settings: model.invoke("Add.", **settings),
    "stream": lambda model, settings: list(model.stream("Add.", **settings)),
    "batch": lambda model, settings: model.batch(["Add."], **settings),
    "ainvoke": lambda model, settings: asyncio.run(model.ainvoke("Add.", **settings)),
    "abatch": lambda model, settings: asyncio.run(model.abatch(["Add."], **settings)),
    "bind": lambda model, settings: model.bind(**settings).invoke("Add."),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tools": [product]}, "the chat template of tiny-llama has no place for tools"),
        ({"tools": [3]}, "tools=.3. are no tools"),
        ({"tools": 3}, "tools=3 are no tools"),
        ({"tools": "add"}, "tools='add' are no tools"),
        ({"tools": [{"type": "web_search_preview"}]}, "are no tools that can be described to an LLM"),
        ({"tools": [product], "tool_choice": {"function": "sub"}}, "tool_choice='sub' is none of the tools product"),
        ({"tools": [product], "tool_choice": 3}, "tool_choice=3 is none of the tools product"),
        ({"tool_choice": "add"}, "tool_choice='add' is none of the tools of a call that has none"),
        ({"tool_choice": "any"}, "tool_choice='any' is none of the tools of a call that has none"),
        ({"response_format": {"type": "json_object"}}, "unknown setting response_format=.*, or leave it out"),
        ({"functions": [product]}, "unknown setting functions=.*, or leave it out"),
    ],
)
def test_what_is_no_tool_or_no_setting_is_one_sentence(call, settings, said):
    llm = tiny_llm()
    with pytest.raises(ConfigError, match=said):
        call(ChatExtensible.from_lm(ExtensibleLM(llm, shared_embedder(llm))), settings)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", ["tools", "tool_choice", "functions", "response_format"])
def test_a_completion_has_no_tools(lm, call, name):
    with pytest.raises(ConfigError, match=f"unknown setting {name}=.*; pass one of budget, .*, or leave it out"):
        call(ExtensibleLLM.from_lm(lm), {name: [product]})


async def test_calls_come_back_from_async_streams_too(lm, says):
    says[0].append(call("add", a=1, b=1))
    chunks = [chunk async for chunk in ChatExtensible.from_lm(lm).bind_tools([add]).astream("Add.")]
    assert [chunk.tool_calls[0]["name"] for chunk in chunks if chunk.tool_calls] == ["add"]


def test_structured_output_is_a_call_that_is_begun(lm, says):
    words, _ = says
    words.append('{"name": "Old mill", "year": 1820}}')
    chat = ChatExtensible.from_lm(lm)
    assert chat.with_structured_output(Mill).invoke("Which mill?") == Mill(name="Old mill", year=1820)


@pytest.mark.parametrize("bind", [lambda chat: chat, lambda chat: chat.bind(seed=1)])
def test_structured_output_by_a_method_that_langchain_has_not_is_refused(lm, bind):
    chat = bind(ChatExtensible.from_lm(lm))
    for method in ("function_calling", "json_mode", "json_schema"):
        assert chat.with_structured_output(Mill, method=method).first.kwargs["tool_choice"] == "any"
    with pytest.raises(ConfigError, match="method='bogus' is not one of function_calling, json_mode, json_schema"):
        chat.with_structured_output(Mill, method="bogus")


def test_a_conversation_with_calls_is_rendered_by_the_template(lm, says):
    words, prompts = says
    words.append("5")
    asked = AIMessage("", tool_calls=[{"name": "add", "args": {"a": 2, "b": 3}, "id": "1"}])
    ChatExtensible.from_lm(lm).bind_tools([add]).invoke(
        [HumanMessage("Add."), asked, ToolMessage("5", tool_call_id="1")]
    )
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>' in prompts[0]
    assert prompts[0].endswith("tool\n5\nassistant\n")


def test_tools_are_counted(lm, says):
    says[0].append("5")
    chat = ChatExtensible.from_lm(lm)
    used = chat.bind_tools([add]).invoke("Add.").usage_metadata["input_tokens"]
    assert chat.get_num_tokens_from_messages([HumanMessage("Add.")], tools=[add]) == used
    assert chat.get_num_tokens_from_messages([HumanMessage("Add.")]) < used
    assert chat.get_num_tokens_from_messages([]) == 0


def test_an_llm_without_a_place_for_tools_says_so():
    llm = tiny_llm()
    chat = ChatExtensible.from_lm(ExtensibleLM(llm, shared_embedder(llm)))
    with pytest.raises(ConfigError, match="has no place for tools"):
        chat.bind_tools([add]).invoke("Add.")


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
def test_an_agent_with_a_retriever_tool_reads_what_it_found_as_embeddings(lm, says, tmp_path, monkeypatch):
    from retrieval_encoder import by_words

    words, prompts = says
    words += [call("search", query="When was the mill built?"), "In 1820."]
    with Library(tmp_path / "lib", lm, encoder=by_words, passage_tokens=60, ratio=4) as library:
        library.add({"text": "The old mill was built in 1820 by the river. It ground corn.", "title": "Mill"})
        search = create_retriever_tool(
            ExtensibleRetriever(library=library, k=1), "search", "Searches.", response_format="content_and_artifact"
        )
        agent = create_agent(ChatExtensible.from_lm(lm, ratio=4), tools=[search])
        result = agent.invoke({"messages": [HumanMessage("When was the mill built?")]})
    assert [type(message) for message in result["messages"]] == [HumanMessage, AIMessage, ToolMessage, AIMessage]
    assert result["messages"][-1].content == "In 1820."
    (told,) = result["messages"][-1].response_metadata["extemb"]["documents"]
    assert told["fidelity"] == 4
    assert told["source"].startswith("Mill")
    assert isinstance(prompts[0], str)
    assert prompts[1].shape[1] == lm.llm.hidden_size  # embeddings among the tokens


def test_generated_is_what_the_fixture_fills():
    assert set(Generated().__dataclass_fields__) == {"text", "token_ids", "finish_reason"}
