"""Every error this library raises on purpose.

    ExtembError
    ├── ConfigError (ValueError)        a setting outside its legal values
    │   └── RatioError                  a ratio that was not trained, or cannot be derived
    ├── BudgetError (ValueError)        the positions asked for cannot hold what must go in
    ├── DocumentError (ValueError)      a document that cannot be read or decoded
    │   └── DocumentNotFoundError (FileNotFoundError)
    ├── WeightsError (OSError)          weights that are missing, damaged or of another kind
    │   ├── WeightsNotFoundError (FileNotFoundError)
    │   └── WeightsCorruptError
    ├── StoreError (OSError)            a store that cannot be opened, read or written
    │   ├── StoreNotFoundError (FileNotFoundError)
    │   ├── StoreFormatError            a folder that is not a store, or of an unknown version
    │   └── StoreCorruptError           bytes that are not what was written
    ├── MismatchError (ValueError)      an embedder, store or embedding made for something else
    ├── EngineError (ConnectionError)   a server that cannot be reached, or refuses what it is asked
    ├── TrainingError (RuntimeError)    a run that cannot go on (NaN loss, foreign checkpoint)
    └── MissingExtraError (ImportError) an optional dependency that is not installed

Each also inherits the builtin a caller would guess. The message of every one of them
names the value, the rule and the remedy, in one sentence.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class ExtembError(Exception):
    """Base of all errors of this library."""


class ConfigError(ExtembError, ValueError):
    """A setting outside its legal values."""


class RatioError(ConfigError):
    """A ratio that was not trained, or that cannot be derived from the one at hand."""


class BudgetError(ExtembError, ValueError):
    """The positions asked for cannot hold what must go in."""


class DocumentError(ExtembError, ValueError):
    """A document that cannot be read or decoded."""


class DocumentNotFoundError(DocumentError, FileNotFoundError):
    """A document's file does not exist."""


class WeightsError(ExtembError, OSError):
    """Weights that are missing, damaged or of another kind."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """A model's files are not where they were looked for."""


class WeightsCorruptError(WeightsError):
    """A model's files are not the bytes they should be."""


class StoreError(ExtembError, OSError):
    """A store that cannot be opened, read or written."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store where one was looked for."""


class StoreFormatError(StoreError):
    """A folder that is not a store, or of a version that this library does not read."""


class StoreCorruptError(StoreError):
    """Bytes of a store are not what was written."""


class MismatchError(ExtembError, ValueError):
    """An embedder, store or embedding that was made for something else."""


class EngineError(ExtembError, ConnectionError):
    """A server that cannot be reached, or refuses what it is asked."""


class TrainingError(ExtembError, RuntimeError):
    """A training run that cannot go on."""


class MissingExtraError(ExtembError, ImportError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        """Name the package, the extra that brings it (None if it is installed by its own name), and what needs it."""
        install = package if extra is None else f"'extemb[{extra}]'"
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install {install}")
        self._given = package, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str | None, str]]:
        return type(self), self._given


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def optional_import(module: str, extra: str | None, purpose: str, package: str | None = None) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: Its name.
        extra: The extra that brings it, or None if it is installed by its own name.
        purpose: Feature that needs it, for the message.
        package: Its distribution; named like the module when not given.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(package or module, extra, purpose) from error
