"""A prefix is read once, and gives what reading it anew would."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llm, tiny_model, tiny_tokenizer

from extemb_core.models.kv_prefix import Prefix
from extemb_core.models.llm import LLM

ARCHITECTURES = ("llama", "qwen2", "mistral", "phi")


def hidden(llm, ids):
    with torch.no_grad():
        return llm.hidden(llm.embed(ids)[None])[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_follows_is_as_in_one_reading(architecture):
    llm = tiny_llm(architecture)
    prefix = Prefix(llm)
    assert prefix.last is None
    prefix.read([5, 6, 7])
    torch.testing.assert_close(prefix.last, hidden(llm, [5, 6, 7])[-1])
    for others in ([8, 9], [10, 11, 12]):  # one after the other: the first is not kept
        torch.testing.assert_close(prefix.peek(others), hidden(llm, [5, 6, 7, *others])[3:])
        assert len(prefix) == 3
    prefix.read([13])
    prefix.read([])
    torch.testing.assert_close(prefix.peek([14]), hidden(llm, [5, 6, 7, 13, 14])[4:])


def test_it_begins_with_the_bos():
    class WithBos(LLM):
        bos_token_id = 1

    llm = WithBos(tiny_model("llama"), tiny_tokenizer())
    prefix = Prefix(llm)
    assert len(prefix) == 1
    torch.testing.assert_close(prefix.last, hidden(llm, [1])[-1])


@pytest.mark.parametrize("kind", ["longrope", "dynamic", "yarn"])
def test_positions_that_are_encoded_by_how_many_there_are_do_not_suit(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 132}
    family, changes = "llama", {}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
        family, changes = "phi3", {"original_max_position_embeddings": 132}
    llm = LLM(tiny_model(family, rope_parameters=rope, **changes), tiny_tokenizer())
    assert llm.reads_in_parts == (kind == "yarn")
    prompts = [[*range(5, 135), *end] for end in ([7, 8, 9], [11] * 5)]  # what is shared ends before position 132
    assert llm.shares_prefix(prompts) == (kind == "yarn")
    scores = llm.log_probs(prompts, [[5, 6], [7]], at_once=True)
    for one, prompt, targets in zip(scores, prompts, [[5, 6], [7]], strict=True):
        torch.testing.assert_close(one, llm.score(prompt, targets), atol=1e-4, rtol=0)


def test_windows_that_slide_and_layers_with_a_state_do_not_suit(monkeypatch):
    assert all(tiny_llm(family).reads_in_parts for family in ARCHITECTURES)
    assert not any(tiny_llm(family).reads_in_parts for family in ("gemma2", "gemma3", "mistral-sliding", "qwen3_next"))
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_is_stateful", True)  # as RWKV says of itself, whose state is no cache
    assert not LLM(model, tiny_tokenizer()).reads_in_parts
