"""LMDB environment, one per folder and process: opened once, grown when full, opened anew after a fork.

LMDB allows one environment per folder and process, and lets its map be resized only while the process has no open
transaction; this module enforces both. Between processes LMDB itself coordinates any number of readers and one writer,
and discards what a killed writer had not committed.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

import lmdb

from extemb_core.errors import ExtembError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.store.free_pages import is_cut
from extemb_core.utils.files import FULL

DATA_FILE, LOCK_FILE = "data.mdb", "lock.mdb"
DATABASES = ("entries", "blocks", "live", "kinds",  # of the store
             "documents", "texts", "passages", "vectors", "refs", "settings", "pending",  # of a library
             "handed")  # documents behind refs  # fmt: skip
_READERS = 1024
_LOCK_BYTES = 64 * (_READERS + 2)  # size of the lock file: 64 bytes for each reader, and a shared part
_PAGE = 1000  # items listed in one transaction
_FIRST_MAP_BYTES = 64 * 2**20
_UNHARMED = "nothing of this call was kept and what was there before still is"
_CHECK_DISK = f"{_UNHARMED}; check the disk and call again"

# The errors in the second line come from rows that are not what was written.
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.PanicError, lmdb.InvalidError, lmdb.VersionMismatchError,
           struct.error, ValueError, TypeError, IndexError, ArithmeticError)  # fmt: skip

_PACKAGE = __name__.partition(".")[0]

T = TypeVar("T")

_shared: dict[str, Environment] = {}  # by folder
_shared_lock = threading.Lock()


class Environment:
    """Databases of one folder. Get one with `open_environment`, and release it with `close`.

    Attributes:
        folder: Folder of the files.
        readonly: Whether nothing can be written.
        lock: Guards data derived from the files; a fork waits for it, and the child gets a new one.
    """

    def __init__(self, folder: Path, readonly: bool) -> None:
        self.folder = folder
        self.readonly = readonly
        self.lock = threading.RLock()
        self._users = 1
        self._gate = threading.Condition(threading.Lock())
        self._open = 0  # transactions that this process has open
        self._waiting = 0  # threads that wait until there are none; no new one begins meanwhile
        self._writing = threading.Lock()
        self._databases: dict[str, Any] = {}
        self._file: tuple[int, int] | None = None  # device and inode of the file that is open
        self._env: Any = None
        self._connect()

    def database(self, name: str) -> Any:
        """Return a handle within a transaction, or None if a read-only environment lacks the database."""
        return self._databases[name]

    def get(self, transaction: Any, name: str, key: bytes) -> Any:
        """Return the value of a key as a view of the file, or None if the key or the database does not exist."""
        database = self._databases[name]
        return None if database is None else transaction.get(key, db=database)

    def count(self, transaction: Any, name: str) -> int:
        """Return the number of keys in a database, 0 if it does not exist."""
        database = self._databases[name]
        return 0 if database is None else int(transaction.stat(database)["entries"])

    def rows(self, transaction: Any, name: str, start: bytes = b"") -> Iterator[tuple[Any, Any]]:
        """Yield keys and values of a database, from a key on, as views of the file; none if it does not exist."""
        cursor = None if (database := self._databases[name]) is None else transaction.cursor(db=database)
        return iter(()) if cursor is None or not cursor.set_range(start) else iter(cursor)

    @contextmanager
    def read(self) -> Iterator[Any]:
        """Open a transaction that sees one state of all databases. Its buffers are views of the file: copy what stays.

        A thread must have only one at a time: a second one could wait for the end of the first.
        """
        with self._entered(), self._failures(), self._begun(write=False) as transaction:
            yield transaction

    def items(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """Yield keys and values of a database, page by page: no transaction stays open while the caller works."""
        start = b""
        while True:
            with self.read() as transaction:
                rows = islice(self.rows(transaction, name, start), _PAGE)
                page = [(bytes(key), bytes(value)) for key, value in rows]
            if not page:
                return
            yield from page
            start = page[-1][0] + b"\0"

    def write(self, work: Callable[[Any], T]) -> T:
        """Run `work(transaction)` and commit: all of it is on disk when this returns, or none of it.

        `work` may run more than once: when the map is full it is grown, and the transaction begins anew. So do not rely
        on what it wrote before this returns.

        Raises:
            StoreError: The environment is read-only, or the disk refuses; then nothing was written.
        """
        with self._writing:
            while True:
                failures = self._failures("could not be written to")
                entered = self._entered(write=True)
                with suppress(lmdb.MapFullError), entered, failures, self._begun(write=True) as transaction:
                    return work(transaction)
                self._grow()

    def close(self) -> None:
        """Release the environment; the files are closed when nothing in this process uses them any more."""
        with _shared_lock:
            self._users -= 1
            if self._users == 0:
                if _shared.get(str(self.folder)) is self:  # and not one that was opened since the folder went
                    del _shared[str(self.folder)]
                with self._gate:
                    self._disconnect()

    def is_gone(self) -> bool:
        """Return whether the open file is no longer the folder's, so that what is written to it would be lost."""
        try:
            found = os.stat(self.folder / DATA_FILE)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # which does not say so
            return False
        return (found.st_dev, found.st_ino) != self._file

    def require_in_place(self) -> None:
        """Raise `StoreError` if the open file is no longer the folder's."""
        if self.is_gone():
            raise StoreError(f"{self.folder} was removed, moved or replaced while it was open; open it again")

    # -- inside -----------------------------------------------------------------------------------------------

    def _before_fork(self) -> None:
        """Close the files before a fork; they are opened again when used.

        A child can neither use what it inherits nor close it, as that would end the parent's transactions. The gate is
        held until the fork is done, so that no thread connects in between.
        """
        self.lock.acquire()
        self._gate.acquire()
        self._disconnect()

    def _after_fork(self) -> None:
        """Reset the locks in the child, where no other thread is left to hold or wait for them."""
        self._waiting = 0
        self.lock = threading.RLock()
        self._gate = threading.Condition(threading.Lock())
        self._writing = threading.Lock()

    def _reopen_to_write(self) -> None:
        with self._gate:
            self._disconnect()
            self.readonly = False
            try:
                self._connect()
            except BaseException:
                self.readonly = True  # as before, from the next transaction on
                raise

    def _abandon(self) -> None:
        """Close the files for good, whoever uses them: those of the folder are others."""
        with self._gate:
            self._disconnect()
            self._file = None

    def _settle(self) -> None:
        """Wait, with the gate held, until no transaction is open."""
        self._waiting += 1
        try:
            self._gate.wait_for(lambda: self._open == 0)
        finally:  # Ctrl-C ends a wait
            self._waiting -= 1
            self._gate.notify_all()  # waiting threads take the gate when it is free

    def _disconnect(self) -> None:
        self._settle()
        if self._env is not None:
            self._env.close()
        self._env = None

    def _connect(self) -> None:
        file = self.folder / DATA_FILE
        locked = self.folder / LOCK_FILE
        lock = not self.readonly or os.access(locked if locked.exists() else self.folder, os.W_OK)
        if lock and not _has_room(locked):
            if not self.readonly:
                raise StoreError(f"{locked} has no room, as the disk is full; make room and open it again")
            lock = False
        options: dict[str, Any] = {"max_dbs": 16, "max_readers": _READERS, "readonly": self.readonly, "lock": lock}

        def opened() -> Any:
            size = file.stat().st_size if file.is_file() else 0
            try:
                return lmdb.open(str(self.folder), max(_FIRST_MAP_BYTES, size), readahead=False, **options)
            except lmdb.Error:
                if not (self.readonly or size) and file.is_file() and file.stat().st_size < 2 * mmap.PAGESIZE:
                    file.unlink()  # a full disk left a new file shorter than LMDB needs to recognise it
                raise

        with self._failures("cannot be opened", "check that the folder may be read and written"):
            self._env = _following(opened, lambda: None)  # another process may write between the size and the opening
        try:
            status = file.stat()
            self._file = status.st_dev, status.st_ino
            self._check_file(file)
            with self._failures():
                self._open_databases()
        except BaseException:
            self._env.close()
            self._env = None
            raise

    def _check_file(self, file: Path) -> None:
        """Refuse a truncated file, which would end the process at the first read beyond its end."""
        used = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if used > file.stat().st_size:
            with self._failures(), _following(self._env.begin, lambda: self._env.set_mapsize(0)) as transaction:
                cut = is_cut(file, transaction.id())
            if cut:
                raise StoreCorruptError(
                    f"{file} is truncated at {file.stat().st_size:,} bytes, and its pages end at {used:,}; restore it "
                    "from a copy, or add the documents to a new store"
                )
        if not self.readonly:
            self._env.reader_check()  # frees the slots of processes that have ended

    def _open_databases(self) -> None:
        """Open the databases once, before anything else: only one thread may do it. To write, wait for the writer."""
        self._databases = dict.fromkeys(DATABASES)
        with suppress(lmdb.NotFoundError):  # read-only: databases are made together, so the others do not exist either
            for name in DATABASES:
                opened = partial(self._env.open_db, name.encode(), create=not self.readonly)
                self._databases[name] = _following(opened, lambda: self._env.set_mapsize(0))

    @contextmanager
    def _entered(self, *, write: bool = False) -> Iterator[None]:
        with self._gate:
            self._gate.wait_for(lambda: not self._waiting)
            if not self._users:
                raise StoreError(f"{self.folder} is closed; open it again")
            if write or self._env is None:  # what is open can be read on
                self.require_in_place()
            if self._env is None:
                self._connect()
            self._open += 1
        try:
            yield
        finally:
            with self._gate:
                self._open -= 1
                self._gate.notify_all()

    def _begun(self, *, write: bool) -> Any:
        return _following(lambda: self._env.begin(write=write, buffers=True), lambda: self._resize(0))

    def _grow(self) -> None:
        with self._entered():
            self._resize(2 * self._env.info()["map_size"])

    def _resize(self, size: int) -> None:
        """Resize the map when no transaction of this process is open; the caller's own has not begun yet."""
        with self._gate:
            self._open -= 1
            try:
                self._settle()
                self._env.set_mapsize(size)
            except lmdb.Error as error:
                self._env.close()  # its map is gone; the next transaction opens it anew
                self._env = None
                wanted = f"{size:,} bytes" if size else "the size that another process gave it"
                raise StoreError(
                    f"{self.folder} could not grow to {wanted} ({error}); {_UNHARMED}; allow this process more address "
                    "space (ulimit -v) and call again"
                ) from error
            finally:
                self._open += 1

    @contextmanager
    def _failures(self, failed: str = "could not be read", remedy: str = _CHECK_DISK) -> Iterator[None]:
        try:
            yield
        except (lmdb.MapFullError, lmdb.MapResizedError, ExtembError):
            raise
        except _DAMAGE as error:
            if not isinstance(error, lmdb.Error) and _is_of_caller(error):
                raise
            raise StoreCorruptError(
                f"{self.folder / DATA_FILE} is damaged ({error}); restore it from a copy, or add the documents to a "
                "new store"
            ) from error
        except lmdb.Error as error:
            raise StoreError(f"{self.folder} {failed} ({error}); {remedy}") from error


