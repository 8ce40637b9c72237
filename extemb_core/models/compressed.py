"""A compressed text: its extensible embeddings and what is needed to read or coarsen them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import MismatchError, RatioError
from extemb_core.models.downscaling import Downscaling, chunk_lengths, coarsen, n_embeddings, picks
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.pooling import Groups, coarsen_groups, rescaled


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
        ratios: Those that may be asked for.
        downscaling: How outputs were picked.
        entry_layer: J, the layer of the LLM at whose input they take their place.
        anchors: (N,) int32, the last token of each group; None at entry layer 0, as are the next three.
        mean_norms: (N,) float32, |m| of each group (see `pooling`). Coarser ratios are derived from these three.
        norms: (N,) float32, the length of each embedding.
        weights: (N,) float32, sum(w) of each group.

    Raises:
        MismatchError: What belongs to states is missing above entry layer 0, of another length, or there at 0.
    """

    embeddings: Tensor
    ratio: int
    n_tokens: int
    ref: str
    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: Downscaling
    entry_layer: int = 0
    anchors: np.ndarray[Any, Any] | None = None
    mean_norms: Tensor | None = None
    norms: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        own = (self.anchors, self.mean_norms, self.norms, self.weights)
        lengths = {None if each is None else len(each) for each in own}
        if lengths != {len(self.embeddings) if self.entry_layer else None}:
            raise MismatchError(
                f"a compressed text of {len(self.embeddings)} embeddings for entry layer {self.entry_layer} came with "
                f"{' and '.join(sorted(map(str, lengths)))} anchors, norms and weights; above 0 each embedding has its "
                "own, at 0 there are none"
            )

    def __len__(self) -> int:
        """Positions it takes in the LLM's window."""
        return int(self.embeddings.shape[0])

    @property
    def part(self) -> Tensor | AnchoredStates:
        """What stands in a prompt for the text."""
        if self.anchors is None:
            return self.embeddings
        return AnchoredStates(self.anchors, self.embeddings, self.entry_layer)

    def require_storable(self) -> None:
        """Raise `MismatchError` where there is no form on disk yet: above entry layer 0."""
        if self.entry_layer:
            raise MismatchError(
                f"compressed texts for entry layer {self.entry_layer} cannot be kept on disk yet; keep them in memory, "
                "without a store or an output file, or use an embedder of entry layer 0"
            )

    def at_ratio(self, ratio: int) -> Compressed:
        """The same text at a coarser ratio, without another forward pass.

        Raises:
            RatioError: `ratio` may not be asked for, or is not a multiple of the ratio at hand.
        """
        if ratio not in self.ratios or ratio % self.ratio:
            derivable = tuple(r for r in self.ratios if r % self.ratio == 0)
            raise RatioError(
                f"ratio={ratio} cannot be derived from ratio {self.ratio}; pass one of {derivable} "
                "or compress the text again at a finer ratio"
            )
        if ratio == self.ratio or not self.n_tokens:
            return replace(self, ratio=ratio)
        lengths = chunk_lengths(self.n_tokens, self.chunk_size)
        counts = [n_embeddings(length, self.ratio) for length in lengths]
        if self.anchors is None:
            chunks = zip(self.embeddings.split(counts), lengths, strict=True)
            made = [coarsen(chunk, length, self.ratio, ratio, self.downscaling) for chunk, length in chunks]
            return replace(self, embeddings=torch.cat(made), ratio=ratio)
        fine = self._groups()
        each = zip(*(part.split(counts) for part in fine), strict=True)
        pooled = [coarsen_groups(Groups(*chunk), ratio // self.ratio) for chunk in each]
        groups = Groups(*(torch.cat(parts) for parts in zip(*pooled, strict=True)))
        ends = np.concatenate([picks("strided", count, ratio // self.ratio).numpy() for count in counts])
        starts = np.repeat(np.cumsum([0, *counts[:-1]]), [len(chunk.weights) for chunk in pooled])
        return replace(
            self,
            embeddings=groups.states,
            ratio=ratio,
            anchors=self.anchors[starts + ends],
            mean_norms=groups.means.norm(dim=-1),
            norms=groups.norms,
            weights=groups.weights,
        )

    def _groups(self) -> Groups:
        assert self.mean_norms is not None
        assert self.norms is not None
        assert self.weights is not None
        return Groups(rescaled(self.embeddings, self.mean_norms), self.weights, self.norms)
