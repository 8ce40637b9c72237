"""How an LLM goes on from prompts: which token is chosen, when it ends, and pieces of text as they come."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from extemb_core.errors import ConfigError
from extemb_core.models.entry import AnchoredPrompt, PromptInputs

if TYPE_CHECKING:
    from extemb_core.models.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The default, temperature 0, is greedy and repeatable.

    Attributes:
        max_new_tokens: The answer ends after so many.
        temperature: 0 is greedy.
        top_p: Draw from the likeliest tokens that have this probability together.
        top_k: Draw from this many of the likeliest tokens; 0 from all.
        repetition_penalty: Over the tokens of the answer, and of the prompt where that is text only: the anchors of
            compressed text are nothing that was said.
        stop: Texts that end the answer; they are not part of it.
        seed: Makes sampling repeatable; without it, draws follow torch's global generator.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
            ("max_new_tokens", self.max_new_tokens, lambda n: _is_whole(n) and n >= 1, "a whole number of at least 1"),
            ("temperature", self.temperature, lambda t: 0 <= t < math.inf, "0 (greedy) or above"),
            ("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, lambda k: _is_whole(k) and k >= 0, "0 (off) or a positive whole number"),
            ("repetition_penalty", self.repetition_penalty, lambda r: 0 < r < math.inf, "above 0 (1 is off)"),
            ("seed", self.seed, lambda s: s is None or _is_whole(s), "a whole number or None"),
        )
        for name, value, is_legal, rule in rules:
            try:
                legal = is_legal(value)
            except TypeError:  # not a number at all
                legal = False
            if not legal:
                raise ConfigError(f"{name}={value!r} must be {rule}; pass such a value")
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop={self.stop!r} must be texts that are not empty; leave out what is empty")


@dataclass(kw_only=True)
class Generated:
    """What one prompt's generation came to. `finish_reason`: "stop", "length" or "cancelled"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"


def generate(
    llm: LLM, prompts: Sequence[PromptInputs], sampling: Sampling, on_token: Callable[[], None] | None = None
) -> list[Generated]:
    """See `LLM.generate`."""
    if not prompts:
        return []
    step = None if on_token is None else _Step(on_token)
    rows = _run(llm, *llm.batch_inputs(prompts), sampling, step, said=_text_of(prompts))
    return [_finish(llm, row, sampling) for row in rows.tolist()]


def stream(llm: LLM, prompt: PromptInputs, sampling: Sampling, result: Generated | None = None) -> Iterator[str]:
    """See `LLM.stream`."""
    result = result if result is not None else Generated()
    relay = _TokenRelay()
    model, inputs = llm.batch_inputs([prompt])

    def work() -> None:
        try:
            _run(llm, model, inputs, sampling, relay, said=_text_of([prompt]))
        except BaseException as error:
            relay.fail(error)
        finally:
            relay.end()

    worker = threading.Thread(target=work, name="extemb-generate", daemon=True)
    worker.start()
    sent, ended = "", False
    try:
        for token in relay:
            if token in llm.stop_token_ids:
                ended = True
                break
            result.token_ids.append(token)
            text, stopped = _visible(llm, result.token_ids, sampling, final=False)
            if text.startswith(sent) and len(text) > len(sent):
                piece, sent = text[len(sent) :], text  # before yielding: the reader may close here
                yield piece
            if stopped:
                break
        finished = _finish(llm, result.token_ids, sampling)
        result.text, result.finish_reason = finished.text, "stop" if ended else finished.finish_reason
        if len(result.text) > len(sent):
            yield result.text[len(sent) :]
    except GeneratorExit:
        result.text, result.finish_reason = sent, "cancelled"
        raise
    finally:
        relay.cancel()
        worker.join()


def _run(
    llm: LLM,
    model: Any,
    inputs: dict[str, Any],
    sampling: Sampling,
    watcher: StoppingCriteria | None = None,
    *,
    said: Sequence[Sequence[int]],
) -> Tensor:
    """New token ids, (B, S), padded on the right with a stop token. `said`: see `_Penalty`."""
    stop_ids = llm.stop_token_ids
    prompt_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
        do_sample=False,  # greedy, or the greatest after `_Draw` added its noise
        num_beams=1,
    )
    criteria = StoppingCriteriaList([watcher] if watcher else [])
    if sampling.stop:
        criteria.append(_StopStrings(llm, sampling))
    with torch.no_grad():
        output: Tensor = model.generate(
            **inputs,
            generation_config=config,
            logits_processor=_processors(sampling, said, prompt_length),
            stopping_criteria=criteria,
            streamer=watcher if isinstance(watcher, _TokenRelay) else None,
        )
    return output[:, prompt_length:]


