"""Answer concurrent requests, from any number of threads, in batches."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakSet

from extemb_core.answers import Answer, AnswerStream, PreparedPrompt, to_answer
from extemb_core.models.bulk import batch_with
from extemb_core.models.generation import Generated, Sampling
from extemb_core.models.llm import LLM
from extemb_core.utils.threads import at_once
from extemb_core.utils.validation import whole_number

_GATHER_SECONDS = 0.2  # maximum wait for requests that were announced


@dataclass(eq=False)
class _Request:
    prepared: PreparedPrompt
    sampling: Sampling
    cancelled: threading.Event
    answer: Future[Answer] = field(default_factory=Future)

    @property
    def positions(self) -> int:
        """Maximum number of positions of the prompt and its answer."""
        return len(self.prepared.prompt) + self.sampling.max_new_tokens


class Batcher:
    """Answers one batch at a time: a thread that finds the LLM free answers all waiting requests, also other threads'.

    A batch takes no more positions than the device has memory for (see `positions_at_once`). If a batch fails, its
    requests are answered one by one, so that each gets its own error.

    Args:
        llm: LLM that answers.
        batch_size: Maximum number of requests in a batch.
    """

    def __init__(self, llm: LLM, batch_size: int = 32) -> None:
        whole_number(batch_size, "batch_size")
        self.llm = llm
        self.batch_size = batch_size
        self._begin()
        _batchers.add(self)

    def _begin(self) -> None:
        """Reset to no requests, also in a forked process, which lacks the threads that asked."""
        self._changed = threading.Condition()  # guards the lists below, and signals finished requests
        self._answering = False
        self._waiting: list[_Request] = []
        self._announced: list[list[int]] = []  # for each announcement, how many requests are still to come

    @contextmanager
    def announce(self, count: int) -> Iterator[None]:
        """Announce that `count` requests are about to come at once: the first waits a moment for the others."""
        to_come = [count]
        with self._changed:
            self._announced.append(to_come)
        try:
            yield
        finally:
            with self._changed:
                to_come[0] = 0  # some may never have come
                self._announced = [some for some in self._announced if some[0]]
                self._changed.notify_all()

    def answer(self, prepared: PreparedPrompt, sampling: Sampling, cancelled: threading.Event | None = None) -> Answer:
        """Answer a prompt from `ExtensibleLM.prepare`, in one batch with what other threads ask meanwhile.

        An answer does not depend on the others in its batch.

        Args:
            prepared, sampling: The prompt, and how its tokens are chosen.
            cancelled: When set, the answer is what was written so far; in a batch, that is nothing or the whole answer.
        """
        return self.answer_all([(prepared, sampling)], cancelled)[0]

    def answer_all(
        self, prepared: Sequence[tuple[PreparedPrompt, Sampling]], cancelled: threading.Event | None = None
    ) -> list[Answer]:
        """Answer several at once, as `answer` does."""
        never = threading.Event()
        requests = [_Request(prompt, sampling, cancelled or never) for prompt, sampling in prepared]
        if not self.llm.in_batches:
            at_once(partial(_alone, self.llm), requests, self.batch_size)
            return [request.answer.result() for request in requests]
        with self._changed:
            self._waiting += requests
            for to_come in self._announced[:1]:
                to_come[0] -= len(requests)
            self._announced = [some for some in self._announced if some[0] > 0]
            self._changed.notify_all()
        try:
            for request in requests:
                self._answer_with_others(request)
        finally:  # after Ctrl-C nobody collects the remaining answers
            with self._changed:
                self._waiting = [request for request in self._waiting if request not in requests]
        return [request.answer.result() for request in requests]

    def _answer_with_others(self, first: _Request) -> None:
        """Wait until `first` is answered, or the LLM is free; then answer a batch with it."""
        with self._changed:
            self._changed.wait_for(lambda: first.answer.done() or not self._answering)
            if first.answer.done():
                return
            self._answering = True
        batch = [first]
        try:
            batch = self._gathered(first)
            if len(batch) > 1:
                with suppress(Exception):  # out of memory, or an error of one request
                    _together(self.llm, batch)
            for request in batch:
                if not request.answer.done():
                    _alone(self.llm, request)
        finally:
            with self._changed:
                # After Ctrl-C here, the other requests are answered by their own threads.
                self._waiting += [request for request in batch if not (request is first or request.answer.done())]
                self._answering = False
                self._changed.notify_all()

    def _gathered(self, first: _Request) -> list[_Request]:
        """Take a batch of waiting requests, beginning with `first`."""
        with self._changed:
            self._changed.wait_for(
                lambda: not self._announced or len(self._waiting) >= self.batch_size, timeout=_GATHER_SECONDS
            )
            others = [
                request
                for request in self._waiting
                # With a seed, a prompt's draws must equal those when it is answered alone.
                if request is not first and request.sampling == first.sampling and first.sampling.seed is None
            ]
            lengths = {request: request.positions for request in [first, *others][: self.batch_size]}
            batch = batch_with(first, lengths, self.llm)
            self._waiting = [request for request in self._waiting if request not in batch]
        return batch


_batchers: WeakSet[Batcher] = WeakSet()


def _after_fork_in_child() -> None:
    for batcher in list(_batchers):
        batcher._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _alone(llm: LLM, request: _Request, interrupted: threading.Event | None = None) -> None:
    try:
        with AnswerStream(llm, request.prepared, request.sampling) as stream:
            if not request.cancelled.is_set():
                for _ in stream:
                    if request.cancelled.is_set() or (interrupted is not None and interrupted.is_set()):
                        break
        request.answer.set_result(stream.answer)
    except Exception as error:
        request.answer.set_exception(error)


def _together(llm: LLM, batch: list[_Request]) -> None:
    live = [request for request in batch if not request.cancelled.is_set()]

    def stop_if_nobody_waits() -> None:
        if all(request.cancelled.is_set() for request in live):
            raise CancelledError("nobody waits for any of the batch")

    generated = {}
    with suppress(CancelledError):
        outputs = llm.generate(
            [request.prepared.prompt.inputs(llm) for request in live], batch[0].sampling, stop_if_nobody_waits
        )
        generated = dict(zip(map(id, live), outputs, strict=True))
    for request in batch:
        seconds = time.perf_counter() - request.prepared.start
        output = generated.get(id(request), Generated(finish_reason="cancelled"))
        request.answer.set_result(to_answer(request.prepared, output, first_token=seconds, total=seconds))
