"""Models of a process: each loaded once, at the same time as others, and let go of when asked."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import random_embedder, save_tiny, tiny_llm

from extemb_core.errors import WeightsError
from extemb_core.frameworks import shared
from extemb_core.models.llm import LLM


@pytest.fixture
def folder(tmp_path):
    shared.release()
    save_tiny(tmp_path)
    yield tmp_path
    shared.release()


@pytest.fixture
def loaded(monkeypatch):
    names = []
    load = LLM.from_pretrained.__func__
    monkeypatch.setattr(
        LLM, "from_pretrained", classmethod(lambda cls, name, **k: names.append(name) or load(cls, name, **k))
    )
    return names


def test_embedders_and_stores_share_the_llm(folder, loaded):
    random_embedder(tiny_llm(), seed=3).save_pretrained(folder / "other")
    one, other = (shared.share(folder / "llm", folder / name) for name in ("embedder", "other"))
    assert one.llm is other.llm
    assert one.embedder is not other.embedder
    with shared.share(folder / "llm", folder / "embedder", store=folder / "store").store as store:
        elsewhere = shared.share(folder / "llm", str(folder / "embedder"), store=str(folder / "store"))
        assert elsewhere.store is store
        assert elsewhere.embedder is one.embedder
    assert shared.share(folder / "llm", folder / "embedder") is one
    assert loaded == [str(folder / "llm")]


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps what is open where it is")
def test_a_store_whose_folder_was_removed_is_made_anew(folder, loaded):
    where = {"llm": folder / "llm", "embedder": folder / "embedder", "store": folder / "store"}
    before = shared.share(**where)
    before.compress("What was here before.")
    shutil.rmtree(folder / "store")
    with shared.share(**where).store as store:
        assert len(store) == 0
        shared.share(**where).compress("What came since.")
        assert len(store) == 1
        assert shared.share(**where).store is store
    assert shared.share(**where).embedder is before.embedder
    assert len(loaded) == 1
    before.store.close()


def test_threads_load_once(folder, loaded):
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda _: shared.share(folder / "llm", folder / "embedder"), range(8)))
    assert all(model is models[0] for model in models)
    assert len(loaded) == 1


def test_loading_one_keeps_nobody_waiting_who_asks_for_another(folder, monkeypatch):
    known = shared.share(folder / "llm", folder / "embedder")
    load, started, go_on = LLM.from_pretrained, threading.Event(), threading.Event()

    def slow(*args, **settings):
        started.set()
        assert go_on.wait(600)
        return load(*args, **settings)

    monkeypatch.setattr(LLM, "from_pretrained", slow)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(shared.share, folder / "llm", folder / "embedder", dtype="bfloat16")
        try:
            assert started.wait(600)
            assert pool.submit(shared.share, folder / "llm", folder / "embedder").result(timeout=300) is known
        finally:
            go_on.set()
        assert other.result().llm is not known.llm


def test_what_is_let_go_of_is_freed(folder, loaded):
    model = shared.share(folder / "llm", folder / "embedder")
    llm = weakref.ref(model.llm)
    shared.release()
    assert model.ask("What?", max_new_tokens=1).new_tokens == 1
    del model
    gc.collect()
    assert llm() is None
    shared.share(folder / "llm", folder / "embedder")
    assert len(loaded) == 2


def test_what_could_not_be_loaded_is_tried_again(folder):
    (folder / "llm").rename(folder / "later")
    with pytest.raises(WeightsError):
        shared.share(folder / "llm", folder / "embedder")
    (folder / "later").rename(folder / "llm")
    assert shared.share(folder / "llm", folder / "embedder").llm.hidden_size == 32
