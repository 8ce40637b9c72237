"""Extensible embeddings: k tokens of text become one input embedding of a frozen LLM (arXiv 2402.11577).

The names below load on first use, so that importing the package is quick and needs neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extemb_core.answers import Answer
    from extemb_core.context.planning import Plan, plan_context
    from extemb_core.documents import Document
    from extemb_core.errors import ExtembError
    from extemb_core.library.library import Library
    from extemb_core.lm import ExtensibleLM
    from extemb_core.loaders import read_document, read_documents
    from extemb_core.models.compressed import Compressed
    from extemb_core.models.config import ExtensibleEmbedderConfig
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.generation import Sampling
    from extemb_core.models.llm import LLM
    from extemb_core.store.store import EmbeddingStore

__version__ = "0.1.0"

_HOMES = {
    "Answer": "answers",
    "Compressed": "models.compressed",
    "Document": "documents",
    "EmbeddingStore": "store.store",
    "ExtembError": "errors",
    "ExtensibleEmbedder": "models.embedder",
    "ExtensibleEmbedderConfig": "models.config",
    "ExtensibleLM": "lm",
    "LLM": "models.llm",
    "Library": "library.library",
    "Plan": "context.planning",
    "Sampling": "models.generation",
    "plan_context": "context.planning",
    "read_document": "loaders",
    "read_documents": "loaders",
}

__all__ = [
    "LLM",
    "Answer",
    "Compressed",
    "Document",
    "EmbeddingStore",
    "ExtembError",
    "ExtensibleEmbedder",
    "ExtensibleEmbedderConfig",
    "ExtensibleLM",
    "Library",
    "Plan",
    "Sampling",
    "__version__",
    "plan_context",
    "read_document",
    "read_documents",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