def _visible(llm: LLM, ids: list[int], sampling: Sampling, *, final: bool) -> tuple[str, bool]:
    """The text to show of `ids`, cut at a stop string; while streaming, what may still change is held back."""
    text = llm.decode(ids)
    cuts = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
    if cuts:
        return text[: min(cuts)], True
    if final:
        return text, False
    held = max((_overlap(text, stop) for stop in sampling.stop), default=0)
    text = text[: len(text) - held]
    return text.rstrip("\ufffd"), False


def _finish(llm: LLM, ids: list[int], sampling: Sampling) -> Generated:
    ends = [at for at, index in enumerate(ids) if index in llm.stop_token_ids]
    kept = ids[: ends[0]] if ends else ids
    text, stopped = _visible(llm, kept, sampling, final=True)
    return Generated(text=text, token_ids=kept, finish_reason="stop" if ends or stopped else "length")


class _TokenRelay(StoppingCriteria):
    """Hands tokens from the generating thread to the reading one, and a cancellation back."""

    def __init__(self) -> None:
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._cancelled = threading.Event()

    def put(self, tokens: Tensor) -> None:
        """Called by transformers: first with the prompt's ids (none here to relay), then with each new token."""
        if tokens.ndim == 1 and tokens.numel() == 1:
            self._tokens.put(int(tokens))

    def end(self) -> None:
        self._tokens.put(None)

    def fail(self, error: BaseException) -> None:
        self._tokens.put(error)

    def cancel(self) -> None:
        self._cancelled.set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), device=input_ids.device)

    def __iter__(self) -> Iterator[int]:
        while (item := self._tokens.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class _Step(StoppingCriteria):
    """Tells of each step; it stops nothing."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _StopStrings(StoppingCriteria):
    """Ends each row of a batch once its own text holds a stop string."""

    def __init__(self, llm: LLM, sampling: Sampling) -> None:
        self._llm = llm
        self._sampling = sampling
        self._longest = max(len(stop) for stop in sampling.stop)
        self._generated: int = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._generated += 1
        recent = input_ids[:, -min(self._generated, 4 * self._longest + 8) :].tolist()
        found = [any(stop in self._llm.decode(row) for stop in self._sampling.stop) for row in recent]
        return torch.tensor(found, device=input_ids.device)


class _Draw(LogitsProcessor):
    """Draws each row's next token with a generator of its own: noise is added such that the greatest is the draw.

    So neither other threads, nor the batch around a row, nor torch's global generator play a part (Gumbel-max).
    """

    def __init__(self, seed: int | None, rows: int) -> None:
        seeds = [seed] * rows if seed is not None else torch.randint(2**62, (rows,)).tolist()
        self._generators = [torch.Generator().manual_seed(each) for each in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        uniform = torch.stack([torch.rand(width, generator=each) for each in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores + gumbel.to(scores.device, scores.dtype)


class _Penalty(LogitsProcessor):
    """Makes less likely what was said: in each row's answer, and in its prompt where that is text.

    Not transformers' own, which takes all ids of a batch: padding, and anchors of compressed text, are not said.

    Args:
        penalty: Divides the scores of what was said, or multiplies them below 0.
        said: Ids of each row's prompt that count.
        start: Where in a row's ids the answer begins.
    """

    def __init__(self, penalty: float, said: Sequence[Sequence[int]], start: int) -> None:
        self._penalty = penalty
        self._prompts = said
        self._start = start
        self._said: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._said is None:
            self._said = torch.zeros_like(scores, dtype=torch.bool)
            for row, ids in enumerate(self._prompts):
                self._said[row, list(ids)] = True
        said = self._said.scatter(1, input_ids[:, self._start :], True)
        return torch.where(said, torch.where(scores < 0, scores * self._penalty, scores / self._penalty), scores)


def _text_of(prompts: Sequence[PromptInputs]) -> list[Sequence[int]]:
    """The ids of prompts that are text only; none of others."""
    return [() if isinstance(p, Tensor | AnchoredPrompt) else [int(index) for index in p] for p in prompts]


def _processors(sampling: Sampling, said: Sequence[Sequence[int]], start: int) -> LogitsProcessorList:
    """What transformers runs over the scores; given whole, so that a model's own defaults add nothing."""
    steps: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        steps.append(_Penalty(float(sampling.repetition_penalty), said, start))
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(_Draw(sampling.seed, len(said)))
    return LogitsProcessorList(steps)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
