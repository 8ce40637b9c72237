"""Generate from prompts: choose tokens, stop, and hand on text piece by piece."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from extemb_core.models.entry import AnchoredPrompt, PromptInputs, TokenIds
from extemb_core.models.stoppable import CACHE
from extemb_core.utils.validation import check_sampling

if TYPE_CHECKING:
    from extemb_core.models.llm import LLM

_MIN_TEMPERATURE = 1e-6  # far below it, scores divided by it are infinite


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The default, temperature 0, is greedy and repeatable.

    Attributes:
        max_new_tokens: Maximum number of tokens in the answer.
        temperature: Sampling temperature; 0 is greedy.
        top_p: Draw from the likeliest tokens that together have this probability.
        top_k: Draw from this many of the likeliest tokens; 0 draws from all.
        repetition_penalty: Penalty for tokens of the answer, and of the prompt if that is text only: the anchors of
            compressed text do not count as said.
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
        stop: Any = self.stop
        if isinstance(stop, Iterable):
            object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        for setting in fields(self):
            object.__setattr__(self, setting.name, check_sampling(setting.name, getattr(self, setting.name)))


@dataclass(kw_only=True)
class Generated:
    """Result of generating from one prompt. `finish_reason`: "stop", "length" or "cancelled"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass(frozen=True, eq=False)
