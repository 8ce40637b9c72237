"""Import a library without an optional package that it would import."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Hide a package, as if it were not installed, from what is imported in this block.

    Args:
        name: Name of the package. Modules of it that are imported already are restored afterwards.
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
