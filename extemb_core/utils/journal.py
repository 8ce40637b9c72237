"""Keep the rows of a long run as they are finished, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from extemb_core.errors import ConfigError, DocumentError
from extemb_core.utils.files import disk_errors, lock, make_folder, parse_json

to_json = partial(json.dumps, ensure_ascii=False, allow_nan=False)
_LATER = ("llm_digest", "hardware")  # parts of an identity that earlier versions did not write


class Journal:
    """File of finished rows, one JSON line each, after a first line that identifies the run.

    Args:
        file: File of the journal. An existing one is read first; half a line left by a kill is cut off. Without a row,
            it belongs to no run yet.
        identity: Identity of the run, which JSON can hold; values may be mappings, which are compared name by name.
        remedy: What to do if the file belongs to another run, for the message.
        resume: Keep the existing rows; otherwise they are dropped.

    Attributes:
        rows: All finished rows.

    Raises:
        ConfigError: The file belongs to a run with another identity, another process writes it, or its folder cannot be
            made.
        DocumentError: The file is damaged.
    """

    def __init__(self, file: Path, identity: Mapping[str, Any], remedy: str, *, resume: bool = True) -> None:
        self.file = file
        make_folder(file.parent, ConfigError, "name a file elsewhere")
        self._stream = _open_locked(file)
        try:
            self.rows, n_bytes = self._read(identity, remedy) if resume else ([], 0)
            os.ftruncate(self._stream.fileno(), n_bytes)
            if not n_bytes:
                self._write({"identity": identity})
        except BaseException:
            self._stream.close()
            raise

    def _read(self, identity: Mapping[str, Any], remedy: str) -> tuple[list[dict[str, Any]], int]:
        """Return the rows, and the byte up to which the file is whole: 0 if it has no row, whatever its identity."""
        text = self.file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        try:
            lines = [parse_json(line) for line in whole.splitlines()]
            known = dict(lines[0]["identity"]) if lines else {}
            rows = [dict(line) for line in lines[1:]]
        except (ValueError, KeyError, TypeError) as error:
            raise DocumentError(f"{self.file} is damaged ({error}); remove it to begin anew") from error
        if not rows:
            return [], 0
        require_same_run(known, identity, self.file, remedy)
        return rows, len(whole)

    @staticmethod
    def identity_in(file: Path) -> dict[str, Any]:
        """Read the identity in a journal's first line; {} if the file is missing or has no whole line."""
        try:
            with file.open("rb") as stream:
                return dict(parse_json(stream.readline())["identity"])
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def add(self, row: dict[str, Any]) -> None:
        """Write a finished row. Raises `ValueError` for values that JSON cannot hold."""
        self._write(row)
        self.rows.append(row)

    def _write(self, row: Mapping[str, Any]) -> None:
        with disk_errors(self.file):
            self._stream.write(to_json(row) + "\n")

    def sync(self) -> None:
        """Wait until everything added is on disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file, with everything added on disk. A second call does nothing."""
        if not self._stream.closed:
            self.sync()
            self._stream.close()

    def remove(self) -> None:
        """Remove the file, and only then release it to other runs."""
        if os.name == "nt":  # Windows cannot remove an open file, and files are not locked there
            self._stream.close()
        self.file.unlink(missing_ok=True)
        self._stream.close()


def _open_locked(file: Path) -> TextIO:
    """Open a file to append whole lines, and lock it against other processes.

    Raises:
        ConfigError: Another process has locked it.
    """
    while True:
        stream = file.open("a", buffering=1, encoding="utf-8")  # flushed with every line
        if not lock(stream.fileno()):
            stream.close()
            raise ConfigError(f"{file} is being written by another run; wait for that, or pass another output")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        stream.close()  # a run that ended meanwhile has removed the file


def require_same_run(known: Mapping[str, Any], identity: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Raise `ConfigError` if a file belongs to another run.

    Args:
        known: Identity of the file's run; missing values count as None, or as equal if its version did not write them.
        identity: Identity of this run.
        file, remedy: File and remedy, for the message.
    """
    for name, now in identity.items():
        if name in _LATER and name not in known:
            continue
        before = known.get(name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            require_same_run(before, now, file, remedy)
        elif before != now:
            raise ConfigError(f"{file} holds a run with another {name} ({before!r:.60}, now {now!r:.60}); {remedy}")
