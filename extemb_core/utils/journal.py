"""Rows of a long run, kept as they are finished, so that a run that is stopped goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from extemb_core.errors import ConfigError, DocumentError
from extemb_core.utils.files import disk_errors, parse_json

to_json = partial(json.dumps, ensure_ascii=False, allow_nan=False)


class Journal:
    """File of finished rows, a JSON line each, after a first line that says what run it is.

    Args:
        file: Read first, if it is there; half a line that a kill left is cut off.
        identity: Of the run, JSON-able; values may be mappings, which are compared name by name.
        remedy: What to do where the file is of another run.

    Attributes:
        rows: All finished rows.

    Raises:
        ConfigError: The file is of a run with another identity.
        DocumentError: The file is damaged.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any], remedy: str) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        text = file.read_bytes() if file.is_file() else b""
        whole = text[: text.rfind(b"\n") + 1]
        try:
            lines = [parse_json(line) for line in whole.splitlines()]
            if lines:
                require_same_run(lines[0]["identity"], identity, file, remedy)
            self.rows = [dict(line) for line in lines[1:]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise DocumentError(f"{file} is damaged ({error}); remove it to begin anew") from error
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("a", buffering=1, encoding="utf-8")  # flushed with every line
        os.truncate(file, len(whole))
        if not lines:
            self._write({"identity": identity})

    def add(self, row: dict[str, Any]) -> None:
        """Write down a finished row."""
        self.rows.append(row)
        self._write(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        with disk_errors(self.file):
            self._stream.write(to_json(row) + "\n")

    def sync(self) -> None:
        """Wait until everything added is on disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file, with everything added on disk."""
        self.sync()
        self._stream.close()


def require_same_run(known: Mapping[str, Any], identity: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Raise `ConfigError` unless a file holds this run and no other.

    Args:
        known: The identity of the file's run; what it does not name counts as None.
        identity: That of this run.
        file, remedy: For the message.
    """
    for name, now in identity.items():
        before = known.get(name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            require_same_run(before, now, file, remedy)
        elif before != now:
            raise ConfigError(f"{file} holds a run with another {name} ({before!r:.60}, now {now!r:.60}); {remedy}")
