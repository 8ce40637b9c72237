"""A real index of a few hundred nodes, the default model, and a store that a later process would find."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.node_parser import SentenceSplitter
from retrieval_encoder import by_words

from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.frameworks.shared import share
from extemb_core.models.embedder import ExtensibleEmbedder
from llama_index.llms.extemb import ExtensibleLLM
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor, ExtensibleNode


class ByWords(BaseEmbedding):
    def _get_text_embedding(self, text):
        return by_words([text])[0].tolist()

    def _get_query_embedding(self, query):
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query):
        return self._get_text_embedding(query)


@pytest.mark.real_model
@pytest.mark.usefixtures("real_weights_once")
async def test_an_index_of_a_few_hundred_nodes(tmp_path, monkeypatch):
    documents = [Document(text=topics[name], metadata={"file_name": name}) for name in sorted(topics)[:50]]
    splitter = SentenceSplitter(chunk_size=128, chunk_overlap=0)
    index = VectorStoreIndex.from_documents(documents, embed_model=ByWords(), transformations=[splitter])
    assert len(index.docstore.docs) > 200
    loaded = share("smollm2-135m-instruct")
    with EmbeddingStore.open(tmp_path / "store") as store:
        llm = ExtensibleLLM.from_lm(ExtensibleLM(loaded.llm, loaded.embedder, store), max_tokens=8)
        post = ExtensibleEmbeddingPostprocessor(llm=llm, ratio=8)
        engine = index.as_query_engine(llm=llm, similarity_top_k=8, node_postprocessors=[post])
        response = engine.query("Which statement raises an exception?")
        assert len(response.source_nodes) == 8
        nodes = [found.node for found in response.source_nodes]
        compressed = [node for node in nodes if isinstance(node, ExtensibleNode) and node.extemb_ratio == 8]
        assert len(compressed) > 4
        assert sum(node.extemb_positions for node in compressed) < sum(node.extemb_tokens for node in compressed) / 7
        monkeypatch.setattr(ExtensibleEmbedder, "compress_ids", lambda *args, **kwargs: pytest.fail("compressed again"))
        assert str(await engine.aquery("Which statement raises an exception?")) == str(response)
