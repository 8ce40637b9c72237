"""Compute the loss of readings: of an LLM's answers after text and extensible embeddings.

Reconstruction, recall and question answering are readings. The cross-entropy may be mixed with self-distillation: the
divergence from the same LLM's predictions when it reads the text itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from extemb_core.context.assembly import Prompt, Segment
from extemb_core.errors import ConfigError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import AnchoredStates, PromptInputs
from extemb_core.models.llm import LLM

# For a group of rows that go through the LLM together. A GPU takes less time for a small LLM's pass over 8,192
# positions than the processor takes to launch it.
_MIN_FILLED = 0.8
_MIN_POSITIONS = {"cpu": 1024, "cuda": 32768}
_MAX_SCORED = 4096  # positions whose logits are in memory at once: 0.8 GB a copy with 49,152 tokens, several copies

Ids = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses at each of S tokens, row after row.

    Attributes:
        values: (S,) negative log-likelihoods in nats, mixed with divergences by distillation; with gradient.
        rows: For each row, the ratio of its embeddings (0 if all is text), and its number of tokens.
    """

    values: Tensor
    rows: Sequence[tuple[int, int]]

    def mean(self) -> Tensor:
        """Return the mean over all tokens, which is minimised."""
        return self.values.mean()

    def by_ratio(self) -> dict[int, Tensor]:
        """Return the mean over the rows of each ratio, without gradient."""
        parts = list(zip(self.rows, self.values.detach().split([n for _, n in self.rows]), strict=True))
        ratios = sorted({ratio for ratio, _ in self.rows if ratio})
        return {ratio: torch.cat([part for (at, _), part in parts if at == ratio]).mean() for ratio in ratios}


class Span(NamedTuple):
    """Part of a document that is read as extensible embeddings, at entry layers above 0.

    The document's chunks are encoded as a whole, as for a store; groups are counted from the span's start, and never
    cross a chunk's border.

    Attributes:
        document: (L,) token ids; spans of one document share the array.
        start, stop: First token of the span, and the one after the last.
    """

    document: Ids
    start: int
    stop: int


@dataclass(frozen=True)
class Reading:
    """One row that an LLM reads and answers.

    Attributes:
        parts: (T,) token ids and their role, in order: "text"; a "document", which is read as extensible embeddings and
            may be a `Span`; or an "answer", which is scored. The last one is an answer.
    """

    parts: tuple[tuple[Ids | Span, Literal["text", "document", "answer"]], ...]


def reading_losses(
    llm: LLM,
    readings: Sequence[Reading],
    *,
    embedder: ExtensibleEmbedder | None = None,
    ratios: Sequence[Sequence[int]] = (),
    chunk_size: int | None = None,
    distillation: float = 0.0,
) -> Losses:
    """Compute the negative log-likelihood, in nats, of the answers' tokens after their prompts.

    Args:
        llm: LLM that reads them; gradient flows through it, and to its trained parts.
        readings: Prompts and answers.
        embedder: Embedder of the documents; without one every part is read as text.
        ratios: Ratios of each reading; one pass of the embedder serves all of them.
        chunk_size: Tokens per chunk; the embedder's own when not given.
        distillation: Weight, instead of the tokens' loss, of the divergence from the LLM that reads every part as text.

    Raises:
        ConfigError: A reading does not end with an answer, or holds a part of a document at entry layer 0.
    """
    if any(not reading.parts or reading.parts[-1][1] != "answer" for reading in readings):
        raise ConfigError("a reading does not end with an answer, so there is nothing to score; add one")
    compressed = _compressed(embedder, readings, ratios, chunk_size) if embedder is not None else {}
    embedded = {(index, ratio) for index, _, ratio in compressed}
    inputs: list[PromptInputs] = []
    positions, targets, texts, expected, rows = [], [], [], [], []
    for index, reading in enumerate(readings):
        answers = [_ids_of(part) for part, role in reading.parts if role == "answer"]
        plain = [_ids_of(part) for part, _ in reading.parts]
        if distillation:
            texts.append(_prompt(llm, plain))
        for ratio in ratios[index] if embedder is not None else (1,):
            row = [compressed.get((index, number, ratio), ids) for number, ids in enumerate(plain)]
            positions.append((len(inputs), _answers_at(reading, row)))
            inputs.append(_prompt(llm, row))
            targets += answers
            rows.append((ratio if (index, ratio) in embedded else 0, sum(map(len, answers))))
            expected.append((index, _answers_at(reading, plain)))
    scored = read_states(llm, inputs, positions, frozen=False)
    teacher = read_states(llm, texts, expected) if distillation else None
    return Losses(
        mixed(llm, scored, torch.from_numpy(np.concatenate(targets)).to(llm.device), teacher, distillation), rows
    )


def _prompt(llm: LLM, row: Sequence[Segment]) -> PromptInputs:
    """Assemble a row without its last token, as nothing is predicted after it."""
    return Prompt((*row[:-1], row[-1][:-1])).inputs(llm)


