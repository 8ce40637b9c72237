"""The routes of the server."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException

from extemb_core import __version__
from extemb_core.context.messages import question_in
from extemb_core.errors import ExtembError
from extemb_core.lm import ExtensibleLM
from extemb_core.serving import requests, responses
from extemb_core.serving.errors import ApiError, ErrorBody, as_api_error
from extemb_core.serving.guard import Guard
from extemb_core.serving.logs import logger
from extemb_core.serving.service import Prepared, Service
from extemb_core.serving.settings import ServerSettings
from extemb_core.serving.workspace import Workspace

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


class _IdConvertor(PathConvertor):
    """Takes the rest of a path, line breaks included."""

    regex = "(?s:.*)"


register_url_convertor("id", _IdConvertor())


def create_app(
    lm: ExtensibleLM, settings: ServerSettings | None = None, *, encoder: Any = None, page: bool = False
) -> FastAPI:
    """Make the ASGI application, for `serve` or any other ASGI server (with one process, as the model is in it).

    Args:
        lm: Model that answers; its store is read, and never added to.
        settings: Limits and keys.
        encoder: Text encoder that finds passages of stored documents; see `Library`.
        page: Add the chat page; a process can have only one.
    """
    service = Service(lm, settings or ServerSettings(), encoder)
    app = FastAPI(title="extemb", version=__version__, lifespan=service.running, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(_routes(service), responses=_ERRORS)
    app.include_router(_open_routes(service))
    if page:
        from extemb_core.serving.page import add_page  # slow to import, and NiceGUI has one application per process

        add_page(app, service)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    for kind in (ApiError, ExtembError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _error_response)
    return app


def _routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1", dependencies=[Depends(HTTPBearer(auto_error=False))])  # the guard checks it
    started = int(time.time())

    @router.post("/chat/completions", response_model=responses.Completion, responses=_STREAM)
    async def chat(request: Request, asked: requests.ChatRequest) -> Response:
        """Answer a conversation from documents, at once or as server-sent events."""
        messages = [message.to_dict() for message in asked.messages]

        def prepare(workspace: Workspace) -> Prepared:
            documents = workspace.documents(asked.documents)
            if asked.k:
                documents += workspace.search(question_in(messages), asked.k)
            return workspace.lm.prepare(
                messages, documents, budget=asked.budget, ratio=asked.ratio, plan=asked.plan, condense=True,
                **asked.sampling(service.settings.max_new_tokens),
            )  # fmt: skip

        return await service.answer(request, asked, responses.ChatWriter(service.model), prepare)

    @router.post("/completions", response_model=responses.Completion, responses=_STREAM)
    async def complete(request: Request, asked: requests.CompletionRequest) -> Response:
        """Continue a text after documents, without a chat template."""

        def prepare(workspace: Workspace) -> Prepared:
            return workspace.lm.prepare_text(
                asked.prompt, workspace.documents(asked.documents), budget=asked.budget, ratio=asked.ratio,
                **asked.sampling(service.settings.max_new_tokens),
            )  # fmt: skip

        return await service.answer(request, asked, responses.TextWriter(service.model), prepare)

    def described() -> responses.Model:
        window, ratios = service.lm.llm.context_window, list(service.lm.embedder.config.ratios)
        return responses.Model(id=service.model, created=started, context_window=window, ratios=ratios)

    @router.get("/models")
    async def models() -> responses.ModelList:
        """List the model."""
        return responses.ModelList(data=[described()])

    @router.get("/models/{name:path}")
    async def model(name: str) -> responses.Model:
        """Describe the model."""
        service.check_model(name)
        return described()

    @router.post("/documents")
    async def add(request: Request, asked: requests.DocumentsRequest) -> responses.DocumentList:
        """Add documents under this key, or replace those of the same id."""
        service.check_count(len(asked.documents))
        records = await service.work(request, lambda workspace: workspace.add(asked.documents), changes=True)
        return responses.DocumentList(data=[responses.StoredRecord.of(record) for record in records])

    @router.get("/documents")
    async def documents(request: Request) -> responses.DocumentList:
        """List the documents of this key."""
        records = await service.work(request, lambda workspace: workspace.records())
        return responses.DocumentList(data=[responses.StoredRecord.of(record) for record in records])

    @router.delete("/documents/{name:id}")
    async def delete(request: Request, name: str) -> responses.DeletedDocument:
        """Delete a document of this key by its id."""
        await service.work(request, lambda workspace: workspace.remove(name), changes=True)
        return responses.DeletedDocument(id=name)

    return router


def _open_routes(service: Service) -> APIRouter:
    router = APIRouter(responses=_ERRORS)

    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the server is up."""
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Return the server's metrics, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return router


async def _error_response(request: Request, error: Exception) -> Response:
    told = as_api_error(error)
    if told.status >= 500:
        logger.error("failed", exc_info=error, extra={"fields": {"id": request.state.record.id}})
    return told.response()
