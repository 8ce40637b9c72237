"""What the chat model and the LLM have in common."""

from __future__ import annotations

from typing import Any

from extemb_core.frameworks import settings as frameworks


class Answering(frameworks.Answering):
    """Settings, and what LangChain wants to know of a model."""

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """All that an answer depends on, besides the messages."""
        settings = {
            name: getattr(self, name)
            for name in ("model", "ratio", "budget", "max_tokens", "temperature", "top_p", "top_k",
                         "repetition_penalty", "seed", "stop")
        }  # fmt: skip
        return settings | {"embedder": self.lm.embedder.fingerprint, "dtype": str(self.lm.llm.dtype)}

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text."""
        return [int(one) for one in self.lm.llm.encode(text)]
