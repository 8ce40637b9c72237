"""Checks of settings, without torch: the command line reads its options off configurations that are checked by them."""

from __future__ import annotations

from typing import Any


def is_count(value: Any) -> bool:
    """Tell whether a setting is a positive whole number (True is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
