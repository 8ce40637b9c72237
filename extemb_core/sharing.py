"""Models that several objects of a process use: loaded once, when first needed."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extemb_core.store.base import Store

if TYPE_CHECKING:
    from extemb_core.batching import Batcher
    from extemb_core.lm import ExtensibleLM


@dataclass(frozen=True)
class Shared:
    """An `ExtensibleLM` and what answers for it in batches."""

    lm: ExtensibleLM
    batcher: Batcher


_lock = threading.Lock()
_models: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # LLM and embedder
_opened: dict[tuple[Any, ...], Shared] = {}


def share(
    llm: str | Path,
    embedder: str | Path | None = None,
    *,
    store: str | Path | Store | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Shared:
    """As `ExtensibleLM.from_pretrained`; the same arguments give the same objects for as long as the process lives.

    Objects with other stores share the weights.

    Raises:
        WeightsError, MismatchError, StoreError: See `ExtensibleLM.from_pretrained`.
    """
    from extemb_core.batching import Batcher
    from extemb_core.lm import ExtensibleLM, open_store

    weights = str(llm), None if embedder is None else str(embedder), device, dtype
    key = (*weights, _name(store))
    with _lock:
        if key not in _opened:
            if weights not in _models:
                loaded = ExtensibleLM.from_pretrained(llm, embedder, device=device, dtype=dtype)
                _models[weights] = loaded.llm, loaded.embedder
            lm = ExtensibleLM(*_models[weights], open_store(store))
            _opened[key] = Shared(lm, Batcher(lm))
        return _opened[key]


def wrap(lm: ExtensibleLM) -> Shared:
    """A model that was loaded by its owner: the same object for as long as the process lives."""
    from extemb_core.batching import Batcher

    with _lock:
        key = ("object", id(lm))
        if key not in _opened:
            _opened[key] = Shared(lm, Batcher(lm))
        return _opened[key]


def _name(store: str | Path | Store | None) -> Any:
    """A store by its place, one that is an object by itself."""
    if isinstance(store, str) and "://" in store:
        return store
    return str(Path(store).absolute()) if isinstance(store, str | Path) else None if store is None else id(store)
