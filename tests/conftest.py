"""Fixtures for all tests; the tiny models themselves are in `tiny.py`."""

from __future__ import annotations

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


@pytest.fixture
def llm() -> Any:
    """A tiny Llama-style LLM, shared between tests (nothing may change it)."""
    return tiny_llm()
