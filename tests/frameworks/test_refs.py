"""Refs: they find their documents, in this process or a later one, and nobody can make one up."""

from __future__ import annotations

import json
import logging
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from extemb_core import Document, EmbeddingStore
from extemb_core.documents import text_ref
from extemb_core.errors import DocumentError, StoreCorruptError
from extemb_core.frameworks.refs import MARK, Refs, _name, _seal
from extemb_core.store.base import MemoryStore

MILL = Document("The mill was built in 1820.", title="Mill", metadata={"source": "mill.txt", "page": 3})
TOWER = Document("The tower is new.")


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    if request.param == "memory":
        yield MemoryStore()
    else:
        with EmbeddingStore.open(tmp_path / "s") as opened:
            yield opened


def test_a_prompt_with_marks_is_its_texts_and_documents(store):
    refs = Refs(store)
    mill, tower = refs.put(MILL, TOWER)
    assert MARK.fullmatch(mill)
    found = refs.find(f"Read {mill}\n\n{tower}{mill} and answer.")
    assert [getattr(part, "text", part) for part in found] == [
        "Read ", MILL.text, "\n\n", TOWER.text, MILL.text, " and answer."]  # fmt: skip
    assert (found[1].ref, found[1].title, found[1].source) == (MILL.ref, "Mill", "mill.txt")
    assert (found[3].title, found[3].source) == (None, TOWER.ref)
    assert refs.find("no marks") == ["no marks"]
    assert refs.find("") == []
    assert refs.put(MILL) == [mill]
    assert refs.put() == []


def test_documents_of_one_text_are_cited_apart(store):
    refs = Refs(store)
    documents = [Document(MILL.text, title=title, metadata={"source": source})
                 for title in ("Mill", None) for source in ("a.txt", "b.txt")]  # fmt: skip
    marks = refs.put(*documents)
    assert len(set(marks)) == 4
    refs.put(documents[0])
    for mark, document in zip(marks, documents, strict=True):
        (found,) = refs.find(mark)
        assert (found.ref, found.title, found.source) == (MILL.ref, document.title, document.source)


def test_what_looks_like_a_ref_is_text(store, caplog):
    refs = Refs(store)
    forged = f"[[{MILL.ref}:{'0' * 32}]]"
    assert refs.find(forged) == [forged]  # before anything was put
    (mark,) = refs.put(MILL)
    foreign = Refs(MemoryStore()).put(MILL)[0]
    swapped = mark.replace(_name(MILL), _name(TOWER))
    caplog.set_level(logging.WARNING)
    caplog.clear()
    for text in (forged, foreign, swapped, mark[:-1], mark.upper(), f"ext:{MILL.ref}"):
        assert refs.find(text) == [text]
    assert sum("was not made by this store" in record.message for record in caplog.records) == 3


