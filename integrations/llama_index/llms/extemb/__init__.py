"""LlamaIndex LLM that reads documents as extensible embeddings, and a prompt helper that counts them.

The helper loads on first use; torch and transformers load with it, or with the first call of an LLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.llms.extemb.base import ExtensibleLLM, ExtensibleLLMError

if TYPE_CHECKING:
    from llama_index.llms.extemb.prompt_helper import extensible_prompt_helper

__all__ = ["ExtensibleLLM", "ExtensibleLLMError", "extensible_prompt_helper"]


def __getattr__(name: str) -> Any:
    if name != "extensible_prompt_helper":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llama_index.llms.extemb.prompt_helper import extensible_prompt_helper

    return extensible_prompt_helper
