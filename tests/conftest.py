"""Fixtures for all tests; the tiny models themselves are in `tiny.py`."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from typing import Any

import pytest
from tiny import tiny_llm


@pytest.fixture
def llm() -> Any:
    """A tiny Llama-style LLM, shared between tests (nothing may change it)."""
    return tiny_llm()
