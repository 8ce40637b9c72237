"""Rows of a long run, kept as they are finished, so that a run that is stopped goes on where it was."""

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
_LATER = ("llm_digest", "hardware")  # what earlier versions did not write down of an identity


class Journal:
    """File of finished rows, a JSON line each, after a first line that says what run it is.

    Args:
        file: Read first, if it is there; half a line that a kill left is cut off. One without a row is of no run yet.
        identity: Of the run, JSON-able; values may be mappings, which are compared name by name.
        remedy: What to do where the file is of another run.
        resume: Without it, what is there is dropped.

    Attributes:
        rows: All finished rows.

    Raises:
        ConfigError: The file is of a run with another identity, or another process writes it, or its folder cannot be
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
        """Return the rows, and up to which byte the file is whole: 0 where a run of any identity left no row."""
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
        """Read the identity in a journal's first line; {} where there is no such file, or no whole line of it."""
        try:
            with file.open("rb") as stream:
                return dict(parse_json(stream.readline())["identity"])
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def add(self, row: dict[str, Any]) -> None:
        """Write down a finished row. Raises `ValueError` for what JSON cannot hold."""
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
        """Remove the file and close it; no other run has it until then."""
        if os.name == "nt":  # no open file is removed there, and none is locked
            self._stream.close()
        self.file.unlink(missing_ok=True)
        self._stream.close()


def _open_locked(file: Path) -> TextIO:
    """Open a file to append whole lines, which no other process then writes.

    Raises:
        ConfigError: Another process writes it.
    """
    while True:
        stream = file.open("a", buffering=1, encoding="utf-8")  # flushed with every line
        if not lock(stream.fileno()):
            stream.close()
            raise ConfigError(f"{file} is being written by another run; wait for that, or pass another output")
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        stream.close()  # a run that has ended meanwhile has removed it


def require_same_run(known: Mapping[str, Any], identity: Mapping[str, Any], file: Path, remedy: str) -> None:
    """Raise `ConfigError` unless a file holds this run and no other.

    Args:
        known: The identity of the file's run; what it does not name counts as None, or was not known to its version.
        identity: That of this run.
        file, remedy: For the message.
    """
    for name, now in identity.items():
        if name in _LATER and name not in known:
            continue
        before = known.get(name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            require_same_run(before, now, file, remedy)
        elif before != now:
            raise ConfigError(f"{file} holds a run with another {name} ({before!r:.60}, now {now!r:.60}); {remedy}")
