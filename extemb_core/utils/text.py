"""Make text of documents and LLMs safe to show in a terminal, a table or a page."""

from __future__ import annotations

import re

# Invisible characters that reorder, break or hide text: direction marks, line ends, zero-width characters, tags. The
# two joiners stay, as emoji and some scripts need them.
UNSEEN = r"\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_CONTROL_CHAR = re.compile(rf"[\0-\x08\x0b-\x1f\x7f-\x9f{UNSEEN}]")
_EXCERPT_CHARS = 48


def strip_control_chars(text: str) -> str:
    """Remove characters that a terminal would obey or hide, and escape those that no encoding can write."""
    return _CONTROL_CHAR.sub("", text).encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(text: str) -> str:
    """Put text on one line, so that line ends in a file's name cannot forge lines, and apply `strip_control_chars`."""
    return strip_control_chars(re.sub(r"[\t\n]", " ", text))


def excerpt(text: str) -> str:
    """Quote the beginning of a text on one line, with single spaces for white space.

    >>> excerpt("  In 1987 the bridge was closed for repairs,\\nand opened again 3 years later.")
    'In 1987 the bridge was closed for repairs, an...'
    """
    line = strip_control_chars(" ".join(text.split()))
    return line if len(line) <= _EXCERPT_CHARS else line[: _EXCERPT_CHARS - 3].rstrip() + "..."
