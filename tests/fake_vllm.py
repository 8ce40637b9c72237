"""A vLLM server that runs in the test: it reads requests as the plugin does, and a tiny LLM answers them."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import torch

from extemb_core.models.entry import AnchoredPrompt
from extemb_core.models.generation import Generated, Sampling

URL = "http://fake:8000/v1"


class FakeVllm:
    """Answers as `llm` does, and remembers.

    Attributes:
        prompts: What was read, as an `LLM` reads it.
        bodies: What was sent.
        closed: How many answers were ended by the client.
    """

    def __init__(self, llm: Any, fingerprint: str, max_model_len: int = 256) -> None:
        from vllm_extemb.items import ItemReader

        self.llm = llm
        self.reader = ItemReader(
            {"entry_layer": 1, "fingerprint": fingerprint},
            hidden_size=llm.hidden_size,
            vocab_size=len(llm.tokenizer),
            control_ids=llm.control_ids,
        )
        self.max_model_len = max_model_len
        self.prompts: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.closed = 0
        self.before_answer: Callable[[], Any] = lambda: None
        self.after_piece: Callable[[], Any] = lambda: None

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self.handle), base_url=URL, headers=headers)

    def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served", "max_model_len": self.max_model_len}]})
        body = json.loads(request.content)
        self.bodies.append(body)
        chat = request.url.path == "/v1/chat/completions"
        try:
            prompt = self._read_chat(body) if chat else self._read_completion(body)
        except ValueError as error:
            return httpx.Response(400, json={"error": {"message": str(error), "code": 400}})
        self.prompts.append(prompt)
        return httpx.Response(200, stream=_Events(self, self._answer(prompt, body, chat)))

    def _read_completion(self, body: dict[str, Any]) -> Any:
        if "prompt_embeds" in body:
            return torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        return body["prompt"]

    def _read_chat(self, body: dict[str, Any]) -> AnchoredPrompt:
        (message,) = body["messages"]
        ids: list[int] = []
        states, mask = [], []
        for part in message["content"]:
            fields = dict(part["image_embeds"])
            fields["states"] = np.load(io.BytesIO(base64.b64decode(fields["states"])))
            item = self.reader.read(fields)
            assert item.around is not None
            before, after = item.around
            ids += [*before, *item.anchors, *after]
            width = item.states.shape[1]
            states += [torch.zeros(len(before), width), item.states, torch.zeros(len(after), width)]
            mask += [False] * len(before) + [True] * len(item.anchors) + [False] * len(after)
        return AnchoredPrompt(torch.tensor(ids), torch.cat(states), torch.tensor(mask), 1)

    def _answer(self, prompt: Any, body: dict[str, Any], chat: bool) -> Iterator[bytes]:
        self.before_answer()
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "seed")
        sampling = Sampling(max_new_tokens=body["max_tokens"], **{name: body[name] for name in names})
        result = Generated()
        pieces = list(self.llm.stream(prompt, sampling, result))
        for piece, token in itertools.zip_longest(pieces, result.token_ids):
            text = {"delta": {"content": piece}} if chat else {"text": piece or ""}
            yield _event({"choices": [text | {"token_ids": [] if token is None else [token], "finish_reason": None}]})
            self.after_piece()
        last = {"delta": {}} if chat else {"text": ""}
        ended = [self.llm.stop_token_ids[0]] if result.finish_reason == "stop" and not body["stop"] else []
        yield _event({"choices": [last | {"token_ids": ended, "finish_reason": result.finish_reason}]})
        yield b"data: [DONE]\n\n"


class _Events(httpx.SyncByteStream):
    def __init__(self, server: FakeVllm, events: Iterator[bytes]) -> None:
        self._server = server
        self._events = events
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[bytes]:
        for event in self._events:  # noqa: UP028  # which would close the events with itself
            yield event

    def close(self) -> None:
        with self._lock:
            ended = next(self._events, None) is not None
            self._server.closed += ended


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"
