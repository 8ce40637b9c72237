"""A text-completion model that reads documents as extensible embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult

from extemb_core.answers import AnswerStream
from langchain_extemb.messages import to_documents
from langchain_extemb.models import Answering, told


class ExtensibleLLM(Answering, BaseLLM):
    """A frozen LLM that continues a prompt, without a chat template; documents are compressed instead of truncated.

    `documents=` of a call stand before each prompt; refs in a prompt are read where they stand.
    """

    @property
    def _llm_type(self) -> str:
        return "extemb"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return self._identity()

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        shared = self._shared(kwargs.get("model"), kwargs.get("embedder"))
        documents, settings = to_documents(kwargs.get("documents")), self._asked(stop, kwargs)
        prepared = [shared.lm.prepare_text(shared.lm.refs.find(prompt), documents, **settings) for prompt in prompts]
        return LLMResult(
            generations=[
                [Generation(text=answer.text, generation_info=told(answer, kwargs.get("model") or self.model))]
                for answer in shared.batcher.answer_all(prepared)
            ]
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        lm = self._shared(kwargs.get("model"), kwargs.get("embedder")).lm
        prepared = lm.prepare_text(
            lm.refs.find(prompt), to_documents(kwargs.get("documents")), **self._asked(stop, kwargs)
        )
        with AnswerStream(lm.llm, *prepared) as stream:
            for piece in stream:
                chunk = GenerationChunk(text=piece)
                if run_manager:
                    run_manager.on_llm_new_token(piece, chunk=chunk)
                yield chunk
        yield GenerationChunk(text="", generation_info=told(stream.answer, kwargs.get("model") or self.model))

    def get_token_ids(self, text: str) -> list[int]:
        return [int(one) for one in self.lm.llm.encode(text)]
