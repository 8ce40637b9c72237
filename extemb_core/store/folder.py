"""The folder of a store: what it says it is."""

from __future__ import annotations

import json
from pathlib import Path

from extemb_core.errors import StoreCorruptError, StoreError
from extemb_core.store.lmdb_env import DATA_FILE
from extemb_core.utils.files import write_whole

FORMAT, VERSION = "extemb-store", 2
_READ = (1, 2)  # version 1 knew no entry layer above 0: all it holds is as version 2 has it
DESCRIPTION = "store.json"


def prepare(folder: Path) -> None:
    """Make the folder of a store, or see that it is one."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file, and a store is a folder; pass another path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{folder} cannot be made ({error.strerror}); pass a path that can be written to") from error
    if any(folder.iterdir()) and not (folder / DATA_FILE).is_file() and not (folder / DESCRIPTION).is_file():
        raise StoreError(f"{folder} holds files that are not a store's; pass another folder, or an empty one")
    check_description(folder)


def check_description(folder: Path) -> int | None:
    """See that a folder which says it is a store has its data.

    Returns:
        The version it says; None where it says nothing.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        known = said["format"] == FORMAT
        version = said["version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise StoreCorruptError(f"{file} does not describe a store ({error}); get it again from a copy") from error
    if not known or version not in _READ:
        raise StoreError(
            f"{file} says {said['format']!r} version {version!r}, and this library reads {FORMAT!r} versions "
            f"{' and '.join(map(str, _READ))}; export it with the version that wrote it, and import it here"
        )
    data = folder / DATA_FILE
    if not data.is_file() or not data.stat().st_size:
        raise StoreCorruptError(f"{data} is missing or empty; get it again from a copy, or start with a new folder")
    return int(version)


def describe(folder: Path) -> None:
    """Say that a folder is a store of this version, whole or not at all; once the data file is there."""
    if check_description(folder) == VERSION:
        return
    write_whole(folder / DESCRIPTION, json.dumps({"format": FORMAT, "version": VERSION}) + "\n")
