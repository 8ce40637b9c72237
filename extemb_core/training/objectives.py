"""Make readings to train on: a text to give back from its embeddings, and questions about documents.

Both are made on demand from an index; all that is drawn follows from the seed and that index, so that a resumed run
trains on what an uninterrupted one would have. The objective that reads plain text is in `two_stream`; the loss of
readings is in `reading_loss`.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from extemb_core.context.assembly import DOCUMENT_SEPARATOR, Part, assemble_chat, assemble_text, document_heading
from extemb_core.context.scoring import bm25_scores, ranking
from extemb_core.context.spans import Sentences, split_into_sentences
from extemb_core.errors import TrainingError
from extemb_core.models.generation import turn_end
from extemb_core.models.llm import LLM
from extemb_core.questions import Question, template_for, templates
from extemb_core.training.reading_loss import Ids, Reading, Span

logger = logging.getLogger(__name__)

Role = Literal["text", "document", "answer"]

NOT_FOUND = "not in the documents"
_REPEAT = "\n\nRepeat the text above, word for word:\n"
_GO_ON = "\n\nGo on from each of these words of the text above:\n"
_MAX_CUE, _MAX_RECALLED, _MAX_CUES = 4, 7, 12
_CHARS_PER_TOKEN = 3  # low, so that a text cut by characters seldom has too many tokens
_MIN_DISTRACTOR = 32
_SPAN_GRID = 8  # raw spans inside compressed text begin and end at multiples: group borders of ratios up to 8
_MAX_RAW = 64
_MAX_FOCUS = 3  # maximum of sentences that stay text when documents are read by a plan
_SOURCE = re.compile(r"[A-Za-z_-]+(?::[A-Za-z-]+(?=:))?")


def reconstruction(llm: LLM, ids: Ids) -> Reading:
    """Make a reading that repeats a span from its embeddings, after a short instruction. ids: (T,)."""
    prompt = assemble_text(llm, [ids, _REPEAT])
    return Reading((*_with_document(prompt.segments, ids), (_array(ids), "answer")))


def recall(llm: LLM, ids: Ids, draw: np.random.Generator) -> Reading:
    """Make a reading that continues, at several places, a text read as embeddings from a few of its words. ids: (T,).

    Each reading practises many times what a question asks of a document: find a place by its words, and say what comes
    next.
    """
    prompt = assemble_text(llm, [ids, _GO_ON])
    parts = _with_document(prompt.segments, ids)
    line = _array(llm.encode("\n"))
    most = max(1, len(ids) // (2 * (_MAX_CUE + _MAX_RECALLED)))
    for _ in range(min(most, _MAX_CUES)):
        cue, recalled = int(draw.integers(2, _MAX_CUE + 1)), int(draw.integers(3, _MAX_RECALLED + 1))
        start = int(draw.integers(max(1, len(ids) - cue - recalled + 1)))
        middle = min(start + cue, len(ids) - 1)
        parts += [(_array(ids[start:middle]), "text"), (_array(ids[middle : middle + recalled]), "answer"),
                  (line, "text")]  # fmt: skip
    return Reading(tuple(part for part in parts[:-1] if len(part[0])))


@dataclass(eq=False, repr=False)
class QuestionReadings:
    """Questions about a document, often among others, in the prompts that `ask` and `extemb eval` make.

    More questions about the same document follow as further turns, as reading the document is most of the work. Some
    documents stay text, and some questions lose their document, so that the answer is `NOT_FOUND`.

    Attributes:
        questions: Questions to ask. Left out are those whose document is too long and does not contain the answer
            literally, and those whose answers are longer than `max_answer_tokens`.
        llm: LLM whose tokenizer and chat template are used.
        max_tokens: Maximum tokens of all documents of a reading.
        max_answer_tokens: Maximum tokens of an answer.
        most_per_source: Maximum rows of each source (the id up to its number) in one round over the questions.
        missing_share: Share of the questions with a literal answer that lose their document.
        raw_share: Share of the documents that stay text.
        mixed_share: Share of the other documents that are compressed around a part left as text, as a plan that finds
            something in them would do; at entry layers above 0.
        focus_share: Share of the questions that read their documents by a plan: up to three sentences of all documents,
            the nearest to the question by BM25, stay text; at entry layers above 0.
        most_distractors: Maximum documents of other questions beside a question's own, if they fit `max_tokens`.
        most_further: Maximum number of further questions about the same document.
        seed: Random seed of everything drawn.

    Raises:
        TrainingError: No question is left.
    """

    questions: Sequence[Question]
    llm: LLM
    _: KW_ONLY
    max_tokens: int = 768
    max_answer_tokens: int = 64
    most_per_source: int = 4000
    missing_share: float = 0.1
    raw_share: float = 0.15
    mixed_share: float = 0.0
    focus_share: float = 0.0
    most_distractors: int = 3
    most_further: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        self._most_chars = _CHARS_PER_TOKEN * self.max_tokens
        by_source: dict[str, list[Question]] = defaultdict(list)
        for question in self.questions:
            if self._is_usable(question):
                source = _SOURCE.match(question.id)
                by_source[source[0] if source else ""].append(question)
        usable = []
        for _, rows in sorted(by_source.items()):
            chosen = np.random.default_rng(self.seed).permutation(len(rows))[: self.most_per_source]
            usable += [rows[int(at)] for at in np.sort(chosen)]
        if not usable:
            raise TrainingError(
                f"none of the {len(self.questions)} questions has a document of at most {self.max_tokens} tokens or a "
                f"literal answer of at most {self.max_answer_tokens}; pass other questions or a larger sample_length"
            )
        self._by_document: dict[str, list[Question]] = defaultdict(list)
        for question in usable:
            self._by_document[question.document].append(question)
        logger.info("%d of %d questions are trained on", len(usable), len(self.questions))
        self.questions = usable

    def __len__(self) -> int:
        return len(self.questions)

    def reading(self, index: int) -> Reading:
        """Make the reading of question `index` of an endless stream, in which each round has another order."""
        rounds, at = divmod(index, len(self))
        question = self.questions[int(shuffled(len(self), self.seed, rounds)[at])]
        draw = np.random.default_rng([self.seed, 1, index])
        answer = question.answers[int(draw.integers(len(question.answers)))].strip()
        missing = answer in question.context and draw.random() < self.missing_share
        answering = [] if missing else [self._own_document(question, answer, draw)]
        others = self._others(question, answer, answering, int(draw.integers(missing, self.most_distractors + 1)), draw)
        if missing and not others:  # nothing else to read
            answering, missing = [self._own_document(question, answer, draw)], False
        documents = answering + others
        documents = [documents[int(at)] for at in draw.permutation(len(documents))]
        stays = draw.random(len(documents)) < self.raw_share
        turns = [(question.question, NOT_FOUND if missing else answer)]
        if answering:
            turns += self._further(question, answering[0], draw)
        as_asked = bool(draw.random() < 0.5)
        focus = self._focus(question.question, documents, draw)
        documents_pieces: list[list[Ids]] = []
        spans: dict[int, Ids | Span] = {}
        for number, (ids, raw) in enumerate(zip(documents, stays, strict=True)):
            kept = [] if raw else focus[number] if focus is not None else self._some_part(ids, draw)
            borders = [0, *(border for part in kept for border in part), len(ids)]
            pieces = [ids[start:stop] for start, stop in itertools.pairwise(borders)] if kept else [ids]
            documents_pieces.append(pieces)
            if not raw:
                whole = _array(ids)
                for piece, start in zip(pieces[::2], borders[::2], strict=True):  # every second piece stays text
                    spans[id(piece)] = Span(whole, start, start + len(piece)) if kept else whole
        return self._conversation(documents_pieces, turns, spans, as_asked)

    def _focus(
        self, question: str, documents: Sequence[Ids], draw: np.random.Generator
    ) -> list[list[tuple[int, int]]] | None:
        """Find the parts of each document that a plan for the question leaves as text; None if no plan is drawn.

        Further questions of the conversation read the documents as planned for the first.
        """
        if not self.focus_share or draw.random() >= self.focus_share:
            return None
        split = [self._sentences(ids) for ids in documents]
        scores = np.array(bm25_scores(question, [text for one in split for text in one.texts]))
        chosen = np.zeros(len(scores), bool)
        chosen[ranking(scores)[: int(draw.integers(1, _MAX_FOCUS + 1))]] = True
        chosen &= scores > 0
        of_each = np.split(chosen, np.cumsum([len(one) for one in split])[:-1])
        return [
            [(int(one.borders[at]), int(one.borders[at + 1])) for at in np.flatnonzero(kept)]
            for one, kept in zip(split, of_each, strict=True)
        ]

    def _sentences(self, ids: Ids) -> Sentences:
        """Cut a document into sentences; one cut within a word, whose text has other tokens, stays one sentence."""
        text = self.llm.decode(ids.tolist())
        again, ends = self.llm.encode_with_ends(text)
        if np.array_equal(again, ids):
            return split_into_sentences(text, ends)
        return Sentences(np.array([0, len(ids)]), text, np.full(len(ids), len(text)))

    def _some_part(self, ids: Ids, draw: np.random.Generator) -> list[tuple[int, int]]:
        """Draw at most one part that stays text."""
        if not self.mixed_share or draw.random() >= self.mixed_share or len(ids) <= 2 * _SPAN_GRID:
            return []
        start = _SPAN_GRID * int(draw.integers(len(ids) // _SPAN_GRID))
        length = _SPAN_GRID * int(draw.integers(1, _MAX_RAW // _SPAN_GRID + 1))
        return [(start, min(start + length, len(ids)))]

    def _conversation(
        self,
        documents: Sequence[Sequence[Ids]],
        turns: Sequence[tuple[str, str]],
        compressed: Mapping[int, Ids | Span],
        as_asked: bool,
    ) -> Reading:
        """Make the reading of a conversation, in the prompt of `ExtensibleLM.ask` or that of the evaluation.

        Args:
            documents: Pieces of each document.
            turns: Questions and answers.
            compressed: By the `id` of a piece, what is read compressed in its place.
            as_asked: Use the prompt of `ExtensibleLM.ask`, not the evaluation's.
        """
        messages: list[dict[str, Any]] = []
        answers = [self.llm.encode(answer) for _, answer in turns]
        for (question, text), ids in zip(turns, answers, strict=True):
            template = templates()[template_for([text])]
            asked = question if as_asked else template["after"].replace("{question}", question)
            content: list[Part] = []
            for number, pieces in enumerate(() if messages else documents):
                before = document_heading(number) if as_asked else template["separator" if number else "before"]
                content += [before, *pieces, *([DOCUMENT_SEPARATOR] if as_asked else [])]
            content.append(asked)
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": [ids]}]
        prompt = assemble_chat(self.llm, messages[:-1])
        end = turn_end(self.llm)
        scored = {id(ids) for ids in answers}
        parts: list[tuple[Ids | Span, Role]] = []
        for segment in prompt.segments:
            part = _array(segment)
            before = parts[-1][0] if parts and parts[-1][1] == "answer" else None
            if isinstance(before, np.ndarray) and part[0] == end:  # the end of a turn is part of the answer
                parts[-1] = np.append(before, part[:1]), "answer"
                part = part[1:]
            if id(segment) in compressed:
                parts.append((compressed[id(segment)], "document"))
            elif len(part):
                parts.append((part, "answer" if id(segment) in scored else "text"))
        last = np.append(_array(answers[-1]), end)
        return Reading((*parts, (last, "answer")))

    def _further(self, question: Question, document: Ids, draw: np.random.Generator) -> list[tuple[str, str]]:
        """Draw more questions about a document, with their answers, which it must contain."""
        siblings = [other for other in self._by_document[question.document] if other is not question]
        cut = len(question.context) > self._most_chars or len(document) >= self.max_tokens
        text = self.llm.decode(document.tolist()) if cut else question.context
        chosen = [siblings[int(at)] for at in draw.permutation(len(siblings))[: self.most_further]]
        return [
            (other.question, other.answers[0].strip())
            for other in chosen
            if text is question.context or other.answers[0].strip() in text
        ]

    def _is_usable(self, question: Question) -> bool:
        longest = max(question.answers, key=len)
        fits = len(question.context) <= self._most_chars or all(a.strip() in question.context for a in question.answers)
        short = len(longest) <= min(self._most_chars, 2 * _CHARS_PER_TOKEN * self.max_answer_tokens)
        return fits and short and len(self.llm.encode(longest)) <= self.max_answer_tokens

    def _own_document(self, question: Question, answer: str, draw: np.random.Generator) -> Ids:
        """Encode the question's document; if it is too long, a part that contains the answer."""
        text = question.context
        end = text.find(answer) + len(answer) if answer in text else 0
        if len(text) > self._most_chars:
            start = int(draw.integers(max(0, end - self._most_chars), end - len(answer) + 1))
            word = text.rfind(" ", 0, start + 1) + 1
            start = word if end <= word + self._most_chars else start
            text, end = text[start : start + self._most_chars], end - start
        ids = self.llm.encode(text)
        cut = max(0, len(self.llm.encode(text[:end])) - self.max_tokens) if len(ids) > self.max_tokens else 0
        return ids[cut : cut + self.max_tokens]

    def _others(
        self, question: Question, answer: str, documents: Sequence[Ids], count: int, draw: np.random.Generator
    ) -> list[Ids]:
        """Draw up to `count` documents of other questions that do not contain the answer, while tokens are left."""
        left = self.max_tokens - sum(map(len, documents))
        distractors: list[Ids] = []
        for at in draw.integers(len(self), size=count):
            other = self.questions[int(at)].context
            if left < _MIN_DISTRACTOR or other == question.context:
                continue
            ids = self.llm.encode(other[: _CHARS_PER_TOKEN * left])[:left]
            if answer.lower() not in other.lower():
                distractors.append(ids)
                left -= len(ids)
        return distractors


@lru_cache(maxsize=8)
def shuffled(count: int, *seed: int) -> np.ndarray[Any, Any]:
    """Draw a random order of `count` things; cached, so that a round over a million samples is drawn once."""
    return np.random.default_rng(seed).permutation(count)


def _with_document(segments: Sequence[Any], document: Ids) -> list[tuple[Ids | Span, Role]]:
    return [(_array(segment), "document" if segment is document else "text") for segment in segments]


def _array(ids: Any) -> Ids:
    return np.asarray(ids, dtype=np.int64)
