"""Import a library without what it would take along."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Let a package look as if it were not installed to what is imported meanwhile.

    Args:
        name: Of the package. What is imported of it already is there again afterwards.
    """
    mine = {key: module for key, module in sys.modules.items() if key == name or key.startswith(f"{name}.")}
    for key in mine:
        del sys.modules[key]
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(mine)
