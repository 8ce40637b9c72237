"""LLM for completions and chats, streamed or not, in threads or an event loop."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from pydantic import ValidationInfo, field_validator

from extemb_core.answers import Answer, AnswerStream, PreparedPrompt
from extemb_core.errors import ConfigError, ExtembError
from extemb_core.frameworks.aio import AsyncAnswerStream, until_cancelled
from extemb_core.frameworks.settings import GenerationSettings, token_usage
from extemb_core.weights.resolve import window_of
from llama_index.llms.extemb.messages import to_messages

Response = TypeVar("Response", ChatResponse, CompletionResponse)


class ExtensibleLLMError(ExtembError, RuntimeError):
    """An error of a call; its cause is the library's own error.

    It is not a ValueError: LlamaIndex, when it refines an answer, takes those and TypeErrors for an empty answer.
    """


class ExtensibleLLM(GenerationSettings, CustomLLM):
    """Frozen LLM whose documents are compressed instead of truncated.

    ```python
    from llama_index.llms.extemb import ExtensibleLLM
    from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor

    llm = ExtensibleLLM.from_model_id("smollm2-135m-joint", store="docs.extemb")
    index.as_query_engine(llm=llm, node_postprocessors=[ExtensibleEmbeddingPostprocessor(llm=llm, budget=1024)])
    ```

    Documents are read where they stand: behind the refs that an `ExtensibleEmbeddingPostprocessor` leaves in the place
    of a node's text, in citable and document blocks of a chat, and from `documents=` of a call. `raw["extemb"]` of a
    response says what became of each. If a chat does not fit the window, its older turns are compressed too.
    """

    @field_validator("messages_to_prompt", "completion_to_prompt", mode="before")
    @classmethod
    def _not_used(cls, value: Any, info: ValidationInfo) -> Any:
        if value not in (None, generic_messages_to_prompt, default_completion_to_prompt):
            raise ConfigError(
                f"{info.field_name}= makes no difference: prompts go through the LLM's own chat template; leave it "
                "out, and call complete(prompt, formatted=True) for a prompt that is whole"
            )
        return value

    @classmethod
    def class_name(cls) -> str:
        return "ExtensibleLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Context window of the LLM, and the maximum length of its answers."""
        of_files = self.loaded_lm is None and self.engine == "transformers"  # a server's may be smaller
        window = window_of(self.model) if of_files else None
        return LLMMetadata(
            context_window=window if window is not None else self.lm.llm.context_window,
            num_output=self.max_tokens,
            is_chat_model=True,
            model_name=self.model,
        )

    def to_payload(self) -> dict[str, Any]:
        """Describe the LLM to callbacks, which ask on the event loop, without loading weights."""
        return {"class_name": self.class_name(), "model_name": self.model, "num_output": self.max_tokens}

    # -- chats ------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._as_chat(self._answer(messages, kwargs), kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return _streamed(
            self._opened(messages, kwargs), _chat_so_far, partial(self._as_chat, settings=kwargs, delta="")
        )

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        answer = await until_cancelled(lambda event: self._answer(messages, kwargs, cancelled=event))
        return self._as_chat(answer, kwargs)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return _astreamed(
            lambda: self._opened(messages, kwargs), _chat_so_far, partial(self._as_chat, settings=kwargs, delta="")
        )

    # -- completions ------------------------------------------------------------------------------------------

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt; with `formatted`, continue it without a chat template."""
        return self._as_completion(self._answer(prompt, kwargs, formatted), kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return _streamed(
            self._opened(prompt, kwargs, formatted),
            _completion_so_far,
            partial(self._as_completion, settings=kwargs, delta=""),
        )

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        answer = await until_cancelled(lambda event: self._answer(prompt, kwargs, formatted, event))
        return self._as_completion(answer, kwargs)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return _astreamed(
            lambda: self._opened(prompt, kwargs, formatted),
            _completion_so_far,
            partial(self._as_completion, settings=kwargs, delta=""),
        )

    # -- inside -----------------------------------------------------------------------------------------------

    def _prepare(
        self, prompt: str | Sequence[ChatMessage], settings: dict[str, Any], formatted: bool
    ) -> tuple[PreparedPrompt, Any]:
        with _not_as_value_error():
            lm, documents = self._lm_of(settings), settings.get("documents")
            documents = () if documents is None else documents
            others = {name: value for name, value in settings.items() if name != "stop"}
            chosen = self._call_settings(settings.get("stop"), others)
            if isinstance(prompt, str) and formatted:
                return lm.prepare_text(lm.refs.find(prompt), documents, **chosen)
            messages = to_messages([ChatMessage(prompt)] if isinstance(prompt, str) else prompt, lm.refs)
            return lm.prepare(messages, documents, condense=True, **chosen)

    def _answer(
        self,
        prompt: str | Sequence[ChatMessage],
        settings: dict[str, Any],
        formatted: bool = False,
        cancelled: threading.Event | None = None,
    ) -> Answer:
        prepared, sampling = self._prepare(prompt, settings, formatted)
        with _not_as_value_error():
            return self._lm_of(settings).batcher.answer(prepared, sampling, cancelled)

    def _opened(
        self, prompt: str | Sequence[ChatMessage], settings: dict[str, Any], formatted: bool = False
    ) -> AnswerStream:
        prepared = self._prepare(prompt, settings, formatted)
        with _not_as_value_error():
            return AnswerStream(self._lm_of(settings).llm, *prepared)

    def _as_chat(self, answer: Answer, settings: dict[str, Any], delta: str | None = None) -> ChatResponse:
        return ChatResponse(
            message=_reply(answer.text),
            delta=delta,
            raw=self._raw(answer, settings),
            additional_kwargs=token_usage(answer),
        )

    def _as_completion(self, answer: Answer, settings: dict[str, Any], delta: str | None = None) -> CompletionResponse:
        return CompletionResponse(
            text=answer.text, delta=delta, raw=self._raw(answer, settings), additional_kwargs=token_usage(answer)
        )

    def _raw(self, answer: Answer, settings: dict[str, Any]) -> dict[str, Any]:
        return {**self._response_metadata(answer, settings), "usage": token_usage(answer)}


@contextmanager
def _not_as_value_error() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise ExtensibleLLMError(str(error)) from error


def _streamed(
    stream: AnswerStream, so_far: Callable[[str, str], Response], ended: Callable[[Answer], Response]
) -> Generator[Response, None, None]:
    """Yield a response for each piece, made of the text so far and the piece, and one of the whole answer."""
    text = ""
    with stream:
        for piece in stream:
            text += piece
            yield so_far(text, piece)
    yield ended(stream.answer)


async def _astreamed(
    opened: Callable[[], AnswerStream], so_far: Callable[[str, str], Response], ended: Callable[[Answer], Response]
) -> AsyncGenerator[Response, None]:
    """Do what `_streamed` does in an event loop; nothing is opened before the first response is asked for."""
    text = ""
    async with AsyncAnswerStream(opened) as stream:
        async for piece in stream:
            text += piece
            yield so_far(text, piece)
        yield ended(stream.answer)


def _chat_so_far(text: str, piece: str) -> ChatResponse:
    return ChatResponse(message=_reply(text), delta=piece)


def _completion_so_far(text: str, piece: str) -> CompletionResponse:
    return CompletionResponse(text=text, delta=piece)


def _reply(text: str) -> ChatMessage:
    return ChatMessage(text, role=MessageRole.ASSISTANT)
