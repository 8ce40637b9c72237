"""A tiny model whose window holds several documents, behind a server with keys."""

from __future__ import annotations

import pytest
from served import KEYS, served
from tiny import entering, tiny_model, tiny_tokenizer

from extemb_core import ExtensibleLM
from extemb_core.models.llm import LLM


@pytest.fixture(scope="module")
def lm():
    llm = LLM(tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer(), name="tiny-llama")
    return ExtensibleLM(llm, entering(llm))


@pytest.fixture(scope="module")
def guarded(lm, tmp_path_factory):
    with served(lm, tmp_path_factory.mktemp("guarded"), keys=KEYS) as one:
        yield one
