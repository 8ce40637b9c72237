"""Files that are whole or not there, whenever the process or the machine stops."""

from __future__ import annotations

import os
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


def settle(temporary: Path, place: Path) -> None:
    """Give a finished file its name, over one that has it; both are of one folder."""
    push(temporary)
    temporary.replace(place)
    push(place.parent)


def write_whole(file: Path, text: str) -> None:
    """Write a text file beside its place and give it its name when it is whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        settle(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
