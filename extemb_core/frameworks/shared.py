"""Share models between the objects of a process: loaded once, when first needed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extemb_core.store.base import Store
from extemb_core.store.remote import StorageLocation

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM

_lock = threading.Lock()
_models: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # LLM and embedder
_opened: dict[tuple[Any, ...], ExtensibleLM] = {}


def share(
    llm: str | Path,
    embedder: str | Path | None = None,
    *,
    store: str | Path | Store | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> ExtensibleLM:
    """Load as `ExtensibleLM.from_pretrained` does; the same arguments give the same object while the process lives.

    Objects with other stores share the weights.

    Raises:
        WeightsError, MismatchError, StoreError: See `ExtensibleLM.from_pretrained`.
    """
    from extemb_core.lm import ExtensibleLM, open_store

    weights, key = _keys(llm, embedder, store, device, dtype)
    with _lock:
        if key not in _opened:
            if weights not in _models:
                loaded = ExtensibleLM.from_pretrained(llm, embedder, device=device, dtype=dtype)
                _models[weights] = loaded.llm, loaded.embedder
            _opened[key] = ExtensibleLM(*_models[weights], open_store(store))
        return _opened[key]


def release(
    llm: str | Path, embedder: str | Path | None, *, store: str | Path | Store | None, device: str, dtype: str
) -> None:
    """Close the store that `share` opened for these arguments, if it did; the next call of `share` opens it again."""
    if isinstance(store, str | Path):
        with _lock:
            lm: Any = _opened.pop(_keys(llm, embedder, store, device, dtype)[1], None)
        if lm is not None:
            getattr(lm.store, "close", lambda: None)()  # shards stay open for no longer than a read


def _keys(
    llm: str | Path, embedder: str | Path | None, store: str | Path | Store | None, device: str, dtype: str
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the keys of weights, and of these weights with a store."""
    weights = str(llm), None if embedder is None else str(embedder), device, dtype
    return weights, (*weights, StorageLocation(store).absolute() if isinstance(store, str | Path) else id(store))
