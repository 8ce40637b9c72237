"""A compressed text: its extensible embeddings and what is needed to read or coarsen them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from extemb_core.errors import ConfigError, MismatchError, RatioError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.models.anchors import anchor_positions
from extemb_core.models.chunks import chunk_lengths, embeddings_of, n_embeddings
from extemb_core.models.downscaling import check_ratios, coarsen
from extemb_core.models.entry import AnchoredStates
from extemb_core.models.pooling import Groups, pool_groups
from extemb_core.utils.files import atomic_write, parse_json
from extemb_core.utils.validation import is_count, path_of

FORMAT, VERSION = "extemb", 2  # version 1, written without a number, knew no entry layer above 0
_TENSORS = ("embeddings", "anchors", "mean_norms", "norms", "weights")
_NUMBERS = ("ratio", "n_tokens", "chunk_size", "entry_layer")
_TEXTS = ("ref", "fingerprint", "downscaling")


@dataclass(frozen=True, kw_only=True, eq=False)
class Compressed:
    """The extensible embeddings of one text.

    Attributes:
        embeddings: (N, D) float32 on the CPU; N is the sum of ceil(chunk tokens / ratio) over the chunks.
        ratio: Tokens per embedding.
        n_tokens: Tokens of the text; each is covered by exactly one embedding.
        ref: The text's content hash.
        fingerprint: Fingerprint of the embedder that made them.
        chunk_size: Tokens per chunk.
        ratios: Ratios that may be asked for.
        downscaling: How outputs were selected or combined.
        entry_layer: J, the layer of the LLM at whose input they take their place.
        anchors: (N,) int32, the last token of each group; None at entry layer 0, as are the next three.
        mean_norms: (N,) float32, |m| of each group (see `pooling`). Coarser ratios are derived from these three.
        norms: (N,) float32, the length of each embedding.
        weights: (N,) float32, sum(w) of each group.

    Raises:
        MismatchError: Anchors, norms or weights are missing or of another length above entry layer 0, or present at 0.
    """

    embeddings: Tensor
    ratio: int
    n_tokens: int
    ref: str
    fingerprint: str
    chunk_size: int
    ratios: tuple[int, ...]
    downscaling: str
    entry_layer: int = 0
    anchors: np.ndarray[Any, Any] | None = None
    mean_norms: Tensor | None = None
    norms: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        fields = (self.anchors, self.mean_norms, self.norms, self.weights)
        lengths = {None if field is None else len(field) for field in fields}
        if lengths != {len(self.embeddings) if self.entry_layer else None}:
            raise MismatchError(
                f"a compressed text of {len(self.embeddings)} embeddings for entry layer {self.entry_layer} came with "
                f"{' and '.join(sorted(map(str, lengths)))} anchors, norms and weights; above 0 each embedding has its "
                "own, at 0 there are none"
            )

    def checked(self) -> Compressed:
        """Return the text, after checking that it has as many embeddings as its tokens need, all of them finite.

        Raises:
            MismatchError: The embeddings are too many, too few, or not finite.
        """
        if len(self) != embeddings_of(self.n_tokens, self.ratio, self.chunk_size):
            raise MismatchError(
                f"{len(self)} embeddings cannot stand for {self.n_tokens} tokens at ratio {self.ratio} in chunks of "
                f"{self.chunk_size}; compress the text again"
            )
        for values in (self.embeddings, self.mean_norms, self.norms, self.weights):
            # The sum is 50 times faster: it is not finite if any value is not, but also if finite values are huge.
            if values is not None and not math.isfinite(values.sum()) and not values.isfinite().all():
                raise MismatchError(
                    f"embeddings made by {self.fingerprint} are not finite numbers, which no LLM reads; get the "
                    "embedder again, or load its LLM in float32"
                )
        return self

    def __len__(self) -> int:
        """Return the positions it takes in the LLM's window."""
        return int(self.embeddings.shape[0])

    @property
    def part(self) -> Tensor | AnchoredStates:
        """Part of a prompt that stands for the text."""
        if self.anchors is None:
            return self.embeddings
        return AnchoredStates(self.anchors, self.embeddings, self.entry_layer)

    def derived(self, ratio: int) -> Compressed:
        """Derive the same text at a ratio, also at one that its embedder was given after the text was stored.

        Raises:
            RatioError: No embedder with its ratios can have that ratio.
        """
        # Beside a ratio of an embedder that has others, only those that one embedder can have together.
        together = [own for own in self.ratios if not (is_count(ratio) and ratio % own and own % ratio)]
        try:
            ratios = check_ratios([*together, ratio], self.chunk_size)
        except ConfigError as error:
            raise RatioError(str(error)) from error
        return replace(self, ratios=ratios).at_ratio(ratio)

    def at_ratio(self, ratio: int) -> Compressed:
        """Derive the same text at a coarser ratio, without another forward pass.

        Raises:
            RatioError: `ratio` is not one of the text's ratios, or not a multiple of its own.
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
            coarse = [coarsen(chunk, length, self.ratio, ratio, self.downscaling) for chunk, length in chunks]
            return replace(self, embeddings=torch.cat(coarse), ratio=ratio)
        pooled, anchors, _ = self._pooled([(0, self.n_tokens, ratio)])
        return replace(
            self,
            embeddings=pooled.states,
            ratio=ratio,
            anchors=anchors,
            mean_norms=pooled.means.norm(dim=-1),
            norms=pooled.norms,
            weights=pooled.weights,
        )

    def parts(self, spans: Sequence[tuple[int, int, int]]) -> list[AnchoredStates]:
        """Derive the parts of a prompt for some spans of the text, without another forward pass.

        Args:
            spans: (start, stop, ratio) of each, in tokens; both ends are borders of stored groups. Coarser groups are
                counted from the span's start, and end where a chunk does.

        Raises:
            RatioError: A ratio is not a multiple of the ratio at hand.
            MismatchError: The text has no states: its entry layer is 0.
        """
        if self.anchors is None:
            raise MismatchError("a text compressed for entry layer 0 has no spans; use the whole of it")
        wrong = next((ratio for _, _, ratio in spans if ratio % self.ratio), None)
        if wrong is not None:
            raise RatioError(f"ratio={wrong} cannot be derived from ratio {self.ratio}; compress the text again")
        if not spans:
            return []
        groups, anchors, counts = self._pooled(spans)
        ends = np.cumsum(counts)
        whole = AnchoredStates(anchors, groups.states, self.entry_layer)
        return [whole[int(end - count) : int(end)] for end, count in zip(ends, counts, strict=True)]

    def _pooled(self, spans: Sequence[tuple[int, int, int]]) -> tuple[Groups, np.ndarray[Any, Any], list[int]]:
        """Pool all spans (see `parts`) at once. Returns the groups, their anchors, and each span's number of groups."""
        per_chunk = n_embeddings(self.chunk_size, self.ratio)
        assert self.anchors is not None
        rows: list[np.ndarray[Any, Any]] = []
        anchored: list[np.ndarray[Any, Any]] = []
        places = cache(anchor_positions)  # most chunks, and many spans, are of the same length
        lengths: list[int] = []
        counts: list[int] = []
        for start, stop, ratio in spans:
            before, times = len(lengths), ratio // self.ratio
            for chunk in range(start // self.chunk_size, -(-stop // self.chunk_size)):
                first = chunk * self.chunk_size
                begin = max(start - first, 0) // self.ratio
                count = n_embeddings(min(stop - first, self.chunk_size), self.ratio) - begin
                rows.append(np.arange(count) + chunk * per_chunk + begin)
                anchored.append(rows[-1][places(count, times).numpy()])
                lengths += chunk_lengths(count, times)
            counts.append(len(lengths) - before)
        chosen = np.concatenate(rows)
        columns: Any = (self.embeddings, self.mean_norms, self.weights, self.norms)
        states, mean_norms, weights, norms = (column[torch.from_numpy(chosen)] for column in columns)
        # A state is its group's mean, rescaled.
        means = states * torch.where(norms > 0, mean_norms / norms, 0)[:, None]
        groups = pool_groups(Groups(means, weights, norms), torch.tensor(lengths))
        return groups, self.anchors[np.concatenate(anchored)], counts

    def save(self, file: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
        """Write the text's embeddings, exactly, into a safetensors file, which is whole or not written at all.

        Args:
            file: File to write; an existing one is replaced.
            metadata: More text to note in the file.

        Raises:
            StoreError: The disk refuses.
        """
        values = {name: getattr(self, name) for name in _TENSORS}
        tensors = {name: torch.as_tensor(value).contiguous() for name, value in values.items() if value is not None}
        header = {str(name): str(value) for name, value in (metadata or {}).items()}
        header |= {"format": FORMAT, "version": str(VERSION)}
        header |= {name: str(getattr(self, name)) for name in (*_TEXTS, *_NUMBERS)}
        header["ratios"] = json.dumps(list(self.ratios))
        try:
            with atomic_write(path_of(file)) as temporary:
                # save_file would write to a temporary file of its own, which a kill would leave behind.
                temporary.write_bytes(save(tensors, header))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} could not be written ({error}); see to the disk") from error

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Compressed:
        """Read a file that `save` or `extemb compress` wrote.

        Raises:
            StoreNotFoundError: There is no such file.
            StoreCorruptError: It is something else, or damaged.
        """
        try:
            with safe_open(path_of(file), "pt") as opened:
                header = {"version": "1", "entry_layer": "0"} | (opened.metadata() or {})
                if header.get("format") != FORMAT or int(header["version"]) not in range(1, VERSION + 1):
                    raise ValueError(f"format {header.get('format')!r}, version {header['version']!r}")
                fields: dict[str, Any] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if "anchors" in fields:
                fields["anchors"] = fields["anchors"].numpy()
            fields |= {name: header[name] for name in _TEXTS} | {name: int(header[name]) for name in _NUMBERS}
            text = cls(**fields, ratios=tuple(parse_json(header["ratios"]))).checked()
        except FileNotFoundError as error:
            raise StoreNotFoundError(f"{file} does not exist; check the path") from error
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, ArithmeticError, MismatchError) as error:
            raise StoreCorruptError(
                f"{file} is not a compressed text ({error}); write it again with: extemb compress"
            ) from error
        return text
