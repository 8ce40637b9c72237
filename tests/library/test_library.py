"""A library: added once, found and asked in any later process, brought up to date and never half there."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from anchored import untrained
from retrieval_encoder import by_words
from shelved import PLACES, document
from tiny import entering, random_embedder

from extemb_core import Document, EmbeddingStore, ExtensibleLM
from extemb_core.documents import text_ref
from extemb_core.errors import ConfigError, DocumentError, MismatchError, StoreError, WeightsNotFoundError
from extemb_core.library.bm25 import WordIndex
from extemb_core.library.library import INDEX_FILE, WORDS_FILE, Library
from extemb_core.library.vector_index import VectorIndex
from extemb_core.store.maintenance import Verified

pytest.importorskip("faiss")


def counting(lm, monkeypatch):
    made = []
    whole = type(lm.embedder).compress_ids
    monkeypatch.setattr(type(lm.embedder), "compress_ids",
                        lambda self, ids, **kwargs: (made.extend(ids), whole(self, ids, **kwargs))[1])  # fmt: skip
    return made


def test_what_was_added_is_found_and_asked_in_a_later_opening_without_the_embedder(opened, lm, monkeypatch):
    with opened() as library:
        added = library.add([document(place) for place in PLACES])
        assert (added.added, added.updated, added.unchanged) == (6, 0, 0)
        assert added.n_passages >= 12
        assert added.n_tokens > 200
    made = counting(lm, monkeypatch)
    with opened(mode="r") as library:
        assert len(library) == 6
        best = library.search("When was the bridge built?", k=3)[0]
        assert best.source == "bridge.txt"
        assert library.text("bridge.txt")[best.start : best.end] == best.text
        assert "The bridge was built" in best.text
        answer = library.ask("When was the bridge built?", k=3, ratio=4, max_new_tokens=4)
        assert answer.context[0].source == f"bridge.txt:{best.start}-{best.end}"
        assert all(entry.cached for entry in answer.context)
        assert made == []
        assert library.store.verify().clean


def test_adding_again_costs_nothing_and_a_change_only_itself(opened, lm, monkeypatch):
    documents = [document(place) for place in PLACES]
    with opened() as library:
        library.add(documents)
        made = counting(lm, monkeypatch)
        assert library.add(documents).unchanged == 6
        assert made == []
        before = len(library.store)
        changed = library.add([*documents[:5], document("station", year=1999)])
        assert (changed.added, changed.updated, changed.unchanged) == (0, 1, 5)
        assert 0 < len(made) < 3  # the passage with the year alone
        assert len(library.store) == before  # the old passage's embeddings are gone
        assert "1999" in library.search("station built", k=1)[0].text
        assert "1820" not in " ".join(p.text for p in library.search("station", k=20) if p.source == "station.txt")
        retitled = Document(documents[0].text, title="Port", metadata={"source": "harbour.txt", "seen": {1, 2}})
        for _ in range(2):
            again = library.add([retitled])
        assert (again.updated, again.unchanged) == (0, 1)
        assert library.search("harbour", k=1)[0].title == "Port"


def test_one_document_of_a_framework_is_one(opened):
    kind = type("Fields", (), {"page_content": "The mill.", "__iter__": lambda self: iter([("page_content", "a")])})
    with opened() as library:
        assert library.add(kind()).added == 1
        assert library.search("mill", k=1)[0].text == "The mill."


def test_texts_of_one_source_that_take_the_place_of_each_other_are_warned_of(opened, caplog):
    pages = [Document(f"Page {page} of the report.", metadata={"source": "report.pdf"}) for page in range(3)]
    with opened() as library:
        assert library.add([document("mill"), document("mill")]).added == 1  # the same text: nothing is lost
        assert not caplog.records
        assert library.add(pages).added == 1
        assert library.text("report.pdf") == pages[-1].text
    assert "2 of 3 documents are not added" in caplog.text
    assert "'report.pdf'" in caplog.text


def test_another_embedder_or_a_finer_ratio_compresses_anew_and_a_coarser_one_does_not(opened, lm, tmp_path):
    documents = [document(place) for place in PLACES[:2]]
    with opened(ratio=4) as library:
        library.add(documents)
    with opened(ratio=8) as library:
        assert library.add(documents).unchanged == 2
    with opened(ratio=2) as library:
        assert library.add(documents).updated == 2
        assert library.add(documents).unchanged == 2
    other = ExtensibleLM(lm.llm, random_embedder(lm.llm, seed=9))
    with Library(tmp_path / "lib", other, encoder=by_words, passage_tokens=40, ratio=2) as library:
        added = library.add(documents)
        assert (added.updated, added.unchanged) == (2, 0)
        assert added.compressed_tokens > 0
        assert library.ask("mill?", k=2, ratio=2, max_new_tokens=2).context[0].cached
        assert library.store.verify().clean


@pytest.fixture(scope="module")
def other(lm):
    return ExtensibleLM(lm.llm, untrained(lm.llm))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps what is open where it is")
def test_a_library_whose_folder_was_removed_is_made_anew(opened, tmp_path):
    with opened() as before:
        before.add([document("mill")])
        shutil.rmtree(tmp_path / "lib")
        with pytest.raises(StoreError, match="was removed, moved or replaced while it was open"):
            before.add([document("tower")])
        with opened() as library:
            library.add([document("bridge")])
    with opened() as library:
        assert [record["source"] for record in library.documents()] == ["bridge.txt"]
        assert library.search("mill", k=1)[0].source == "bridge.txt"


def test_an_embedder_of_the_same_fingerprint_with_ratios_of_its_own_compresses_anew(lm, tmp_path):
    for ratios in ((2, 4, 8), (3, 6), (6, 12), (2, 4, 8)):
        embedder = entering(lm.llm, ratios=ratios)
        with Library(tmp_path / "lib", ExtensibleLM(lm.llm, embedder), encoder=by_words, passage_tokens=40) as library:
            library.add([document("mill")])
            assert library.ask("mill?", k=1, ratio=ratios[0], max_new_tokens=2).context[0].cached
            assert library.verify().clean


def test_embeddings_that_others_drop_as_often_as_they_are_made_are_an_error_in_the_end(opened, monkeypatch):
    with opened() as library:
        write = library.store.write

        def late(work):
            library.store.environment.write(
                lambda transaction: [library.store.forget(transaction, ref) for ref, _ in stored]
            )
            return write(work)

        stored = []
        put = library.store.put
        monkeypatch.setattr(library.store, "put", lambda *texts: (put(*texts), stored.extend(library.store.items())))
        monkeypatch.setattr(library.store, "write", late)
        with pytest.raises(StoreError, match=r"mill\.txt.* end what writes there and call again"):
            library.add([document("mill")])
        assert len(library) == 0


def test_a_tilde_is_the_home_folder(home, lm, monkeypatch):
    (home / "mill.txt").write_text("The mill was built in 1820.")
    with Library("~/lib", lm, encoder=by_words) as library:
        assert library.path == home / "lib"
        assert library.add(Path("~/mill.txt")).added == 1
        assert [record["source"] for record in library.documents()] == ["mill.txt"]
    monkeypatch.setattr("extemb_core.library.encoders._default", None)  # is not made where there is a library
    with Library("~/lib", lm) as library:
        assert len(library) == 1


def test_settings_that_cannot_be_kept_leave_no_library(other, tmp_path, monkeypatch):
    def missing():
        raise WeightsNotFoundError("not installed")

    monkeypatch.setattr("extemb_core.library.encoders._default", missing)
    for settings in ({"encoder": by_words, "dtype": "int8"}, {"encoder": 5}, {}):
        with pytest.raises((MismatchError, ConfigError, WeightsNotFoundError)):
            Library(tmp_path / "lib", other, **settings)
        assert not (tmp_path / "lib").exists()


@pytest.mark.parametrize("plan", [None, "focus", "select", "even"])
def test_the_sentences_of_passages_are_planned_for_the_question(other, tmp_path, monkeypatch, plan):
    with Library(tmp_path / "lib", other, encoder=by_words, passage_tokens=60) as library:
        library.add([document(place) for place in PLACES])
    made = counting(other, monkeypatch)
    with Library(tmp_path / "lib", other, encoder=by_words, passage_tokens=60, mode="r") as library:
        question, settings = "When was the bridge built?", {"k": 2, "budget": 70, "plan": plan, "max_new_tokens": 2}
        best, *_ = library.search(question, k=2)
        answers = library.ask(question, **settings), library.stream(question, **settings).finish()
    for answer in answers:
        first, *_ = answer.context
        read = [(best.text[span.start : span.stop], span.fidelity) for span in first.spans]
        assert any("bridge" in text and kind == "raw" for text, kind in read) == (plan != "even")
        assert (first.fidelity == "mixed") == (plan != "even")
        assert sum(entry.positions for entry in answer.context) <= 70
    assert made == []  # the grid of what is kept is the library's


@pytest.mark.parametrize("counted", [True, False])
def test_documents_of_another_embedder_are_read_and_told_of_and_made_anew_when_asked(
    opened, lm, other, tmp_path, monkeypatch, caplog, counted
):
    documents = [document(place) for place in PLACES]
    with opened() as library:
        library.add([*documents, Document("The mill burned.", metadata={"source": 7, "seen": [1]})])
        assert (library.n_stale, library.embedders) == (0, {lm.embedder.fingerprint: 7})
        if not counted:  # as version 1 left it

            def forget_counts(transaction):
                settings = library._catalogue.settings(transaction)
                del settings["embedders"]
                database = library.store.environment.database("settings")
                transaction.put(b"library", json.dumps(settings).encode(), db=database)

            library.store.write(forget_counts)
    later = {"encoder": by_words, "passage_tokens": 40, "ratio": 2}
    with Library(tmp_path / "lib", other, mode="r", **later) as library:
        assert library.n_stale == 7
        for _ in range(2):
            answer = library.ask("When was the bridge built?", k=1, ratio=2, max_new_tokens=2)
            assert (answer.context[0].fidelity, answer.context[0].cached) == (2, False)
        [told] = [record.getMessage() for record in caplog.records if record.name == "extemb_core.library.library"]
        assert told.startswith(f"7 of 7 documents in {tmp_path / 'lib'} were compressed by another embedder")
        assert told.endswith(f"or: extemb index refresh {tmp_path / 'lib'}")
        assert library.store.stats().by_fingerprint.keys() == {lm.embedder.fingerprint}
    with Library(tmp_path / "lib", encoder=by_words, mode="r") as library:
        assert library.n_stale == 0  # nothing is known of an embedder
    with Library(tmp_path / "lib", other, **later) as library:
        made = library.refresh()
        assert (made.added, made.updated, made.unchanged) == (0, 7, 0)
        assert (library.n_stale, library.embedders) == (0, {other.embedder.fingerprint: 7})
        assert library.store.stats().by_fingerprint.keys() == {other.embedder.fingerprint}
        assert sorted(record["source"] for record in library.documents()) == sorted(
            [*(f"{p}.txt" for p in PLACES), "7"]
        )
        assert library.ask("bridge?", k=1, ratio=2, max_new_tokens=2).context[0].cached
        assert library.refresh().unchanged == 7
        assert library.add(documents).unchanged == 6
        assert library.store.verify().clean


def test_a_refresh_that_was_interrupted_goes_on(opened, other, tmp_path, monkeypatch):
    monkeypatch.setattr("extemb_core.library.library._BATCH_TOKENS", 100)
    with opened() as library:
        library.add([document(place) for place in PLACES])
    whole = type(other.embedder).compress_ids
    calls = []

    def interrupted(self, ids, **kwargs):
        calls.append(len(ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, ids, **kwargs)

    monkeypatch.setattr(type(other.embedder), "compress_ids", interrupted)
    with Library(tmp_path / "lib", other, encoder=by_words, passage_tokens=40, ratio=2) as library:
        with pytest.raises(KeyboardInterrupt):
            library.refresh()
        left = library.n_stale
        assert 0 < left < 6
        assert library.refresh().updated == left
        assert library.n_stale == 0
        assert library.store.verify().clean


def book(year):
    return Document(" ".join(f"The tower {at} was built in {year}." for at in range(40)), metadata={"source": "book"})


def add_some(library, documents, monkeypatch):
    """Stop after a part of the documents' texts is compressed and kept; returns how many texts that is."""
    put, before = EmbeddingStore.put, len(library.store)

    def stopping(self, *texts):
        put(self, *texts)
        if len(library.store) > before + 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("extemb_core.library.library._BATCH_TOKENS", 100)
        patch.setattr(EmbeddingStore, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            library.add(documents)
    return len(library.store) - before


def test_what_an_interrupted_add_kept_of_a_text_that_has_changed_goes(opened, other, tmp_path, monkeypatch):
    with opened() as library:
        library.add([document(PLACES[0])])
        alone = len(library.store)
        for year in (1820, 1830):
            assert add_some(library, [book(year)], monkeypatch) > 2
    with Library(tmp_path / "lib", other, encoder=by_words, passage_tokens=40, ratio=2) as library:
        assert add_some(library, [book(1840)], monkeypatch) > 2
    with opened() as library:
        library.add([book(1840)])
        refs = {text_ref(passage.text) for passage in library.search("tower built", k=1000)}
        assert set(library.store.items()) == {(ref, library.lm.embedder.fingerprint) for ref in refs}
        library.remove("book")
        assert len(library.store) == alone
        assert add_some(library, [book(1850)], monkeypatch) > 2
        assert library.remove("book") == 0
        assert len(library.store) == alone


def test_what_an_interrupted_add_kept_is_not_compressed_again(opened, monkeypatch):
    with opened() as library:
        kept = add_some(library, [book(1820), document(PLACES[0])], monkeypatch)
        held = {ref for ref, _ in library.store.items()}
        library.add([document(PLACES[1])])
        assert held <= {ref for ref, _ in library.store.items()}
        compressed = []
        put = EmbeddingStore.put
        monkeypatch.setattr(EmbeddingStore, "put", lambda self, *texts: (put(self, *texts), compressed.extend(texts)))
        library.add([book(1820)])
        assert len(held) == kept
        assert held.isdisjoint(text.ref for text in compressed)


def test_a_source_that_is_no_unicode_is_found_and_cited(opened):
    with opened() as library:
        library.add([Document("The cafe was built in 1820.", metadata={"source": "caf\udce9.txt"})])
        answer = library.ask("When was the cafe built?", max_new_tokens=2)
        assert answer.context[0].source == "caf\udce9.txt:0-27"


@pytest.mark.parametrize(
    "text", ["The mill burned in 1840. ", "\u78e8\u574a\u5728\u4e00\u516b\u56db\u96f6\u5e74\u70e7\u6bc1\u3002"]
)
@pytest.mark.parametrize("n_documents", [1, 30])
def test_what_is_lost_with_a_process_is_a_few_thousand_tokens_in_any_script(opened, lm, monkeypatch, text, n_documents):
    monkeypatch.setattr("extemb_core.library.library._BATCH_TOKENS", 200)
    compressed, kept = [0], []
    whole, put = type(lm.embedder).compress_ids, EmbeddingStore.put

    def compressing(self, ids, **kwargs):
        compressed[0] += sum(map(len, ids))
        return whole(self, ids, **kwargs)

    monkeypatch.setattr(type(lm.embedder), "compress_ids", compressing)
    monkeypatch.setattr(EmbeddingStore, "put", lambda self, *texts: (put(self, *texts), kept.append(compressed[0])))
    parts = [f"{number} {text}" for number in range(150)]
    texts = ["".join(parts[at::n_documents]) for at in range(n_documents)]
    with opened() as library:
        library.add(texts)
    assert compressed[0] > 2000
    assert max(after - before for before, after in pairwise([0, *kept])) <= 200 + 170  # and what a document is longer


def test_a_passage_that_two_documents_share_survives_the_refresh_of_one(opened, other, tmp_path):
    with opened() as library:
        library.add([document("mill"), Document(document("mill").text, metadata={"source": "copy"})])
    with Library(tmp_path / "lib", other, encoder=by_words, passage_tokens=40, ratio=2) as library:
        assert library.add([document("mill")]).updated == 1
        assert library.verify().clean  # what the copy is read with is still there
        assert (library.n_stale, library.refresh().updated, library.n_stale) == (1, 1, 0)
        assert set(library.store.stats().by_fingerprint) == {other.embedder.fingerprint}
        assert library.remove("copy") == 1
        assert library.ask("mill?", k=1, ratio=2, max_new_tokens=2).context[0].cached
        assert library.store.verify().clean


def test_embeddings_that_are_damaged_or_lost_are_made_anew(opened, lm, tmp_path, monkeypatch):
    with opened() as library:
        library.add([document(place) for place in PLACES])
        _, block = next(library.store.environment.items("blocks"))
    data = (tmp_path / "lib" / "data.mdb").read_bytes()
    at = data.index(block[:32]) + 8
    (tmp_path / "lib" / "data.mdb").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    made = counting(lm, monkeypatch)
    with opened() as library:
        (damaged,) = library.verify().damaged
        assert library.refresh().updated == 1
        assert library.verify().clean
        assert len(made) == 1
        assert library.refresh().unchanged == len(PLACES)
        library.store.remove([damaged[0]])
        (lost,) = library.verify().problems
        assert re.match(r"\S+: the embeddings of 1 passages are lost; .* index refresh ", lost)
        assert library.add([document(place) for place in PLACES]).updated == 1  # lost ones are seen without reading any
        assert len(made) == 2
        assert library.store.verify().n_documents == library.store.stats().n_documents
        ref, other = damaged[0], "0" * 32
        library.store.put(replace(library.store.finest(ref, lm.embedder.fingerprint), fingerprint=other))
        monkeypatch.setattr(library.store, "verify", lambda: Verified(n_documents=0, damaged=((ref, other, "lost"),)))
        assert library.refresh().updated == 0  # what this embedder made of the same passage is whole
        assert set(library.store.stats().by_fingerprint) == {lm.embedder.fingerprint}
    with opened(mode="r") as library, pytest.raises(StoreError, match="was opened to read"):
        library.refresh()


def test_passages_are_planned_by_the_scorer_of_the_lm(opened, lm, tmp_path):
    def scorer(question, sentences):
        return [1.0] * len(sentences)

    scored = ExtensibleLM(lm.llm, lm.embedder, scorer=scorer)
    with Library(tmp_path / "lib", scored, encoder=by_words) as library:
        assert library.lm.builder.scorer is scorer


def test_of_two_documents_of_one_source_the_last_counts(opened, lm):
    with opened() as library:
        library.add([document("mill"), document("mill", year=1900)])
        assert library.embedders == {lm.embedder.fingerprint: 1} == {lm.embedder.fingerprint: len(library)}
        library.remove("mill.txt")
        assert library.embedders == {}


def test_what_is_removed_is_gone_and_shared_passages_stay(opened):
    with opened() as library:
        library.add([document(place) for place in PLACES])
        twin = Document(document("mill").text, metadata={"source": "copy of mill"})
        library.add([twin])
        assert library.remove(["mill.txt", "nothing.txt"]) == 1
        assert library.search("mill built", k=1)[0].source == "copy of mill"
        assert library.ask("mill?", k=2, ratio=2, max_new_tokens=2).context[0].cached
        assert library.remove("copy of mill") == 1
        assert not any("mill" in passage.text for passage in library.search("mill built", k=50))
        with pytest.raises(DocumentError, match="has no document 'mill.txt'"):
            library.text("mill.txt")
        assert sorted(record["source"] for record in library.documents()) == sorted(
            f"{place}.txt" for place in PLACES if place != "mill"
        )
        library.remove([f"{place}.txt" for place in PLACES])
        assert len(library) == len(library.store) == 0
        assert library.search("mill") == []


def test_equal_words_do_not_outvote_the_vectors_by_age(opened):
    with opened() as library:
        library.add([f"Room {number} is on the {'left' if number % 2 else 'right'} side." for number in range(40)])
        for number in (7, 31, 38):
            assert library.search(f"Which side is room {number}?", k=1)[0].text.startswith(f"Room {number} ")


def test_files_and_folders(opened, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("The mill was built in 1820.")
    (folder / "b.md").write_text("# Bridge\n\nThe bridge was closed in 1987.")
    with opened() as library:
        assert library.add(folder).added == 2
        (folder / "a.txt").write_text("The mill was burned in 1830.")
        assert library.add([folder]).updated == 1
        assert "burned" in library.search("mill", k=1)[0].text


def test_a_file_is_known_by_where_it_is_however_its_path_is_typed(opened, tmp_path, monkeypatch):
    for project in ("one", "two"):
        (tmp_path / project / "notes").mkdir(parents=True)
        (tmp_path / project / "notes" / "plan.txt").write_text(f"The budget of {project} is 100.")
        monkeypatch.chdir(tmp_path / project)
        with opened() as library:
            assert library.add(Path("notes")).added == 1
    (tmp_path / "linked").symlink_to("one")
    notes = tmp_path / "one" / "notes"
    spellings = (notes, Path("../one/notes"), Path("../linked/notes"), notes / "plan.txt", notes / ".." / "notes")
    with opened() as library:
        added = library.add(spellings)
        assert (added.added, added.updated, added.unchanged) == (0, 0, 1)
        named = [str(Path(project, "notes", "plan.txt")) for project in ("one", "two")]
        assert sorted(record["source"] for record in library.documents()) == named
        assert library.text(named[1]) == "The budget of two is 100."
    with Library(tmp_path / "two" / "lib", opened().lm, encoder=by_words) as library:
        library.add([notes, Document("The mill.", metadata={"source": "notes/plan.txt"})])
        sources = {record["source"] for record in library.documents()}
        assert sources == {str((notes / "plan.txt").resolve()), "notes/plan.txt"}  # one that is named keeps its name


def test_the_index_is_brought_up_to_date_whatever_became_of_its_file(opened, tmp_path):
    with opened() as library:
        library.add([document(place) for place in PLACES[:3]])
    files = [tmp_path / "lib" / name for name in (INDEX_FILE, WORDS_FILE)]
    old = [file.read_bytes() for file in files]
    with opened() as library:
        library.add([document(place) for place in PLACES[3:]])
        library.remove("harbour.txt")
        wanted = library.search("tower built", k=20)
    for change in (bytes, lambda content: b"", lambda content: content[:-9], None):
        for file, content in zip(files, old, strict=True):
            if change is None:
                file.unlink()
            else:
                file.write_bytes(change(content))
        with opened(mode="r") as library:
            assert library.search("tower built", k=20) == wanted


def test_a_change_costs_its_own_passages_alone(opened, monkeypatch):
    """Neither is an index written for each, nor are the words of the others read."""
    written, read = [], []
    for index in (VectorIndex, WordIndex):
        save, add = index.save, index.add
        monkeypatch.setattr(index, "save", lambda self, *a, save=save, **k: written.append(1) or save(self, *a, **k))
        monkeypatch.setattr(index, "add", lambda self, ids, *a, add=add: read.append(len(ids)) or add(self, ids, *a))
    with opened() as library:
        for place in PLACES:
            read.clear()
            n_passages = library.add(document(place)).n_passages
            assert library.search(f"{place} built", k=1)[0].source == f"{place}.txt"
            assert sum(read) == 2 * n_passages
        library.remove("mill.txt")
        assert not any("mill" in passage.text for passage in library.search("mill built", k=50))
        assert written == []
    assert written == [1, 1]
    read.clear()
    with opened(mode="r") as library:
        assert library.search("tower built", k=1)[0].source == "tower.txt"
    assert sum(read) == 0  # both are read from their files
    assert written == [1, 1]


def test_the_indices_are_written_now_and_then_too(opened, monkeypatch):
    monkeypatch.setattr("extemb_core.library.library._MIN_UNSAVED", 10)
    sizes = []
    save = VectorIndex.save
    monkeypatch.setattr(VectorIndex, "save", lambda self, *a, **k: sizes.append(len(self.ids)) or save(self, *a, **k))
    with opened() as library:
        for place in PLACES:
            library.add(document(place))
        assert sizes == [12, 24]


def test_an_index_that_cannot_be_written_loses_nothing(opened, tmp_path, caplog):
    with opened() as library:
        (tmp_path / "lib" / INDEX_FILE).mkdir()
        library.add(document("mill"))
    assert "the documents are kept, and their index was not written" in caplog.text
    with opened(mode="r") as library:
        assert library.search("mill", k=1)[0].source == "mill.txt"


def test_an_index_for_more_passages_than_there_are(opened):
    with opened(index="IVF256,Flat") as library:
        library.add([document(place) for place in PLACES])
        assert library.search("mill built", k=1)[0].source == "mill.txt"
    with opened(index="IVF256,Flat", mode="r") as library:
        assert library.search("tower built", k=1, hybrid=False)[0].source == "tower.txt"


def test_an_index_that_cannot_be_is_refused_before_anything_is_written(opened):
    with opened(index="Tree") as library:
        with pytest.raises(ConfigError, match="index='Tree' is not an index that FAISS builds"):
            library.add(document("mill"))
        assert len(library) == len(library.store) == 0


def test_an_index_that_takes_no_more_is_made_anew(opened, monkeypatch):
    whole = VectorIndex.add

    def once(self, ids, vectors):
        if self.ids and len(ids):
            raise ConfigError("it takes no more vectors")
        whole(self, ids, vectors)

    monkeypatch.setattr(VectorIndex, "add", once)
    with opened() as library:
        library.add([document("mill")])
        assert library.search("mill")
        library.add([document("bridge")])
        assert library.search("bridge", k=1, hybrid=False)[0].source == "bridge.txt"


@pytest.mark.parametrize("hybrid", [False, True])
def test_the_indices_of_a_later_state_are_not_those_of_a_database_that_comes_from_a_copy(opened, tmp_path, hybrid):
    with opened() as library:
        library.add([document("mill")])
    copied = (tmp_path / "lib" / "data.mdb").read_bytes()
    with opened() as library:
        library.add([document("bridge")])
    (tmp_path / "lib" / "data.mdb").write_bytes(copied)  # as the error of a damaged one advises
    with opened() as library:
        library.add([document("tower")])  # its passages get the ids that the bridge's had
        found = library.search("When was the tower built?", k=20, hybrid=hybrid)
        assert found[0].source == "tower.txt"
    for file in (INDEX_FILE, WORDS_FILE):
        (tmp_path / "lib" / file).unlink()
    with opened(mode="r") as library:
        assert library.search("When was the tower built?", k=20, hybrid=hybrid) == found


def test_the_index_files_of_an_opening_serve_the_next(opened, monkeypatch):
    with opened() as library:
        library.add([document(place) for place in PLACES])
        wanted = library.search("tower built", k=20)
    loaded = []
    for kind in (VectorIndex, WordIndex):
        load = kind.load
        monkeypatch.setattr(
            kind, "load", lambda *args, load=load, **how: loaded.append(load(*args, **how)) or loaded[-1]
        )
    with opened(mode="r") as library:
        assert library.search("tower built", k=20) == wanted
    assert [type(index) for index in loaded] == [VectorIndex, WordIndex]


@pytest.mark.parametrize("hybrid", [False, True])
def test_an_index_that_ctrl_c_left_half_changed_is_not_gone_on_with(opened, monkeypatch, hybrid):
    def half_of_vectors(self, ids, vectors):
        self._index.add_with_ids(vectors[:2], np.asarray(ids[:2]))  # FAISS has them, and nobody knows of it
        raise KeyboardInterrupt

    def half_of_words(self, ids, texts):
        self._postings["built"][0].append(0)  # and its count is not there yet
        raise KeyboardInterrupt

    with opened(index="HNSW32") as library:
        library.add([document(place) for place in PLACES[:2]])
        library.search("tower built")
        library.add([document(place) for place in PLACES[2:]])
        with monkeypatch.context() as patch:
            patch.setattr(*((WordIndex, "add", half_of_words) if hybrid else (VectorIndex, "add", half_of_vectors)))
            with pytest.raises(KeyboardInterrupt):
                library.search("tower built", hybrid=hybrid)
        found = library.search("tower built", k=20, hybrid=hybrid)
    with opened(index="HNSW32", mode="r") as library:
        assert found == library.search("tower built", k=20, hybrid=hybrid)
        assert len({passage.id for passage in found}) == len(found) > 10


def test_an_index_is_trained_on_what_a_library_has_become(opened):
    with opened(index="SQ8") as library:
        library.add(document("mill"))
    with opened(index="SQ8") as library:
        library.add([document(place) for place in PLACES])
        assert library.search("tower built", k=1, hybrid=False)[0].source == "tower.txt"
        assert library._vectors._trained_on == len(library._vectors.ids) > len(PLACES)


def test_an_empty_library_has_an_index_of_any_kind(opened):
    with opened(index="IVF4,PQ8") as library:
        assert library.search("mill") == []
        library.add([document("mill")])
        assert library.search("mill", k=1)[0].source == "mill.txt"


def by_letters(texts):
    return [[text.count(letter) + 1 for letter in "abcd"] for text in texts]


def test_of_two_encoders_of_a_new_library_the_first_that_adds_stays(opened):
    with opened() as library, opened(encoder=by_letters) as other:
        library.add([document("mill")])
        for call in (lambda: other.add([document("bridge")]), lambda: other.search("mill")):
            with pytest.raises(MismatchError, match=r"'callable:by_words' of width 64, and this is .* of width 4"):
                call()
        assert library.search("mill", k=1)[0].source == "mill.txt"


def test_an_encoder_is_not_asked_about_nothing(opened):
    with opened(encoder=by_letters) as library:
        library.add([Document("", title="Nothing")])
        library.add([document("mill")])
        assert library.search("mill", k=1)[0].source == "mill.txt"


def test_another_process_sees_what_this_one_adds(opened):
    with opened() as library, opened() as other:
        library.add([document("mill")])
        assert other.search("mill", k=1)[0].source == "mill.txt"
        library.add([document("bridge")])
        assert other.search("bridge", k=1)[0].source == "bridge.txt"


def test_embeddings_that_another_process_drops_before_they_are_used_are_made_again(opened, monkeypatch):
    mill = document("mill")
    with opened() as library, opened() as other:
        library.add([mill])
        write = library.store.write

        def late(work):
            other.remove("mill.txt")
            return write(work)

        monkeypatch.setattr(library.store, "write", late)
        added = library.add([Document(mill.text, title="copy.txt")])
        assert added.compressed_tokens > 0
        assert [record["source"] for record in library.documents()] == ["copy.txt"]
        assert library.verify().clean


def test_a_library_stays_with_its_encoder_and_needs_an_lm_to_add(opened, tmp_path):
    with opened() as library:
        library.add([document("mill")])
    with pytest.raises(MismatchError, match="was made with the text encoder 'callable:by_words'"):
        opened(encoder=lambda texts: [[1.0, 2.0]] * len(texts))
    with Library(tmp_path / "lib", mode="r") as library:  # what needs no encoder needs none
        assert [record["source"] for record in library.documents()] == ["mill.txt"]
    with Library(tmp_path / "lib", encoder=by_words, mode="r") as library:
        assert library.search("mill", k=1)[0].source == "mill.txt"
        for call in (lambda: library.add(["text"]), lambda: library.ask("What?")):
            with pytest.raises(ConfigError, match="was opened without an LLM"):
                call()
    with opened(mode="r") as library:
        with pytest.raises(StoreError, match="was opened to read"):
            library.add([document("tower")])
        for call, message in (
            (lambda: library.search(" "), "the question is empty"),
            (lambda: library.search({"question": "a"}), "the question is a dict"),
            (lambda: library.search("a", k=0), "k=0 is not a whole number of at least 1"),
        ):
            with pytest.raises(ConfigError, match=message):
                call()
    with pytest.raises(ConfigError, match="passage_tokens=0"):
        opened(passage_tokens=0)


def test_an_empty_library_and_an_empty_document(opened):
    with opened() as library:
        assert library.search("anything") == []
        assert library.add([Document("", title="Nothing")]).added == 1
        assert library.text("Nothing") == ""
        assert library.search("anything") == []
        assert library.add([]).added == 0
        assert library.ask("What?", max_new_tokens=2).context == ()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_searches_asks_and_adds_though_the_parent_had_more_threads(opened, lm):
    faiss = pytest.importorskip("faiss")
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    searching, may_end = threading.Event(), threading.Event()

    def slow(texts):  # as long as the fork waits: what a thread has half done is not for the child
        if may_end.is_set():
            return by_words(texts)
        searching.set()
        may_end.wait(0.2)
        return by_words(texts)

    try:
        with opened() as library:
            library.add([document(place) for place in PLACES])
            library.ask("mill?", max_new_tokens=2)
            torch.randn(600, 600) @ torch.randn(600, 600)  # with both threads
            library.encoder._function = slow
            other = threading.Thread(target=library.search, args=("bridge",))
            other.start()
            searching.wait()
            child = os.fork()
            may_end.set()
            if not child:
                code = 1
                try:
                    assert library.search("mill", k=1)[0].source == "mill.txt"
                    library.add([Document("The ship is new. " * 40, title="Ship")])
                    library.ask("Which ship?", max_new_tokens=2)
                    code = 0
                finally:
                    os._exit(code)
            other.join()
            deadline = time.monotonic() + 60
            while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
                time.sleep(0.01)
            if not ended[0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            assert ended == (child, 0)
            assert library.search("ship", k=1)[0].source == "Ship"
            assert torch.get_num_threads() == 2  # the parent keeps its own
    finally:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    "kills", [3, pytest.param(int(os.environ.get("EXTEMB_SOAK", "6")), marks=pytest.mark.soak, id="soak")]
)
def test_killed_while_adding_the_next_call_finishes(opened, lm, tmp_path, monkeypatch, kills):
    monkeypatch.setattr("extemb_core.library.library._BATCH_TOKENS", 100)
    documents = [document(f"{place}{number}") for place in PLACES for number in range(8)]
    draw = random.Random(3)
    for _ in range(kills):
        child = os.fork()
        if not child:
            try:
                with opened() as library:
                    library.add(documents)
                    library.remove([draw.choice(documents).source for _ in range(5)])
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if Path(tmp_path / "lib").exists():
            with opened() as library:
                assert library.store.verify().clean
                for record in library.documents():  # whole ones alone
                    assert library.text(record["source"]) == document(record["source"].removesuffix(".txt")).text
    with opened() as library:
        library.add(documents)
        assert len(library) == 48
        found = library.search("tower5 built", k=1)
        assert found[0].source == "tower5.txt"
        assert library.store.verify().clean
