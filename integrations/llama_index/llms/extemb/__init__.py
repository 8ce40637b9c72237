"""A LlamaIndex LLM that reads documents as extensible embeddings, and a prompt helper that counts them."""

from llama_index.llms.extemb.base import ExtensibleLLM
from llama_index.llms.extemb.prompt_helper import extensible_prompt_helper

__all__ = ["ExtensibleLLM", "extensible_prompt_helper"]
