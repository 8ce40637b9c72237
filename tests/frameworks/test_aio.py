"""Work for event loops: awaited without blocking, told when nobody waits, closed when left."""

from __future__ import annotations

import asyncio
import threading

import pytest
from passes import PATIENCE, passes_of
from tiny import random_embedder, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.errors import ConfigError
from extemb_core.frameworks.aio import AsyncAnswerStream, in_thread, until_cancelled


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, random_embedder(llm))


async def test_work_is_done_in_a_thread_and_its_errors_arrive():
    assert await in_thread(lambda one, two: (one + two, threading.current_thread().name[:6]), 1, 2) == (3, "extemb")
    with pytest.raises(ConfigError, match="no"):
        await until_cancelled(lambda event: (_ for _ in ()).throw(ConfigError("no")))


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
