"""What an embedder is trained on: pure functions of token ids.

Two-stream auto-regression (twin paper, section 2.3) is `two_stream_losses`; reading, which reconstruction and question
answering are, is `reading_losses`. Either can mix its cross-entropy with self-distillation: the divergence from what
the same LLM predicts when it reads the text itself.

Two-stream auto-regression:

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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import Prompt, Segment
from extemb_core.errors import ConfigError
from extemb_core.models.downscaling import chunk_lengths, n_embeddings
from extemb_core.models.entry import AnchoredStates

_LEAST_FILLED, _FEWEST_POSITIONS = 0.8, 1024  # of a group of rows that go through the LLM together

if TYPE_CHECKING:
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.entry import PromptInputs
    from extemb_core.models.llm import LLM


@dataclass(frozen=True, eq=False)
class Losses:
    """What is lost at each of S tokens, row after row.

    Attributes:
        values: (S,) negative log-likelihoods in nats, mixed with divergences by distillation; with gradient.
        rows: Of each row, the ratio of the embeddings in it (0 where all is text), and its tokens.
    """

    values: Tensor
    rows: Sequence[tuple[int, int]]

    def mean(self) -> Tensor:
        """What is minimised."""
        return self.values.mean()

    def by_ratio(self) -> dict[int, Tensor]:
        """The mean over the rows of each ratio, without gradient."""
        parts = list(zip(self.rows, self.values.detach().split([n for _, n in self.rows]), strict=True))
        ratios = sorted({ratio for ratio, _ in self.rows if ratio})
        return {ratio: torch.cat([part for (own, _), part in parts if own == ratio]).mean() for ratio in ratios}


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


def two_stream_loss(*args: Any, **settings: Any) -> Tensor:
    """Mean of `two_stream_losses`."""
    return two_stream_losses(*args, **settings).mean()


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
    """Negative log-likelihood, in nats, of every token of every chunk but each sample's first.

    Args:
        embedder: The model being trained. Gradient flows to it through its frozen LLM.
        samples: (T,) token ids each, longer than one chunk.
        ratios: Of each sample; one pass of the embedder serves all of them.
        chunk_size: Tokens per chunk.
        llm: Predicts; the embedder's own when not given.
        window: Positions per LLM pass; the LLM's own when not given.
        distillation: Weight of the divergence from the LLM that reads the whole sample, instead of the tokens.

    Returns:
        With gradient to the embedder's own parameters.
    """
    llm = embedder.llm if llm is None else llm
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
    bos = llm.bos_token_id
    n_prefix = int(bos is not None)
    embeddings: dict[tuple[int, int], Segment] = {}
    runs: list[tuple[int, Pass]] = []  # with their ratios
    row = 0
    for index, (parts, wanted) in enumerate(zip(lengths, ratios, strict=True)):
        for ratio in wanted:
            chunks = [embedder.read_out(outputs, row + i, chunk_size, ratio) for i in range(len(parts) - 1)]
            embeddings[index, ratio] = _joined(llm, chunks)
            runs += [(ratio, run) for run in plan_passes(parts, ratio, window, index, n_prefix)]
        row += len(parts) - 1

    # Stream 2: passes of all samples, padded on the right to one length.
    layouts = [lay_out(lengths[run.sample], ratio, run, n_prefix) for ratio, run in runs]
    longest = max(len(layout.positions) for layout in layouts)
    inputs, masks, positions, sources, targets, owners = [], [], [], [], [], []
    for index, ((ratio, run), layout) in enumerate(zip(runs, layouts, strict=True)):
        sample = samples[run.sample]
        before = np.array([bos] * n_prefix, dtype=np.int64)
        own = embeddings[run.sample, ratio][: layout.n_embedded]
        inputs.append(Prompt((before, own, sample[slice(*layout.raw)].numpy())).inputs(llm))
        padding = longest - len(layout.positions)
        masks.append(_padded_mask(layout.mask, padding))
        positions.append(torch.nn.functional.pad(layout.positions, (0, padding)))
        sources.append(layout.sources + index * longest)
        targets.append(sample[layout.targets].to(device))
        owners.append((run.sample, layout.targets))
    hidden = llm.hidden_of(
        inputs, mask=torch.stack(masks)[:, None].to(device), positions=torch.stack(positions).to(device)
    )
    scored = hidden.flatten(0, 1)[torch.cat(sources).to(device)]
    teacher = None
    if distillation:
        whole = [[*([bos] * n_prefix), *sample.tolist()] for sample in samples]
        # A token is predicted at the place before it, and a BOS moves all places by one.
        teacher = _read(llm, whole, [(index, at + n_prefix - 1) for index, at in owners])
    scored_rows = [(ratio, len(ids)) for (ratio, _), ids in zip(runs, targets, strict=True)]
    return Losses(_mixed(llm, scored, torch.cat(targets), teacher, distillation), scored_rows)


class Span(NamedTuple):
    """A part of a document that is read as extensible embeddings, at entry layers above 0.

    The document's chunks are encoded whole, as a store holds them; groups are counted from the span's start, and never
    cross a chunk's border.

    Attributes:
        document: (L,) token ids; spans of one document share the tensor.
        start, stop: The tokens of it.
    """

    document: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """What an LLM reads and answers, in one row.

    Attributes:
        parts: (T,) token ids and what they are, in order: "text"; a "document", which is read as extensible
            embeddings and may be a `Span`; or an "answer", which is scored. The last one is an answer.
    """

    parts: tuple[tuple[Tensor | Span, Literal["text", "document", "answer"]], ...]


def reading_loss(*args: Any, **settings: Any) -> Tensor:
    """Mean of `reading_losses`."""
    return reading_losses(*args, **settings).mean()


def reading_losses(
    llm: LLM,
    readings: Sequence[Reading],
    *,
    embedder: ExtensibleEmbedder | None = None,
    ratios: Sequence[Sequence[int]] = (),
    chunk_size: int | None = None,
    distillation: float = 0.0,
) -> Losses:
    """Negative log-likelihood, in nats, of the answers' tokens after their prompts.

    Args:
        llm: Reads; gradient flows through it, and to what of it is trained.
        readings: Prompts and answers.
        embedder: Makes the embeddings; without one every piece is read as text.
        ratios: Of each reading; one pass of the embedder serves all of them.
        chunk_size: Tokens per chunk; the embedder's own when not given.
        distillation: Weight of the divergence from the LLM that reads every piece as text, instead of the tokens.

    Raises:
        ConfigError: A reading does not end with an answer, or holds a part of a document at entry layer 0.
    """
    if any(not reading.parts or reading.parts[-1][1] != "answer" for reading in readings):
        raise ConfigError("a reading does not end with an answer, so there is nothing to score; add one")
    compressed = _compressed(embedder, readings, ratios, chunk_size) if embedder is not None else {}
    embedded = {(index, ratio) for index, _, ratio in compressed}
    inputs: list[PromptInputs] = []
    places, targets, texts, expected, rows = [], [], [], [], []
    for index, reading in enumerate(readings):
        answers = [_ids_of(part) for part, role in reading.parts if role == "answer"]
        plain = [_ids_of(part).numpy() for part, _ in reading.parts]
        if distillation:
            texts.append(_prompt(llm, plain))
        for ratio in ratios[index] if embedder is not None else (1,):
            row = [compressed.get((index, number, ratio), ids) for number, ids in enumerate(plain)]
            places.append((len(inputs), _answers_at(reading, row)))
            inputs.append(_prompt(llm, row))
            targets += answers
            rows.append((ratio if (index, ratio) in embedded else 0, sum(map(len, answers))))
            expected.append((index, _answers_at(reading, plain)))
    scored = _read(llm, inputs, places, frozen=False)
    teacher = _read(llm, texts, expected) if distillation else None
    return Losses(_mixed(llm, scored, torch.cat(targets).to(llm.device), teacher, distillation), rows)


def _prompt(llm: LLM, row: Sequence[Segment]) -> PromptInputs:
    """A row without its last token, after which nothing is predicted."""
    return Prompt((*row[:-1], row[-1][:-1])).inputs(llm)


def _ids_of(part: Tensor | Span) -> Tensor:
    """The tokens of a part. (T,)"""
    return part.document[part.start : part.stop] if isinstance(part, Span) else part


def _compressed(
    embedder: ExtensibleEmbedder, readings: Sequence[Reading], ratios: Sequence[Sequence[int]], chunk_size: int | None
) -> dict[tuple[int, int, int], Segment]:
    """(reading, part, ratio) -> embeddings: every chunk of every document in one batch, padded on the right."""
    size = embedder.config.chunk_size if chunk_size is None else chunk_size
    spans = {
        (index, number): part if isinstance(part, Span) else Span(part, 0, len(part))
        for index, reading in enumerate(readings)
        for number, (part, role) in enumerate(reading.parts)
        if role == "document"
    }
    part = next((span for span in spans.values() if span.stop - span.start < len(span.document)), None)
    if part is not None and not embedder.config.entry_layer:
        raise ConfigError(
            f"a reading holds tokens {part.start} to {part.stop} of a document of {len(part.document)} alone, and at "
            "entry layer 0 documents are read whole; leave out mixed_share, or train with an entry_layer above 0"
        )
    documents = {id(span.document): span.document for span in spans.values()}
    if not documents:
        return {}
    chunks = {(key, at): chunk for key, ids in documents.items() for at, chunk in enumerate(ids.split(size))}
    rows = {key: row for row, key in enumerate(chunks)}
    outputs = embedder(torch.nn.utils.rnn.pad_sequence(list(chunks.values()), batch_first=True).to(embedder.llm.device))
    made: dict[tuple[int, int, int], Segment] = {}
    for (index, number), span in spans.items():
        for ratio in ratios[index]:
            made[index, number, ratio] = _joined(
                embedder.llm,
                [
                    embedder.read_out(
                        outputs,
                        rows[id(span.document), at],
                        min(span.stop - at * size, size),
                        ratio,
                        max(span.start - at * size, 0),
                    )
                    for at in range(span.start // size, -(-span.stop // size))
                ],
            )
    return made


def _joined(llm: LLM, parts: Sequence[Tensor | AnchoredStates]) -> Segment:
    """Embeddings of consecutive chunks as one segment of a prompt."""
    anchored = [part for part in parts if isinstance(part, AnchoredStates)]
    if anchored:
        return AnchoredStates.cat(anchored)
    return torch.cat([part for part in parts if isinstance(part, Tensor)]).to(llm.dtype)


def _answers_at(reading: Reading, rows: Sequence[Segment]) -> Tensor:
    """(S,) places before each token of the answers, in a row of parts."""
    places, start = [], 0
    for (_, role), row in zip(reading.parts, rows, strict=True):
        if role == "answer":
            places.append(torch.arange(start - 1, start + len(row) - 1))
        start += len(row)
    return torch.cat(places)


def _read(
    llm: LLM, inputs: Sequence[PromptInputs], places: Sequence[tuple[int, Tensor]], *, frozen: bool = True
) -> Tensor:
    """The LLM's hidden states at some places of some inputs.

    Args:
        llm: Reads them, those of like length in one batch.
        inputs: Prompts.
        places: Number of an input and (S,) places in it, each.
        frozen: Without gradient.

    Returns:
        (all places, D).
    """
    rows: dict[int, Tensor] = {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        for group in groups_of_like_length([len(row) for row in inputs]):
            rows |= zip(group, llm.hidden_of([inputs[index] for index in group]), strict=True)
        return torch.cat([rows[index][at.to(llm.device)] for index, at in places])


def groups_of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Which rows go through the LLM together: a group is cut off where padding would be a fifth of a row, once it is
    large enough to keep a CPU busy."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        if group and (lengths[index] >= _LEAST_FILLED * longest or len(group) * longest < _FEWEST_POSITIONS):
            group.append(index)
        else:
            groups.append([index])
    return groups


def _mixed(llm: LLM, scored: Tensor, targets: Tensor, teacher: Tensor | None, distillation: float) -> Tensor:
    """scored, teacher: (S, D) hidden states; targets: (S,) ids -> (S,)."""
    logits = llm.logits(scored).float()
    loss = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
    if teacher is None:
        return loss
    with torch.no_grad():
        expected = llm.logits(teacher).float().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1)
    return (1 - distillation) * loss + distillation * divergence


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
