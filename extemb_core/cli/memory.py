"""Memory for long computations on a CPU: what was freed is used again instead of going back to the system.

Every step makes and frees the same large tensors. glibc asks the system for each of them anew and gives it back at
once, and clearing the pages takes up to half of a core's time (docs/experiments.md).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Set glibc's malloc so, for this process; elsewhere nothing is done. Returns whether it was set."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