def _ids_of(part: Ids | Span) -> Ids:
    """Return the tokens of a part. (T,)"""
    return part.document[part.start : part.stop] if isinstance(part, Span) else part


def _compressed(
    embedder: ExtensibleEmbedder, readings: Sequence[Reading], ratios: Sequence[Sequence[int]], chunk_size: int | None
) -> dict[tuple[int, int, int], Segment]:
    """Compress every chunk of every document in one padded batch: (reading, part, ratio) -> embeddings."""
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
    chunks = {
        (key, at // size): torch.from_numpy(ids[at : at + size])
        for key, ids in documents.items()
        for at in range(0, len(ids), size)
    }
    rows = {key: row for row, key in enumerate(chunks)}
    outputs = embedder(torch.nn.utils.rnn.pad_sequence(list(chunks.values()), batch_first=True))

    parts: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {
        (*key, ratio): [
            (rows[id(span.document), at], min(span.stop - at * size, size), ratio, max(span.start - at * size, 0))
            for at in range(span.start // size, -(-span.stop // size))
        ]
        for key, span in spans.items()
        for ratio in ratios[key[0]]
    }
    made = iter(embedder.read_out_parts(outputs, list(chain(*parts.values()))))
    return {key: joined(embedder.llm, list(islice(made, len(own)))) for key, own in parts.items()}


def joined(llm: LLM, parts: Sequence[Tensor | AnchoredStates]) -> Segment:
    """Join embeddings of consecutive chunks into one segment of a prompt."""
    anchored = [part for part in parts if isinstance(part, AnchoredStates)]
    if anchored:
        return AnchoredStates.cat(anchored)
    return torch.cat([part for part in parts if isinstance(part, Tensor)]).to(llm.dtype)


def _answers_at(reading: Reading, rows: Sequence[Segment]) -> Tensor:
    """Find the (S,) positions from which the answers' tokens are predicted, in a row of parts."""
    positions, start = [], 0
    for (_, role), row in zip(reading.parts, rows, strict=True):
        if role == "answer":
            positions.append(torch.arange(start - 1, start + len(row) - 1))
        start += len(row)
    return torch.cat(positions)


def read_states(
    llm: LLM, inputs: Sequence[PromptInputs], positions: Sequence[tuple[int, Tensor]], *, frozen: bool = True
) -> Tensor:
    """Compute the LLM's hidden states at some positions of some inputs.

    Args:
        llm: LLM that reads them, inputs of similar length in one batch.
        inputs: Prompts.
        positions: For each entry, the number of an input and (S,) positions in it.
        frozen: Compute without gradient.

    Returns:
        (all positions, D).
    """
    rows: dict[int, Tensor] = {}
    least = _MIN_POSITIONS.get(llm.device.type, _MIN_POSITIONS["cpu"])
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        for group in groups_of_like_length([len(row) for row in inputs], least):
            rows |= zip(group, llm.hidden_of([inputs[index] for index in group]), strict=True)
        return torch.cat([rows[index][at.to(llm.device)] for index, at in positions])


def groups_of_like_length(lengths: Sequence[int], min_positions: int) -> list[list[int]]:
    """Group rows that go through the LLM together, longest first.

    Once a group has `min_positions`, it ends where padding would exceed a fifth of a row.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        group = groups[-1] if groups else []
        longest = lengths[group[0]] if group else 0
        if group and (lengths[index] >= _MIN_FILLED * longest or len(group) * longest < min_positions):
            group.append(index)
        else:
            groups.append([index])
    return groups


def mixed(llm: LLM, scored: Tensor, targets: Tensor, teacher: Tensor | None, distillation: float) -> Tensor:
    """Mix losses with divergences. scored, teacher: (S, D) hidden states; targets: (S,) ids -> (S,).

    The logits of many positions are computed part by part, and again for the gradient.
    """
    if len(scored) <= _MAX_SCORED:
        return _mixed(llm, scored, targets, teacher, distillation)
    teachers = repeat(None) if teacher is None else teacher.split(_MAX_SCORED)
    parts = zip(scored.split(_MAX_SCORED), targets.split(_MAX_SCORED), teachers, strict=False)
    return torch.cat([checkpoint(_mixed, llm, *part, distillation, use_reentrant=False) for part in parts])


def _mixed(llm: LLM, scored: Tensor, targets: Tensor, teacher: Tensor | None, distillation: float) -> Tensor:
    logits = llm.logits(scored).float()
    loss = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
    if teacher is None:
        return loss
    with torch.no_grad():
        expected = llm.logits(teacher).float().log_softmax(-1)
    divergence = torch.nn.functional.kl_div(logits.log_softmax(-1), expected, log_target=True, reduction="none").sum(-1)
    return (1 - distillation) * loss + distillation * divergence
