"""A chat model that reads documents as extensible embeddings."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, cast

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import get_config_list

from extemb_core.answers import Answer, AnswerStream
from langchain_extemb.messages import to_documents, to_messages
from langchain_extemb.models import Answering, told

MOST_AT_ONCE = 32
_pool = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="extemb")  # of all models: none of them blocks a loop


class ChatExtensible(Answering, BaseChatModel):
    """A frozen LLM whose documents are compressed instead of truncated.

    ```python
    from langchain_extemb import ChatExtensible

    llm = ChatExtensible.from_model_id("smollm2-135m-instruct", store="docs.extemb", budget=1024)
    llm.invoke("What changed in 2023?", documents=retriever.invoke("changes in 2023"))
    ```

    Documents are read wherever LangChain puts them: `documents=` of a call or of `bind` (they join the last human
    message), `text-plain`, `document` and `search_result` content blocks, the artifact of a retriever tool's message,
    and refs that an `ExtensibleCompressor` left in a prompt. `response_metadata["extemb"]["documents"]` says what
    became of each. Of a conversation that the window does not hold the older turns are compressed too.
    """

    @property
    def _llm_type(self) -> str:
        return "extemb-chat"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity()

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        settings = {name: kwargs.get(name, getattr(self, name)) for name in ("temperature", "max_tokens")}
        found = LangSmithParams(
            ls_provider="extemb",
            ls_model_name=kwargs.get("model") or self.model,
            ls_model_type="chat",
            ls_temperature=settings["temperature"],
            ls_max_tokens=settings["max_tokens"],
        )
        if stop or self.stop:
            found["ls_stop"] = stop or self.stop or []
        return found

    # -- answers ----------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._answer(messages, stop, kwargs, None), kwargs.get("model") or self.model)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        cancelled = threading.Event()
        try:
            answer = await asyncio.wrap_future(_pool.submit(self._answer, messages, stop, kwargs, cancelled))
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return _result(answer, kwargs.get("model") or self.model)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._opened(messages, stop, kwargs) as stream:
            for piece in stream:
                chunk = _chunk(piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield _last(stream.answer, kwargs.get("model") or self.model)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        opening = _pool.submit(self._opened, messages, stop, kwargs)
        working: Future[Any] = opening
        try:
            stream = await asyncio.wrap_future(opening)
            while True:
                working = _pool.submit(next, stream, None)
                piece = await asyncio.wrap_future(working)
                if piece is None:
                    break
                chunk = _chunk(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield _last(stream.answer, kwargs.get("model") or self.model)
        finally:  # whoever stops reading stops the LLM
            _pool.submit(_close, opening, working)

    def batch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Prompts answered together, up to `max_concurrency` of the config at a time."""
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        at_once = configs[0].get("max_concurrency") or min(MOST_AT_ONCE, len(inputs))
        configs = [{**one, "max_concurrency": at_once} for one in configs]
        with self._shared().batcher.expecting(min(at_once, len(inputs))):
            return super().batch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """`batch` without blocking the event loop."""
        if not inputs:
            return []
        configs = get_config_list(config, len(inputs))
        at_once = configs[0].get("max_concurrency") or MOST_AT_ONCE
        shared = await asyncio.wrap_future(_pool.submit(self._shared))
        with shared.batcher.expecting(min(at_once, len(inputs))):
            return await super().abatch(inputs, configs, return_exceptions=return_exceptions, **kwargs)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Positions of the window that messages take with these settings, their documents included."""
        lm = self.lm
        return lm.positions(to_messages(messages, lm.refs), budget=self.budget, ratio=self.ratio)

    def get_token_ids(self, text: str) -> list[int]:
        return [int(one) for one in self.lm.llm.encode(text)]

    # -- inside -----------------------------------------------------------------------------------------------

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        settings: dict[str, Any],
        cancelled: threading.Event | None,
    ) -> Answer:
        shared = self._shared(settings.get("model"), settings.get("embedder"))
        documents = to_documents(settings.get("documents"))
        asked = to_messages(messages, shared.lm.refs)
        prepared = shared.lm.prepare(asked, documents, condense=True, **self._asked(stop, settings))
        return shared.batcher.answer(*prepared, cancelled)

    def _opened(self, messages: list[BaseMessage], stop: list[str] | None, settings: dict[str, Any]) -> AnswerStream:
        lm = self._shared(settings.get("model"), settings.get("embedder")).lm
        documents = to_documents(settings.get("documents"))
        return lm.stream(to_messages(messages, lm.refs), documents, condense=True, **self._asked(stop, settings))


def _result(answer: Answer, model: str) -> ChatResult:
    message = AIMessage(content=answer.text, usage_metadata=_usage(answer), response_metadata=told(answer, model))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _last(answer: Answer, model: str) -> ChatGenerationChunk:
    """What is known when all was written."""
    message = AIMessageChunk(
        content="", usage_metadata=_usage(answer), response_metadata=told(answer, model), chunk_position="last"
    )
    return ChatGenerationChunk(message=message)


def _chunk(piece: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=piece))


def _usage(answer: Answer) -> UsageMetadata:
    """Positions that were really used."""
    read, written = answer.prompt_positions, answer.new_tokens
    return cast(UsageMetadata, {"input_tokens": read, "output_tokens": written, "total_tokens": read + written})


def _close(opening: Future[AnswerStream], working: Future[Any]) -> None:
    """Close a stream, once the step that is under way is done."""
    wait([opening, working])
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
