"""Two-stream auto-regression (twin paper, section 2.3).

Stream 1: the embedder compresses every chunk of a sample but the last. Stream 2: the frozen LLM predicts every
token of every chunk but the first, each token seeing only

    (a) the extensible embeddings of the chunks before its own, and
    (b) the raw tokens before it in its own chunk.

The first token of a chunk is predicted from the last embedding before it. Several chunks share one LLM pass under
a block mask, as long as embeddings and raw tokens fit the LLM's window: the embeddings' own hidden states depend on
embeddings alone, so sharing them changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extemb_core.errors import ConfigError
from extemb_core.models.downscaling import chunk_lengths, n_embeddings

if TYPE_CHECKING:
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.llm import LLM


@dataclass(frozen=True)
class Pass:
    """One LLM pass: raw chunks `first` up to and without `end`, after the embeddings of chunks before `end - 1`."""

    sample: int
    first: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Where everything stands in one pass of T slots: [BOS?] [embeddings] [raw tokens of the pass's chunks].

    Attributes:
        n_prefix: 1 when the LLM wants a BOS, else 0.
        n_embedded: Embeddings in the pass, chunks in order.
        raw: (start, stop) of the pass's raw tokens within the sample.
        positions: (T,) position ids.
        mask: (T, T), True where the row's slot may look at the column's.
        sources: (S,) slots whose output is scored.
        targets: (S,) places within the sample of the tokens they predict.
    """

    n_prefix: int
    n_embedded: int
    raw: tuple[int, int]
    positions: Tensor
    mask: Tensor
    sources: Tensor
    targets: Tensor


def plan_passes(lengths: Sequence[int], ratio: int, window: int, sample: int = 0, n_prefix: int = 0) -> list[Pass]:
    """Pack a sample's chunks into as few passes as the window allows.

    Args:
        lengths: Tokens of each chunk.
        ratio: Tokens per embedding.
        window: Positions per pass.
        sample: Copied into each pass.
        n_prefix: Slots before the embeddings.

    Raises:
        ConfigError: Not even one chunk fits beside the embeddings before it.
    """
    before = _embeddings_before(lengths, ratio)
    passes: list[Pass] = []
    first = 1
    while first < len(lengths):
        end, raw = first, 0
        while end < len(lengths) and n_prefix + before[end] + raw + lengths[end] <= window:
            raw += lengths[end]
            end += 1
        if end == first:
            raise ConfigError(
                f"a chunk of {lengths[first]} tokens after {before[first]} embeddings does not fit {window} positions; "
                "use shorter samples or a coarser ratio"
            )
        passes.append(Pass(sample, first, end))
        first = end
    return passes


def lay_out(lengths: Sequence[int], ratio: int, run: Pass, n_prefix: int = 0) -> Layout:
    """The slots, positions, block mask and targets of one pass. See `Layout`."""
    before = _embeddings_before(lengths, ratio)
    starts = [sum(lengths[:chunk]) for chunk in range(len(lengths) + 1)]
    n_embedded = before[run.end - 1]
    head = n_prefix + n_embedded
    # `chunk` of a slot: -1 for the BOS, so that everything sees it.
    chunk_of = [-1] * n_prefix
    for chunk in range(run.end - 1):
        chunk_of += [chunk] * (before[chunk + 1] - before[chunk])
    positions = list(range(head))
    sources: list[int] = []
    targets: list[int] = []
    slot = head
    for chunk in range(run.first, run.end):
        length = lengths[chunk]
        visible = n_prefix + before[chunk]
        chunk_of += [chunk] * length
        positions += range(visible, visible + length)
        sources += [visible - 1, *range(slot, slot + length - 1)]
        targets += range(starts[chunk], starts[chunk] + length)
        slot += length
    place = torch.arange(slot)
    chunk_ids = torch.tensor(chunk_of)
    embedded = place < head
    causal = place[None, :] <= place[:, None]
    same = chunk_ids[None, :] == chunk_ids[:, None]
    earlier = chunk_ids[None, :] < chunk_ids[:, None]
    mask = torch.where(embedded[None, :], torch.where(embedded[:, None], causal, earlier), causal & same)
    return Layout(
        n_prefix=n_prefix,
        n_embedded=n_embedded,
        raw=(starts[run.first], starts[run.end]),
        positions=torch.tensor(positions),
        mask=mask,
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
    )


