"""Prepare the calls of both models for LangChain: load weights in a thread, and make a list of the documents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.outputs import LLMResult
from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.config import get_config_list

from extemb_core.documents import Document, several
from extemb_core.frameworks.aio import MAX_CONCURRENCY, in_thread
from extemb_core.frameworks.settings import GenerationSettings

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM


class LoadedInThread(GenerationSettings):
    """Loads weights in a thread. A base class before LangChain's own, which would need them on the event loop."""

    # Standard parameters of LangChain that have no meaning for a model in this process.
    _WITHOUT_EFFECT: ClassVar[frozenset[str]] = frozenset({"timeout", "max_retries", "streaming", "stream_usage"})

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        """Return a runnable with settings for all its calls; see LangChain."""
        return Bound(bound=self, kwargs=_listed(kwargs), config={})  # type: ignore[arg-type]

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer prompts together, up to `max_concurrency` of the config at a time; each fails on its own."""
        if not inputs:
            return []
        configs, at_once = _at_once(config, len(inputs))
        with self._announced(at_once, kwargs):
            return Runnable.batch(
                self,  # type: ignore[arg-type]
                inputs,
                configs,
                return_exceptions=return_exceptions,
                **_listed(kwargs),
            )

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Answer prompts as `batch` does, without blocking the event loop."""
        if not inputs:
            return []
        configs, at_once = _at_once(config, len(inputs))
        with suppress(Exception):  # each call will raise it
            await in_thread(self._lm_of, kwargs)
        with self._announced(at_once, kwargs):
            return await Runnable.abatch(
                self,  # type: ignore[arg-type]
                inputs,
                configs,
                return_exceptions=return_exceptions,
                **_listed(kwargs),
            )

    def batch_as_completed(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Answer several inputs, each as it is done; see LangChain."""
        answers: Iterator[Any] = super().batch_as_completed(*args, **_listed(kwargs))  # type: ignore[misc]
        return answers

    def abatch_as_completed(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        """Answer several inputs, each as it is done; see LangChain."""
        answers: AsyncIterator[Any] = super().abatch_as_completed(*args, **_listed(kwargs))  # type: ignore[misc]
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

    def astream_events(self, *args: Any, **kwargs: Any) -> Any:
        """Yield the events of an answer; see LangChain."""
        told = super().astream_events  # type: ignore[misc]
        if kwargs.get("version") != "v3":  # other versions use `astream`
            return told(*args, **kwargs)

        async def loaded() -> Any:
            await self._load()
            return await told(*args, **kwargs)

        return loaded()

    def get_num_tokens(self, text: str) -> int:
        """Count a text's tokens; documents behind refs in it count as the positions in which a call would read them."""
        lm = self.lm
        parts = lm.refs.find(text)
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return len(self.get_token_ids(text))
        return sum(len(self.get_token_ids(part)) for part in texts) + self._positions_of_documents(lm, parts)

    def _positions_of_documents(self, lm: ExtensibleLM, parts: list[str | Document]) -> int:
        """Count the positions of the documents in a prompt."""
        raise NotImplementedError

    async def _load(self) -> None:
        with suppress(Exception):  # the call will raise it, where callbacks see it
            await in_thread(lambda: self.lm)

    @contextmanager
    def _announced(self, count: int, settings: dict[str, Any]) -> Iterator[None]:
        """Let `count` calls be answered together; if the model cannot be loaded, each call will fail."""
        with ExitStack() as stack:
            with suppress(Exception):
                stack.enter_context(self._lm_of(settings).batcher.announce(count))
            yield


def _at_once(config: RunnableConfig | list[RunnableConfig] | None, count: int) -> tuple[list[RunnableConfig], int]:
    """Return the configs of a batch, and how many prompts run at once: all, if the configs allow it."""
    configs = get_config_list(config, count)
    at_once = min(configs[0].get("max_concurrency") or MAX_CONCURRENCY, count)
    return [{**one, "max_concurrency": at_once} for one in configs], at_once


class Bound(RunnableBinding[Any, Any]):
    """A model with settings, to which more can be bound as to the model itself."""

    @classmethod
    def lc_id(cls) -> list[str]:
        return [*cls.get_lc_namespace(), "RunnableBinding"]

    def bind(self, **kwargs: Any) -> Runnable[Any, Any]:
        return super().bind(**_listed(kwargs))


def _listed(settings: dict[str, Any]) -> dict[str, Any]:
    """Make a list of an iterator's documents, which several calls would otherwise share among them."""
    documents = settings.get("documents")
    return {**settings, "documents": several(documents)} if isinstance(documents, Iterator) else settings
