"""The completion model: what it tells of the tokens of a call."""

from __future__ import annotations

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler

from langchain_extemb import ExtensibleLLM

PROMPTS = ["One ship", "Two", "How many ships are there?"]


class Counter(BaseCallbackHandler):
    """Adds up what calls tell of their tokens in `llm_output`, as handlers that count costs do."""

    def __init__(self):
        self.total, self.last = 0, None

    def on_llm_end(self, response, **kwargs):
        self.total += ((response.llm_output or {}).get("token_usage") or {}).get("total_tokens", 0)
        self.last = response.generations[0][0].generation_info["token_usage"]


def used(answer):
    read, written = answer.prompt_positions, answer.new_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


@pytest.fixture
def expected(lm, documents):
    return [used(lm.generate(prompt, documents, ratio=4, max_new_tokens=3)) for prompt in PROMPTS]


async def test_a_call_tells_the_positions_of_each_prompt_and_of_all_together(lm, documents, expected):
    counter = Counter()
    llm = ExtensibleLLM.from_lm(lm, max_tokens=3, ratio=4, callbacks=[counter])
    together = {name: sum(one[name] for one in expected) for name in expected[0]}
    for result in (llm.generate(PROMPTS, documents=documents), await llm.agenerate(PROMPTS, documents=documents)):
        assert result.llm_output == {"token_usage": together, "model_name": llm.model}
        assert [one[0].generation_info["token_usage"] for one in result.generations] == expected
    assert counter.total == 2 * together["total_tokens"]
    llm.batch(PROMPTS, documents=documents)
    assert counter.total == 3 * together["total_tokens"]


async def test_a_stream_tells_its_positions_at_its_end(lm, documents, expected):
    counter = Counter()
    llm = ExtensibleLLM.from_lm(lm, max_tokens=3, ratio=4, callbacks=[counter])
    assert list(llm.stream(PROMPTS[0], documents=documents))
    assert counter.last == expected[0]
    assert [piece async for piece in llm.astream(PROMPTS[1], documents=documents)]
    assert counter.last == expected[1]


def test_answers_of_a_cache_tell_what_they_took_and_are_not_counted_again(lm):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=3, cache=InMemoryCache())
    first = llm.generate(PROMPTS[:1])
    mixed, cached = llm.generate(PROMPTS[:2]), llm.generate(PROMPTS[:2])
    assert mixed.llm_output["token_usage"] == used(lm.generate(PROMPTS[1], max_new_tokens=3))
    assert cached.llm_output == {}
    assert cached.generations == mixed.generations
    assert cached.generations[0][0].generation_info["token_usage"] == first.llm_output["token_usage"]
