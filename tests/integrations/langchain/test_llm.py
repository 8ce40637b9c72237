"""The completion model: what it tells of the tokens of a call."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import HumanMessage, SystemMessage, get_buffer_string
from passes import passes_of
from tiny import shared_embedder, tiny_llm

from extemb_core import ExtensibleLM
from langchain_extemb import ExtensibleCompressor, ExtensibleLLM

PROMPTS = ["One ship", "Two", "How many ships are there?"]


class Pieces(AsyncCallbackHandler):
    """Remembers the pieces of a stream."""

    def __init__(self):
        self.pieces = []

    async def on_llm_new_token(self, token, **kwargs):
        self.pieces.append(token)


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


async def test_a_stream_that_is_awaited_is_that_of_a_call_and_leaving_it_stops_the_llm(lm, documents, monkeypatch):
    told = Pieces()
    llm = ExtensibleLLM.from_lm(lm, max_tokens=5, ratio=4)
    expected = list(llm.stream(PROMPTS[0], documents=documents))
    stream = llm.astream(PROMPTS[0], {"callbacks": [told]}, documents=documents)
    assert [piece async for piece in stream] == expected
    assert told.pieces == expected[:-1]  # the last has only what is known at the end
    with passes_of(lm.llm, monkeypatch) as passes:
        async with aclosing(llm.astream(PROMPTS[0], documents=documents, max_tokens=150)) as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(passes.stopped)


def test_answers_of_a_cache_tell_what_they_took_and_are_not_counted_again(lm):
    llm = ExtensibleLLM.from_lm(lm, max_tokens=3, cache=InMemoryCache())
    first = llm.generate(PROMPTS[:1])
    mixed, cached = llm.generate(PROMPTS[:2]), llm.generate(PROMPTS[:2])
    assert mixed.llm_output["token_usage"] == used(lm.generate(PROMPTS[1], max_new_tokens=3))
    assert cached.llm_output == {}
    assert cached.generations == mixed.generations
    assert cached.generations[0][0].generation_info["token_usage"] == first.llm_output["token_usage"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "settings", [{"ratio": 4}, {"ratio": 8}, {"budget": 60}, {"ratio": "raw"}, {}, {"max_tokens": 150}]
)
def test_refs_are_counted_as_the_positions_that_a_call_reads_them_in(documents, settings, bos, monkeypatch):
    """The token that begins a prompt is not of its text."""
    llm = tiny_llm(bos=bos)
    lm = ExtensibleLM(llm, shared_embedder(llm))
    refs = [
        found.metadata["extemb_ref"] for found in ExtensibleCompressor.from_lm(lm).compress_documents(documents, "")
    ]
    model = ExtensibleLLM.from_lm(lm, **{"max_tokens": 3, **settings})
    texts = [f"Read {refs[0]}\nand {refs[1]}: how many?", refs[0], "How many?"]
    talk = [SystemMessage(f"Read {refs[0]}."), HumanMessage("Yes?"), HumanMessage(f"{refs[1]} How many?")]
    used = [
        model.generate([text]).llm_output["token_usage"]["prompt_tokens"] for text in [*texts, get_buffer_string(talk)]
    ]
    monkeypatch.setattr(type(lm.embedder), "compress_ids", lambda *args, **kwargs: pytest.fail("compressed"))
    assert [model.get_num_tokens(text) + bos for text in texts] == used[:-1]
    assert model.get_num_tokens_from_messages(talk) + bos == used[-1]
    assert model.get_num_tokens_from_messages([]) == 0
