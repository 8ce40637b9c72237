"""Servers that tests ask: one in a thread of this process with a tiny model, one in a process of its own."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
from passes import PATIENCE
from processes import Process
from retrieval_encoder import by_words
from tiny import SENTENCES

from extemb_core.serving.process import make_server
from extemb_core.serving.settings import ServerSettings

MODEL = "tiny"
_MAIN = "import sys; from extemb_core.cli.main import main; sys.argv[0] = 'extemb'; main()"
KEYS = ("first-key-0123456789", "second-key-0123456789")
QUESTION = "When was the bridge closed?"
ASKED = [{"role": "user", "content": QUESTION}]
DOCUMENT = {"title": "Ships", "text": SENTENCES, "id": "ships.txt"}


@dataclass
class Served:
    """A server that runs.

    Attributes:
        lines: What it logged: fields of each record.
        came: Told of each line.
    """

    url: str
    server: Any
    lines: list[dict[str, Any]] = field(default_factory=list)
    came: threading.Condition = field(default_factory=threading.Condition)
    clients: list[Any] = field(default_factory=list)

    @property
    def service(self) -> Any:
        return self.server.config.app.state.service

    def line_of(self, response: Any) -> dict[str, Any]:
        """Wait for the line of a response, which is logged after it is sent."""
        with self.came:
            assert self.came.wait_for(lambda: self._lines_of(response), PATIENCE)
        return self._lines_of(response)[0]

    def _lines_of(self, response: Any) -> list[dict[str, Any]]:
        return [line for line in self.lines if line.get("id") == response.headers["x-request-id"]]

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
    def __init__(self, server: Served) -> None:
        super().__init__()
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        line = {"message": record.getMessage(), "exc_info": record.exc_info, **getattr(record, "fields", {})}
        with self._server.came:
            self._server.lines.append(line)
            self._server.came.notify_all()


@contextmanager
def served(lm: Any, data: Any, **settings: Any) -> Iterator[Served]:
    """Serve `lm`, and finish what is at work at the end."""
    chosen = ServerSettings(**{"port": 0, "name": MODEL, "data": str(data), "max_new_tokens": 8} | settings)
    server = make_server(lm, chosen, encoder=by_words)
    listener = socket.create_server(("127.0.0.1", 0))
    one = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", server)
    handler, logger = _Lines(one), logging.getLogger("extemb_core.serving")
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


def serve(*options: Any, env: Mapping[str, str] | None = None) -> tuple[Process, str]:
    """Start `extemb serve` as a process of its own. Returns it, and the address of its API."""
    process = Process(_MAIN, "serve", *options, env=os.environ | (env or {}))

    def said() -> str:
        return os.pread(process._stderr.fileno(), 2**20, 0).decode()

    process.wait_for(lambda: "listening at" in said())
    return process, said().partition("listening at ")[2].split()[0]


def ask(client, documents=(), stream=False, messages=ASKED, **settings):
    own = {name: settings.pop(name) for name in ("budget", "ratio", "plan", "k") if name in settings}
    return client.chat.completions.create(
        model=MODEL, messages=messages, stream=stream, extra_body={"documents": list(documents), **own}, **settings
    )


def refused(error, call, *args, **settings):
    with pytest.raises(error) as raised:
        call(*args, **settings)
    body = raised.value.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert raised.value.response.headers["x-request-id"]
    return raised.value
