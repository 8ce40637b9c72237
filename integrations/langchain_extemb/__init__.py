"""extemb for LangChain: documents that would be truncated are compressed into extensible embeddings instead."""

from langchain_extemb.chat import ChatExtensible
from langchain_extemb.compressor import ExtensibleCompressor
from langchain_extemb.llm import ExtensibleLLM
from langchain_extemb.retriever import ExtensibleRetriever

__all__ = ["ChatExtensible", "ExtensibleCompressor", "ExtensibleLLM", "ExtensibleRetriever"]
