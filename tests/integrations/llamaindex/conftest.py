"""A tiny LLM for LlamaIndex, and nodes that retrieval might have returned."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.schema import NodeRelationship, NodeWithScore, RelatedNodeInfo, TextNode
from tiny import SENTENCES, roomy_llm, shared_embedder

from extemb_core import ExtensibleLM
from llama_index.llms.extemb import ExtensibleLLM


@pytest.fixture
def lm():
    llm = roomy_llm(2048)
    return ExtensibleLM(llm, shared_embedder(llm, chunk_size=64))


@pytest.fixture
def llm(lm):
    return ExtensibleLLM.from_lm(lm, max_tokens=4)


@pytest.fixture
def nodes():
    """Three, the last of them short."""
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc")}
    texts = [SENTENCES[:300], SENTENCES[100:380], "Short."]
    return [
        NodeWithScore(
            node=TextNode(
                id_=f"node-{at}",
                text=text,
                metadata={"file_name": f"{at}.txt", "secret": "not for the LLM"},
                excluded_llm_metadata_keys=["secret"],
                relationships=source,
                start_char_idx=at,
            ),
            score=0.9 - at / 10,
        )
        for at, text in enumerate(texts)
    ]