def open_environment(folder: Path, *, readonly: bool) -> Environment:
    """Open the environment of a folder, shared with all users of the folder in this process.

    Raises:
        StoreNotFoundError: `readonly`, and it does not exist.
        StoreCorruptError: The file is damaged.
        StoreError: It cannot be opened, or only for reading.
    """
    folder = folder.resolve()
    with _shared_lock:
        for name, known in list(_shared.items()):  # all: one may have been moved to this folder
            if known.is_gone():
                known._abandon()
                del _shared[name]
        environment = _shared.get(str(folder))
        if environment is None:
            for file in (folder / DATA_FILE, folder / LOCK_FILE):
                if file.is_symlink():  # LMDB would write to the link's target
                    raise StoreError(f"{file} is a link, and no store has one; copy the store's files themselves")
            if readonly and not (folder / DATA_FILE).is_file():
                raise StoreNotFoundError(f"{folder} has no store in it; check the path")
            environment = _shared[str(folder)] = Environment(folder, readonly)
        else:
            if environment.readonly and not readonly:
                environment._reopen_to_write()
            environment._users += 1
        return environment


def _before_fork() -> None:
    _shared_lock.acquire()
    for environment in _shared.values():
        environment._before_fork()


def _after_fork_in_parent() -> None:
    for environment in _shared.values():
        environment._gate.release()
        environment.lock.release()
    _shared_lock.release()


def _after_fork_in_child() -> None:
    global _shared_lock
    for environment in _shared.values():
        environment._after_fork()
    _shared_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _has_room(file: Path) -> bool:
    """Reserve the space of LMDB's lock file; False if the disk is full.

    The file is written through a memory map: without space, that would kill the process.
    """
    if not hasattr(os, "posix_fallocate"):
        return True
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.posix_fallocate(handle, 0, _LOCK_BYTES)
        finally:
            os.close(handle)
    except OSError as error:  # other errors LMDB reports itself, or works without
        return error.errno not in FULL
    return True


def _is_of_caller(error: BaseException) -> bool:
    """Return whether an error was raised by code outside this package, which alone reads rows."""
    modules = {frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)}
    others = modules - {__name__, contextmanager.__module__}
    return bool(others) and not any(name.startswith(f"{_PACKAGE}.") for name in others)


def _following(begin: Callable[[], T], resize: Callable[[], None]) -> T:
    """Call `begin`; if another process has grown the map meanwhile, call `resize` and try again."""
    while True:
        try:
            return begin()
        except lmdb.MapResizedError:  # noqa: PERF203 - one more try is the exception
            resize()
