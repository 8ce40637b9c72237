"""A server in a thread of this process, on a port of its own, with a tiny model: what the tests of it ask."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from passes import PATIENCE
from retrieval_encoder import by_words

from extemb_core.serving.process import make_server
from extemb_core.serving.settings import ServerSettings

MODEL = "tiny"
KEYS = ("first-key-0123456789", "second-key-0123456789")


@dataclass
class Served:
    """A server that runs.

    Attributes:
        lines: What it logged: fields of each record.
    """

    url: str
    server: Any
    lines: list[dict[str, Any]] = field(default_factory=list)
    clients: list[Any] = field(default_factory=list)

    @property
    def service(self) -> Any:
        return self.server.config.app.state.service

    def openai(self, key: str = "unused", **settings: Any) -> openai.OpenAI:
        """Make OpenAI's own client."""
        chosen = {"max_retries": 0, "timeout": PATIENCE} | settings
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **chosen)
        self.clients.append(client)
        return client

    def http(self, key: str | None = None) -> httpx.Client:
        """Make a plain client."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)
        self.clients.append(client)
        return client


class _Lines(logging.Handler):
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(
            {"message": record.getMessage(), "exc_info": record.exc_info, **getattr(record, "fields", {})}
        )


@contextmanager
def served(lm: Any, data: Any, **settings: Any) -> Iterator[Served]:
    """Serve `lm`, and finish what is at work at the end."""
    chosen = ServerSettings(**{"port": 0, "name": MODEL, "data": str(data), "max_new_tokens": 8} | settings)
    server = make_server(lm, chosen, encoder=by_words)
    listener = socket.create_server(("127.0.0.1", 0))
    one = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    handler, logger = _Lines(one.lines), logging.getLogger("extemb_core.serving")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield one
    finally:
        server.should_exit = True
        for client in one.clients:
            client.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        listener.close()
        logger.removeHandler(handler)
        logger.setLevel(before)
