"""Files that are whole or not there, whenever the process or the machine stops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def push(path: Path) -> None:
    """Push what was written to a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole(place: Path) -> Iterator[Path]:
    """A name to write a file under, beside its place: it takes the place at the end, and is gone after an error."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        push(temporary)
        temporary.replace(place)
        push(place.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(file: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    with whole(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
