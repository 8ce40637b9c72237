"""Folders of files that are written once, on this machine or wherever fsspec reaches (s3://, gs://, hf://, ...)."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from extemb_core.errors import ExtembError, StoreError, StoreFormatError, StoreNotFoundError, first_line
from extemb_core.utils.files import LEFT_SECONDS, atomic_write, sha256_of, sha256_of_stream

_READ_AT_ONCE = 16


class StorageLocation:
    """Folder of files, local or remote. Methods that read or remove raise the errors listed at `errors`.

    Args:
        where: A path, or a URL that fsspec knows.

    Raises:
        StoreError: fsspec does not know the URL, lacks the package for it, or the package refuses it.
    """

    def __init__(self, where: str | os.PathLike[str]) -> None:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        try:
            self.where = os.fspath(where)
            self._files, self._root = url_to_fs(self.where)
        except Exception as error:  # fsspec raises ImportError or ValueError, and each package errors of its own
            why = first_line(error).rstrip(".")
            raise StoreError(f"{where} cannot be reached ({why}); pass a folder, or a URL that fsspec knows") from error
        self.local = Path(self._root) if isinstance(self._files, LocalFileSystem) else None

    @classmethod
    def of(cls, where: AnyFolder) -> StorageLocation:
        """Return the location of a path or URL, or the location itself."""
        return where if isinstance(where, StorageLocation) else cls(where)

    def __str__(self) -> str:
        return self.where

    def naming(self, name: str) -> str:
        """Return the path or URL of a file here, for messages."""
        return f"{self.where.rstrip('/')}/{name}"

    def absolute(self) -> str:
        """Return the location as an absolute one, for a process with another working directory."""
        return self.where if self.local is None else str(self.local)

    @contextmanager
    def errors(self, name: str = "", done: str = "read") -> Iterator[None]:
        """Translate errors of any storage backend raised in this block into errors of this library.

        Raises:
            StoreNotFoundError: There is no such file or folder.
            StoreError: The storage cannot be reached, or refuses.
        """
        try:
            yield
        except ExtembError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreNotFoundError(f"{self.naming(name)} does not exist; check the path") from error
        except Exception as error:
            raise StoreError(
                f"{self.naming(name)} could not be {done} ({first_line(error)}); check the connection and that it may "
                f"be {done}, and call again"
            ) from error

    def names(self) -> list[str]:
        """List the names here, sorted; none if there is no such folder."""
        return sorted(self._listed())

    def sizes(self) -> dict[str, int]:
        """Map the names of the files here to their sizes in bytes, from one listing; links are left out."""
        infos = self._listed().items()
        return {name: int(info["size"]) for name, info in infos if info["type"] == "file" and not info.get("islink")}

    def _listed(self) -> dict[str, dict[str, Any]]:
        try:
            with self.errors():
                self._files.invalidate_cache()
                infos = self._files.ls(self._root, detail=True)
        except StoreNotFoundError:
            return {}
        if [info["name"] for info in infos] == [self._root] and infos[0]["type"] == "file":
            raise StoreFormatError(f"{self} is a file; pass a folder")
        return {PurePosixPath(info["name"]).name: info for info in infos}

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist or is a link."""
        try:
            with self.errors(name):
                if self.local is not None and (self.local / name).is_symlink():
                    return None
                info = self._files.info(self._path(name))
        except StoreNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def open(self, name: str) -> BinaryIO:
        """Open a seekable file for reading; reading it raises the storage's own errors."""
        with self.errors(name):
            return cast(BinaryIO, self._files.open(self._path(name), "rb"))

    def sha256(self, name: str) -> str:
        """Hash a file, read block by block."""
        with self.errors(name), self.open(name) as stream:
            return sha256_of_stream(stream)

    def write(self, name: str, fill: Callable[[Path], Any]) -> tuple[str, int]:
        """Write a file atomically; an existing one is replaced.

        Args:
            name: Name of the file.
            fill: Writes the content to a file on this machine.

        Returns:
            Its sha256 and its size in bytes.
        """
        if self.local is not None:
            self.local.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.local / name) as temporary:
                fill(temporary)
                return sha256_of(temporary), temporary.stat().st_size
        with tempfile.TemporaryDirectory(prefix="extemb-") as folder:
            temporary = Path(folder) / name
            fill(temporary)
            self._files.makedirs(self._root, exist_ok=True)
            self._files.put_file(str(temporary), self._path(name))  # object storage never shows half a file
            return sha256_of(temporary), temporary.stat().st_size

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file atomically."""
        self.write(name, lambda file: file.write_text(text, encoding="utf-8"))

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """Read a file, or a part of it."""
        with self.errors(name):
            return cast(bytes, self._files.cat_file(self._path(name), begin, end))

    def read_text(self, name: str) -> str:
        """Read a small text file; bytes that are not UTF-8 become \\xff or the like, which is not valid JSON either."""
        return self.read(name).decode("utf-8", "backslashreplace")

    def read_texts(self, names: Sequence[str]) -> dict[str, str]:
        """Read several small text files in parallel; files that another process has removed are left out."""

        def text(name: str) -> str | None:
            with suppress(StoreNotFoundError):
                return self.read_text(name)
            return None

        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:  # fsspec would take a name such as run[1] for a pattern
            return {name: read for name, read in zip(names, pool.map(text, names), strict=True) if read is not None}

    def is_left(self, name: str) -> bool:
        """Return whether a file was last written more than an hour ago; False where that is not known."""
        try:
            with self.errors(name), suppress(NotImplementedError):
                self._files.invalidate_cache()
                return bool(time.time() - self._files.modified(self._path(name)).timestamp() > LEFT_SECONDS)
        except StoreNotFoundError:
            pass
        return False

    def remove(self, name: str) -> None:
        """Remove a file that another process may remove too."""
        with suppress(StoreNotFoundError), self.errors(name, "removed"):
            self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"


AnyFolder = str | os.PathLike[str] | StorageLocation
"""A path, a URL that fsspec knows, or the location of either."""


def is_url(where: str | os.PathLike[str]) -> bool:
    """Return whether this is a URL and not a path."""
    return "://" in os.fspath(where)
