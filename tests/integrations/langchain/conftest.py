"""A tiny LLM for LangChain, and documents that it can be asked about."""

from __future__ import annotations

import pytest
from langchain_core.documents import Document
from tiny import SENTENCES, shared_embedder, tiny_llm

from extemb_core import ExtensibleLM
from langchain_extemb import ChatExtensible


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, shared_embedder(llm))


@pytest.fixture
def chat(lm):
    return ChatExtensible.from_lm(lm, max_tokens=4, ratio=4)


@pytest.fixture
def documents():
    return [
        Document(id="a", page_content=SENTENCES[:90], metadata={"source": "ships.txt", "page": 1}),
        Document(id="b", page_content=SENTENCES[90:200], metadata={"source": "wires.txt"}),
    ]
