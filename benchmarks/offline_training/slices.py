"""Folders as slices: one compressed archive cut into files of at most a given size, with a manifest of hashes.

They carry a folder to machines that accept only small files. Standard library only: every bundle holds a copy of this
file, which unpacks it where this package is not installed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BLOCK = 1 << 20


class SliceError(ValueError):
    """Slices that are missing or damaged, or a text that is not a size."""


def parse_size(text: str) -> int:
    """Count the bytes of "60MiB", "15 MB" or "1000"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise SliceError(f"{text!r} is not a size above 0; pass e.g. 60MiB, 15MB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def write_slices(source: Path, files: Iterable[Path], folder: Path, size: int, prefix: str = "slice") -> list[Path]:
    """Write files, named by their paths within `source`, as slices in `folder`; those of an earlier call are replaced.

    The manifest is written last: without it the slices do not count. Until then those of the earlier call stay, and the
    new ones have other numbers.

    Args:
        source: Folder that the paths are relative to.
        files: Files to write.
        folder: Folder for the slices; it may hold other files.
        size: Maximum bytes of a slice.
        prefix: Prefix of the slices' names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unnamed(folder, prefix)
    out: Any = _SliceWriter(folder, size, prefix)
    with (
        closing(out),
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=3) as packed,
        tarfile.open(fileobj=packed, mode="w|", dereference=True) as archive,
    ):
        for file in sorted(files):
            archive.add(file, str(file.relative_to(source)), recursive=False)
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps({"slices": out.slices}, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)
    _remove_unnamed(folder, prefix)
    return [folder / str(entry["name"]) for entry in out.slices]


def _remove_unnamed(folder: Path, prefix: str) -> None:
    """Remove slices that the manifest does not name, left by an earlier call or by one that was stopped."""
    named = set()
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # without a manifest, no slice counts
        named = {entry["name"] for entry in json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["slices"]}
    for file in folder.glob(f"{prefix}-*"):
        if file.name not in named:
            file.unlink()


def join_slices(folder: Path, target: Path) -> None:
    """Verify all slices in `folder` and unpack them into `target`, which appears only when it is whole.

    Raises:
        SliceError: The manifest or a slice is missing or damaged, or `target` exists.
    """
    if target.exists():
        raise SliceError(f"{target} exists; pass another folder, or remove it")
    manifest = folder / MANIFEST
    try:
        slices = [
            (folder / Path(entry["name"]).name, int(entry["size"]), str(entry["sha256"]))
            for entry in json.loads(manifest.read_text(encoding="utf-8"))["slices"]
        ]
    except FileNotFoundError as error:
        raise SliceError(f"{manifest} does not exist; copy it here with the slices that it names") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SliceError(f"{manifest} is damaged ({error}); copy it again") from error
    for file, size, sha256 in slices:
        if not file.is_file():
            raise SliceError(f"{file} does not exist and is one of {len(slices)} slices; copy it here")
        if file.stat().st_size != size or _sha256(file) != sha256:
            raise SliceError(f"{file} is not what {MANIFEST} says (size or sha256); copy it again")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed call left behind
    partial.mkdir(parents=True)
    source: Any = _SliceReader([file for file, _, _ in slices])
    try:
        with closing(source), tarfile.open(fileobj=source, mode="r|gz") as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3, for one, has none
            archive.extractall(partial, _inside(archive, partial))
        partial.rename(target)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise SliceError(f"the slices in {folder} are no archive to unpack ({error}); do not trust them") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _inside(archive: tarfile.TarFile, folder: Path) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        within = (folder / member.name).resolve().is_relative_to(folder.resolve())
        if not within or not (member.isreg() or member.isdir()):
            raise tarfile.TarError(f"{member.name!r} is a link, or outside of its folder")
        yield member


class _SliceWriter:
    """A stream that takes bytes and begins a new file whenever one is full."""

    def __init__(self, folder: Path, size: int, prefix: str) -> None:
        self._folder = folder
        self._size = size
        self._prefix = prefix
        self._file: BinaryIO | None = None
        self._number = 0
        self._hash = hashlib.sha256()
        self.slices: list[dict[str, str | int]] = []

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while len(view):
            if self._file is None:
                while (file := self._folder / f"{self._prefix}-{self._number:03d}").exists():  # an earlier call's
                    self._number += 1
                self.slices.append({"name": file.name, "size": 0, "sha256": ""})
                self._file = file.open("wb")
                self._hash = hashlib.sha256()
            entry = self.slices[-1]
            part = view[: self._size - int(entry["size"])]
            self._file.write(part)
            self._hash.update(part)
            entry["size"] = int(entry["size"]) + len(part)
            view = view[len(part) :]
            if entry["size"] == self._size:
                self.close()
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.slices[-1]["sha256"] = self._hash.hexdigest()
            self._file = None


class _SliceReader:
    """Files one after another as one stream."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = iter(files)
        self._file: BinaryIO | None = None

    def read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            if self._file is None:
                following = next(self._files, None)
                if following is None:
                    break
                self._file = following.open("rb")
            part = self._file.read(size - len(data))
            data += part
            if not part:
                self.close()
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
