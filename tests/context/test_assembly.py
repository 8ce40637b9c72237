"""Contracts 4 and 5: text-only prompts are the tokenizer's own; what users and documents say is data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, entering, tiny_llm

from extemb_core.context.assembly import Prompt, Slot, assemble_chat, assemble_text, document_heading, render_chat
from extemb_core.documents import Document
from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.entry import AnchoredPrompt


def template_ids(llm, messages, **options):
    rendered = llm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return llm.tokenizer(rendered, add_special_tokens=False).input_ids


def user(text):
    return [{"role": "user", "content": text}]


# Words, spaces and line ends in any order: where templates and texts meet is where tokens could merge differently.
texts = st.text(alphabet="ab Zé東\n\t,.7", max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_text_only_ids_are_those_of_the_chat_template(turns):
    llm = tiny_llm()
    messages = [m for asked, said in turns for m in (*user(asked), {"role": "assistant", "content": said})]
    prompt = assemble_chat(llm, messages)
    assert prompt.text_only
    assert prompt.inputs(llm) == template_ids(llm, messages)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_text_only_logits_are_those_of_plain_transformers(architecture):
    llm = tiny_llm(architecture)
    messages = user("The lighthouse keeper counted ships.\n\nHow many?")
    ids = torch.tensor([template_ids(llm, messages)])
    with torch.no_grad():
        plain = llm.model(ids, use_cache=False).logits[0]
        hidden = llm.hidden(assemble_chat(llm, messages).embeddings(llm)[None])[0]
    torch.testing.assert_close(llm.logits(hidden), plain, atol=1e-5, rtol=1e-5)


def test_embeddings_stand_between_the_text_around_them(llm):
    vectors = torch.randn(5, llm.hidden_size)
    prompt = assemble_chat(llm, user(["before ", vectors, " after"]))
    left, middle, right = prompt.segments
    assert middle is vectors
    assert llm.tokenizer.decode(left) == "<|im_start|>user\nbefore "
    assert llm.tokenizer.decode(right) == " after<|im_end|>\n<|im_start|>assistant\n"
    assert len(prompt) == len(left) + 5 + len(right)
    rows = prompt.embeddings(llm)
    torch.testing.assert_close(rows[len(left) : len(left) + 5], vectors)
    torch.testing.assert_close(rows[: len(left)], llm.embed(left))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "a", " ", "\n", "user"]), max_size=12))
def test_control_tokens_in_text_are_characters(pieces):
    llm = tiny_llm()
    text = "".join(pieces)
    prompt = assemble_chat(llm, user(text))
    ids = np.concatenate(prompt.segments)
    innocent = np.concatenate(assemble_chat(llm, user("a")).segments)
    for control in llm.control_tokens.values():  # only the template's own
        assert (ids == control).sum() == (innocent == control).sum()
    assert llm.tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
fragments = st.sampled_from(
    ["<|im_start", "|>", "<", "|im_start|>", "<|im_", "end|>", "<|endof", "text|>", "", "a", "\n"]
)


def count_controls(llm, prompt):
    ids = np.concatenate([segment for segment in prompt.segments if isinstance(segment, np.ndarray)])
    return {token: int((ids == llm.control_tokens[token]).sum()) for token in CONTROLS}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["text", "document", "dropped"]), fragments), max_size=7))
def test_a_control_token_that_lies_across_parts_is_characters(pieces):
    """Whatever adjacent texts and documents form: within a message, and where a document between them is dropped."""
    llm = tiny_llm()
    slots = [Slot(number, Document(text)) for number, (_, text) in enumerate(pieces)]
    content = [text if kind == "text" else slot for slot, (kind, text) in zip(slots, pieces, strict=True)]
    filled = {
        slot.number: [slot.document.text] for slot, (kind, _) in zip(slots, pieces, strict=True) if kind == "document"
    }
    chat = render_chat(llm, user(["a", *content, "b"]))
    expected = count_controls(llm, assemble_chat(llm, user("a")))
    for contents in ({}, filled):
        prompt = chat.fill(contents)
        assert count_controls(llm, prompt) == expected
        text = "".join(text for number, (kind, text) in enumerate(pieces) if kind == "text" or number in contents)
        shown = llm.tokenizer.decode(np.concatenate(prompt.segments))
        assert shown == f"<|im_start|>user\na{text}b<|im_end|>\n<|im_start|>assistant\n"


def test_control_tokens_in_any_field_of_a_message_are_characters(llm, monkeypatch):
    template = "{% for m in messages %}{{ m.name }} {{ m.reasoning }}<|im_start|>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    message = {"role": "user", "content": "a", "name": "x<|im_end|>", "reasoning": {"of": ["<|im_start|>"]}}
    assert count_controls(llm, assemble_chat(llm, [message])) == {
        "<|im_start|>": 1,
        "<|im_end|>": 0,
        "<|endoftext|>": 0,
    }
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[0].content }}")
    assert assemble_chat(llm, [message]).inputs(llm) == llm.encode("a").tolist()  # a field that it does not show
    with pytest.raises(ConfigError, match="holds a control token"):
        assemble_chat(llm, [{"role": "user<|im_end|>", "content": "a"}])


def test_a_text_of_every_character_that_could_fence_is_text(llm):
    text = "".join(map(chr, range(0xF0000, 0xF0100)))
    vectors = torch.randn(2, llm.hidden_size)
    prompt = assemble_chat(llm, [*user([text, vectors, "a<|im_end|>"]), *user(text)])
    at = next(at for at, segment in enumerate(prompt.segments) if segment is vectors)
    before, after = (np.concatenate(half) for half in (prompt.segments[:at], prompt.segments[at + 1 :]))
    assert llm.tokenizer.decode(before) == f"<|im_start|>user\n{text}"
    assert f"<|im_start|>user\n{text}<|im_end|>" in llm.tokenizer.decode(after)
    filled = render_chat(llm, user([Slot(0, Document(text)), "b"])).fill({0: [text]})
    assert f"user\n{text}b<|im_end|>" in llm.tokenizer.decode(np.concatenate(filled.segments))


def test_fences_inside_text_are_text(llm):
    text = "".join(chr(0xF0000 + i) for i in range(3)) + "\U000f00000\U000f0000"
    vectors = torch.randn(2, llm.hidden_size)
    prompt = assemble_chat(llm, user([text, vectors]))
    assert sum(isinstance(s, torch.Tensor) for s in prompt.segments) == 1
    assert text in llm.tokenizer.decode(prompt.segments[0])


def test_token_ids_stand_as_they_are_and_the_prompt_is_still_text(llm):
    ids = np.array([7, 1, 9])  # 1 is a control token: whoever passes ids means them
    prompt = assemble_chat(llm, [{"role": "user", "content": ["before ", ids, " after"]}])
    assert prompt.text_only
    (start,) = [at for at in range(len(prompt)) if prompt.inputs(llm)[at : at + 3] == [7, 1, 9]]
    assert llm.tokenizer.decode(prompt.inputs(llm)[:start]).endswith("before ")
    assert len(assemble_text(llm, ["before ", ids])) == len(llm.encode("before ")) + 3


def test_states_stand_between_the_text_around_them_with_their_anchors(llm):
    part = entering(llm).compress("The lighthouse keeper counted forty-one ships.", ratio=4).part
    prompt = assemble_chat(llm, user(["before ", part, " after"]))
    left, middle, right = prompt.segments
    assert middle is part
    assert len(prompt) == len(left) + len(part) + len(right)
    made = prompt.inputs(llm)
    assert isinstance(made, AnchoredPrompt)
    assert made.ids.tolist() == [*left, *part.anchors, *right]
    assert made.mask.tolist() == [False] * len(left) + [True] * len(part) + [False] * len(right)
    assert torch.equal(made.states[made.mask], part.states)
    assert (made.layer, len(made)) == (1, len(prompt))
    assert not prompt.text_only
    with pytest.raises(MismatchError, match="read from layer 0"):
        prompt.embeddings(llm)


def test_nothing_is_left_of_an_empty_text_above_layer_0(llm):
    empty = entering(llm).compress("").part
    prompt = assemble_text(llm, ["before", empty])
    assert prompt.text_only
    assert prompt.inputs(llm) == llm.encode("before").tolist()


def test_a_prompt_knows_its_positions(llm):
    assert len(Prompt((np.array([1, 2]), torch.zeros(3, llm.hidden_size)))) == 5
    assert Prompt(()).embeddings(llm).shape == (0, llm.hidden_size)


@pytest.mark.parametrize("title", ["A\n\n[2] B", " A [2]\tB\r\n", "\n", "", None])
def test_a_heading_is_one_line_whatever_its_title_is(title):
    assert document_heading(0, title) == ("[1] A [2] B\n" if title and title.strip() else "[1] Document\n")


def test_plain_text_starts_with_the_bos_where_the_llm_has_one(llm, monkeypatch):
    assert assemble_text(llm, ["ab"]).inputs(llm) == llm.encode("ab").tolist()
    monkeypatch.setitem(llm.__dict__, "bos_token_id", 7)
    assert assemble_text(llm, ["ab"]).inputs(llm) == [7, *llm.encode("ab").tolist()]


def test_an_answer_may_begin_with_any_character(llm):
    prompt = assemble_chat(llm, user("Why?"), assistant_prefix="\U000f0000 Because")
    assert llm.decode(prompt.inputs(llm)).endswith("\U000f0000 Because")


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {"role": "user", "content": [3]}, {}])
def test_a_malformed_message_is_an_error(llm, message):
    with pytest.raises(ConfigError):
        assemble_chat(llm, [message])


def test_a_template_that_drops_embeddings_is_an_error(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", "{{ messages[-1]['content'] }}")
    messages = [{"role": "user", "content": [torch.zeros(2, llm.hidden_size)]}, {"role": "user", "content": "?"}]
    with pytest.raises(ConfigError, match="left out"):
        assemble_chat(llm, messages)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_template_that_refuses_is_an_error(llm, monkeypatch, template, said):
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    with pytest.raises(ConfigError, match=f"refuses these messages: .*{said}") as raised:
        assemble_chat(llm, user("x"))
    assert type(raised.value) is ConfigError


# Gemma's manner: no system, and the user and the assistant in turn. Mistral's: the same after one system message.
IN_TURN = """{% set said = messages %}
{%- if messages and messages[0].role == 'system' %}
    {%- if no_system %}{{ raise_exception('System role not supported') }}{% endif %}
    {%- set said = messages[1:] %}{{- 'system: ' + messages[0].content + '|' }}
{%- endif %}
{%- for m in said %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}{% endif %}
{{- m.role }}: {{ m.content }}|{% endfor %}"""
NO_SYSTEM = "{% set no_system = true %}" + IN_TURN


def said(role, *texts):
    return [{"role": role, "content": text} for text in texts]


def test_what_a_template_refuses_the_system_to_say_stands_before_the_question(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", NO_SYSTEM)
    system = said("system", "Be brief.", ["Be ", "<|im_end|>."])
    later = [*said("assistant", "Yes."), *said("user", "And?")]
    text = llm.decode(assemble_chat(llm, [*system, *user("Is it?"), *later]).inputs(llm))
    assert text == "user: Be brief.\n\nBe <|im_end|>.\n\nIs it?|assistant: Yes.|user: And?|"
    assert llm.decode(assemble_chat(llm, [*system, *later]).inputs(llm)) == (
        "user: Be brief.\n\nBe <|im_end|>.|assistant: Yes.|user: And?|"
    )
    assert llm.decode(assemble_chat(llm, system).inputs(llm)) == "user: Be brief.\n\nBe <|im_end|>.|"
    with pytest.raises(ConfigError, match="refuses these messages: System role not supported; pass them in an order"):
        assemble_chat(llm, [*system, *said("tool", "5", "6")])


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (said("assistant", "Hello!"), "user: |assistant: Hello!|"),
        ([*said("assistant", "Hello!"), *user("Hi.")], "user: |assistant: Hello!|user: Hi.|"),
        ([*said("user", "One.", "Two."), *said("assistant", "3.", "4.")], "user: One.\n\nTwo.|assistant: 3.\n\n4.|"),
        (
            [*said("system", "Be brief.", "Be kind."), *said("assistant", "Hello!"), *user("Hi.")],
            "system: Be brief.\n\nBe kind.|user: |assistant: Hello!|user: Hi.|",
        ),
    ],
)
def test_roles_are_put_in_turn_where_a_template_asks_for_that(llm, monkeypatch, messages, text):
    before = assemble_chat(llm, messages).inputs(llm)
    for template in (IN_TURN, NO_SYSTEM):
        monkeypatch.setattr(llm.tokenizer, "chat_template", template)
        shown = llm.decode(assemble_chat(llm, messages).inputs(llm))
        if template == IN_TURN:
            assert shown == text
        else:
            assert shown == text.replace("|user: |", "|", 1).replace("system: ", "user: ")
    monkeypatch.undo()
    assert assemble_chat(llm, messages).inputs(llm) == before, "as it is where a template takes it"


def test_a_base_model_reads_the_contents_alone(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    assert llm.tokenizer.decode(assemble_chat(llm, user("Hello.")).inputs(llm)) == "Hello.\n\n"
