"""Processes of their own that need not import torch first: forked from a server that has, and has no threads.

For what is promised of signals, kills and several processes at once. What a fresh interpreter does at its start or
end is tested with `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

PATIENCE = 600  # seconds until a process counts as hung, on however busy a machine

_context: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if _context.get_start_method() == "forkserver":
    _context.set_forkserver_preload(
        ["torch", "transformers.models.llama.modeling_llama", "transformers.trainer", "peft"]
    )


class Process:
    """Python code in a process, with the part of the interface of `subprocess.Popen` that tests need.

    Args:
        code: What `python -c` would be given.
        args: The rest of `sys.argv`.
        env: Its environment, else this process's.
    """

    def __init__(self, code: str, *args: str | Path, env: Mapping[str, str] | None = None) -> None:
        reader, writer = _context.Pipe(duplex=False)
        self._stderr = TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        with writer, Connection(os.dup(self._stderr.fileno()), readable=False) as errors:
            self._process = _context.Process(
                target=_run, args=(code, list(map(str, args)), dict(env or os.environ), writer, errors)
            )
            self._process.start()
        with reader:
            self.stdout = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        """Exit code; -N after signal N, None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Wait until something is true that the process brings about."""
        until = time.monotonic() + PATIENCE
        while not there():
            assert self.returncode is None, self.communicate()
            assert time.monotonic() < until
            time.sleep(0.01)

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end, and return what is left of its standard output, and its standard error."""
        with self.stdout, self._stderr:
            output = self.stdout.read()
            self._process.join(PATIENCE)
            assert self.returncode is not None
            self._stderr.seek(0)
            return output, self._stderr.read()


def _run(code: str, args: list[str], env: dict[str, str], stdout: Connection, stderr: Connection) -> None:
    os.environ.clear()
    os.environ.update(env)
    for number, connection in ((1, stdout), (2, stderr)):
        os.dup2(connection.fileno(), number)
        connection.close()
    sys.argv = ["-c", *args]
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yield what any thread may call in the place of Ctrl-C, whatever this process was started with."""
    handled = threading.Event()

    def handle(*_: object) -> None:
        handled.set()
        raise KeyboardInterrupt

    def interrupt() -> None:
        while not handled.is_set():  # a thread about to wait for a lock misses a signal, and hears the next
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            handled.wait(0.2)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
