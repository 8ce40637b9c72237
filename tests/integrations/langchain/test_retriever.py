"""The retriever: passages of a library, beside models that have the same folder as their store."""

from __future__ import annotations

import pickle
import threading
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pytest
from retrieval_encoder import by_words
from tiny import SENTENCES, Named, save_tiny

from extemb_core import ExtensibleLM, Library
from extemb_core.errors import ConfigError
from extemb_core.library.encoders import CallableEncoder
from extemb_core.store import lmdb_env
from langchain_extemb import ChatExtensible, ExtensibleRetriever

QUESTION = "How many ships were counted?"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A library, and the fields of a model that has it as its store."""
    monkeypatch.setattr("extemb_core.frameworks.shared._models", {})
    monkeypatch.setattr("extemb_core.frameworks.shared._opened", {})
    monkeypatch.setattr("extemb_core.library.library.as_encoder", lambda requested: CallableEncoder(by_words))
    save_tiny(tmp_path)
    lm = ExtensibleLM.from_pretrained(tmp_path / "llm", tmp_path / "embedder")
    with Library(tmp_path / "docs.extemb", lm, ratio=2) as library:
        library.add([{"text": SENTENCES, "title": "Ships"}])
    return tmp_path


@pytest.mark.parametrize("first", ["retriever", "model"])
def test_a_library_and_a_model_with_it_as_store_may_be_opened_in_any_order(folder, first):
    retriever = ExtensibleRetriever(library=folder / "docs.extemb", k=1)
    chat = ChatExtensible.from_model_id(
        str(folder / "llm"), embedder=str(folder / "embedder"), store=str(folder / "docs.extemb"), ratio=2, max_tokens=2
    )
    if first == "model":
        assert chat.lm
    for _ in range(2):
        documents = retriever.invoke(QUESTION)
        told = chat.invoke(QUESTION, documents=documents).response_metadata["extemb"]["documents"]
        assert [(one["fidelity"], one["cached"]) for one in told] == [(2, True)]
        retriever.close()
        chat.close()


def test_a_passage_is_the_same_document_for_every_question(folder):
    # What asks several questions at once (MultiQueryRetriever) drops documents that are equal to another.
    retriever = ExtensibleRetriever(library=folder / "docs.extemb", k=1)
    one, other = (retriever.invoke(question)[0] for question in (QUESTION, "Where do rivers carry sand?"))
    retriever.close()
    assert one == other
    assert set(one.metadata) == {"source", "title", "start", "end", "ref"}


@pytest.mark.parametrize("path", [Path, Named])
def test_a_librarys_path_may_be_of_any_class(folder, path):
    retriever = ExtensibleRetriever(library=path(folder / "docs.extemb"), k=1)
    assert retriever.library == str(folder / "docs.extemb")
    assert retriever.invoke(QUESTION)
    retriever.close()


def test_settings_of_a_retriever_are_checked(folder):
    library = folder / "docs.extemb"
    for settings, said in (
        ({"kk": 3}, "unknown setting kk=3; pass k"),
        ({"hybrd": False}, "unknown setting hybrd=False; pass hybrid"),
        ({"k": 0}, "k=0 is not a whole number"),
        ({"k": "many"}, "k='many' is not a whole number"),
    ):
        with pytest.raises(ConfigError, match=said):
            ExtensibleRetriever(library=library, **settings)
        with pytest.raises(ConfigError, match=said):
            ExtensibleRetriever(library=library).invoke(QUESTION, **settings)


def test_a_call_may_search_by_vectors_alone(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(Library, "search", lambda self, question, k, *, hybrid: asked.append((k, hybrid)) or [])
    retriever = ExtensibleRetriever(library=folder / "docs.extemb", k=3)
    retriever.invoke(QUESTION)
    retriever.invoke(QUESTION, k=1, hybrid=False)
    assert asked == [(3, True), (1, False)]
    retriever.close()


def test_threads_that_ask_first_open_one_library_and_closing_leaves_none_open(folder, monkeypatch):
    whole, opened, met = Library.__init__, [], threading.Barrier(2)

    def opening(self, *args, **settings):
        opened.append(self)
        with suppress(threading.BrokenBarrierError):
            met.wait(0.5)  # for a thread that opens it too
        whole(self, *args, **settings)

    monkeypatch.setattr(Library, "__init__", opening)
    retriever = ExtensibleRetriever(library=folder / "docs.extemb", k=1)
    assert len(retriever.batch([QUESTION] * 4)) == 4
    retriever.close()
    assert len(opened) == 1
    assert str(folder / "docs.extemb") not in lmdb_env._shared


def test_a_retriever_by_folder_is_pickled_also_after_it_was_asked(folder):
    retriever = ExtensibleRetriever(library=folder / "docs.extemb", k=1)
    found = retriever.invoke(QUESTION)
    for other in (pickle.loads(pickle.dumps(retriever)), deepcopy(retriever), retriever.model_copy()):
        assert other.invoke(QUESTION) == found
        other.close()
        assert retriever.invoke(QUESTION) == found  # its own is open
    retriever.close()


def test_a_library_that_was_passed_stays_open_and_is_shared_by_copies(folder, caplog):
    lm = ExtensibleLM.from_pretrained(folder / "llm", "untrained")  # another embedder than the library's
    with Library(folder / "docs.extemb", lm, mode="r") as library:
        retriever = ExtensibleRetriever(library=library, k=1)
        assert deepcopy(retriever).invoke(QUESTION) == retriever.invoke(QUESTION)
        retriever.close()
        assert len(library) == 1
    assert caplog.text.count("1 of 1 documents") == 1  # which are compressed by another embedder
