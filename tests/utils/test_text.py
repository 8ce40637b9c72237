"""Text of others on one line of a terminal."""

from __future__ import annotations

import pytest

from extemb_core.utils.text import excerpt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \r\n\t ", ""),
        ("One.\r\n\r\n  Two.\u2028Three.", "One. Two. Three."),
        ("a\x1b[31mb\u202ec\x00", "a[31mbc"),
        ("x" * 48, "x" * 48),
        ("x" * 49, "x" * 45 + "..."),
        ("x" * 44 + " yyyyyyyy", "x" * 44 + "..."),
    ],
)
def test_an_excerpt_is_one_short_line(text, expected):
    assert excerpt(text) == expected
