"""Train by two-stream auto-regression (twin paper, section 2.3).

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
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import Prompt, Segment
from extemb_core.errors import ConfigError
from extemb_core.models.chunks import chunk_lengths, n_embeddings
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM
from extemb_core.training.reading_loss import Losses, joined, mixed, read_states


@dataclass(frozen=True)
class Pass:
    """One LLM pass: raw chunks from `first` to before `end`, after the embeddings of all chunks before `end - 1`."""

    first: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Layout of one pass of T slots: [BOS?] [embeddings] [raw tokens of the pass's chunks].

    Attributes:
        n_embedded: Number of embeddings in the pass, chunk after chunk.
        raw: (start, stop) of the pass's raw tokens within the sample.
        positions: (T,) position ids.
        mask: (T, T), True where the slot of the row may attend to that of the column.
        sources: (S,) slots whose output is scored.
        targets: (S,) positions within the sample of the tokens that they predict.
    """

    n_embedded: int
    raw: tuple[int, int]
    positions: Tensor
    mask: Tensor
    sources: Tensor
    targets: Tensor


def pass_window(llm: LLM) -> int:
    """Return the longest pass, in positions, in which an LLM obeys the block mask.

    Raises:
        ConfigError: A layer keeps a state of everything it has read, which a mask cannot change.
    """
    if not llm.mask_window:
        raise ConfigError(
            f"{llm.name} has layers that keep a state of all they have read, which two_stream cannot mask; train with "
            "the objectives reconstruction, recall or questions"
        )
    return llm.mask_window


def plan_passes(lengths: Sequence[int], ratio: int, window: int, n_prefix: int = 0) -> list[Pass]:
    """Pack a sample's chunks into as few passes as the window allows.

    Args:
        lengths: Tokens of each chunk.
        ratio: Tokens per embedding.
        window: Positions per pass.
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
                "use shorter samples, a coarser ratio or another objective"
            )
        passes.append(Pass(first, end))
        first = end
    return passes


def lay_out(lengths: Sequence[int], ratio: int, run: Pass, n_prefix: int = 0) -> Layout:
    """Lay out the slots, positions, block mask and targets of one pass. See `Layout`."""
    before = _embeddings_before(lengths, ratio)
    starts = list(accumulate(lengths, initial=0))
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
    slots = torch.arange(slot)
    chunk_ids = torch.tensor(chunk_of)
    embedded = slots < head
    causal = slots[None, :] <= slots[:, None]
    same = chunk_ids[None, :] == chunk_ids[:, None]
    earlier = chunk_ids[None, :] < chunk_ids[:, None]
    mask = torch.where(embedded[None, :], torch.where(embedded[:, None], causal, earlier), causal & same)
    return Layout(
        n_embedded=n_embedded,
        raw=(starts[run.first], starts[run.end]),
        positions=torch.tensor(positions),
        mask=mask,
        sources=torch.tensor(sources),
        targets=torch.tensor(targets),
    )


def two_stream_losses(
    embedder: ExtensibleEmbedder,
    samples: Sequence[Tensor],
    ratios: Sequence[Sequence[int]],
    chunk_size: int,
    *,
    llm: LLM | None = None,
    window: int | None = None,
    distillation: float = 0.0,
) -> Losses:
    """Compute the negative log-likelihood, in nats, of every token of every chunk but each sample's first.

    Args:
        embedder: The model being trained. Gradient flows to it through its frozen LLM.
        samples: (T,) token ids each, longer than one chunk.
        ratios: Ratios of each sample; one pass of the embedder serves all of them.
        chunk_size: Tokens per chunk.
        llm: LLM that predicts; the embedder's own when not given.
        window: Positions per LLM pass; at most `pass_window`, which is the default.
        distillation: Weight, instead of the tokens' loss, of the divergence from the LLM that reads the whole sample.

    Returns:
        The losses, with gradient to the embedder's own parameters.
    """
    llm = embedder.llm if llm is None else llm
    window = pass_window(llm) if window is None else min(window, pass_window(llm))
    device = llm.device
    samples = [sample.cpu() for sample in samples]  # the Trainer has moved them to its device
    lengths = [chunk_lengths(len(sample), chunk_size) for sample in samples]
    short = next((len(sample) for sample, parts in zip(samples, lengths, strict=True) if len(parts) < 2), None)
    if short is not None:
        raise ConfigError(f"a sample of {short} tokens has no second chunk of {chunk_size} to predict; use longer ones")

    # Stream 1: all chunks but each sample's last are full, so they form one batch without padding.
    rows = [s[i * chunk_size : (i + 1) * chunk_size] for s, parts in zip(samples, lengths, strict=True)
            for i in range(len(parts) - 1)]  # fmt: skip
    outputs = embedder(torch.stack(rows))
    bos = llm.bos_token_id
    n_prefix = int(bos is not None)
    embeddings: dict[tuple[int, int], Segment] = {}
    runs: list[tuple[int, int, Pass]] = []  # passes with their samples and ratios
    row = 0
    for index, (parts, wanted) in enumerate(zip(lengths, ratios, strict=True)):
        for ratio in wanted:
            chunks = [embedder.read_out(outputs, row + i, chunk_size, ratio) for i in range(len(parts) - 1)]
            embeddings[index, ratio] = joined(llm, chunks)
            runs += [(index, ratio, run) for run in plan_passes(parts, ratio, window, n_prefix)]
        row += len(parts) - 1

    # Stream 2: passes of all samples, padded on the right to one length.
    layouts = [lay_out(lengths[index], ratio, run, n_prefix) for index, ratio, run in runs]
    longest = max(len(layout.positions) for layout in layouts)
    inputs, masks, positions, sources, targets, owners = [], [], [], [], [], []
    for number, ((index, ratio, _), layout) in enumerate(zip(runs, layouts, strict=True)):
        sample = samples[index]
        before = np.array([bos] * n_prefix, dtype=np.int64)
        visible = embeddings[index, ratio][: layout.n_embedded]
        inputs.append(Prompt((before, visible, sample[slice(*layout.raw)].numpy())).inputs(llm))
        padding = longest - len(layout.positions)
        # A padding slot attends only to itself, so that its softmax is defined.
        mask = torch.nn.functional.pad(layout.mask, (0, padding, 0, padding))
        masks.append(mask | torch.eye(longest, dtype=torch.bool))
        positions.append(torch.nn.functional.pad(layout.positions, (0, padding)))
        sources.append(layout.sources + number * longest)
        targets.append(sample[layout.targets].to(device))
        owners.append((index, layout.targets))
    hidden = llm.hidden_of(
        inputs, mask=torch.stack(masks)[:, None].to(device), positions=torch.stack(positions).to(device)
    )
    scored = hidden.flatten(0, 1)[torch.cat(sources).to(device)]
    teacher = None
    if distillation:
        whole = [[*([bos] * n_prefix), *sample.tolist()] for sample in samples]
        # A token is predicted at the position before it, and a BOS shifts all positions by one.
        teacher = read_states(llm, whole, [(index, at + n_prefix - 1) for index, at in owners])
    scored_rows = [(ratio, len(ids)) for (_, ratio, _), ids in zip(runs, targets, strict=True)]
    return Losses(mixed(llm, scored, torch.cat(targets), teacher, distillation), scored_rows)


def _embeddings_before(lengths: Sequence[int], ratio: int) -> list[int]:
    """Count the embeddings before each chunk; one entry more than there are chunks."""
    return list(accumulate((n_embeddings(length, ratio) for length in lengths), initial=0))
