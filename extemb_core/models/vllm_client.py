"""An LLM whose answers a vLLM server writes; documents are planned, compressed and put in place here (docs/vllm.md).

A request is a whole prompt. Text is token ids; compressed text is sent as `image_embeds` parts of a message, one for
each run of states, which also hold the ids around it (see `integrations/vllm_extemb/items.py`); embeddings of entry
layer 0 are `prompt_embeds`. So control tokens in documents stay data, whatever the server's tokenizer obeys.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError, EngineError, optional_import
from extemb_core.models.entry import AnchoredPrompt, PromptInputs, TokenIds
from extemb_core.models.generation import Generated, Sampling, StreamedRow
from extemb_core.models.llm import LLM
from extemb_core.utils.threads import at_once
from extemb_core.utils.validation import check_engine

_MAX_CONCURRENT = 32


class VllmLLM(LLM):
    """An LLM that a vLLM server serves, from a folder of `extemb export --vllm`. Scores are computed here.

    Attributes:
        base_url: Address of the server's OpenAI-compatible API, such as http://localhost:8000/v1.
        api_key: API key of the server, if it needs one.
        fingerprint: Fingerprint of the embedder, which must be the one for which the folder was exported.
        in_batches: False: the server batches requests itself.
    """

    base_url: str = ""
    api_key: str | None = None
    fingerprint: str = ""
    in_batches = False

    @cached_property
    def _client(self) -> Any:
        httpx = optional_import("httpx", "vllm", "engine='vllm'")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.base_url, headers=headers, timeout=httpx.Timeout(None, connect=10))

    @cached_property
    def _served(self) -> dict[str, Any]:
        """The server's description of its model."""
        with self._request("GET", "models") as response:
            return dict(json.loads(response.read())["data"][0])

    @property
    def context_window(self) -> int:
        """Positions the LLM was trained for, or those that the server allows if they are fewer."""
        return min(super().context_window, int(self._served.get("max_model_len") or super().context_window))

    def generate(
        self, prompts: Sequence[PromptInputs], sampling: Sampling, on_token: Callable[[], None] | None = None
    ) -> list[Generated]:
        """Continue prompts, all at once; see `generation.generate`."""

        def one(prompt: PromptInputs, cancelled: threading.Event) -> Generated:
            result = Generated()
            with closing(self.stream(prompt, sampling, result)) as pieces:
                for _ in pieces:
                    if on_token is not None:
                        on_token()
                    if cancelled.is_set():
                        break
            return result

        return at_once(one, prompts, _MAX_CONCURRENT)

    def generate_and_score(
        self, prompts: Sequence[PromptInputs], targets: Sequence[TokenIds], sampling: Sampling
    ) -> tuple[list[Generated], list[Tensor]]:
        """Return `generate`, of the server, and `LLM.log_probs`, of here; see `generation.generate_and_score`."""
        return self.generate(prompts, sampling), self.log_probs(prompts, targets)

    def stream_batch(self, rows: Sequence[StreamedRow]) -> None:
        """Continue prompts, all at once, handing on the text of each as it comes; see `generation.stream_batch`.

        Raises:
            EngineError: The server failed at one, which is not told of its end; the others were answered first.
        """

        def one(row: StreamedRow, _: threading.Event) -> Exception | None:
            row.result.finish_reason = "cancelled"
            try:
                if not row.cancelled.is_set():
                    with closing(self.stream(row.prompt, row.sampling, row.result)) as pieces:
                        for piece in pieces:
                            row.on_piece(piece)
                            if row.cancelled.is_set():
                                break
                row.on_piece(None)
            except Exception as error:
                return error
            return None

        for error in filter(None, at_once(one, rows, _MAX_CONCURRENT)):
            raise error

    def stream(
        self, prompt: PromptInputs, sampling: Sampling, result: Generated | None = None
    ) -> Generator[str, None, None]:
        """Continue one prompt, yielding text as it comes; see `generation.stream`."""
        result = result if result is not None else Generated()
        if not len(prompt):
            raise ConfigError("a prompt has 0 positions; at least one token is needed to continue from")
        path, body = self._body(prompt)
        body |= {
            "model": self._served["id"],
            "stream": True,
            "return_token_ids": True,
            "max_tokens": sampling.max_new_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
            "min_p": 0.0,  # overrides the folder's generation_config.json
            "repetition_penalty": float(sampling.repetition_penalty),
            "stop": list(sampling.stop),
            "stop_token_ids": self.stop_token_ids,
            "seed": sampling.seed,
        }
        reason, result.finish_reason = None, "cancelled"  # until it is whole
        with self._request("POST", path, json=body) as response:
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise self._refused(line.removeprefix("data: "))
                for choice in event["choices"]:
                    reason = choice.get("finish_reason") or reason
                    result.token_ids += choice.get("token_ids") or ()
                    piece = choice["text"] if "text" in choice else choice["delta"].get("content")
                    if piece:
                        result.text += piece
                        yield piece
        if reason not in ("stop", "length"):
            raise EngineError(f"the server at {self.base_url} ended an answer with {reason!r}; see to its log")
        result.finish_reason = reason
        if result.token_ids and result.token_ids[-1] in self.stop_token_ids:
            result.token_ids.pop()

    def _body(self, prompt: PromptInputs) -> tuple[str, dict[str, Any]]:
        """Return the API path for a prompt, and the fields of the request that hold it."""
        if isinstance(prompt, AnchoredPrompt):
            parts = [{"type": "image_embeds", "image_embeds": item} for item in self._items(prompt)]
            return "chat/completions", {"messages": [{"role": "user", "content": parts}]}
        if isinstance(prompt, Tensor):
            buffer = io.BytesIO()
            torch.save(prompt.detach().to("cpu", torch.float32), buffer)
            return "completions", {"prompt_embeds": _encoded(buffer)}
        return "completions", {"prompt": [int(index) for index in prompt]}

    def _items(self, prompt: AnchoredPrompt) -> list[dict[str, Any]]:
        """Split a prompt into its runs of states, each with the ids around it."""
        ids, mask = prompt.ids.tolist(), prompt.mask.tolist()
        items: list[dict[str, Any]] = []
        before: list[int] = []
        for has_states, run in itertools.groupby(range(len(ids)), mask.__getitem__):
            at = list(run)
            anchors = ids[at[0] : at[-1] + 1]
            if not has_states:
                before = anchors
                continue
            buffer = io.BytesIO()
            np.save(buffer, prompt.states[at[0] : at[-1] + 1].detach().to("cpu", torch.float32).numpy())
            items.append({"before": before, "anchors": anchors, "states": _encoded(buffer), "after": []})
            before = []
            if self.fingerprint:
                items[-1]["fingerprint"] = list(bytes.fromhex(self.fingerprint))
        items[-1]["after"] = before
        return items

    @contextmanager
    def _request(self, method: str, path: str, **content: Any) -> Iterator[Any]:
        """Open a request; turn its failures into errors of this library."""
        httpx = optional_import("httpx", "vllm", "engine='vllm'")
        try:
            with self._client.stream(method, path, **content) as response:
                if response.status_code != 200:
                    raise self._refused(response.read().decode(errors="replace"))
                yield response
        except httpx.HTTPError as error:
            raise EngineError(
                f"the server at {self.base_url} cannot be reached, or broke off ({error}); start it, or pass another "
                "base_url"
            ) from error

    def _refused(self, answer: str) -> EngineError:
        with suppress(ValueError, KeyError, TypeError):
            answer = json.loads(answer)["error"]["message"]
        return EngineError(
            f"the server at {self.base_url} refuses the request ({answer:.500}); docs/vllm.md says how it is started"
        )


def load_llm(
    name: str,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    engine: str = "transformers",
    base_url: str | None = None,
    api_key: str | None = None,
) -> LLM:
    """Load an LLM, which answers by itself or through a server.

    Args:
        name, device, dtype: See `LLM.from_pretrained`.
        engine: "transformers", in this process; or "vllm", the server at `base_url`.
        base_url: Address of its OpenAI-compatible API.
        api_key: API key of the server, if it needs one.

    Raises:
        ConfigError: The engine is unknown, or a server is named without "vllm", or "vllm" without a server.
    """
    check_engine(engine, base_url, api_key)
    if engine == "transformers":
        return LLM.from_pretrained(name, device=device, dtype=dtype)
    llm = VllmLLM.from_pretrained(name, device=device, dtype=dtype)
    assert isinstance(llm, VllmLLM)
    llm.base_url, llm.api_key = str(base_url), api_key
    return llm


def _encoded(buffer: io.BytesIO) -> str:
    return base64.b64encode(buffer.getvalue()).decode()
