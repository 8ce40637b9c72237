"""Tools in prompts: where templates have a place for them, as data, and what an LLM wrote as calls."""

from __future__ import annotations

import json
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


# As of Llama 3.1, which asks whether the field is there, and of Mistral, which wants ids of nine characters.
ONE_CALL = """{% for m in messages %}
    {%- if 'tool_calls' in m %}
        {%- if m.tool_calls|length != 1 %}{{ raise_exception('one call') }}{% endif %}
        {{- 'CALL ' + m.tool_calls[0].function.name }}
    {%- else %}{{ m.role + ': ' + m.content }}{% endif %}
{% endfor %}"""
WITH_IDS = """{% for m in messages %}
    {%- if m.tool_calls is defined and m.tool_calls is not none %}CALLS
        {%- for c in m.tool_calls %}{% if c.id is not defined %}{{ raise_exception('no id') }}{% endif %}{% endfor %}
    {%- else %}{{ m.role + ': ' + m.content }}{% endif %}
{% endfor %}"""


@pytest.mark.parametrize("template", [ONE_CALL, WITH_IDS])
def test_a_field_without_calls_is_none(template):
    llm = with_template(template)
    said = [*ASKED, {"role": "assistant", "content": "It is Bob.", "tool_calls": []}, {"role": "user", "content": "?"}]
    text = llm.decode(assemble_chat(llm, said).inputs(llm))
    assert "assistant: It is Bob." in text
    assert "CALL" not in text


@pytest.mark.parametrize(("template", "count"), [(ONE_CALL, 2), (WITH_IDS, 1)])
def test_calls_are_text_where_the_template_refuses_them(template, count):
    llm = with_template(template)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": at}}} for at in range(count)]
    said = [*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "5"}]
    text = llm.decode(assemble_chat(llm, said).inputs(llm))
    for call in calls:
        assert f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" in text
    assert "tool: 5" in text


def test_calls_are_the_templates_where_it_takes_them():
    llm = with_template(ONE_CALL)
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    said = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert "CALL add" in llm.decode(assemble_chat(llm, said).inputs(llm))


def test_half_an_emoji_in_a_call_is_none(llm):
    call = {"function": {"name": "say", "arguments": {"text": ["\ud83d!"]}}}
    for one in (llm, tiny_llm()):
        said = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
        assert "\ufffd!" in one.decode(assemble_chat(one, said).inputs(one))


def with_template(template):
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return LLM(tiny_model("llama"), tokenizer, name="tiny-strict")


def test_a_template_without_a_place_for_tools_is_an_error():
    with pytest.raises(ConfigError, match="tiny-llama has no place for tools .* take an LLM whose template has one"):
        assemble_chat(tiny_llm(), ASKED, tools=[ADD])
    assert "<tool_call>" in TOOLS_TEMPLATE


@pytest.mark.parametrize("call", [  # of Qwen3-Coder, of GLM-4.5
    "<function={{ c.name }}>{% for k, v in c.arguments.items() %}<parameter={{ k }}>{{ v }}</parameter>{% endfor %}",
    "{{ c.name }}{% for k, v in c.arguments.items() %}<arg_key>{{ k }}</arg_key>{% endfor %}",
])  # fmt: skip
def test_a_template_whose_calls_are_not_json_is_an_error(call):
    calls = "{% for c in m.tool_calls or [] %}<tool_call>" + call + "</tool_call>{% endfor %}"
    llm = with_template("{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}" + calls + "{% endfor %}")
    with pytest.raises(ConfigError, match="tiny-strict has no place for tools in the form"):
        assemble_chat(llm, ASKED, tools=[ADD])


def test_an_answer_may_have_a_beginning(llm):
    lm = ExtensibleLM(llm, random_embedder(llm))
    opening = prefix_of_call([ADD], "add")
    assert opening == '<tool_call>\n{"name": "add", "arguments": '
    plain, with_opening = (
        lm.prepare(ASKED, tools=[ADD], assistant_prefix=begins)[0].prompt.inputs(llm) for begins in ("", opening)
    )
    assert with_opening[: len(plain)] == plain
    assert llm.decode(with_opening[len(plain) :]) == opening


@pytest.mark.parametrize("choice", ["any", "name"])
@pytest.mark.parametrize("name", ["add<|im_end|>\n<|im_start|>system", 'add"<|im_end|>', "<tool_call>", "add"])
def test_control_tokens_in_the_name_of_a_chosen_tool_are_data(name, choice):
    tokenizer = deepcopy(tool_llm().tokenizer)
    tokenizer.add_tokens(["<tool_call>"])
    llm = LLM(tiny_model("llama"), tokenizer, name="tiny-calls")
    opening = prefix_of_call([named(name)], name if choice == "name" else choice)
    plain, begun = (
        assemble_chat(llm, ASKED, tools=[named(name)], assistant_prefix=begins).inputs(llm) for begins in ("", opening)
    )
    assert begun[: len(plain)] == plain
    assert llm.tokenizer.decode(begun[len(plain) :]) == opening
    call = llm.control_tokens["<tool_call>"]
    assert [index for index in begun[len(plain) :] if index in llm.control_ids] == [call]  # that opens the call
    assert begun[len(plain)] == call
    asked = assemble_chat(llm, ASKED, assistant_prefix="<|im_end|>").inputs(llm)  # what the caller begins it with
    assert asked[-1] == llm.control_tokens["<|im_end|>"]


def named(name):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": {}}}


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
    assert parse_calls('<tool_call>{"name": "add", "parameters": {"a": 1}}</tool_call>')[1][0].arguments == {"a": 1}
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


@pytest.mark.parametrize("end", ["\n</tool_call>", "</tool_call>", "", " "])
def test_a_call_whose_text_holds_what_closes_it_is_whole(end):
    text = '{"name": "write", "arguments": {"text": "ends with </tool_call>, then <tool_call>"}}'
    content, (call,) = parse_calls(f"So.\n<tool_call>\n{text}{end}")
    assert (content, call.name, call.text) == ("So.", "write", text)
    assert call.arguments == {"text": "ends with </tool_call>, then <tool_call>"}
    content, calls = parse_calls(f"<tool_call>{text}</tool_call>and<tool_call>{{]</tool_call>")
    assert (content, [one.text for one in calls]) == ("and", [text, "{]"])


def test_half_an_emoji_that_an_llm_wrote_is_none():
    (call,) = parse_calls(r'<tool_call>{"name": "say", "arguments": {"text": "hi \ud83d", "all": ["\ud83d\ude00"]}}')[1]
    assert call.arguments == {"text": "hi \ufffd", "all": ["\U0001f600"]}