class StreamedRow:
    """One prompt of a batch whose answers are streamed, each with settings of its own.

    Attributes:
        prompt: (T, D) embeddings, ids, or ids with states.
        sampling: How its tokens are chosen.
        on_piece: Called in the generating thread with each piece of its text, and with None at its end.
        cancelled: When set, the row ends at the next token; the others go on. When all rows of the batch are cancelled,
            the pass ends at the next layer, even in the middle of a long prompt.
        result: Filled with the complete result as the stream goes on.
    """

    prompt: PromptInputs
    sampling: Sampling
    on_piece: Callable[[str | None], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    result: Generated = field(default_factory=Generated)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Collect the ids that end an answer: those of the generation config and of the tokenizer, sorted."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})


def turn_end(llm: LLM) -> int:
    """Return the id of the token that ends an assistant's turn."""
    eos = llm.tokenizer.eos_token_id
    return int(eos) if eos in llm.stop_token_ids or not llm.stop_token_ids else llm.stop_token_ids[0]


def generate(
    llm: LLM, prompts: Sequence[PromptInputs], sampling: Sampling, on_token: Callable[[], None] | None = None
) -> list[Generated]:
    """Continue a batch of prompts: (T, D) embeddings, ids, or ids with states (`Prompt.inputs`).

    Prompts are padded on the left and positions counted from each prompt's own start, so that the answer to
    one does not depend on the others. A prefix that all prompts share is read once.

    Args:
        llm: LLM that continues them.
        prompts: Prompts to continue.
        sampling: How tokens are chosen.
        on_token: Called after each step.
    """
    if not prompts:
        return []

    def step(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if on_token is not None:
            on_token()
        return _end_none(input_ids, scores)

    rows = _run(llm, *llm.batch_inputs(prompts), [sampling] * len(prompts), _text_of(prompts), step)
    return [_finish(llm, row, sampling) for row in rows.tolist()]


def generate_and_score(
    llm: LLM, prompts: Sequence[PromptInputs], targets: Sequence[TokenIds], sampling: Sampling
) -> tuple[list[Generated], list[Tensor]]:
    """Return `generate` and `LLM.log_probs` of a batch of prompts, which are read once for both.

    Args:
        llm, prompts, sampling: See `generate`.
        targets: (S,) ids that may follow each prompt.

    Returns:
        The answers, and for each prompt (S,) float32 natural logarithms.
    """
    if not prompts or not llm.reads_in_parts:  # what was read after a prompt cannot be removed from the cache
        return generate(llm, prompts, sampling), llm.log_probs(prompts, targets)
    model, inputs, log_probs = score_at_once(llm, prompts, targets)
    rows = _run(llm, model, inputs, [sampling] * len(prompts), _text_of(prompts), _end_none)
    return [_finish(llm, row, sampling) for row in rows.tolist()], log_probs


def score_at_once(
    llm: LLM, prompts: Sequence[PromptInputs], targets: Sequence[TokenIds]
) -> tuple[Any, dict[str, Any], list[Tensor]]:
    """Return a model, its inputs to continue prompts, and `LLM.log_probs` of what may follow them, from one pass."""
    n = max(1, *map(len, targets))
    # Each row: the prompt, its target without the last token, then padding that is not looked at.
    follow = [[*map(int, target), *[0] * (n - len(target))][:-1] for target in targets]
    model, inputs = llm.batch_inputs([llm.continued(p, ids) for p, ids in zip(prompts, follow, strict=True)], own=n)
    mask, cache = inputs.pop("attention_mask"), inputs.pop(CACHE, DynamicCache(config=llm.model.config))
    read, end = cache.get_seq_length(), mask.shape[1] - n + 1
    with torch.no_grad():
        outputs = model.base_model(
            **{name: rows[:, read:] for name, rows in inputs.items()},
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, read:],
            use_cache=True,
            **{CACHE: cache},
        )
        states = outputs.last_hidden_state[:, -n:]
        log_probs = [llm.log_probs_of(*one) for one in zip(states, targets, strict=True)]
    cache.crop(-n)  # the last position of the prompts is read again: from it the first new token comes
    inputs = {name: rows[:, :end] for name, rows in inputs.items()}
    return model, inputs | {"attention_mask": mask[:, :end], CACHE: cache}, log_probs


def stream(llm: LLM, prompt: PromptInputs, sampling: Sampling, result: Generated | None = None) -> Iterator[str]:
    """Continue one prompt, yielding text as it comes. Closing the iterator stops the LLM at the next token.

    Args:
        llm: LLM that continues it.
        prompt: (T, D) embeddings, ids, or ids with states.
        sampling: How tokens are chosen.
        result: Filled with the complete result as the stream goes on.
    """
    result = result if result is not None else Generated()
    relay = _TokenRelay()
    model, inputs = llm.batch_inputs([prompt])

    def work() -> None:
        try:
            _run(llm, model, inputs, [sampling], _text_of([prompt]), relay.is_cancelled, relay)
        except BaseException as error:
            relay.tokens.put(error)
        finally:
            relay.end()

    worker = threading.Thread(target=work, name="extemb-generate", daemon=True)
    worker.start()
    text = _StreamedText(llm, sampling, result)
    try:
        while not text.ended and (token := relay.tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            if piece := text.add(token):
                yield piece
        if piece := text.finish():
            yield piece
    except BaseException:
        text.cancel()
        raise
    finally:
        relay.cancelled.set()
        worker.join()


def stream_batch(llm: LLM, rows: Sequence[StreamedRow]) -> None:
    """Continue a batch of prompts in this thread, handing on the text of each as it comes.

    The answer to one does not depend on the others, nor on when they end or are cancelled.
    """
    texts = [_StreamedText(llm, row.sampling, row.result) for row in rows]
    longest = max(row.sampling.max_new_tokens for row in rows)
    # Lengths and stop strings differ between rows; they are checked in `step`.
    samplings = [replace(row.sampling, max_new_tokens=longest, stop=()) for row in rows]

    def step(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, text, token in zip(rows, texts, input_ids[:, -1].tolist(), strict=True):
            if not text.ended:
                _hand_on(row, text, token)
        return torch.tensor([text.ended for text in texts], device=input_ids.device)

    def nobody_waits() -> bool:
        return all(text.ended or row.cancelled.is_set() for row, text in zip(rows, texts, strict=True))

    prompts = [row.prompt for row in rows]
    try:
        inputs = llm.batch_inputs(prompts, is_stopped=nobody_waits)
        _run(llm, *inputs, samplings, _text_of(prompts), step)
    except CancelledError:
        for row, text in zip(rows, texts, strict=True):
            if not text.ended:
                _hand_on(row, text, None)


def _hand_on(row: StreamedRow, text: _StreamedText, token: int | None) -> None:
    """Hand a row's reader the text that a token adds, and None if the row ends or is cancelled."""
    if token is None or row.cancelled.is_set():
        text.cancel()
    else:
        piece = text.add(token)
        piece += text.finish() if text.ended else ""
        if piece:
            row.on_piece(piece)
    if text.ended:
        row.on_piece(None)


def _end_none(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _run(
    llm: LLM,
    model: Any,
    inputs: dict[str, Any],
    samplings: Sequence[Sampling],
    said: Sequence[Sequence[int]],
    after_step: Callable[..., Tensor],
    streamer: _TokenRelay | None = None,
) -> Tensor:
    """Return new token ids, (B, S), padded on the right with a stop token.

    Args:
        llm, inputs: See `generate`.
        model: Model that reads the inputs.
        samplings: Sampling of each row; all have the same length and stop strings.
        said: See `_Penalty`.
        after_step: Tells transformers which rows are to end, (B,).
        streamer: Receives the tokens.
    """
    stop_ids, sampling = llm.stop_token_ids, samplings[0]
    prompt_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=1.0,
        eos_token_id=stop_ids or None,
        pad_token_id=stop_ids[0] if stop_ids else 0,
        do_sample=False,  # greedy, or the highest score after `_Draw` added its noise
        num_beams=1,
    )
    n_recent = 4 * max(map(len, sampling.stop), default=0) + 8

    def is_stopped(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [llm.decode(row) for row in input_ids[:, prompt_length:][:, -n_recent:].tolist()]
        return torch.tensor([any(stop in text for stop in sampling.stop) for text in texts], device=input_ids.device)

    criteria: list[Any] = [after_step, is_stopped] if sampling.stop else [after_step]
    if all(other == sampling for other in samplings):
        processors = _processors(sampling, said, prompt_length)
    else:
        each = [_processors(one, [ids], prompt_length) for one, ids in zip(samplings, said, strict=True)]
        processors = LogitsProcessorList([_RowByRow(each)])
    model = copy(model)  # the LLM's own stays as it is
    model.generation_config = GenerationConfig()  # transformers would take from the LLM's what ours leaves open
    with torch.no_grad():
        output: Tensor = model.generate(
            **inputs,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(criteria),
            streamer=streamer,
        )
    return output[:, prompt_length:]


def _processors(sampling: Sampling, said: Sequence[Sequence[int]], prompt_length: int) -> LogitsProcessorList:
    """List the processors after which the highest score is the next token; see `_Penalty` for `said`."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(_Penalty(float(sampling.repetition_penalty), said, prompt_length))
    if sampling.temperature > 0:
        processors.append(transformers.TemperatureLogitsWarper(max(float(sampling.temperature), _MIN_TEMPERATURE)))
        if sampling.top_k:
            processors.append(transformers.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(transformers.TopPLogitsWarper(sampling.top_p))
        processors.append(_Draw(sampling.seed, len(said)))
    return processors


def _visible(text: str, sampling: Sampling, *, final: bool) -> tuple[str, bool]:
    """Return the part of a text to show, and whether a stop string ended it; what may still change is held back."""
    cuts = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
    if cuts:
        return text[: min(cuts)], True
    if final:
        return text, False
    held = max((_overlap(text, stop) for stop in sampling.stop), default=0)
    text = text[: len(text) - held]
    return text.rstrip("\ufffd"), False


def _finish(llm: LLM, ids: list[int], sampling: Sampling) -> Generated:
    """Make the result from new token ids, up to the first stop token."""
    end = next((at for at, index in enumerate(ids) if index in llm.stop_token_ids), None)
    text, stopped = _visible(llm.decode(ids[:end]), sampling, final=True)
    if stopped and not llm.stop_token_ids:  # without stop tokens, find where a row ended while others went on
        decoded = _DecodedText(llm)
        ends = (at for at, index in enumerate(ids, 1) if _visible(decoded.add(index), sampling, final=False)[1])
        end = next(ends, end)
    return Generated(text=text, token_ids=ids[:end], finish_reason="stop" if stopped or end is not None else "length")


class _DecodedText:
    """Decodes tokens one by one: the text that a token adds depends only on the few before it."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._text = ""  # of all tokens except `_open`
        self._before: list[int] = []  # the last tokens of `_text`: a token decoded without them may lose its space
        self._open: list[int] = []  # tokens that may still be parts of a character

    def add(self, token: int) -> str:
        """Add a token, and return the text of all tokens so far."""
        self._open.append(token)
        before, both = self._llm.decode(self._before), self._llm.decode(self._before + self._open)
        text = self._text + both[len(before) :]
        if both.startswith(before) and not both.endswith("\ufffd"):
            self._before = self._open if len(both) > len(before) else self._before + self._open
            self._text, self._open = text, []
        return text


class _StreamedText:
    """The text of one answer as its tokens come, and its end.

    Attributes:
        ended: Whether it ended: by a stop token, a stop string, the maximum length, or a cancellation.
    """

    def __init__(self, llm: LLM, sampling: Sampling, result: Generated) -> None:
        self._llm = llm
        self._sampling = sampling
        self._result = result
        self._decoded = _DecodedText(llm)
        self._sent = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Add a token, and return the text that it adds."""
        self._result.token_ids.append(token)
        self.ended = len(self._result.token_ids) >= self._sampling.max_new_tokens
        if token in self._llm.stop_token_ids:
            self.ended = True
            return ""
        text, stopped = _visible(self._decoded.add(token), self._sampling, final=False)
        self.ended |= stopped
        return self._send(text) if text.startswith(self._sent) else ""

    def finish(self) -> str:
        """Fill the result, and return what was held back."""
        finished = _finish(self._llm, self._result.token_ids, self._sampling)
        for setting in fields(finished):
            setattr(self._result, setting.name, getattr(finished, setting.name))
        return self._send(finished.text)

    def cancel(self) -> None:
        """End the answer with the text shown so far; it counts as finished if that is all of it."""
        if self.ended and _finish(self._llm, self._result.token_ids, self._sampling).text == self._sent:
            self.finish()
            return
        self.ended = True
        self._result.text, self._result.finish_reason = self._sent, "cancelled"

    def _send(self, text: str) -> str:
        piece, self._sent = text[len(self._sent) :], max(self._sent, text, key=len)
        return piece


class _TokenRelay:
    """Hands tokens from the generating thread to the reading one, and a cancellation back.

    Attributes:
        tokens: The tokens written, then None; or the error that ended the generation.
        cancelled: Set when the reader has gone.
    """

    def __init__(self) -> None:
        self.tokens: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()

    def put(self, tokens: Tensor) -> None:
        """Receive from transformers the prompt's ids, which are not relayed, then each new token."""
        for token in tokens.tolist() if tokens.ndim == 1 else ():
            self.tokens.put(token)

    def end(self) -> None:
        """Receive from transformers the end of the tokens."""
        self.tokens.put(None)

    def is_cancelled(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tell transformers whether to stop."""
        return torch.full((len(input_ids),), self.cancelled.is_set(), device=input_ids.device)


class _RowByRow(LogitsProcessor):
    """Applies to each row of a batch its own processors."""

    def __init__(self, rows: Sequence[LogitsProcessorList]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        pairs = zip(self._rows, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([row(ids, of_row) for row, ids, of_row in pairs])


class _Draw(LogitsProcessor):
    """Draws each row's next token with a generator of its own: with Gumbel noise added, the highest score is the draw.

    So a row's draws depend neither on other threads, nor on its batch, nor on torch's global generator.
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
    """Penalises tokens that occur in a row's answer, or in its prompt if that is text only.

    transformers' own penalty counts all ids of a batch, also padding and the anchors of compressed text.

    Args:
        penalty: Divides positive scores of such tokens, and multiplies negative ones.
        said: Ids of each row's prompt that count.
        start: Index in a row's ids at which the answer begins.
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
    """List the ids of prompts that are text only; empty for other prompts."""
    return [() if isinstance(p, Tensor | AnchoredPrompt) else [int(index) for index in p] for p in prompts]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
