"""Run the server in this process until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from extemb_core.lm import ExtensibleLM
from extemb_core.serving.app import create_app
from extemb_core.serving.logs import log_as_json
from extemb_core.serving.settings import ServerSettings


def serve(
    lm: ExtensibleLM,
    settings: ServerSettings,
    *,
    encoder: Any = None,
    on_bound: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; then finish the answers at work, and take no new requests.

    Args:
        lm, settings, encoder: See `create_app`.
        on_bound: Called with the address once connections to it are queued.

    Raises:
        OSError: The server cannot listen at that address.
    """
    log_as_json()
    server = make_server(lm, settings, encoder=encoder, page=True)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=2048) as listener:
        host = f"[{settings.host.strip('[]')}]" if family == socket.AF_INET6 else settings.host
        if on_bound is not None:
            on_bound(f"http://{host}:{listener.getsockname()[1]}")
        server.run(sockets=[listener])


def make_server(
    lm: ExtensibleLM, settings: ServerSettings, *, encoder: Any = None, page: bool = False
) -> uvicorn.Server:
    """Make the uvicorn server of an application; see `create_app`."""
    config = uvicorn.Config(
        create_app(lm, settings, encoder=encoder, page=page), http="h11", ws="auto", lifespan="on", log_config=None,
        loop="asyncio",  # the same with or without uvloop, which NiceGUI installs; the LLM takes the time
        access_log=False, server_header=False, timeout_graceful_shutdown=settings.request_seconds,
    )  # fmt: skip
    return uvicorn.Server(config)
