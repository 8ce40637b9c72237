"""Prompt helper that counts the positions of refs, and never splits one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core import PromptHelper
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.indices.prompt_helper import DEFAULT_PADDING
from llama_index.core.prompts import BasePromptTemplate, SelectorPromptTemplate
from pydantic import PrivateAttr

from extemb_core.frameworks.refs import MARK
from llama_index.llms.extemb.base import ExtensibleLLM
from llama_index.llms.extemb.messages import to_messages

_BETWEEN = "\n\n"
_SYSTEM = (MessageRole.SYSTEM, MessageRole.DEVELOPER)


def extensible_prompt_helper(llm: ExtensibleLLM, **settings: Any) -> PromptHelper:
    """Make a helper for `Settings.prompt_helper` or `get_response_synthesizer(prompt_helper=...)`; it loads the LLM.

    Texts with refs in them are packed whole and counted in positions; the prompt is counted through the LLM's chat
    template; texts without refs are packed as LlamaIndex does.

    Args:
        llm: LLM whose positions are counted.
        **settings: Settings of `PromptHelper`: chunk_overlap_ratio, chunk_size_limit, separator.
    """
    return ExtensiblePromptHelper(llm, **settings)


class ExtensiblePromptHelper(PromptHelper):
    """Packs prompts as `extensible_prompt_helper` says."""

    _llm: ExtensibleLLM = PrivateAttr()

    def __init__(self, llm: ExtensibleLLM, **settings: Any) -> None:
        lm = llm.lm

        def tokenizer(text: str) -> Sequence[int]:
            return range(lm.positions_of(lm.refs.find(text)))

        metadata = llm.metadata
        super().__init__(metadata.context_window, metadata.num_output, tokenizer=tokenizer, **settings)  # type: ignore[arg-type]
        self._llm = llm

    @classmethod
    def class_name(cls) -> str:
        return "ExtensiblePromptHelper"

    def _get_available_chunk_size(
        self,
        prompt: BasePromptTemplate,
        num_chunks: int = 1,
        padding: int = DEFAULT_PADDING,
        llm: Any = None,
        tools: Any = None,
    ) -> int:
        if isinstance(prompt, SelectorPromptTemplate):
            prompt = prompt.select(llm or self._llm)
        empty = dict.fromkeys(prompt.template_vars, "")
        messages = prompt.format_messages(llm=None, **(empty | prompt.kwargs))
        if system_prompt := getattr(llm, "system_prompt", None):
            messages = [ChatMessage(system_prompt, role=MessageRole.SYSTEM), *messages]
        size = self._get_available_context_size(self._positions(messages)) // num_chunks - padding
        size -= size // 64  # a splitter counts word by word, which gives a little less than the whole
        return size if self.chunk_size_limit is None else min(size, self.chunk_size_limit)

    def _positions(self, messages: Sequence[ChatMessage]) -> int:
        """Count a prompt; its older turns count as half of the room at most, into which they would be compressed."""
        lm = self._llm.lm
        last = max((at for at, message in enumerate(messages) if message.role == MessageRole.USER), default=0)
        older = [at for at, message in enumerate(messages[:last]) if message.role not in _SYSTEM]
        kept = [message for at, message in enumerate(messages) if at not in older]
        whole, without = (lm.positions(to_messages(some, lm.refs)) for some in (messages, kept))
        return min(whole, without + (self.context_window - self.num_output + 1) // 2)

    def repack(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: Any = None,
        tools: Any = None,
    ) -> list[str]:
        """Pack texts into few that each fill the window, in order; a text with a ref in it stays whole."""
        if not any(map(MARK.search, text_chunks)):
            return super().repack(prompt, text_chunks, padding, llm, tools)
        size = self._get_available_chunk_size(prompt, padding=padding, llm=llm, tools=tools)
        count = self._token_counter.get_string_tokens
        pieces: list[str] = []
        for chunk in filter(None, (chunk.strip() for chunk in text_chunks)):
            if MARK.search(chunk) or count(chunk) <= size:
                pieces.append(chunk)
            else:
                pieces += super().repack(prompt, [chunk], padding, llm, tools)
        packed: list[str] = []
        for piece in pieces:
            joined = packed[-1] + _BETWEEN + piece if packed else piece
            if packed and count(joined) <= size:
                packed[-1] = joined
            else:
                packed.append(piece)
        return packed

    def truncate(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: Any = None,
        tools: Any = None,
    ) -> list[str]:
        """Cut texts so that all fit the window together; those with refs in them stay whole."""
        count = self._token_counter.get_string_tokens
        plain = [chunk for chunk in text_chunks if not MARK.search(chunk)]
        if len(plain) == len(text_chunks):
            return super().truncate(prompt, text_chunks, padding, llm, tools)
        if not plain:
            return list(text_chunks)
        size = self._get_available_chunk_size(prompt, padding=padding, llm=llm, tools=tools)
        share = (size - sum(count(chunk) for chunk in text_chunks if MARK.search(chunk))) // len(plain)
        limited = self.model_copy(update={"chunk_size_limit": max(1, share)})
        cut = iter(PromptHelper.truncate(limited, prompt, plain, padding, llm, tools))
        return [chunk if MARK.search(chunk) else next(cut) for chunk in text_chunks]