def two_stream_loss(
    embedder: ExtensibleEmbedder,
    llm: LLM,
    samples: Sequence[Tensor],
    ratios: Sequence[int],
    chunk_size: int,
    window: int | None = None,
) -> Tensor:
    """Mean negative log-likelihood, in nats, of every token of every chunk but each sample's first.

    Args:
        embedder: The model being trained.
        llm: The frozen LLM; gradient flows through it.
        samples: (T,) token ids each, longer than one chunk.
        ratios: One per sample.
        chunk_size: Tokens per chunk.
        window: Positions per LLM pass; the LLM's own when not given.

    Returns:
        A scalar with gradient to the embedder's own parameters.
    """
    window = llm.window if window is None else window
    device = llm.device
    lengths = [chunk_lengths(len(sample), chunk_size) for sample in samples]
    short = next((len(sample) for sample, parts in zip(samples, lengths, strict=True) if len(parts) < 2), None)
    if short is not None:
        raise ConfigError(f"a sample of {short} tokens has no second chunk of {chunk_size} to predict; use longer ones")

    # Stream 1: all chunks but each sample's last are full, so they form one batch without padding.
    rows = [s[i * chunk_size : (i + 1) * chunk_size] for s, parts in zip(samples, lengths, strict=True)
            for i in range(len(parts) - 1)]  # fmt: skip
    outputs = embedder(torch.stack(rows).to(device))
    embeddings: list[Tensor] = []
    row = 0
    for parts, ratio in zip(lengths, ratios, strict=True):
        chunks = [embedder.read_out(outputs, row + i, chunk_size, ratio) for i in range(len(parts) - 1)]
        embeddings.append(torch.cat(chunks).to(llm.dtype))
        row += len(chunks)

    # Stream 2: passes of all samples, padded on the right to one length.
    bos = llm.bos_token_id
    n_prefix = int(bos is not None)
    runs = [run for index, (parts, ratio) in enumerate(zip(lengths, ratios, strict=True))
            for run in plan_passes(parts, ratio, window, index, n_prefix)]  # fmt: skip
    layouts = [lay_out(lengths[run.sample], ratios[run.sample], run, n_prefix) for run in runs]
    longest = max(len(layout.positions) for layout in layouts)
    inputs, masks, positions, sources, targets = [], [], [], [], []
    for index, (run, layout) in enumerate(zip(runs, layouts, strict=True)):
        sample = samples[run.sample].to(device)
        pieces = [embeddings[run.sample][: layout.n_embedded], llm.embed(sample[slice(*layout.raw)])]
        if bos is not None:
            pieces.insert(0, llm.embed([bos]))
        padding = longest - len(layout.positions)
        inputs.append(torch.nn.functional.pad(torch.cat(pieces), (0, 0, 0, padding)))
        masks.append(_padded_mask(layout.mask, padding))
        positions.append(torch.nn.functional.pad(layout.positions, (0, padding)))
        sources.append(layout.sources + index * longest)
        targets.append(sample[layout.targets.to(device)])
    hidden = llm.hidden(
        torch.stack(inputs), mask=torch.stack(masks)[:, None].to(device), positions=torch.stack(positions).to(device)
    )
    scored = hidden.flatten(0, 1)[torch.cat(sources).to(device)]
    return torch.nn.functional.cross_entropy(llm.logits(scored).float(), torch.cat(targets).long())


def _embeddings_before(lengths: Sequence[int], ratio: int) -> list[int]:
    """How many embeddings stand before each chunk; one entry more than there are chunks."""
    before = [0]
    for length in lengths:
        before.append(before[-1] + n_embeddings(length, ratio))
    return before


def _padded_mask(mask: Tensor, padding: int) -> Tensor:
    """Pad a (T, T) mask; a padding slot sees itself alone, so that its softmax is defined."""
    padded = torch.nn.functional.pad(mask, (0, padding, 0, padding))
    return padded | torch.eye(padded.shape[0], dtype=torch.bool)
