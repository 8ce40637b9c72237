"""Score sentences by the LLM's own attention to them, when it reads the documents compressed.

Some attention heads of an LLM copy from what it reads (retrieval heads, arXiv 2404.15574). `extemb eval heads` finds
those whose greatest attention, at the position from which an answer comes, is most often on the sentence that holds it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from extemb_core.context.assembly import DOCUMENT_SEPARATOR, Part, assemble_chat
from extemb_core.context.focus import SplitDocument
from extemb_core.context.scoring import SentenceScorer, bm25_scores
from extemb_core.context.spans import MAX_SENTENCE_TOKENS, Array, Sentences
from extemb_core.models.chunks import chunk_lengths, compressed_positions
from extemb_core.models.compressed import Compressed
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import AnchoredPrompt, reading_model
from extemb_core.models.llm import LLM
from extemb_core.models.stoppable import CACHE, StoppableCache
from extemb_core.utils.progress import is_stopped

Heads = Sequence[Sequence[int]]
"""Layer and number of each of some attention heads, from 0."""

_LOOK_RATIO = 8
_MAX_PART_TOKENS = 32  # of a sentence (docs/experiments.md)
# Total tokens up to which long sentences are cut into parts; in longer texts parts rank worse than whole sentences
# (docs/experiments.md).
_FEW_TOKENS = 768
_LOOKS = 2  # weight of attention relative to words: found on training questions (docs/experiments.md)
_SHOWING = "extemb_showing"  # the name, in transformers, of attention that reports its weights
_shown: ContextVar[dict[int, Tensor]] = ContextVar("shown")
"""Layer -> attention of the last position that was read."""
_KEPT_POSITIONS = 2048  # longest prompt whose states are kept: the next question is often about the same documents


class RetrievalHeads:
    """Attention heads that show where an LLM looks in compressed documents. Safe for several threads.

    The LLM's tensors are shared, and its layers run no further than the last of the heads.

    Args:
        llm: LLM that reads the documents.
        entry_layer: J, at which the documents' states enter.
        heads: Heads to look at; all when not given.

    Raises:
        ConfigError: The LLM cannot read compressed text at that layer.
    """

    def __init__(self, llm: LLM, entry_layer: int, heads: Heads | None = None) -> None:
        self.llm = llm
        self.entry_layer = entry_layer
        config = llm.text_config
        every = itertools.product(range(config.num_hidden_layers), range(config.num_attention_heads))
        self.heads = [(layer, head) for layer, head in (every if heads is None else heads)]
        self._kept: tuple[AnchoredPrompt, list[tuple[Tensor, Tensor]]] | None = None

    @cached_property
    def _model(self) -> Any:
        """The LLM's first layers, which report the attention of the last position that they read."""
        AttentionInterface.register(_SHOWING, _attend_and_show)
        AttentionMaskInterface.register(_SHOWING, sdpa_mask)
        model: Any = reading_model(self.llm.model, self.entry_layer, self.llm.name)
        model.base_model.layers = nn.ModuleList(model.base_model.layers[: max(layer for layer, _ in self.heads) + 1])
        model.set_attn_implementation(_SHOWING)
        return model

    def ratio_for(self, documents: Sequence[SplitDocument], room: int, ratios: Sequence[int]) -> int | None:
        """Choose the ratio at which documents are looked at: the finest from 8 on that fits; None if none does.

        The documents may take no more than `room`, so that looking takes no longer than reading the planned prompt, and
        no more than half of the window, which `room` may exceed.
        """
        most = min(room, self.llm.context_window // 2)
        for ratio in ratios:
            positions = [compressed_positions(one.n_tokens, ratio, one.chunk_size) + one.overhead for one in documents]
            if ratio >= max([_LOOK_RATIO, *(one.finest for one in documents)]) and sum(positions) <= most:
                return ratio
        return None

    @torch.no_grad()
    def look(self, question: str, parts: Sequence[Part]) -> Array:
        """Return the share of each head's attention that each position of compressed text gets: (heads, N).

        It is the attention of the position from which the answer's first token comes.

        Args:
            question: The question about the documents.
            parts: Compressed text, N positions in all, and what stands between.
        """
        prompt: Any = assemble_chat(self.llm, [{"role": "user", "content": [*parts, f"\n\n{question}"]}]).inputs(
            self.llm
        )
        shown = self._read(prompt)
        looks = torch.stack([shown[layer][head, prompt.mask] for layer, head in self.heads]).float()
        shares: Array = (looks / looks.sum(1, keepdim=True).clamp(min=1e-9)).cpu().numpy()
        return shares

    def scorer(
        self,
        documents: Sequence[SplitDocument],
        room: int,
        ratios: Sequence[int],
        compressed: Callable[[], Sequence[Compressed]],
    ) -> SentenceScorer | None:
        """Return a function that scores sentences by `scores`; None if the room is too small to look at the documents.

        Args:
            documents, room, ratios: See `ratio_for`.
            compressed: Returns the compressed documents; called when they are looked at.
        """
        ratio = self.ratio_for(documents, room, ratios)
        if ratio is None:
            return None
        return lambda question, sentences: self.scores(question, sentences, documents, compressed(), ratio)

    def scores(
        self,
        question: str,
        sentences: Sequence[str],
        documents: Sequence[SplitDocument],
        texts: Sequence[Compressed],
        ratio: int,
    ) -> list[float]:
        """Score the sentences of some documents by what the heads look at, and half as much by their words (BM25).

        Args:
            question: The question about the documents.
            sentences: (U,) sentences of all documents.
            documents: The documents.
            texts: The documents compressed, at `ratio` or finer.
            ratio: Ratio at which they are looked at; see `ratio_for`.
        """
        read = [(one, text) for one, text in zip(documents, texts, strict=True) if one.n_tokens]
        parts: list[Part] = [part for _, text in read for part in (DOCUMENT_SEPARATOR, text.at_ratio(ratio).part)]
        shares = self.look(question, parts[1:]).mean(0)
        looks = of_sentences(shares, [one.sentences for one, _ in read], ratio, documents[0].chunk_size)
        words = np.array(bm25_scores(question, sentences))
        both: list[float] = (_share(words) + _LOOKS * _share(looks)).tolist()
        return both

    def _read(self, prompt: AnchoredPrompt) -> dict[int, Tensor]:
        """Read a prompt, and return the attention of its last position: layer -> (H, T).

        A beginning that it shares with the prompt before is not read again.
        """
        cache, read, model = StoppableCache(self.llm.model.config, is_stopped), 0, self._model
        if (kept := self._kept) is not None and (read := _alike(kept[0], prompt)):
            for layer, (keys, values) in enumerate(kept[1]):
                cache.update(keys[:, :, :read], values[:, :, :read], layer)
        rows = {"input_ids": prompt.ids, "entry_states": prompt.states, "entry_mask": prompt.mask}
        shown: dict[int, Tensor] = {}
        token = _shown.set(shown)
        try:
            model.base_model(**{name: row[None, read:] for name, row in rows.items()}, **{CACHE: cache}, use_cache=True)
        finally:
            _shown.reset(token)
        if len(prompt) <= _KEPT_POSITIONS:
            layers: list[Any] = cache.layers[: len(model.base_model.layers)]
            self._kept = (prompt, [(layer.keys, layer.values) for layer in layers])
        return shown


def _attend_and_show(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Attend as torch does, and note the attention of the last position. transformers calls this.

    query (1, H, T, D), key and value (1, G, S, D), mask (1, 1, T, S) or None; -> (1, T, H, D).
    """
    groups, last = key[0], query[0, :, -1]
    scores = torch.einsum("ghd,gsd->ghs", last.view(len(groups), -1, last.shape[-1]), groups).flatten(0, 1)
    scale = others.get("scaling") or last.shape[-1] ** -0.5
    _shown.get()[module.layer_idx] = (scores.float() * scale).softmax(-1)
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    return output, None


def heads_of(llm: LLM, embedder: ExtensibleEmbedder) -> RetrievalHeads | None:
    """Return the heads that an embedder names, if the LLM has them and attends to whole documents; else None."""
    heads, config = embedder.config.retrieval_heads, llm.text_config
    there = all(layer < config.num_hidden_layers and head < config.num_attention_heads for layer, head in heads)
    if not heads or not there or not llm.reads_in_parts or type(llm) is not LLM:  # a server's layers are not here
        return None
    return RetrievalHeads(llm, embedder.config.entry_layer, heads)


def max_sentence_tokens(heads: RetrievalHeads | None, n_tokens: int) -> int:
    """Return the maximum length of a sentence, in tokens, when texts of `n_tokens` in all are planned.

    In short texts, heads tell parts of one sentence apart, which words alone do not (docs/experiments.md).
    """
    return MAX_SENTENCE_TOKENS if heads is None or n_tokens > _FEW_TOKENS else _MAX_PART_TOKENS


def _share(scores: Array) -> Array:
    share: Array = scores / max(scores.max(initial=0), 1e-9)  # of the greatest
    return share


def _alike(one: AnchoredPrompt, other: AnchoredPrompt) -> int:
    """Count the positions at the start that two prompts share, leaving at least one more in each."""
    length = min(len(one), len(other)) - 1
    differs = (one.ids[:length] != other.ids[:length]) | (one.mask[:length] != other.mask[:length])
    differs |= (one.states[:length] != other.states[:length]).any(1)
    at = differs.nonzero()
    return int(at[0]) if len(at) else length


def of_sentences(shares: Array, documents: Sequence[Sentences], ratio: int, chunk_size: int) -> Array:
    """Sum the shares of positions over sentences; a position's share is spread evenly over its tokens.

    Args:
        shares: (..., N) for each position of the documents.
        documents: The documents, in order.
        ratio: Ratio at which they are compressed.
        chunk_size: Tokens that are compressed together.

    Returns:
        (..., U) for each sentence of all of them.
    """
    sizes = [
        min(ratio, length - start)
        for sentences in documents
        for length in chunk_lengths(int(sentences.borders[-1]), chunk_size)
        for start in range(0, length, ratio)
    ]
    sums = np.cumsum(np.repeat(shares / np.array(sizes), sizes, axis=-1), axis=-1)
    sums = np.concatenate([np.zeros_like(sums[..., :1]), sums], axis=-1)
    starts = np.cumsum([0, *(int(sentences.borders[-1]) for sentences in documents)])
    borders = [sentences.borders + start for sentences, start in zip(documents, starts, strict=False)]
    parts = [np.diff(sums[..., at], axis=-1) for at in borders]
    found: Array = np.concatenate(parts, axis=-1)
    return found
