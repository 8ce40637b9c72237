"""The service behind the routes: one model, its engine, and the documents of each key."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from platformdirs import user_data_path
from starlette.types import Receive, Scope, Send

from extemb_core.answers import PreparedPrompt
from extemb_core.errors import ExtembError, StoreError
from extemb_core.library.encoders import as_encoder
from extemb_core.lm import ExtensibleLM
from extemb_core.models.generation import Sampling
from extemb_core.serving.engine import Engine, Job
from extemb_core.serving.errors import ApiError, as_api_error
from extemb_core.serving.guard import ClientGone, Record
from extemb_core.serving.logs import logger
from extemb_core.serving.metrics import Metrics
from extemb_core.serving.requests import AnswerRequest
from extemb_core.serving.responses import Usage, Writer
from extemb_core.serving.settings import ServerSettings
from extemb_core.serving.workspace import Workspace
from extemb_core.utils.files import make_folder
from extemb_core.utils.validation import path_of
from extemb_core.weights.resolve import short_name

T = TypeVar("T")
Prepared = tuple[PreparedPrompt, Sampling]


class Service:
    """One model behind the routes, with a workspace for each key.

    Args:
        lm: Model that answers.
        settings: Limits and keys.
        encoder: Text encoder that finds passages of stored documents; see `Library`.

    Attributes:
        changing: Lock of each workspace, held while its documents are changed.
    """

    def __init__(self, lm: ExtensibleLM, settings: ServerSettings, encoder: Any = None) -> None:
        self.lm = lm
        self.settings = settings
        self.model = settings.name or short_name(lm.llm.name)
        self.metrics = Metrics()
        self.engine: Engine  # set while the server runs
        self._encoder = encoder
        self._folder = path_of(settings.data) if settings.data is not None else user_data_path("extemb") / "server"
        make_folder(self._folder, StoreError, "pass another folder as --data")
        self._workspaces: dict[str, Workspace] = {}
        self._lock = threading.Lock()
        self.changing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Run the engine while the server runs; then close the libraries."""
        settings = self.settings
        self.engine = Engine(
            self.lm.llm, batch_size=settings.batch_size, max_requests=settings.max_requests, metrics=self.metrics
        )
        running = asyncio.create_task(self.engine.run())
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            self.engine.close()
            for workspace in self._workspaces.values():
                workspace.close()
            self._workspaces.clear()

    def workspace(self, owner: str) -> Workspace:
        """Return the workspace of a key, opening it if needed."""
        with self._lock:
            if owner not in self._workspaces:
                if isinstance(self._encoder, str | os.PathLike):  # once for all keys
                    self._encoder = as_encoder(self._encoder)
                self._workspaces[owner] = Workspace(
                    self._folder / owner, self.lm, encoder=self._encoder,
                    memory_bytes=self.settings.memory_mib * 2**20, max_documents=self.settings.max_stored_documents,
                )  # fmt: skip
            return self._workspaces[owner]

    def check_model(self, name: str) -> None:
        """Refuse a request for another model."""
        if name != self.model:
            message = f"there is no model {name!r:.80}; ask for {self.model!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def check_count(self, n_documents: int) -> None:
        """Refuse more documents than the limit."""
        if n_documents > (most := self.settings.max_documents):
            message = f"{n_documents} documents are more than {most}, the limit of a request; send fewer, or add them"
            raise ApiError(400, message, code="too_many_documents", param="documents")

    async def answer(
        self, request: Request, asked: AnswerRequest, writer: Writer, prepare: Callable[[Workspace], Prepared]
    ) -> Response:
        """Answer a request, streamed or at once, as it asks."""
        self.check_model(asked.model)
        self.check_count(len(asked.documents))
        record: Record = request.state.record
        deadline = asyncio.get_running_loop().time() + self.settings.request_seconds
        start = self.engine.start(lambda: prepare(self.workspace(record.owner)))
        job = await self._while_there(request, start, deadline)
        if asked.stream:
            events = self._events(job, writer, record, deadline, with_usage=asked.with_usage)
            return _EventStream(events, lambda: self.engine.cancel(job))
        try:
            answer = await self._while_there(request, job.finish(), deadline)
        finally:
            self.engine.cancel(job)
        self._tell(job, record)
        return JSONResponse(writer.completion(answer).model_dump())

    async def work(self, request: Request, work: Callable[[Workspace], T], *, changes: bool = False) -> T:
        """Do something with the documents of a key; changes are made one after another."""
        owner = request.state.record.owner
        deadline = asyncio.get_running_loop().time() + self.settings.request_seconds
        alone = self.changing[owner] if changes else nullcontext()
        done = self.engine.work(lambda: work(self.workspace(owner)), alone)
        return await self._while_there(request, done, deadline)

    async def _while_there(self, request: Request, work: Awaitable[T], deadline: float) -> T:
        """Await something, unless the client disconnects or its time is over."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({task, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return await task
            raise ClientGone if gone.done() else self._late()
        finally:
            task.cancel()
            gone.cancel()

    def _late(self) -> ApiError:
        return ApiError(504, f"the answer was not there within {self.settings.request_seconds} s; ask for less")

    def _tell(self, job: Job, record: Record) -> None:
        """Count an answer in the metrics, and note its size in the log record."""
        answer, reason = job.answer, "cancelled"
        if job.ended:
            self.metrics.answered(answer)
            reason = answer.finish_reason
        record.fields |= Usage.of(answer).model_dump()
        record.fields |= {"documents": len(answer.documents), "finish_reason": reason, **answer.seconds}

    async def _events(
        self, job: Job, writer: Writer, record: Record, deadline: float, *, with_usage: bool
    ) -> AsyncIterator[str]:
        """Yield an answer as server-sent events. An error is the last event."""
        loop = asyncio.get_running_loop()
        try:
            if (first := writer.first()) is not None:
                yield _event(first)
            pieces = job.pieces()
            while (piece := await asyncio.wait_for(anext(pieces, None), deadline - loop.time())) is not None:
                yield _event(writer.piece(piece))
            yield _event(writer.last(job.answer))
            if with_usage:
                yield _event(writer.usage(job.answer))
            yield "data: [DONE]\n\n"
        except Exception as error:
            late = isinstance(error, TimeoutError | asyncio.TimeoutError)
            if not late and not isinstance(error, ExtembError):
                logger.error("failed", exc_info=error, extra={"fields": {"id": record.id}})
            yield _event((self._late() if late else as_api_error(error)).body)
        finally:
            self._tell(job, record)


class _EventStream(StreamingResponse):
    """Server-sent events; `at_end` is called when all are sent, or the client has disconnected."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies must not hold events back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
