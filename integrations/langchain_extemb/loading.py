"""What both models do about weights that are not loaded yet: load them in a thread, and fail as a call does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from extemb_core.errors import ExtembError
from extemb_core.frameworks.aio import in_thread
from extemb_core.frameworks.settings import GenerationSettings


class LoadedInThread(GenerationSettings):
    """Base of a model, before LangChain's own, which asks on the event loop for what only loaded weights tell."""

    async def agenerate(self, *args: Any, **kwargs: Any) -> Any:
        """Answer several prompts; see LangChain."""
        await self._load()
        return await super().agenerate(*args, **kwargs)  # type: ignore[misc]

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
