"""Cut a document into sentences, and join neighbours that a plan treats alike into spans of its tokens."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import sentencex

from extemb_core.context.planning import Fidelity, Span

MAX_SENTENCE_TOKENS = 64  # longer stretches without a full stop, such as code and tables, are cut

_PART_ENDS = [  # where a sentence is cut, best first
    re.compile(ending)
    for ending in (
        r"(?=\n)",  # a line
        r"[,;:)\]\u2013\u2014\u060c\u061b](?=\s)|[\u3001\uff0c\uff1b\uff1a\uff09\u300d\u300f]",  # a clause
        r"\S(?=\s)",  # a word
    )
]
_EXCERPT_CHARS = 200  # more than is shown, as white space may be collapsed
# sentencex takes the space between an initial and its full stop for one byte, and panics at others ("J\u00a0. Ito").
_PLAIN_SPACES = {point: " " for point in range(128, 0x3001) if chr(point).isspace()}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Sentences:
    """The sentences of a document.

    Attributes:
        borders: (U + 1,) token at which each begins, and the number of tokens.
        text: The document.
        ends: (T,) character at which each of its tokens ends.
        max_tokens: Longest sentence; longer ones were cut.
    """

    borders: Array
    text: str
    ends: Array
    max_tokens: int = MAX_SENTENCE_TOKENS

    def __len__(self) -> int:
        return len(self.borders) - 1

    @cached_property
    def texts(self) -> list[str]:
        """(U,) text of each sentence."""
        starts = map(self.character, self.borders.tolist())
        return [self.text[start:stop] for start, stop in itertools.pairwise(starts)]

    def character(self, token: int) -> int:
        """Return the character at which a token begins; for the number of tokens, where the last one ends."""
        return int(self.ends[token - 1]) if token else 0

    def excerpt(self, span: Span) -> str:
        """Return the first characters of a span."""
        start, stop = map(self.character, (span.start, span.stop))
        return self.text[start : min(stop, start + _EXCERPT_CHARS)]


def split_into_sentences(text: str, ends: Array, *, max_tokens: int = MAX_SENTENCE_TOKENS) -> Sentences:
    """Cut a document into sentences of at most `max_tokens` tokens; together they are all of its tokens.

    White space belongs to the sentence after it, as in byte-level BPE.

    Args:
        text: A document.
        ends: (T,) character at which each of its tokens ends, ascending.
        max_tokens: Longer sentences are cut into parts of about equal length: after a line if one ends near there, else
            after a clause, else between words, else anywhere.
    """
    stops = _sentence_stops(text.translate(_PLAIN_SPACES))[:-1]
    borders = np.unique([0, *np.searchsorted(ends, stops, "right"), len(ends)])
    places = [
        np.unique(np.searchsorted(ends, [found.end() for found in ending.finditer(text)], "right"))
        for ending in _PART_ENDS
    ]
    cuts: list[int] = []
    for start, stop in itertools.pairwise(borders.tolist()):
        cuts.append(start)
        while stop - start > max_tokens:
            start = _cut(start, stop, max_tokens, places)
            cuts.append(start)
    return Sentences(np.array([*cuts, len(ends)]), text, ends, max_tokens)


def _cut(start: int, stop: int, max_tokens: int, places: Sequence[Array]) -> int:
    """Return where to cut a sentence that is too long: after the first of the fewest parts of about equal length."""
    ideal = start + (stop - start) / math.ceil((stop - start) / max_tokens)
    first, last = max(start + 1, ideal - max_tokens / 3), min(start + max_tokens, ideal + max_tokens / 3)
    for borders in places:
        near = borders[np.searchsorted(borders, first) : np.searchsorted(borders, last, "right")]
        if len(near):
            return int(near[np.abs(near - ideal).argmin()])
    return int(ideal)


def _sentence_stops(text: str) -> list[int]:
    """Return the character at which each sentence ends, without the white space after it."""
    try:
        found = sentencex.get_sentence_boundaries("en", text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic of its Rust code is not an Exception; then the text is cut by lines alone
        return []
    return [part["start_index"] + len(part["text"].rstrip()) for part in found if part["text"].strip()]


def cover(spans: Sequence[Span], n_tokens: int, finest: int, chunk_size: int) -> bool:
    """Return whether spans are all tokens of a document, each once, and begin where its finest groups do."""
    borders = [0, *(span.stop for span in spans)]
    return (
        borders[-1] == n_tokens
        and [span.start for span in spans] == borders[:-1]
        and all(start < stop and start % chunk_size % finest == 0 for start, stop in itertools.pairwise(borders))
    )


class GroupGrid:
    """The finest groups of one document: where its spans may begin and end.

    Args:
        sentences: Sentences of the document.
        finest: Tokens of a group.
        chunk_size: Tokens that are compressed together; groups are counted in each chunk.
    """

    def __init__(self, sentences: Sentences, finest: int, chunk_size: int) -> None:
        self._n_tokens = int(sentences.borders[-1])
        chunks = np.arange(0, self._n_tokens, chunk_size)
        starts = [np.arange(start, min(start + chunk_size, self._n_tokens), finest) for start in chunks]
        self._starts: Array = np.concatenate(starts) if starts else np.empty(0, np.int64)
        first = np.searchsorted(self._starts, sentences.borders[:-1], "right") - 1
        last = np.searchsorted(self._starts, sentences.borders[1:] - 1, "right")
        # (group, sentence) where they overlap, sentence after sentence.
        self._sentences = np.repeat(np.arange(len(sentences)), last - first)
        self._groups = np.arange(len(self._sentences)) - np.repeat(np.cumsum(last - first) - last, last - first)

    def spans(self, fidelities: Sequence[Fidelity], chosen: Array) -> list[Span]:
        """Join sentences into spans. A group shared by two sentences goes with the one that is read in more detail.

        Args:
            fidelities: Fidelities in rising detail.
            chosen: (U,) index into them for each sentence.
        """
        levels = np.zeros(len(self._starts), np.int64)
        np.maximum.at(levels, self._groups, chosen[self._sentences])
        cuts = np.flatnonzero(np.diff(levels, prepend=-1))
        starts = [*self._starts[cuts].tolist(), self._n_tokens]
        levels = levels[cuts].tolist()
        return [
            Span(start, stop, fidelities[level])
            for (start, stop), level in zip(itertools.pairwise(starts), levels, strict=True)
        ]
