"""Fixtures for all tests; the tiny models themselves are in `tiny.py`."""

from __future__ import annotations

import asyncio
import inspect
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import Any

import hypothesis
import pytest
from tiny import tiny_llm

# No deadlines: a busy machine is no failure. The same examples everywhere: a red run can be repeated.
hypothesis.settings.register_profile("extemb", deadline=None, derandomize=True)
hypothesis.settings.load_profile("extemb")


@pytest.fixture(autouse=True)
def no_loop_is_left_over(request: pytest.FixtureRequest) -> None:
    """LlamaIndex's synchronous calls take the thread's event loop, make one if need be, and close none."""
    if not inspect.iscoroutinefunction(getattr(request.node, "function", None)):
        asyncio.set_event_loop(None)


@pytest.fixture
def llm() -> Any:
    """A tiny Llama-style LLM, shared between tests (nothing may change it)."""
    return tiny_llm()