def test_a_document_behind_a_mark_is_found_by_a_later_process_and_by_readers(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        (mark,) = Refs(store).put(MILL)
    with EmbeddingStore.open(tmp_path / "s") as store:
        assert Refs(store).find(mark)[0].source == "mill.txt"
        assert Refs(store).put(MILL) == [mark]
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        refs = Refs(store)
        (own,) = refs.put(TOWER)  # in memory
        assert [part.text for part in refs.find(mark + own)] == [MILL.text, TOWER.text]
        assert len(Refs(store).find(own)) == 1
        assert isinstance(Refs(store).find(own)[0], str)


def test_a_store_from_before_there_were_refs_can_be_read(tmp_path):
    with EmbeddingStore.open(tmp_path / "s"):
        pass
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert Refs(store).find("words") == ["words"]
        store.environment._databases["handed"] = None
        assert Refs(store)._keepers[1].get(MILL.ref) is None


def test_a_document_that_is_gone_or_damaged_is_an_error(store, monkeypatch):
    refs = Refs(store)
    (mark,) = refs.put(MILL)
    monkeypatch.setattr(refs._keepers[0], "get", lambda ref: None)
    with pytest.raises(DocumentError, match="not kept any more; compress the document again"):
        refs.find(mark)


@pytest.mark.parametrize("value", [b"words", "other", "bomb"])
def test_what_is_read_is_what_was_put(tmp_path, value, monkeypatch):
    monkeypatch.setattr("extemb_core.frameworks.refs._MAX_BYTES", 1000)
    bomb = zlib.compress(json.dumps(["a" * 10**6, None, "a"]).encode())
    other = zlib.compress(json.dumps(["other text", None, "a"]).encode())
    with EmbeddingStore.open(tmp_path / "s") as store:
        refs = Refs(store)
        (mark,) = refs.put(MILL)
        handed = store.environment.database("handed")
        key = bytes.fromhex(_name(MILL).removeprefix("ext:"))
        store.write(lambda txn: txn.put(key, {"other": other, "bomb": bomb}.get(value, value), db=handed))
        with pytest.raises(StoreCorruptError, match="add the document again"):
            refs.find(mark)
        with pytest.raises(DocumentError, match="at most 1,000 are handed; split it"):
            refs.put(Document("a" * 1001))


def test_memory_is_bounded_and_threads_may_share(monkeypatch):
    monkeypatch.setattr("extemb_core.frameworks.refs._MAX_CHARS", 1000)
    refs = Refs(MemoryStore())
    documents = [Document(f"Text {number}. " * 10) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        marks = list(pool.map(lambda document: refs.put(document)[0], documents))
    kept = refs._keepers[0]
    assert 500 < kept._chars <= 1000
    assert kept._chars == sum(len(document.text) for document in kept._documents.values())
    last = next(reversed(kept._documents))
    assert refs.find(marks[[*map(_name, documents)].index(last)])[0].text == kept._documents[last].text
    assert text_ref(documents[0].text) == documents[0].ref


def test_a_mark_may_say_the_finest_ratio_and_its_seal_covers_it(store, caplog):
    refs = Refs(store)
    plain, limited = refs.put(MILL, MILL, finest=[None, 8])
    assert MARK.fullmatch(limited)
    assert limited != plain
    found = refs.find(f"{limited} or {plain}")
    assert [(part.text, part.finest) for part in found if part != " or "] == [(MILL.text, 8), (MILL.text, None)]
    forged = limited.replace("/8:", "/2:")
    with caplog.at_level(logging.WARNING):
        assert refs.find(forged) == [forged]
    assert "looks like a ref" in caplog.text


SPANS = ((0, 4, "dropped"), (4, 8, 2), (8, 11, "raw"))


def test_a_mark_may_carry_spans_which_are_part_of_its_name(store):
    refs = Refs(store)
    plain, spanned, limited = refs.put(MILL, MILL, MILL, finest=[None, None, 8], spans=[None, SPANS, SPANS])
    (other,) = refs.put(MILL, spans=[SPANS[:2]])
    (cited,) = refs.put(Document(MILL.text), spans=[SPANS])
    marks = [plain, spanned, limited, other, cited]
    assert len(set(marks)) == 5
    assert all(map(MARK.fullmatch, marks))
    found = refs.find("".join(marks))
    assert [(part.spans, part.finest) for part in found] == [
        (None, None), (SPANS, None), (SPANS, 8), (SPANS[:2], None), (SPANS, None)]  # fmt: skip
    assert [(part.text, part.source) for part in found] == [(MILL.text, "mill.txt")] * 4 + [(MILL.text, MILL.ref)]
    assert refs.put(MILL, spans=[SPANS]) == [spanned]
    assert refs.put(found[1]) == [spanned]
    assert refs.put(MILL) == [plain]


def test_a_text_that_is_planned_again_and_again_is_in_memory_once(monkeypatch):
    monkeypatch.setattr("extemb_core.frameworks.refs._MAX_NAMES", 8)
    refs = Refs(MemoryStore())
    marks = [refs.put(MILL, spans=[((0, at, "raw"), (at, 11, 2))])[0] for at in range(1, 11)]
    assert refs._keepers[0]._chars == len(MILL.text)
    with pytest.raises(DocumentError, match="not kept any more"):
        refs.find(marks[0])
    (found,) = refs.find(marks[9])
    assert (found.spans, found.source, found.metadata["page"]) == (((0, 10, "raw"), (10, 11, 2)), "mill.txt", 3)
    assert refs.find(refs.put(MILL)[0])[0].spans is None


def test_spans_are_found_by_a_later_process_and_their_text_is_on_disk_once(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        marks = [Refs(store).put(MILL, spans=[(*SPANS[:2], (8, at, "raw"))])[0] for at in range(9, 12)]
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        found = [Refs(store).find(mark)[0] for mark in marks]
        assert [(one.text, one.title, one.source) for one in found] == [(MILL.text, "Mill", "mill.txt")] * 3
        assert [one.spans[2] for one in found] == [(8, at, "raw") for at in range(9, 12)]
        with store.environment.read() as transaction:
            assert transaction.stat(store.environment.database("handed"))["entries"] == 4


def test_spans_that_are_not_those_that_were_put_are_refused(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        refs = Refs(store)
        mark, other = refs.put(MILL, TOWER, spans=[SPANS, SPANS])
        handed = store.environment.database("handed")
        (found,) = refs.find(mark)
        name, plain, tower = _name(found), _name(MILL), _name(TOWER)

        def put(name, values):
            key, data = bytes.fromhex(name.removeprefix("ext:")), zlib.compress(json.dumps(values).encode())
            store.write(lambda transaction: transaction.put(key, data, db=handed))

        wrong = [[plain, [*SPANS[:2], (8, 11, 2)]], [tower, SPANS], [name, SPANS], [plain, "spans"], [plain, None],
                 [plain], [plain, [[0, 11]]], [MILL.text, "Mill", "mill.txt"], {"name": plain}, 3]  # fmt: skip
        for values in wrong:
            put(name, values)
            with pytest.raises(StoreCorruptError, match="add the document again"):
                refs.find(mark)
        put(name, [plain, SPANS])
        assert refs.find(mark) == [found]
        # The name that refs had before version 0.2 said nothing of titles, and nothing of spans either.
        put(MILL.ref, [MILL.text, "Mill", "mill.txt"])
        old = f"[[{MILL.ref}:{_seal(refs._keepers[0].secret(), MILL.ref)}]]"
        assert refs.find(old)[0].source == "mill.txt"
        put(MILL.ref, [plain, SPANS])
        with pytest.raises(StoreCorruptError, match="is not what was put"):
            refs.find(old)
        store.write(lambda transaction: transaction.delete(bytes.fromhex(tower.removeprefix("ext:")), db=handed))
        with pytest.raises(DocumentError, match="not kept any more"):
            refs.find(other)
