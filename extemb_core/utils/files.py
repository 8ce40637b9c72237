"""Write files so that they are whole or absent, whenever the process or the machine stops; lock and hash them."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_BLOCK_BYTES = 1 << 20
LEFT_SECONDS = 3600  # an unfinished file older than this is no longer being written
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk, a quota, or a limit on file sizes
_OF_SAFETENSORS = ".tmp" + 6 * "[0-9A-Za-z]"  # pattern of safetensors' temporary files
_REFUSED = re.compile(r"I/O error: (.*) \(os error (\d+)\)")  # a disk's error in safetensors' words
_NAME_CHARS = 60  # of a file's name are kept in that of its temporary file: names have at most 255 bytes


def fsync(path: Path) -> None:
    """Flush the content of a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path, error: Callable[[str], Exception], remedy: str) -> None:
    """Create a folder to write to, and its parents, unless they exist.

    Raises:
        Exception: The folder cannot be made or written to; `error` makes the exception from a message that ends with
            the remedy.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as refused:
        raise error(f"{folder} cannot be made ({refused.strerror}); {remedy}") from refused
    if not os.access(folder, os.W_OK | os.X_OK):
        raise error(f"{folder} may not be written to; {remedy}")


def refuse_foreign(where: object, foreign: Iterable[str], whose: str, error: Callable[[str], Exception]) -> None:
    """Refuse a folder that holds what may be somebody's files: they would be mixed with ours, or replaced.

    Args:
        where: The folder.
        foreign: Names in it of files that are not ours.
        whose: What our files are called, after "not": "a shard".
        error: Makes the error from its message.

    Raises:
        Exception: That of `error`, which names the first of `foreign`.
    """
    first = min(foreign, default=None)
    if first is not None:
        raise error(f"{where} holds {first!r}, which is not {whose}; pass a new or empty folder")


def lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed, if the system has such locks; False if another process holds it.

    filelock is not used, as it leaves a lock file beside the locked one.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # some file systems have no locks
    return True


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Lock a folder as `lock` does, without creating a file, and yield whether that succeeded.

    The lock ends with the block, even if a process forked in it still has the folder open.
    """
    if os.name == "nt":  # Windows opens no folders
        yield True
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        yield lock(handle)
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


@contextmanager
def locked(folder: Path, error: Callable[[str], Exception], remedy: str) -> Iterator[None]:
    """Let one process at a time build `folder`; the lock is released when the process ends, however it does.

    Raises:
        Exception: That of `error`, which ends with the remedy: the folder's parent cannot be written to.
    """
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.parent / f".{folder.name}.lock").acquire()
    except OSError as refused:
        raise error(f"{folder.parent} cannot be written to ({refused.strerror}); {remedy}") from refused
    with held:
        yield


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder beside `folder`, after removing what a killed process left behind."""
    pattern = f".{folder.name}.partial-"
    for abandoned in folder.parent.glob(f"{pattern}*"):  # the lock is held, so nobody works in it
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=pattern, dir=folder.parent, ignore_cleanup_errors=True) as partial:
        yield Path(partial)


def remove_left(folder: Path, pattern: str = _OF_SAFETENSORS, *, folders: bool = False) -> None:
    """Remove the files, or folders, that processes killed more than an hour ago left in a folder.

    Those that cannot be removed stay, without an error: they may be another user's.
    """
    for left in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left) if folders else left.unlink()


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file to write to: at the end it becomes the file; after an error it is removed.

    Leftovers of killed processes are removed an hour later.
    """
    name = file.name[:_NAME_CHARS]
    remove_left(file.parent, f".{glob.escape(name)}.*.tmp")
    temporary = file.with_name(f".{name}.{secrets.token_hex(8)}.tmp")  # several threads may write the same file
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        fsync(temporary)
        temporary.replace(file)
        fsync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise a disk's errors, safetensors' own included, as an `OSError` that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:  # safetensors' own, which is not imported here
        if (refused := _REFUSED.search(str(error))) is None:
            raise
        raise OSError(int(refused[2]), refused[1], str(path)) from error


@contextmanager
def safetensors_folder(folder: Path, tensors: str, settings: str) -> Iterator[None]:
    """Wrap the writing of a folder's file of tensors and its settings, which get the mode that files have here.

    Leftovers of killed processes are removed first, and disk errors name the folder, as in `disk_errors`.
    """
    remove_left(folder)
    with disk_errors(folder):
        yield
    (folder / tensors).chmod((folder / settings).stat().st_mode)  # safetensors makes files that only their owner reads


def atomic_write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(file) as temporary, disk_errors(file):
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does, but raise `JSONDecodeError` also for JSON nested deeper than Python's stack."""
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", "", 0) from None


def sha256_of(file: Path) -> str:
    """Compute the hash of a file, read block by block."""
    with file.open("rb") as stream:
        return sha256_of_stream(stream)


def sha256_of_stream(stream: BinaryIO) -> str:
    """Compute the hash of the rest of a stream, read block by block."""
    digest = hashlib.sha256()
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
