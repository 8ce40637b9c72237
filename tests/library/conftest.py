"""A library of a tiny LLM, opened as often as a test asks."""

from __future__ import annotations

import pytest
from retrieval_encoder import by_words
from tiny import random_embedder, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.library.library import Library


@pytest.fixture(scope="module")
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, random_embedder(llm))


@pytest.fixture
def opened(lm, tmp_path):
    def make(**settings):
        return Library(tmp_path / "lib", lm, **({"encoder": by_words, "passage_tokens": 40, "ratio": 2} | settings))

    return make
