"""extemb for LangChain: documents that would be truncated are compressed into extensible embeddings instead.

The names below load on first use; torch and transformers load with the first call of a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_extemb.chat import ChatExtensible
    from langchain_extemb.compressor import ExtensibleCompressor
    from langchain_extemb.llm import ExtensibleLLM
    from langchain_extemb.retriever import ExtensibleRetriever

_HOMES = {
    "ChatExtensible": "chat",
    "ExtensibleCompressor": "compressor",
    "ExtensibleLLM": "llm",
    "ExtensibleRetriever": "retriever",
}

__all__ = ["ChatExtensible", "ExtensibleCompressor", "ExtensibleLLM", "ExtensibleRetriever"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
