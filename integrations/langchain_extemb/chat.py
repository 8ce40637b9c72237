"""Chat model that reads documents as extensible embeddings."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast
from uuid import uuid4

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import invalid_tool_call, tool_call, tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from extemb_core.answers import Answer, AnswerStream
from extemb_core.context.tools import parse_calls, prefix_of_call, takes_tools, tool_name
from extemb_core.documents import Document, several
from extemb_core.errors import ConfigError
from extemb_core.frameworks.aio import AsyncAnswerStream, until_cancelled
from extemb_core.utils.validation import require_one_of
from extemb_core.weights.resolve import window_of
from langchain_extemb.loading import Bound, LoadedInThread
from langchain_extemb.messages import to_documents, to_messages

if TYPE_CHECKING:
    from langchain_core.language_models import ModelProfile

    from extemb_core.lm import ExtensibleLM


_METHODS = ("function_calling", "json_mode", "json_schema")  # of structured output; all do what the first does


class ChatExtensible(LoadedInThread, BaseChatModel):
    """Frozen LLM whose documents are compressed instead of truncated.

    ```python
    from langchain_extemb import ChatExtensible

    llm = ChatExtensible.from_model_id("smollm2-135m-joint", store="docs.extemb", budget=1024)
    llm.invoke("What changed in 2023?", documents=retriever.invoke("changes in 2023"))
    ```

    Documents are read wherever LangChain puts them: `documents=` of a call or of `bind` (they join the last human
    message), `text-plain`, `document` and `search_result` content blocks, the artifact of a retriever tool's message,
    and refs that an `ExtensibleCompressor` left in a prompt. `response_metadata["extemb"]["documents"]` says what
    became of each. If a conversation does not fit the window, its older turns are compressed too.
    """

    _ELSEWHERE: ClassVar[frozenset[str]] = frozenset(
        {"stream", "stream_usage", "tools", "tool_choice", "ls_structured_output_format"}
    )

    @property
    def _llm_type(self) -> str:
        return "extemb-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        """Return what the LLM can do, as far as this is known without loading its weights."""
        profile: ModelProfile = {
            "text_inputs": True,
            "image_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "pdf_inputs": False,
            "max_output_tokens": self.max_tokens,
            "text_outputs": True,
            "structured_output": False,
            "reasoning_output": False,
            "temperature": True,
        }
        if self.loaded_lm is not None:
            profile["tool_calling"] = takes_tools(self.loaded_lm.llm)
        if self.loaded_lm is not None:
            window = self.loaded_lm.llm.context_window
        else:
            window = window_of(self.model) if self.engine == "transformers" else None  # a server's may be smaller
        if window is not None:
            profile["max_input_tokens"] = window
        return profile

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = LangSmithParams(
            ls_provider="extemb",
            ls_model_name=self._model_of(kwargs),
            ls_model_type="chat",
            ls_temperature=kwargs.get("temperature", self.temperature),
            ls_max_tokens=kwargs.get("max_tokens", self.max_tokens),
        )
        if given := self._call_settings(stop, {})["stop"]:
            params["ls_stop"] = given
        return params

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Return a cache key for the settings of a call; it holds documents and tools completely, unlike their repr."""
        if (documents := kwargs.get("documents")) is not None:
            # Texts stay as they are: a warning about one that names a file comes when it is read.
            kwargs["documents"] = [one if isinstance(one, str) else to_documents([one]) for one in several(documents)]
        if kwargs.get("tools"):
            kwargs["tools"] = _formatted(kwargs["tools"])
        return super()._get_llm_string(stop, **kwargs)

    # -- answers ----------------------------------------------------------------------------------------------

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(self._answer(messages, stop, kwargs, None), kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = await until_cancelled(lambda cancelled: self._answer(messages, stop, kwargs, cancelled))
        return self._result(answer, kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        if _may_call(kwargs):
            yield _as_chunk(self._generate(messages, stop, run_manager, **kwargs).generations[0].message)
            return
        with self._opened(messages, stop, kwargs) as stream:
            for piece in stream:
                chunk = _chunk(piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield self._last(stream.answer, kwargs)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        if _may_call(kwargs):
            result = await self._agenerate(messages, stop, run_manager, **kwargs)
            yield _as_chunk(result.generations[0].message)
            return
        async with AsyncAnswerStream(lambda: self._opened(messages, stop, kwargs)) as stream:
            async for piece in stream:
                chunk = _chunk(piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield self._last(stream.answer, kwargs)

    def bind(self, **kwargs: Any) -> _BoundChat:  # type: ignore[override]  # newer versions of LangChain have their own
        """Return a runnable with settings for all its calls, to which tools and schemas can be bound as well."""
        return _BoundChat(bound=self, kwargs=super().bind(**kwargs).kwargs, config={})  # type: ignore[attr-defined]

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Let the LLM call tools, if its chat template has a place for them (Qwen's has, SmolLM2-135M's has not).

        Args:
            tools: As for any chat model.
            tool_choice: The name of a tool, or "any", or OpenAI's form of these: the answer then begins with a call.
                The LLM writes the rest of it; a call that is not valid is in `invalid_tool_calls`.
            **kwargs: Further settings of the calls; `strict` and `parallel_tool_calls` make no difference here.

        Raises:
            ConfigError: No tool has that name, or a tool is not one. If the template has no place for tools, the first
                call raises it.
        """
        formatted = _formatted(tools)
        choice = tool_name(tool_choice)
        prefix_of_call(formatted, choice)  # refuses an unknown tool now, not at the first call
        settings = {name: value for name, value in kwargs.items() if name not in ("strict", "parallel_tool_calls")}
        return self.bind(tools=formatted, tool_choice=choice, **settings)

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        """Let the LLM answer in a schema, as with any chat model: by a tool call, whichever `method` is named.

        Raises:
            ConfigError: `method` is not one of LangChain's. See `bind_tools`, too.
        """
        require_one_of(kwargs.get("method", _METHODS[0]), "method", _METHODS)
        return BaseChatModel.with_structured_output(self, schema, **kwargs)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the positions of the window that messages take with these settings, documents and tools included."""
        if not messages:
            return 0
        lm, formatted = self.lm, _formatted(tools)
        return self._positions(lm, to_messages(messages, lm.refs), formatted)

    # -- inside -----------------------------------------------------------------------------------------------

    def _positions(self, lm: ExtensibleLM, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]] = ()) -> int:
        settings = {"budget": self.budget, "ratio": self.ratio, "plan": self.plan, "max_new_tokens": self.max_tokens}
        return lm.positions(messages, tools=tools, **settings)  # type: ignore[arg-type]

    def _positions_of_documents(self, lm: ExtensibleLM, parts: list[str | Document]) -> int:
        messages = [{"role": "user", "content": parts}]
        return self._positions(lm, messages) - lm.builder.render(messages).n_around

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        settings: dict[str, Any],
        cancelled: threading.Event | None,
    ) -> Answer:
        lm = self._lm_of(settings)
        return lm.batcher.answer(*lm.prepare(**self._prepared(lm, messages, stop, settings)), cancelled)

    def _opened(self, messages: list[BaseMessage], stop: list[str] | None, settings: dict[str, Any]) -> AnswerStream:
        lm = self._lm_of(settings)
        return lm.stream(**self._prepared(lm, messages, stop, settings))

    def _prepared(
        self, lm: ExtensibleLM, messages: list[BaseMessage], stop: list[str] | None, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the arguments of `ExtensibleLM.prepare`."""
        return self._call_settings(stop, settings) | {
            "question": to_messages(messages, lm.refs),
            "documents": to_documents(settings.get("documents")),
            "condense": True,
            "tools": _formatted(settings["tools"]) if _may_call(settings) else (),
            "assistant_prefix": _assistant_prefix(settings),
        }

    def _result(self, answer: Answer, settings: dict[str, Any]) -> ChatResult:
        called = _may_call(settings)
        text, calls = parse_calls(_assistant_prefix(settings) + answer.text) if called else (answer.text, [])
        message = AIMessage(
            content=text,
            tool_calls=[
                tool_call(name=one.name, args=dict(one.arguments), id=f"call_{uuid4().hex}")
                for one in calls
                if one.arguments is not None
            ],
            invalid_tool_calls=[
                invalid_tool_call(name=None, args=one.text, id=f"call_{uuid4().hex}", error="no call of a tool in JSON")
                for one in calls
                if one.arguments is None
            ],
            usage_metadata=_usage(answer),
            response_metadata=self._response_metadata(answer, settings),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _last(self, answer: Answer, settings: Mapping[str, Any]) -> ChatGenerationChunk:
        """Return the last chunk, with what is known only at the end."""
        message = AIMessageChunk(
            content="",
            usage_metadata=_usage(answer),
            response_metadata=self._response_metadata(answer, settings),
            chunk_position="last",
        )
        return ChatGenerationChunk(message=message)


class _BoundChat(Bound):
    """A chat model with settings; LangChain's own class loses them when tools or a schema are bound afterwards."""

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        return self.bind(**self.bound.bind_tools(tools, **kwargs).kwargs)  # type: ignore[attr-defined]

    def with_structured_output(self, schema: Any, **kwargs: Any) -> Runnable[LanguageModelInput, Any]:
        return ChatExtensible.with_structured_output(self, schema, **kwargs)  # type: ignore[arg-type]  # it binds tools


def _as_chunk(message: BaseMessage) -> ChatGenerationChunk:
    """Return a whole message as the only chunk of a stream: a tool call is incomplete before its end."""
    assert isinstance(message, AIMessage)
    calls = [(call["name"], json.dumps(call["args"]), call["id"]) for call in message.tool_calls]
    # As a JSON string: LangChain completes the JSON of a chunk, and would turn one that was cut off into a call.
    invalid = [(call["name"], json.dumps(call["args"]), call["id"]) for call in message.invalid_tool_calls]
    chunk = AIMessageChunk(
        content=message.content,
        tool_call_chunks=[
            tool_call_chunk(name=name, args=args, id=call_id, index=index)
            for index, (name, args, call_id) in enumerate([*calls, *invalid])
        ],
        usage_metadata=message.usage_metadata,
        response_metadata=message.response_metadata,
        chunk_position="last",
    )
    return ChatGenerationChunk(message=chunk)


def _formatted(tools: Any) -> list[dict[str, Any]]:
    """Convert the tools of a call to OpenAI's form."""
    try:
        formatted = [convert_to_openai_tool(tool) for tool in tools or ()]
        prefix_of_call(formatted, None)  # checks that all have a name
        return formatted
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"tools={tools!r:.80} are no tools that can be described to an LLM ({error}); pass a list of functions "
            "with docstrings, pydantic classes, LangChain's tools or dicts in OpenAI's form"
        ) from error


def _may_call(settings: Mapping[str, Any]) -> bool:
    """Return whether a call has tools that the LLM may choose."""
    return bool(settings.get("tools")) and tool_name(settings.get("tool_choice")) != "none"


def _assistant_prefix(settings: Mapping[str, Any]) -> str:
    return prefix_of_call(_formatted(settings.get("tools")), tool_name(settings.get("tool_choice")))


def _chunk(piece: str) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content=piece))


def _usage(answer: Answer) -> UsageMetadata:
    """Return the numbers of positions that were really used."""
    read, written = answer.prompt_positions, answer.new_tokens
    return cast(UsageMetadata, {"input_tokens": read, "output_tokens": written, "total_tokens": read + written})
