"""What a library's catalogue gives back is what was put there or an error, whatever became of its file."""

from __future__ import annotations

import json

import pytest
from shelved import document

from extemb_core import Document, EmbeddingStore
from extemb_core.errors import ExtembError, StoreCorruptError

pytest.importorskip("faiss")


@pytest.mark.parametrize(
    "metadata", [{("a", 1): 2}, {"source": "a\udc80"}, {"of": {("a", 1): 2}}, {"nan": float("nan")}]
)
def test_metadata_that_json_cannot_hold(opened, metadata):
    mill = Document("The mill was built in 1820.", title="Mill", metadata=metadata)
    with opened() as library:
        assert library.add([mill]).added == 1
        assert library.add([mill]).unchanged == 1
        assert library.text(mill.source) == mill.text
        json.dumps([*library.documents()], allow_nan=False)


def damage(path, name, at, row=0):
    """Flip a bit of a row of a database."""
    with EmbeddingStore.open(path) as store:

        def work(transaction):
            key, value = [*store.environment.rows(transaction, name)][row]
            data = bytearray(value)
            data[at % len(data)] ^= 1 << at % 7
            transaction.put(bytes(key), bytes(data), db=store.environment.database(name))

        store.write(work)


def test_a_changed_text_is_never_quoted_and_the_original_brings_it_back(opened):
    mill = Document("The fee is 1000 euros, says the contract.", metadata={"source": "fee.txt"})
    with opened() as library:
        library.add([mill, document("bridge")])
        assert library.verify().clean
        row = [record["source"] for record in library.documents()].index("fee.txt")
        damage(library.path, "texts", 12, row)
        for read in (lambda: library.search("fee"), lambda: library.text("fee.txt"), lambda: library.ask("fee?")):
            with pytest.raises(StoreCorruptError, match=r"'fee.txt' is not what was written; add the document again"):
                read()
        assert library.store.verify().clean  # the embeddings are
        assert [("'fee.txt'" in problem) for problem in library.verify().problems] == [True]
        added = library.add([mill, document("bridge")])
        assert (added.updated, added.unchanged) == (1, 1)
        assert library.search("fee", k=1)[0].text == mill.text
        assert library.verify().clean
        damage(library.path, "texts", 12, row)
        assert library.remove("fee.txt") == 1
        assert library.verify().clean


@pytest.mark.parametrize("name", ["documents", "texts", "passages", "settings", "entries", "kinds", "blocks"])
def test_what_a_library_gives_back_is_what_was_put_there_or_an_error(opened, tmp_path, name):
    def read(library):
        passages = library.search("mill", k=9)
        found = {(passage.source, passage.title, passage.start, passage.text) for passage in passages}
        records = list(library.documents())
        return found, records, library.text("mill.txt"), library.ask("mill?", ratio=2, max_new_tokens=4).text

    with opened() as library:
        library.add([document("mill")])
        wanted = read(library)
    refused = 0
    for at in range(0, 160, 7):
        damage(tmp_path / "lib", name, at)
        try:
            with opened(mode="r") as library:
                assert read(library) == wanted
        except ExtembError:
            refused += 1
        damage(tmp_path / "lib", name, at)  # the bit is back
    with opened() as library:
        assert read(library) == wanted
    assert refused
