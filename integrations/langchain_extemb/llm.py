"""Text-completion model that reads documents as extensible embeddings."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.messages import BaseMessage, get_buffer_string
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from typing_extensions import Self

from extemb_core.answers import Answer, AnswerStream
from extemb_core.documents import Document
from extemb_core.frameworks.aio import AsyncAnswerStream, until_cancelled
from extemb_core.frameworks.settings import token_usage
from langchain_extemb.loading import LoadedInThread
from langchain_extemb.messages import to_documents

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

_OF_LANGCHAIN = {"prompts", "stop", "callbacks", "tags", "metadata", "run_name", "run_id"}  # `generate`'s own


class ExtensibleLLM(LoadedInThread, BaseLLM):
    """Frozen LLM that continues a prompt, without a chat template; documents are compressed instead of truncated.

    `documents=` of a call stand before each prompt; refs in a prompt are read where they stand. LangChain's cache is
    not used for calls with documents or settings of their own, as its key is only the prompt and the object. The only
    `plan` is "even", as a plain prompt has no question.
    """

    _HAS_QUESTION: ClassVar[bool] = False

    @property
    def _llm_type(self) -> str:
        return "extemb"

    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Continue several prompts; see LangChain."""
        return super(ExtensibleLLM, self._uncached(kwargs)).generate(*args, **kwargs)

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Continue several prompts; see LangChain."""
        return await super(ExtensibleLLM, self._uncached(kwargs)).agenerate(*args, **kwargs)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of messages, joined as a call joins them, as `get_num_tokens` does."""
        ignored = super().get_num_tokens_from_messages([], tools)  # for its warning about tools
        return ignored + self.get_num_tokens(get_buffer_string(messages))

    def _positions_of_documents(self, lm: ExtensibleLM, parts: list[str | Document]) -> int:
        texts = [part for part in parts if isinstance(part, str)]
        settings = {"budget": self.budget, "ratio": self.ratio, "max_new_tokens": self.max_tokens}
        return lm.text_positions(parts, **settings) - lm.text_positions(texts)  # type: ignore[arg-type]

    def _uncached(self, settings: dict[str, Any]) -> Self:
        """Return this model, or a copy without a cache if a call has settings of its own."""
        return self.model_copy(update={"cache": False}) if settings.keys() - _OF_LANGCHAIN else self

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._answers(prompts, stop, kwargs, None)

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return await until_cancelled(lambda cancelled: self._answers(prompts, stop, kwargs, cancelled))

    def _answers(
        self, prompts: list[str], stop: list[str] | None, kwargs: dict[str, Any], cancelled: threading.Event | None
    ) -> LLMResult:
        lm = self._lm_of(kwargs)
        documents, settings = to_documents(kwargs.get("documents")), self._call_settings(stop, kwargs)
        prepared = [lm.prepare_text(lm.refs.find(prompt), documents, **settings) for prompt in prompts]
        answers = lm.batcher.answer_all(prepared, cancelled)
        return LLMResult(
            generations=[[Generation(text=one.text, generation_info=self._info(one, kwargs))] for one in answers],
            llm_output={"token_usage": token_usage(*answers), "model_name": self._model_of(kwargs)},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with self._opened(prompt, stop, kwargs) as stream:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield GenerationChunk(text="", generation_info=self._info(stream.answer, kwargs))

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async with AsyncAnswerStream(lambda: self._opened(prompt, stop, kwargs)) as stream:
            async for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    await run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
            yield GenerationChunk(text="", generation_info=self._info(stream.answer, kwargs))

    def _opened(self, prompt: str, stop: list[str] | None, kwargs: dict[str, Any]) -> AnswerStream:
        lm, documents = self._lm_of(kwargs), to_documents(kwargs.get("documents"))
        return AnswerStream(
            lm.llm, *lm.prepare_text(lm.refs.find(prompt), documents, **self._call_settings(stop, kwargs))
        )

    def _info(self, answer: Answer, settings: dict[str, Any]) -> dict[str, Any]:
        return {**self._response_metadata(answer, settings), "token_usage": token_usage(answer)}
