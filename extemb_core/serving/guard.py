"""Checks that every request passes before it is read: key, size and time; and its entry in the log and the metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from extemb_core.serving.errors import ApiError, as_api_error
from extemb_core.serving.logs import logger
from extemb_core.serving.metrics import Metrics
from extemb_core.serving.settings import ServerSettings, is_loopback

PAGE = "/chat"
"""Path of the chat page, which asks for a key itself; `/` leads there."""

OPEN_PATHS = frozenset({"/", "/healthz", "/metrics", PAGE})
"""Paths that need no key."""

TIMED_OUT = 408
"""The status of a request whose body did not come in time."""

NO_KEY = "default"
"""Name of the workspace of a server without keys."""


class ClientGone(Exception):  # noqa: N818  # nothing is wrong
    """The client has disconnected: nobody waits for an answer."""


@dataclass
class Record:
    """Fields of a request that are logged. `owner` identifies the key without revealing it."""

    id: str
    owner: str = NO_KEY
    fields: dict[str, Any] = field(default_factory=dict)


class Keys:
    """The API keys; only their hashes are kept and compared."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = [_hash(key) for key in keys]

    def owner_of(self, authorization: str | None) -> str:
        """Return the name of a key's workspace.

        Raises:
            ApiError: The key is missing, or not one of the server's.
        """
        if not self._hashes:
            return NO_KEY
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip())
        matches = [hmac.compare_digest(given, known) for known in self._hashes]  # compares with all, in constant time
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                401, "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return given.hex()[:32]


class Guard:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics
        self._keys = Keys(settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on with its complete body."""
        if scope["type"] == "websocket" and not self._is_own_page(Headers(scope=scope)):
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, record = time.perf_counter(), 499, Record(secrets.token_hex(12))  # 499: the client left
        is_read = False
        scope["state"] = {**scope.get("state", {}), "record": record}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check(scope["path"], headers, record)
            body = await self._in_time(self._body(headers, receive))
            is_read = True
            await self._app(scope, _replayed(body, receive), answer)
        except ClientGone:
            pass
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.error("failed", exc_info=error, extra={"fields": {"id": record.id}})
            if status == 499:
                response = as_api_error(error).response()
                await (response(scope, receive, answer) if is_read else self._refuse(response, receive, answer))
        finally:
            is_part = scope["path"].startswith(f"{PAGE}/_")  # one of the page's many paths, which differ for each visit
            route = f"{PAGE}/_nicegui" if is_part else getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            seconds = round(time.perf_counter() - start, 4)
            told = {"id": record.id, "method": scope["method"], "route": route, "status": status, "seconds": seconds}
            level = logging.DEBUG if is_part else logging.INFO
            logger.log(level, "request", extra={"fields": {**told, "owner": record.owner, **record.fields}})

    def _check(self, path: str, headers: Headers, record: Record) -> None:
        """Refuse requests without a valid key, and other sites' pages that reach a keyless server by their own name."""
        if not self._is_known(host := headers.get("host", "")):
            raise ApiError(400, f"{host!r:.80} is not this server; ask it as localhost, or start it with a key")
        if path not in OPEN_PATHS and not path.startswith(f"{PAGE}/"):
            record.owner = self._keys.owner_of(headers.get("authorization"))

    def _is_own_page(self, headers: Headers) -> bool:
        """Return whether a WebSocket was opened by the page of this server: a browser opens them for any site."""
        host = headers.get("host", "")
        return self._is_known(host) and headers.get("origin", "").partition("//")[2] == host

    def _is_known(self, host: str) -> bool:
        """Return whether a host is this server; where there are keys, it may have names besides those of loopback."""
        return bool(self._settings.keys) or is_loopback(re.sub(r":\d+$", "", host))

    async def _refuse(self, response: Response, receive: Receive, send: Send) -> None:
        """Answer before the body is read, and discard the rest of it; otherwise the connection would be reset."""
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})

        async def rest() -> None:
            while (await receive()).get("more_body", False):
                pass

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(rest(), self._settings.body_seconds)
        await send({"type": "http.response.body"})

    async def _in_time(self, body: Awaitable[bytes]) -> bytes:
        try:
            return await asyncio.wait_for(body, self._settings.body_seconds)
        except asyncio.TimeoutError:
            message = f"the body did not come within {self._settings.body_seconds} s; send it faster"
            raise ApiError(TIMED_OUT, message, headers={"Connection": "close"}) from None

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """Read the body, unless its declared or actual size is too large."""
        limit = self._settings.max_body_mib * 2**20
        declared = headers.get("content-length", "")
        parts: list[bytes] = []
        come = 0
        while max(come, int(declared) if declared.isdecimal() else 0) <= limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            come += len(parts[-1])
            if come <= limit and not message.get("more_body", False):
                return b"".join(parts)
        raise ApiError(
            413, f"the body is larger than {self._settings.max_body_mib} MiB; send less, or documents by their refs",
            headers={"Connection": "close"},
        )  # fmt: skip


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body again that was read already, then what follows it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
