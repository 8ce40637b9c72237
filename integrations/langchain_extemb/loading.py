"""What both models do before LangChain sees a call: load weights in a thread, and make a list of its documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from langchain_core.documents.base import BaseMedia
from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable

from extemb_core.documents import Document
from extemb_core.errors import ExtembError
from extemb_core.frameworks.aio import in_thread
from extemb_core.frameworks.settings import GenerationSettings


class LoadedInThread(GenerationSettings):
    """Base of a model, before LangChain's own, which asks on the event loop for what only loaded weights tell."""

    # Parameters that LangChain standardises, of which a model in this process has no use.
    _WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset(
        {"timeout", "max_retries", "api_key", "base_url", "streaming", "stream_usage"}
    )

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        """Return a runnable with settings of each of its calls; see LangChain."""
        bound: Runnable[Any, Any] = super().bind(**_listed(kwargs))  # type: ignore[misc]
        return bound

    def batch(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Answer several inputs; see LangChain."""
        answers: list[Any] = super().batch(*args, **_listed(kwargs))  # type: ignore[misc]
        return answers

    async def abatch(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Answer several inputs; see LangChain."""
        answers: list[Any] = await super().abatch(*args, **_listed(kwargs))  # type: ignore[misc]
        return answers

    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer several prompts; see LangChain."""
        result: LLMResult = super().generate(*args, **_listed(kwargs))  # type: ignore[misc]
        return result

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Answer several prompts; see LangChain."""
        await self._load()
        result: LLMResult = await super().agenerate(*args, **_listed(kwargs))  # type: ignore[misc]
        return result

    async def astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Answer piece by piece; see LangChain."""
        await self._load()
        async for chunk in super().astream(*args, **kwargs):  # type: ignore[misc]
            yield chunk

    async def _load(self) -> None:
        await in_thread(lambda: self.lm)

    @contextmanager
    def _announced(self, count: int, settings: dict[str, Any]) -> Iterator[None]:
        """Let so many calls be answered together; a model that cannot be loaded fails in each of them."""
        try:
            batcher = self._lm_of(settings).batcher
        except ExtembError:
            yield
            return
        with batcher.announce(count):
            yield


def _listed(settings: dict[str, Any]) -> dict[str, Any]:
    """Make a list of documents that come one by one: they are read more than once, and a cache's key names them."""
    documents = settings.get("documents")
    if isinstance(documents, str | Mapping | Document | BaseMedia) or not isinstance(documents, Iterable):
        return settings
    return {**settings, "documents": list(documents)}
