"""Show text of documents and LLMs where it must not do more than be seen: in a terminal, a table, a page."""

from __future__ import annotations

import re

# What is not seen but turns, breaks or hides what is: marks of direction, line ends, characters of no width, tags. The
# two joiners stay, without which emoji and whole scripts are not what they are.
UNSEEN = r"\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_CONTROL_CHAR = re.compile(rf"[\0-\x08\x0b-\x1f\x7f-\x9f{UNSEEN}]")
_EXCERPT_CHARS = 48


def strip_control_chars(text: str) -> str:
    """Take out of text of an LLM or a file's name what a terminal would obey or hide, or no encoding can write."""
    return _CONTROL_CHAR.sub("", text).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """Write on one line what may hold a file's name, whose line ends would forge others; else `strip_control_chars`."""
    return strip_control_chars(re.sub(r"[\t\n]", " ", text))


def excerpt(text: str) -> str:
    """Quote the beginning of a text on one line, its white space as single spaces.

    >>> excerpt("  In 1987 the bridge was closed for repairs,\\nand opened again 3 years later.")
    'In 1987 the bridge was closed for repairs, an...'
    """
    line = strip_control_chars(" ".join(text.split()))
    return line if len(line) <= _EXCERPT_CHARS else line[: _EXCERPT_CHARS - 3].rstrip() + "..."
