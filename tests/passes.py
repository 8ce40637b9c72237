"""An LLM that is held in a pass until a test lets it go on: what is cancelled is then told by counts, not by time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from extemb_core.models import generation

PATIENCE = 300  # seconds until something counts as hung, on however busy a machine


class Passes:
    """Counts the passes of an LLM, and holds it before all but the first few.

    Attributes:
        count: Passes so far, the one that is held included.
        held: Set once a pass is held.
        go_on: Lets all passes go on when it is set; whatever cancels a stream sets it.
    """

    def __init__(self, free: int) -> None:
        self.count = 0
        self.free = free
        self.held = threading.Event()
        self.go_on = threading.Event()
        self._running = 0
        self._changed = threading.Condition()

    def before(self) -> None:
        self.count += 1
        if self.count > self.free:
            self.held.set()
            assert self.go_on.wait(2 * PATIENCE)
            time.sleep(0.01)  # so that a thread that only waits for the next token gets its turn before the next pass

    def run(self, whole: Any, *args: Any, **settings: Any) -> Any:
        with self._changed:
            self._running += 1
        try:
            return whole(*args, **settings)
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def ended(self) -> bool:
        """Wait until the LLM answers nobody any more."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, PATIENCE)


@contextmanager
def passes_of(llm: Any, monkeypatch: pytest.MonkeyPatch, free: int = 4) -> Iterator[Passes]:
    """Hold the passes of `llm` after so many."""
    passes = Passes(free)
    whole, cancel = generation._run, generation._TokenRelay.cancel
    monkeypatch.setattr(generation, "_run", lambda *args, **settings: passes.run(whole, *args, **settings))
    monkeypatch.setattr(generation._TokenRelay, "cancel", lambda self: (cancel(self), passes.go_on.set())[0])
    hook = llm.model.register_forward_pre_hook(lambda *_: passes.before())
    try:
        yield passes
    finally:
        passes.go_on.set()
        assert passes.ended()
        hook.remove()
