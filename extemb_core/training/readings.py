"""Readings to train on: a text to give back from its embeddings, and questions about documents.

Both are made on demand from an index, with nothing drawn but from the seed and that index, so that a resumed run
trains on what an uninterrupted one would have.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from extemb_core.context.assembly import DOCUMENT_SEPARATOR, Part, assemble_chat, assemble_text, document_heading
from extemb_core.errors import TrainingError
from extemb_core.models.llm import LLM
from extemb_core.questions import Question, template_for, templates
from extemb_core.training.reading_loss import Reading, Span

logger = logging.getLogger(__name__)

Ids = np.ndarray[Any, Any]
Role = Literal["text", "document", "answer"]

NOT_FOUND = "not in the documents"
_REPEAT = "\n\nRepeat the text above, word for word:\n"
_GO_ON = "\n\nGo on from each of these words of the text above:\n"
_MAX_CUE, _MAX_RECALLED, _MAX_CUES = 4, 7, 12
_CHARS_PER_TOKEN = 3  # few enough that a cut by characters seldom has too many tokens
_MAX_DISTRACTORS = 3
_MIN_DISTRACTOR = 32
_SPAN_GRID = 8  # raw spans inside compressed text begin and end at such places: group borders of the ratios up to it
_MAX_RAW = 64
_SOURCE = re.compile(r"[A-Za-z_-]+(?::[A-Za-z-]+(?=:))?")


def reconstruction(llm: LLM, ids: Ids) -> Reading:
    """Give a span back from its embeddings, after a short instruction. ids: (T,)."""
    prompt = assemble_text(llm, [ids, _REPEAT])
    parts = tuple((_tensor(part), _role(part is ids)) for part in prompt.segments)
    return Reading((*parts, (_tensor(ids), "answer")))


def recall(llm: LLM, ids: Ids, draw: np.random.Generator) -> Reading:
    """Go on from a few words of a text that is read as embeddings, at several of its places. ids: (T,).

    What a question asks of a document is done here many times a reading: find the place by the words that stand there,
    and say what comes next.
    """
    prompt = assemble_text(llm, [ids, _GO_ON])
    parts = [(_tensor(part), _role(part is ids)) for part in prompt.segments]
    line = _tensor(llm.encode("\n"))
    most = max(1, len(ids) // (2 * (_MAX_CUE + _MAX_RECALLED)))
    for _ in range(min(most, _MAX_CUES)):
        cue, recalled = int(draw.integers(2, _MAX_CUE + 1)), int(draw.integers(3, _MAX_RECALLED + 1))
        start = int(draw.integers(max(1, len(ids) - cue - recalled + 1)))
        middle = min(start + cue, len(ids) - 1)
        parts += [(_tensor(ids[start:middle]), "text"), (_tensor(ids[middle : middle + recalled]), "answer"),
                  (line, "text")]  # fmt: skip
    return Reading(tuple(part for part in parts[:-1] if len(part[0])))


class QuestionReadings:
    """Questions about their own document, often among others, in the prompts that `ask` and `extemb eval` make.

    Further questions about the same document follow as further turns: reading the document is most of the work. Some
    documents stay text, and some questions lose their document, so that the answer is `NOT_FOUND`.

    Args:
        questions: What to ask. Left out are those whose document is too long and does not hold the answer literally,
            and those with longer answers than `max_answer_tokens`.
        llm: Whose tokenizer and chat template are used.
        max_tokens: Of all documents of a reading.
        max_answer_tokens: Of an answer.
        most_per_source: Rows of each source (the id up to its number) in one round over the questions.
        missing_share: Of the questions with a literal answer, how many lose their document.
        raw_share: Of the documents, how many stay text.
        mixed_share: Of the others, how many are compressed around a part that stays text, as a plan would have it that
            finds something in it; at entry layers above 0.
        most_further: Further questions about the same document.
        seed: Of all that is drawn.

    Raises:
        TrainingError: No question is left.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        llm: LLM,
        *,
        max_tokens: int = 768,
        max_answer_tokens: int = 64,
        most_per_source: int = 4000,
        missing_share: float = 0.1,
        raw_share: float = 0.15,
        mixed_share: float = 0.0,
        most_further: int = 3,
        seed: int = 0,
    ) -> None:
        self._llm = llm
        self._max_tokens = max_tokens
        self._max_answer_tokens = max_answer_tokens
        self._missing_share = missing_share
        self._raw_share = raw_share
        self._mixed_share = mixed_share
        self._most_further = most_further
        self._seed = seed
        self._most_chars = _CHARS_PER_TOKEN * max_tokens
        by_source: dict[str, list[Question]] = defaultdict(list)
        for question in questions:
            if self._is_usable(question):
                by_source[_source(question.id)].append(question)
        self.questions = []
        for source in sorted(by_source):
            rows = by_source[source]
            chosen = np.random.default_rng(seed).permutation(len(rows))[:most_per_source]
            self.questions += [rows[int(at)] for at in np.sort(chosen)]
        if not self.questions:
            raise TrainingError(
                f"none of the {len(questions)} questions has a document of at most {max_tokens} tokens or a literal "
                f"answer of at most {max_answer_tokens}; pass other questions or a larger sample_length"
            )
        self._by_document: dict[str, list[Question]] = defaultdict(list)
        for question in self.questions:
            self._by_document[question.document].append(question)
        logger.info("%d of %d questions are trained on", len(self.questions), len(questions))

    def __len__(self) -> int:
        return len(self.questions)

    def reading(self, index: int) -> Reading:
        """The reading of question number `index` of an endless stream: each round over them is another order."""
        rounds, place = divmod(index, len(self))
        question = self.questions[int(shuffled(len(self), self._seed, rounds)[place])]
        draw = np.random.default_rng([self._seed, 1, index])
        answer = question.answers[int(draw.integers(len(question.answers)))].strip()
        missing = answer in question.context and draw.random() < self._missing_share
        own = [] if missing else [self._own(question, answer, draw)]
        others = self._others(question, answer, own, int(draw.integers(missing, _MAX_DISTRACTORS + 1)), draw)
        if missing and not others:  # nothing else to read
            own, missing = [self._own(question, answer, draw)], False
        documents = own + others
        documents = [documents[int(at)] for at in draw.permutation(len(documents))]
        stays = draw.random(len(documents)) < self._raw_share
        turns = [(question.question, NOT_FOUND if missing else answer)]
        if own:
            turns += self._further(question, own[0], draw)
        as_asked = bool(draw.random() < 0.5)
        pieces = [
            [ids] if raw else self._pieces(ids, draw) for ids, raw in zip(documents, stays, strict=True)
        ]  # parts of each document
        spans: dict[int, Tensor | Span] = {}
        for ids, own_pieces, raw in zip(documents, pieces, stays, strict=True):
            whole, start = _tensor(ids), 0
            for number, piece in enumerate(own_pieces):
                if not raw and number % 2 == 0:  # every second piece, if there are several, stays text
                    span = Span(whole, start, start + len(piece))
                    spans[id(piece)] = whole if len(own_pieces) == 1 else span
                start += len(piece)
        return self._conversation(pieces, turns, spans, as_asked)

    def _pieces(self, ids: Ids, draw: np.random.Generator) -> list[Ids]:
        """A document's compressed, raw and compressed pieces; itself alone if it is compressed whole."""
        if not self._mixed_share or draw.random() >= self._mixed_share or len(ids) <= 2 * _SPAN_GRID:
            return [ids]
        start = _SPAN_GRID * int(draw.integers(len(ids) // _SPAN_GRID))
        length = _SPAN_GRID * int(draw.integers(1, _MAX_RAW // _SPAN_GRID + 1))
        return [ids[:start], ids[start : start + length], ids[start + length :]]

    def _conversation(
        self,
        documents: Sequence[Sequence[Ids]],
        turns: Sequence[tuple[str, str]],
        compressed: Mapping[int, Tensor | Span],
        as_asked: bool,
    ) -> Reading:
        """Half the prompts are those of `ExtensibleLM.ask`, half those of the evaluation.

        Args:
            documents: The pieces of each.
            turns: Questions and answers.
            compressed: What is read in the place of a piece, by its `id`.
            as_asked: In the prompt of `ExtensibleLM.ask`.
        """
        messages: list[dict[str, Any]] = []
        answers = [self._llm.encode(answer) for _, answer in turns]
        for (question, text), ids in zip(turns, answers, strict=True):
            template = templates()[template_for([text])]
            asked = question if as_asked else template["after"].replace("{question}", question)
            parts: list[Part] = [asked]
            if not messages:
                parts = [*_asked(documents), asked] if as_asked else [*_evaluated(documents, template), asked]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": [ids]}]
        prompt = assemble_chat(self._llm, messages[:-1])
        end = turn_end(self._llm)
        scored = {id(ids) for ids in answers}
        found: list[tuple[Tensor | Span, Role]] = []
        for segment in prompt.segments:
            part = _tensor(segment)
            before = found[-1][0] if found and found[-1][1] == "answer" else None
            if isinstance(before, Tensor) and part[0] == end:  # the end of a turn is part of the answer
                found[-1] = torch.cat([before, part[:1]]), "answer"
                part = part[1:]
            if id(segment) in compressed:
                found.append((compressed[id(segment)], "document"))
            elif len(part):
                found.append((part, "answer" if id(segment) in scored else "text"))
        last = torch.cat([_tensor(answers[-1]), torch.tensor([end])])
        return Reading((*found, (last, "answer")))

    def _further(self, question: Question, own: Ids, draw: np.random.Generator) -> list[tuple[str, str]]:
        """More questions about a document, as far as it holds their answers: with their answers."""
        siblings = [other for other in self._by_document[question.document] if other is not question]
        text = self._llm.decode(own.tolist()) if len(question.context) > self._most_chars else question.context
        chosen = [siblings[int(at)] for at in draw.permutation(len(siblings))[: self._most_further]]
        return [
            (other.question, other.answers[0].strip())
            for other in chosen
            if text is question.context or other.answers[0].strip() in text
        ]

    def _is_usable(self, question: Question) -> bool:
        longest = max(question.answers, key=len)
        fits = len(question.context) <= self._most_chars or all(a.strip() in question.context for a in question.answers)
        short = len(longest) <= 2 * _CHARS_PER_TOKEN * self._max_answer_tokens
        return fits and short and len(self._llm.encode(longest)) <= self._max_answer_tokens

    def _own(self, question: Question, answer: str, draw: np.random.Generator) -> Ids:
        """The question's document; of a long one a part with the answer somewhere in it."""
        text, end = question.context, 0
        if len(text) > self._most_chars:
            at = text.find(answer)
            start = int(draw.integers(max(0, at + len(answer) - self._most_chars), at + 1))
            start = text.rfind(" ", 0, start + 1) + 1
            text, end = text[start : start + self._most_chars], at + len(answer) - start
        ids = self._llm.encode(text)
        cut = max(0, len(self._llm.encode(text[:end])) - self._max_tokens) if len(ids) > self._max_tokens else 0
        return ids[cut : cut + self._max_tokens]

    def _others(
        self, question: Question, answer: str, documents: Sequence[Ids], count: int, draw: np.random.Generator
    ) -> list[Ids]:
        """Up to `count` documents of other questions, as far as tokens are left, none with the answer in it."""
        left = self._max_tokens - sum(map(len, documents))
        found: list[Ids] = []
        for at in draw.integers(len(self), size=count):
            other = self.questions[int(at)].context
            if left < _MIN_DISTRACTOR or other == question.context:
                continue
            ids = self._llm.encode(other[: _CHARS_PER_TOKEN * left])[:left]
            if answer.lower() not in other.lower():
                found.append(ids)
                left -= len(ids)
        return found


def _asked(documents: Sequence[Sequence[Ids]]) -> list[Part]:
    parts: list[Part] = []
    for number, pieces in enumerate(documents):
        parts += [document_heading(number), *pieces, DOCUMENT_SEPARATOR]
    return parts


def _evaluated(documents: Sequence[Sequence[Ids]], template: Mapping[str, Any]) -> list[Part]:
    parts: list[Part] = [template["before"]]
    for number, pieces in enumerate(documents):
        parts += [template["separator"], *pieces] if number else pieces
    return parts


@lru_cache(maxsize=8)
def shuffled(count: int, *seed: int) -> np.ndarray[Any, Any]:
    """An order of `count` things, kept for the next who asks: a round over a million samples is drawn once."""
    return np.random.default_rng(seed).permutation(count)


def _role(compressed: bool) -> Role:
    return "document" if compressed else "text"


def _source(name: str) -> str:
    match = _SOURCE.match(name)
    return match[0] if match else ""


def turn_end(llm: LLM) -> int:
    """What ends an assistant's turn."""
    own = llm.tokenizer.eos_token_id
    return int(own) if own in llm.stop_token_ids or not llm.stop_token_ids else llm.stop_token_ids[0]


def _tensor(ids: Any) -> Tensor:
    return torch.as_tensor(np.asarray(ids), dtype=torch.long)
