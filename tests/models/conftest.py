"""A tiny LLM in a folder."""

from __future__ import annotations

import pytest
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def saved(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path
