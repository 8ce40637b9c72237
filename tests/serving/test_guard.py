"""What stands before the routes: a WebSocket is opened by a page of this server alone."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("fastapi")

from served import KEYS
from starlette.routing import Route

from extemb_core.serving.guard import Guard
from extemb_core.serving.metrics import Metrics
from extemb_core.serving.settings import ServerSettings


@pytest.mark.parametrize(
    ("keys", "host", "origin", "opened"),
    [
        ((), "127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ((), "localhost:8000", "http://localhost:8000", True),
        ((), "127.0.0.1:8000", "http://evil.example", False),
        ((), "127.0.0.1:8000", "http://127.0.0.1:9000", False),
        ((), "127.0.0.1:8000", None, False),
        ((), "evil.example", "http://evil.example", False),
        (KEYS, "docs.example", "https://docs.example", True),
        (KEYS, "docs.example", "https://evil.example", False),
    ],
)
async def test_a_websocket_of_another_page_is_closed(keys, host, origin, opened):
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope)

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    guard = Guard(app, ServerSettings(keys=keys), Metrics())
    await guard({"type": "websocket", "path": "/chat/_nicegui_ws", "headers": headers}, None, send)
    assert bool(reached) is opened
    assert sent == ([] if opened else [{"type": "websocket.close", "code": 1008}])


@pytest.mark.parametrize(
    ("path", "level"),
    [("/chat/", logging.INFO), ("/chat/_nicegui/3/quasar.css", logging.DEBUG), ("/v1/models", logging.INFO)],
)
async def test_what_a_page_is_made_of_is_logged_when_debugging(monkeypatch, path, level):
    logged = []
    monkeypatch.setattr("extemb_core.serving.guard.logger.log", lambda level, *words, **more: logged.append(level))

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        pass

    guard = Guard(app, ServerSettings(), Metrics())
    await guard({"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")]}, receive, send)
    assert logged == [level]


async def test_parts_of_the_page_are_counted_as_one_route():
    """Each visit has routes of its own, which would be counters for ever."""
    metrics = Metrics()

    async def app(scope, receive, send):
        scope["route"] = Route(scope["path"], lambda: None)
        await send({"type": "http.response.start", "status": 200})

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        pass

    guard = Guard(app, ServerSettings(), metrics)
    for path in ("/chat/_nicegui/client/1/upload/15", "/chat/_nicegui/client/2/upload/15", "/v1/models"):
        scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")]}
        await guard(scope, receive, send)
    counted = [line for line in metrics.text().decode().splitlines() if line.startswith("extemb_requests_total{")]
    assert sorted(counted) == [
        'extemb_requests_total{route="/chat/_nicegui",status="200"} 2.0',
        'extemb_requests_total{route="/v1/models",status="200"} 1.0',
    ]
