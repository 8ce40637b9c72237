"""An LLM that is held in a pass until a test lets it go on: what is cancelled is then told by counts, not by time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from extemb_core.models import generation

PATIENCE = 300  # seconds until something counts as hung, on however busy a machine


class Passes:
    """Counts the passes of an LLM, and holds it in all but the first few until an answer is cancelled.

    Attributes:
        count: Passes so far, the one that is held included.
        held: Set once a pass is held.
    """

    def __init__(self, free: int) -> None:
        self.count = 0
        self.held = threading.Event()
        self._free = free
        self._let_go = False
        self._running = 0
        self._changed = threading.Condition()

    def before(self) -> None:
        with self._changed:
            self.count += 1
            number = self.count
            if number > self._free:
                self.held.set()
            assert self._changed.wait_for(lambda: self._let_go or number <= self._free, 2 * PATIENCE)

    def let(self, count: int) -> None:
        """Let so many passes more go on."""
        with self._changed:
            self._free += count
            self._changed.notify_all()

    def let_go(self) -> None:
        """Let all passes go on: also called when the stream of an answer is cancelled."""
        with self._changed:
            self._let_go = True
            self._changed.notify_all()

    def run(self, whole: Any, *args: Any, **settings: Any) -> Any:
        with self._changed:
            self._running += 1
        try:
            return whole(*args, **settings)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def stopped(self) -> bool:
        """Wait until the LLM answers nobody any more, and say if no pass came after the one that was held."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, PATIENCE) and self.count <= self._free + 1


@contextmanager
def passes_of(llm: Any, monkeypatch: pytest.MonkeyPatch, free: int = 4) -> Iterator[Passes]:
    """Hold the passes of `llm` after so many; no answer ends by itself, with the token that would end it."""
    passes = Passes(free)
    monkeypatch.setitem(llm.__dict__, "stop_token_ids", [llm.tokenizer.pad_token_id])
    whole = generation._run

    class Relay(generation._TokenRelay):
        def __init__(self) -> None:
            super().__init__()
            cancel = self.cancelled.set
            self.cancelled.set = lambda: (cancel(), passes.let_go())[0]  # type: ignore[method-assign]

    monkeypatch.setattr(generation, "_run", lambda *args, **settings: passes.run(whole, *args, **settings))
    monkeypatch.setattr(generation, "_TokenRelay", Relay)
    hook = llm.model.register_forward_pre_hook(lambda *_: passes.before())
    try:
        yield passes
    finally:
        passes.let_go()
        hook.remove()
