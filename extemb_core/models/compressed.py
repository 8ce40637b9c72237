"""A compressed text: its extensible embeddings and what is needed to read or coarsen them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from extemb_core.errors import RatioError
from extemb_core.models.downscaling import Downscaling, chunk_lengths, coarsen, n_embeddings


@dataclass(frozen=True, kw_only=True, eq=False)
class Compressed:
    """The extensible embeddings of one text.

    Attributes:
        embeddings: (N, D) float32 on the CPU; N is the sum of ceil(chunk tokens / ratio) over the chunks.
        ratio: Tokens per embedding.
        n_tokens: Tokens of the text; each is covered by exactly one embedding.
        ref: The text's content hash.
        fingerprint: Of the embedder that made them.
        chunk_size: Tokens per chunk.
        ratios: The trained ratios.
        downscaling: How outputs were picked.
    """

    embeddings: Tensor
    ratio: int
    n_tokens: int
    ref: str
    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: Downscaling

    def __len__(self) -> int:
        """Positions it takes in the LLM's window."""
        return int(self.embeddings.shape[0])

    def at_ratio(self, ratio: int) -> Compressed:
        """The same text at a coarser ratio, without another forward pass.

        Raises:
            RatioError: `ratio` was not trained or is not a multiple of the ratio at hand.
        """
        if ratio not in self.ratios or ratio % self.ratio:
            derivable = tuple(r for r in self.ratios if r % self.ratio == 0)
            raise RatioError(
                f"ratio={ratio} cannot be derived from ratio {self.ratio}; pass one of {derivable} "
                "or compress the text again at a finer ratio"
            )
        if ratio == self.ratio or not self.n_tokens:
            return replace(self, ratio=ratio)
        parts, start = [], 0
        for length in chunk_lengths(self.n_tokens, self.chunk_size):
            count = n_embeddings(length, self.ratio)
            chunk = self.embeddings[start : start + count]
            parts.append(coarsen(chunk, length, self.ratio, ratio, self.downscaling))
            start += count
        return replace(self, embeddings=torch.cat(parts), ratio=ratio)
