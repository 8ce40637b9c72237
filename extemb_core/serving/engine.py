"""Answers all clients with one LLM: waiting requests form batches, and each answer is streamed as it is made.

A batch is taken when the one before it is done: the request that waited longest, and as many behind it as fit with it.
See docs/decisions/0008-server.md.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TypeVar

from extemb_core.answers import Answer, PreparedPrompt, to_answer
from extemb_core.errors import ConfigError
from extemb_core.frameworks.aio import until_cancelled
from extemb_core.models.bulk import batch_with
from extemb_core.models.entry import PromptInputs
from extemb_core.models.generation import Sampling, StreamedRow
from extemb_core.models.llm import LLM
from extemb_core.serving.errors import ApiError
from extemb_core.serving.metrics import Metrics

_RETRY_SECONDS = 1
_PREPARED_AT_ONCE = 2  # one request compresses on all cores while another reads and plans; more would need more memory

T = TypeVar("T")


class Job:
    """A request at work, and its answer as it is made.

    Attributes:
        row: The LLM's input, and how it is answered.
        ended: Whether the answer is complete, or failed.
    """

    def __init__(self, engine: Engine, prepared: PreparedPrompt, inputs: PromptInputs, sampling: Sampling) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._prepared = prepared
        self._pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self._first_token: float | None = None
        self._seconds = 0.0
        self.ended = False
        self.positions = len(prepared.prompt) + sampling.max_new_tokens
        self.row = StreamedRow(inputs, sampling, partial(_hand_over, self._loop, weakref.WeakMethod(self.put)))

    @property
    def answer(self) -> Answer:
        """The answer so far."""
        first = self._seconds if self._first_token is None else self._first_token
        return to_answer(self._prepared, self.row.result, first_token=first, total=self._seconds)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the text as it comes. A caller that stops before the end must call `Engine.cancel`."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    async def finish(self) -> Answer:
        """Wait for the end, and return the answer."""
        async for _ in self.pieces():
            pass
        return self.answer

    def put(self, piece: str | BaseException | None) -> None:
        """Hand the reader a piece, or an error or None, which end the answer."""
        if self.ended:
            return
        self._seconds = time.perf_counter() - self._prepared.start
        self._pieces.put_nowait(piece)
        if isinstance(piece, str):
            self._first_token = self._first_token or self._seconds
        else:
            self.ended = True
            self._engine.release()


def _hand_over(
    loop: asyncio.AbstractEventLoop, put: weakref.WeakMethod[Callable[[str | None], None]], piece: str | None
) -> None:
    """Hand a piece over to a job's own loop, from the LLM's thread.

    The job is held by a weak reference: in a reference cycle with its row, it would keep its documents in memory until
    the garbage collector ran, which counts objects and not their bytes.
    """
    if (there := put()) is not None:
        loop.call_soon_threadsafe(there, piece)


class Engine:
    """Takes requests up to a limit, prepares each in a thread, and answers them in batches in a thread of its own.

    Args:
        llm: LLM that answers.
        batch_size: Maximum number of requests in a batch.
        max_requests: Maximum number of requests at work or waiting; more are refused.
        metrics: Metrics that count them.

    Attributes:
        running: The batch that is being answered.
    """

    def __init__(self, llm: LLM, *, batch_size: int, max_requests: int, metrics: Metrics) -> None:
        self.llm = llm
        self._batch_size = batch_size
        self._max_requests = max_requests
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="extemb-llm")
        self.running: list[Job] = []
        self._waiting: list[Job] = []
        self._came = asyncio.Event()
        self._preparing = asyncio.Semaphore(_PREPARED_AT_ONCE)
        self._n_requests = 0

    def admit(self) -> None:
        """Count a request as at work, until `release`.

        Raises:
            ApiError: The limit is reached.
        """
        if self._n_requests >= self._max_requests:
            raise ApiError(
                429, f"{self._n_requests} requests are at work or waiting, which is the limit; try again later",
                headers={"Retry-After": str(_RETRY_SECONDS)},
            )  # fmt: skip
        self._n_requests += 1
        self._metrics.at_work.set(self._n_requests)

    def release(self) -> None:
        """Stop counting a request."""
        self._n_requests -= 1
        self._metrics.at_work.set(self._n_requests)

    async def work(self, work: Callable[[], T], alone: AbstractAsyncContextManager[None]) -> T:
        """Run work that takes as long as an answer in a thread, counted as a request, after entering `alone`."""
        self.admit()
        try:
            async with alone:
                return await until_cancelled(lambda _: work())
        finally:
            self.release()

    async def start(self, prepare: Callable[[], tuple[PreparedPrompt, Sampling]]) -> Job:
        """Prepare a prompt, unless the client leaves meanwhile, and put it in the queue.

        Raises:
            ExtembError: `prepare` raised it.
            ConfigError: The prompt is empty.
        """

        def ready(_: object) -> tuple[PreparedPrompt, PromptInputs, Sampling]:
            prepared, sampling = prepare()
            if not len(prepared.prompt):
                raise ConfigError("the prompt is empty; send a text to go on with, or documents")
            return prepared, prepared.prompt.inputs(self.llm), sampling

        self.admit()
        try:
            async with self._preparing:
                prepared = await until_cancelled(ready)
            job = Job(self, *prepared)
        except BaseException:
            self.release()
            raise
        self._waiting.append(job)
        self._came.set()
        return job

    def cancel(self, job: Job) -> None:
        """Stop a job at the next token, or at the next layer if it is alone; drop it if it is still waiting.

        A job that has ended stays as it is.
        """
        job.row.cancelled.set()
        if job in self._waiting:
            self._waiting.remove(job)
            job.row.result.finish_reason = "cancelled"
            job.put(None)

    async def run(self) -> None:
        """Answer requests until this is cancelled."""
        while True:
            await self._came.wait()
            if batch := self._next_batch():
                self.running = batch
                await self._answer(batch)
                self.running = []
            else:
                self._came.clear()

    def close(self) -> None:
        """Shut down the LLM's thread."""
        self._thread.shutdown()

    def _next_batch(self) -> list[Job]:
        """Take the job that waited longest, and those behind it that fit with it."""
        if not self._waiting:
            return []
        first, lengths = self._waiting[0], {job: job.positions for job in self._waiting[: self._batch_size]}
        batch = batch_with(first, lengths, self.llm)
        self._waiting = [job for job in self._waiting if job not in batch]
        return batch

    async def _answer(self, batch: list[Job]) -> None:
        """Answer a batch. If it fails, each job is answered alone, so that it gets its own error."""
        self._metrics.batch_size.observe(len(batch))
        rows = [job.row for job in batch]
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self.llm.stream_batch, rows)
        except Exception as error:
            for job in batch:
                if len(batch) > 1 and not (job.ended or job.row.result.token_ids):
                    await self._answer([job])
                else:
                    job.put(error)
