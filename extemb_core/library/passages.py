"""Split documents into passages, which are found, compressed and quoted separately."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from extemb_core.library import PASSAGE_TOKENS
from extemb_core.utils.validation import whole_number

# Where a text may be cut, best first: after a paragraph, a line, a sentence, a word.
_CUTS = tuple(re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"(?<=[.!?])[\"')\]]*\s+", r"\s+"))


def split_passages(
    text: str, max_tokens: int, count: Callable[[Sequence[str]], Sequence[int]]
) -> list[tuple[int, int]]:
    """Cut a text into passages of at most `max_tokens` tokens, at the best available places.

    Args:
        text: A document.
        max_tokens: Maximum tokens of a passage.
        count: Counts the tokens of each of several texts.

    Returns:
        (start, end) character offsets. Together they are the whole text, none overlaps another.

    Raises:
        ConfigError: `max_tokens` is not positive.
    """
    whole_number(max_tokens, "max_tokens", remedy=f"e.g. {PASSAGE_TOKENS}")
    pieces = _pieces(text, 0, len(text), max_tokens, count, 0) if text else []
    starts, size = [0], 0
    for begin, _, tokens in pieces:
        if size and size + tokens > max_tokens:
            starts.append(begin)
            size = 0
        size += tokens
    return list(pairwise([*starts, len(text)])) if text else []


def _pieces(
    text: str, start: int, end: int, max_tokens: int, count: Callable[[Sequence[str]], Sequence[int]], level: int
) -> list[tuple[int, int, int]]:
    """List (start, end, tokens) of pieces that need no further cut: short paragraphs, else lines, and so on."""
    if level == len(_CUTS):  # a word longer than a passage
        half = (start + end) // 2
        bounds = [start, half, end] if end - start > 1 else [start, end]
    else:
        cuts = [match.end() for match in _CUTS[level].finditer(text, start, end)]
        bounds = [start, *(cut for cut in cuts if start < cut < end), end]
    spans = list(pairwise(bounds))
    pieces = []
    for (begin, stop), tokens in zip(spans, count([text[begin:stop] for begin, stop in spans]), strict=True):
        if tokens <= max_tokens or stop - begin == 1:
            pieces.append((begin, stop, tokens))
        else:
            pieces += _pieces(text, begin, stop, max_tokens, count, min(level + 1, len(_CUTS)))
    return pieces
