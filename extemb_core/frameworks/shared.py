"""Share models between the objects of a process: loaded once, when first needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from extemb_core.store.base import Store
from extemb_core.store.remote import StorageLocation
from extemb_core.utils.validation import name_or_path
from extemb_core.weights.resolve import resolve_embedder

if TYPE_CHECKING:
    import torch

    from extemb_core.lm import ExtensibleLM

T = TypeVar("T")
Name = str | os.PathLike[str]

_lock = threading.Lock()  # held only briefly; each lock below is held while its object is made
_locks: dict[tuple[Any, ...], threading.Lock] = {}
_models: dict[tuple[Any, ...], Any] = {}  # LLMs and embedders
_opened: dict[tuple[Any, ...], ExtensibleLM] = {}  # models with their stores
_beside: WeakKeyDictionary[ExtensibleLM, dict[tuple[Any, ...], ExtensibleLM]] = WeakKeyDictionary()


def share(
    llm: Name,
    embedder: Name | None = None,
    *,
    store: Name | Store | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    beside: ExtensibleLM | None = None,
    **engine: Any,
) -> ExtensibleLM:
    """Load as `ExtensibleLM.from_pretrained` does; the same arguments give the same object, until `release`.

    Objects with different embedders share the LLM, unless it runs on a server; objects with different stores share the
    embedder too. While one model is loaded, requests for loaded ones do not wait.

    With `beside`, a loaded model, the new object shares its store, refs, engine and device, and its LLM if `llm` names
    that; it is released together with that model.

    Raises:
        WeightsError, MismatchError, StoreError: See `ExtensibleLM.from_pretrained`.
    """
    from extemb_core.lm import ExtensibleLM
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.vllm_client import load_llm
    from extemb_core.store.shard_store import open_store
    from extemb_core.store.store import EmbeddingStore

    llm, embedder = name_or_path(llm), None if embedder is None else name_or_path(embedder)
    if beside is not None:
        with _lock:
            made = _beside.setdefault(beside, {})
        return _once(made, (id(beside), llm, embedder), lambda: _made_beside(beside, llm, embedder))

    def load() -> ExtensibleLM:
        files = resolve_embedder(embedder, llm)
        of_llm: tuple[Any, ...] = llm, device, dtype
        if engine:  # a server's LLM depends on the embedder
            of_llm = *of_llm, str(files), *sorted(engine.items())
        model = _once(_models, of_llm, lambda: load_llm(llm, device=device, dtype=dtype, **engine))
        own = _once(_models, (*of_llm, str(files)), lambda: ExtensibleEmbedder.from_pretrained(files, llm=model))
        return ExtensibleLM(model, own, open_store(store))

    key = _key(llm, embedder, store, device=device, dtype=dtype, **engine)
    if isinstance(store, str | os.PathLike):
        with _lock:
            known = getattr(_opened.get(key), "store", None)
            if isinstance(known, EmbeddingStore) and known.environment.is_gone():
                del _opened[key]  # its folder was removed: open a new store
    return _once(_opened, key, load)


def _made_beside(loaded: ExtensibleLM, name: str, embedder: str | None) -> ExtensibleLM:
    from extemb_core.lm import ExtensibleLM
    from extemb_core.models.embedder import ExtensibleEmbedder
    from extemb_core.models.llm import choose_device, choose_dtype
    from extemb_core.models.vllm_client import VllmLLM

    llm = loaded.llm
    if name == llm.name:
        llm = copy(llm) if isinstance(llm, VllmLLM) else llm  # a server's LLM depends on its embedder
        own = ExtensibleEmbedder.from_pretrained(resolve_embedder(embedder, name), llm=llm)
    else:  # with the default device and dtype, the object that others share
        usual = llm.device.type == choose_device().type and not llm.device.index
        where: dict[str, Any] = {"device": "auto" if usual else str(llm.device)}
        where["dtype"] = "auto" if llm.dtype == choose_dtype("auto", llm.device) else llm.dtype
        if isinstance(llm, VllmLLM):
            where |= {"engine": "vllm", "base_url": llm.base_url, "api_key": llm.api_key}
        other = share(name, embedder, **where)
        llm, own = other.llm, other.embedder
    made = ExtensibleLM(llm, own, loaded.store, scorer=loaded.builder.scorer)
    made.refs = loaded.refs
    return made


def close_store(llm: Name, embedder: Name | None, *, store: Name | Store | None, **where: Any) -> None:
    """Close the store that `share` opened for these arguments, if it did; the next call of `share` opens it again."""
    if isinstance(store, str | os.PathLike):
        with _lock:
            lm: Any = _opened.pop(_key(llm, embedder, store, **where), None)
        if lm is not None:
            getattr(lm.store, "close", lambda: None)()  # shards are open only during a read


def release() -> None:
    """Release all models: each is freed when no object holds it any more, and loaded again when needed."""
    with _lock:
        for kept in (_models, _opened, _locks):
            kept.clear()
        _beside.clear()


def _key(llm: Name, embedder: Name | None, store: Name | Store | None, **where: Any) -> tuple[Any, ...]:
    kept = StorageLocation(store).absolute() if isinstance(store, str | os.PathLike) else id(store)
    names = [None if name is None else name_or_path(name) for name in (llm, embedder)]
    return (*names, kept, *sorted(where.items()))


def _once(made: dict[tuple[Any, ...], T], key: tuple[Any, ...], make: Callable[[], T]) -> T:
    """Return the object made for a key, or make it; other threads that want the same one wait."""
    with _lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:
        if (one := made.get(key)) is None:
            one = made[key] = make()
        return one  # also if it is released meanwhile
