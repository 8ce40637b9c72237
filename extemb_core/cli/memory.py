"""Let long computations on a CPU reuse freed memory instead of returning it to the system.

Every step allocates and frees the same large tensors. glibc requests each of them from the system and returns it at
once, and clearing the pages takes up to half of a core's time (docs/experiments.md).
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # constants of malloc.h


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory in this process. Returns whether it does; other C libraries do not."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
