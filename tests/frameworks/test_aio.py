"""Work for event loops: awaited without blocking, told when nobody waits, closed when left."""

from __future__ import annotations

import asyncio
import os
import signal
import threading

import pytest
from passes import PATIENCE, passes_of
from tiny import SENTENCES, shared_embedder, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.errors import ConfigError
from extemb_core.frameworks.aio import AsyncAnswerStream, in_thread, until_cancelled


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, shared_embedder(llm))


async def test_work_is_done_in_a_thread_and_its_errors_arrive():
    assert await in_thread(lambda one, two: (one + two, threading.current_thread().name[:6]), 1, 2) == (3, "extemb")
    with pytest.raises(ConfigError, match="no"):
        await until_cancelled(lambda event: (_ for _ in ()).throw(ConfigError("no")))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    assert asyncio.run(in_thread(os.getpid)) == os.getpid()
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(PATIENCE)  # kills it
            code = int(asyncio.run(in_thread(os.getpid)) != os.getpid())
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


async def test_work_is_told_when_whoever_waits_is_cancelled():
    started, told = threading.Event(), threading.Event()

    def work(cancelled):
        started.set()
        if cancelled.wait(PATIENCE):
            told.set()

    task = asyncio.create_task(until_cancelled(work))
    assert await in_thread(started.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await in_thread(told.wait, PATIENCE)


async def test_a_stream_is_the_answer_and_leaving_it_stops_the_llm(lm, monkeypatch):
    async with AsyncAnswerStream(lambda: lm.stream("How many?", max_new_tokens=5)) as stream:
        text = "".join([piece async for piece in stream])
    assert text == stream.answer.text == lm.ask("How many?", max_new_tokens=5).text
    with passes_of(lm.llm, monkeypatch) as passes:
        async with AsyncAnswerStream(lambda: lm.stream("How many?", max_new_tokens=150)) as stream:
            async for _ in stream:
                break
        assert await asyncio.to_thread(passes.stopped)


async def test_a_stream_that_cannot_be_opened_is_an_error(lm):
    async with AsyncAnswerStream(lambda: lm.stream(" ")) as stream:
        with pytest.raises(ConfigError, match="empty"):
            await anext(aiter(stream))


TEXTS = [f"{number}. {SENTENCES}" for number in range(4)]


async def read_stream(stream):
    async for _ in stream:
        pass


async def read_awaited(stream):
    await read_stream(await stream)


def langchain(lm):
    module = pytest.importorskip("langchain_extemb")
    return module, *(kind.from_lm(lm, ratio=8, max_tokens=2) for kind in (module.ChatExtensible, module.ExtensibleLLM))


def llamaindex(lm):
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import NodeWithScore, TextNode

    from llama_index.llms.extemb import ExtensibleLLM
    from llama_index.postprocessor import extemb

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    return extemb, ExtensibleLLM.from_lm(lm, ratio=8, max_tokens=2), nodes


async def retrieved(lm):
    extemb, llm, nodes = llamaindex(lm)
    await extemb.ExtensibleEmbeddingPostprocessor(llm=llm, ratio=8).apostprocess_nodes(nodes)


async def taken_in(lm):
    extemb, llm, nodes = llamaindex(lm)
    await extemb.ExtensibleTransform(llm=llm, ratio=8).acall([found.node for found in nodes])


async def found(lm):
    from langchain_core.documents import Document

    compressor = langchain(lm)[0].ExtensibleCompressor.from_lm(lm, ratio=8)
    await compressor.acompress_documents([Document(text) for text in TEXTS], "")


COMPRESSING = {
    "chat": lambda lm: langchain(lm)[1].ainvoke("How many?", documents=TEXTS),
    "stream": lambda lm: read_stream(langchain(lm)[1].astream("How many?", documents=TEXTS)),
    "LLM": lambda lm: langchain(lm)[2].agenerate(["How many?"], documents=TEXTS),
    "LLM stream": lambda lm: read_stream(langchain(lm)[2].astream("How many?", documents=TEXTS)),
    "LlamaIndex": lambda lm: llamaindex(lm)[1].acomplete("How many?", documents=TEXTS),
    "LlamaIndex stream": lambda lm: read_awaited(llamaindex(lm)[1].astream_complete("How many?", documents=TEXTS)),
    "compressor": found,
    "postprocessor": retrieved,
    "transform": taken_in,
}


@pytest.mark.parametrize("call", COMPRESSING.values(), ids=COMPRESSING)
async def test_compressing_stops_when_nobody_waits(call, lm, monkeypatch):
    threads, held, go_on, stopped = [], threading.Event(), threading.Event(), threading.Event()
    kind = type(lm.embedder)
    step, compress = kind.forward, kind.compress_ids

    def held_step(self, *args):
        threads.append(threading.current_thread())
        held.set()
        assert go_on.wait(PATIENCE)
        return step(self, *args)

    def told(self, *args, **settings):
        try:
            return compress(self, *args, **settings)
        finally:
            stopped.set()

    monkeypatch.setattr(kind, "forward", held_step)
    monkeypatch.setattr(kind, "compress_ids", told)
    task = asyncio.create_task(call(lm))
    assert await asyncio.to_thread(held.wait, PATIENCE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)  # for a stream that is closed behind whoever read it
    go_on.set()
    assert await asyncio.to_thread(stopped.wait, PATIENCE)
    assert len(threads) == 1
    lm.compress(TEXTS, ratio=8)
    assert len(threads) > 2
