"""Checks of settings, without torch: the command line reads its options off configurations that are checked by them."""

from __future__ import annotations

import operator
from typing import Any

from extemb_core.errors import ConfigError, ExtembError


def is_count(value: Any) -> bool:
    """Tell whether a setting is a positive whole number (True is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def whole_number(
    value: Any, name: str, at_least: int = 1, *, remedy: str = "", error: type[ExtembError] = ConfigError
) -> int:
    """Return a setting as an int.

    Args:
        value: What was passed; numpy's integers are taken, True and False are not.
        name: Of the setting.
        at_least: The smallest legal value.
        remedy: What to pass instead, e.g. "steps, or None".
        error: What is raised.

    Raises:
        ConfigError: It is no whole number, or below `at_least`.
    """
    try:
        number = at_least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        remedy = remedy or f"an int from {at_least} up"
        raise error(f"{name}={value!r} is not a whole number of at least {at_least}; pass {remedy}")
    return number
