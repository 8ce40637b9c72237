"""Silence transformers while files of models are read or written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bar and notices while local files are read or written, one thread at a time.

    What is silenced is the process's, as is the default dtype that transformers sets while it loads.
    """
    from transformers.utils import logging  # here, as finding a model's files takes no transformers

    with _lock:
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()
