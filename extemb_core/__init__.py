"""Extensible embeddings: k tokens of text become one input embedding of a frozen LLM (arXiv 2402.11577).

The names below load on first use, so that importing the package is quick and needs neither torch nor
transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from extemb_core.answers import Answer as Answer
    from extemb_core.context.planning import Plan as Plan
    from extemb_core.context.planning import plan_context as plan_context
    from extemb_core.documents import Document as Document
    from extemb_core.errors import ExtembError as ExtembError
    from extemb_core.library.library import Library as Library
    from extemb_core.lm import ExtensibleLM as ExtensibleLM
    from extemb_core.loaders import read_document as read_document
    from extemb_core.loaders import read_documents as read_documents
    from extemb_core.models.compressed import Compressed as Compressed
    from extemb_core.models.config import ExtensibleEmbedderConfig as ExtensibleEmbedderConfig
    from extemb_core.models.embedder import ExtensibleEmbedder as ExtensibleEmbedder
    from extemb_core.models.generation import Sampling as Sampling
    from extemb_core.models.llm import LLM as LLM
    from extemb_core.store.store import EmbeddingStore as EmbeddingStore

__version__ = "0.2.0"

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

__all__ = [*_HOMES, "__version__"]  # type checkers read the aliases above


def __getattr__(name: str) -> Any:
    """Import a name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the names that are there and those that load on first use."""
    return sorted({*globals(), *__all__})
