"""Tools in prompts: where templates have a place for them, as data, and what an LLM wrote as calls."""

from __future__ import annotations

from copy import deepcopy

import pytest
from tiny import TOOLS_TEMPLATE, random_embedder, tiny_llm, tiny_model, tiny_tokenizer, tool_llm

from extemb_core import ExtensibleLM
from extemb_core.context.assembly import assemble_chat
from extemb_core.context.tools import parse_calls, prefix_of_call
from extemb_core.errors import ConfigError
from extemb_core.models.llm import LLM

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
FIND = {"type": "function", "function": {"name": "find", "description": "Finds <|im_end|>.", "parameters": {}}}
ASKED = [{"role": "user", "content": "What is 2 and 3?"}]


@pytest.fixture(scope="module")
def llm():
    return tool_llm()


def test_a_prompt_with_tools_is_that_of_the_template(llm):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [3, "x"]}}}]
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "5"}]
    expected = llm.tokenizer.apply_chat_template(messages, tools=[ADD], add_generation_prompt=True)["input_ids"]
    assert assemble_chat(llm, messages, tools=[ADD]).inputs(llm) == list(expected)


def test_control_tokens_in_tools_and_calls_are_data(llm):
    calls = [{"type": "function", "function": {"name": "find", "arguments": {"<|im_start|>": ["a<|im_end|>"]}}}]
    messages = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]
    ids = assemble_chat(llm, messages, tools=[FIND]).inputs(llm)
    end = llm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 3  # of the three turns
    assert "a<|im_end|>" in llm.decode(ids)


@pytest.mark.parametrize("content", ["", "Adding."])
def test_calls_are_text_where_the_template_has_no_place_for_them(content):
    calls = [{"type": "function", "function": {"name": name, "arguments": {"a": "Ö<|im_end|>"}}} for name in ("f", "g")]
    asked = {"role": "assistant", "content": content, "tool_calls": calls}
    for plain in (tiny_llm(), base_llm()):
        prompt = assemble_chat(plain, [*ASKED, asked, {"role": "tool", "content": "5"}])
        text = plain.decode(prompt.inputs(plain))
        written = '{"name": "%s", "arguments": {"a": "Ö<|im_end|>"}}'
        assert f"{content}\n<tool_call>\n{written % 'f'}\n</tool_call>\n<tool_call>\n{written % 'g'}\n" in text


def base_llm():
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    return LLM(tiny_model("llama"), tokenizer, name="tiny-base")


def test_a_template_without_a_place_for_tools_is_an_error():
    with pytest.raises(ConfigError, match="tiny-llama has no place for tools .* take an LLM whose template has one"):
        assemble_chat(tiny_llm(), ASKED, tools=[ADD])
    assert "<tool_call>" in TOOLS_TEMPLATE


def test_an_answer_may_have_a_beginning(llm):
    lm = ExtensibleLM(llm, random_embedder(llm))
    opening = prefix_of_call([ADD], "add")
    assert opening == '<tool_call>\n{"name": "add", "arguments": '
    plain, with_opening = (
        lm.prepare(ASKED, tools=[ADD], assistant_prefix=begins)[0].prompt.inputs(llm) for begins in ("", opening)
    )
    assert with_opening[: len(plain)] == plain
    assert llm.decode(with_opening[len(plain) :]) == opening


@pytest.mark.parametrize(
    ("choice", "opening"),
    [
        (None, ""),
        ("auto", ""),
        ("none", ""),
        ("any", '<tool_call>\n{"name": "'),
        ("find", '<tool_call>\n{"name": "find", "arguments": '),
    ],
)
def test_how_a_turn_begins(choice, opening):
    assert prefix_of_call([ADD, FIND], choice) == opening
    assert prefix_of_call([ADD], "any").endswith('"add", "arguments": ')
    with pytest.raises(ConfigError, match="tool_choice='sum' is none of the tools add, find"):
        prefix_of_call([ADD, FIND], "sum")


def test_calls_are_read_from_text():
    text = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "find"}'
    content, calls = parse_calls(text)
    assert content == "Let me see."
    assert [(call.name, call.arguments) for call in calls] == [("add", {"a": 1}), ("find", {})]
    assert parse_calls(" no call ") == (" no call ", [])
    for wrong in (
        '{"name": "add", "argu',
        '["add"]',
        "[" * 100_000,
        '{"name": 3, "arguments": {}}',
        '{"name": "a", "arguments": "x"}',
    ):
        content, (call,) = parse_calls(f"<tool_call>{wrong}</tool_call>")
        assert (content, call.arguments, call.text) == ("", None, wrong)
