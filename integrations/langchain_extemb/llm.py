"""Text-completion model that reads documents as extensible embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from extemb_core.answers import AnswerStream
from extemb_core.frameworks.settings import GenerationSettings
from langchain_extemb.messages import to_documents


class ExtensibleLLM(GenerationSettings, BaseLLM):
    """Frozen LLM that continues a prompt, without a chat template; documents are compressed instead of truncated.

    `documents=` of a call stand before each prompt; refs in a prompt are read where they stand.
    """

    @property
    def _llm_type(self) -> str:
        return "extemb"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        lm = self._lm_of(kwargs)
        documents, settings = to_documents(kwargs.get("documents")), self._call_settings(stop, kwargs)
        prepared = [lm.prepare_text(lm.refs.find(prompt), documents, **settings) for prompt in prompts]
        return LLMResult(
            generations=[
                [Generation(text=answer.text, generation_info=self._response_metadata(answer, kwargs))]
                for answer in lm.batcher.answer_all(prepared)
            ]
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        lm = self._lm_of(kwargs)
        prepared = lm.prepare_text(
            lm.refs.find(prompt), to_documents(kwargs.get("documents")), **self._call_settings(stop, kwargs)
        )
        with AnswerStream(lm.llm, *prepared) as stream:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield GenerationChunk(text="", generation_info=self._response_metadata(stream.answer, kwargs))
