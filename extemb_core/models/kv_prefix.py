"""A prefix that an LLM keeps in its cache, so that reading on costs no more than the new tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from extemb_core.models.entry import TokenIds
from extemb_core.models.llm import LLM
from extemb_core.models.stoppable import CACHE


class Prefix:
    """Tokens that the LLM keeps in its cache, beginning with its BOS if it has one.

    Args:
        llm: LLM that reads them; `peek` needs one that `reads_in_parts`.

    Attributes:
        last: (D,) hidden state of the last token read, which predicts the next; None if nothing was read.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._cache = DynamicCache(config=llm.model.config)
        self.last: Tensor | None = None
        if llm.bos_token_id is not None:
            self.read([llm.bos_token_id])

    def __len__(self) -> int:
        return int(self._cache.get_seq_length())

    def read(self, ids: TokenIds) -> None:
        """Read tokens and keep them. ids: (T,)."""
        if len(ids):
            self.last = self._run(ids)[-1]

    def peek(self, ids: TokenIds) -> Tensor:
        """Compute the hidden states of tokens that might follow, (T, D), without keeping them. ids: (T,)."""
        hidden = self._run(ids)
        self._cache.crop(-len(ids))
        return hidden

    @torch.no_grad()
    def _run(self, ids: TokenIds) -> Tensor:
        outputs = self._llm.model.base_model(
            inputs_embeds=self._llm.embed(ids)[None], **{CACHE: self._cache}, use_cache=True
        )
        return torch.as_tensor(outputs.last_hidden_state)[0]
