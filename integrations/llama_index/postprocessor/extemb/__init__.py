"""LlamaIndex nodes that go to the LLM as extensible embeddings instead of being truncated."""

from llama_index.postprocessor.extemb.base import ExtensibleEmbeddingPostprocessor
from llama_index.postprocessor.extemb.node import ExtensibleNode
from llama_index.postprocessor.extemb.transform import ExtensibleTransform

__all__ = ["ExtensibleEmbeddingPostprocessor", "ExtensibleNode", "ExtensibleTransform"]
