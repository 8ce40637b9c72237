"""A store whose last pages are free, and so were never written, is whole; one that was cut is refused."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from made import compressed
from processes import Process
from retrieval_encoder import by_words
from tiny import shared_embedder, tiny_llm

from extemb_core import Document, ExtensibleLM
from extemb_core.errors import StoreCorruptError
from extemb_core.library.library import Library
from extemb_core.store.free_pages import is_cut
from extemb_core.store.lmdb_env import open_environment
from extemb_core.store.store import EmbeddingStore

PAGE = 4096

# Cut page by page: what is not refused is read, all of it, which would end a process where a page is missing.
CUTTER = """
import sys
from pathlib import Path
from extemb_core.errors import StoreCorruptError
from extemb_core.store.lmdb_env import DATABASES, open_environment
file = Path(sys.argv[1])
expected, whole, answers = int(sys.argv[2]), file.read_bytes(), ""
for end in range(len(whole), 0, -int(sys.argv[3])):
    file.write_bytes(whole[:end])
    try:
        environment = open_environment(file.parent, readonly=True)
    except StoreCorruptError:
        answers += "r"
        continue
    rows = [row for name in DATABASES for row in environment.items(name)]
    assert len(rows) == expected
    environment.close()
    answers += "w"
file.write_bytes(whole)
print(answers, flush=True)
"""


def ends_in_free_pages(environment):
    """Return whether the file is shorter than LMDB counts pages."""
    with environment.read():
        last, size = environment._env.info()["last_pgno"], environment._env.stat()["psize"]
    return (last + 1) * size > (environment.folder / "data.mdb").stat().st_size


@pytest.mark.parametrize(("put", "removed"), [(200, 199), (1000, 999), (30, 30)])
def test_a_store_is_opened_however_much_was_removed(tmp_path, put, removed):
    texts = [compressed(str(at), n_tokens=1) for at in range(put)]
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        store.remove([text.ref for text in texts[:removed]])
        short = ends_in_free_pages(store.environment)
    assert short or put == 30  # or this tests nothing
    for mode in ("r", "a"):
        with EmbeddingStore.open(tmp_path / "s", mode) as store:
            assert len(store) == store.verify().n_documents == put - removed
            assert store.verify().clean
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        assert len(store) == put
        assert store.verify().clean


def test_a_library_is_opened_however_much_was_removed(tmp_path):
    documents = [Document(f"Ship {at} sailed.", metadata={"source": str(at)}) for at in range(300)]
    llm = tiny_llm()
    with Library(tmp_path / "l", ExtensibleLM(llm, shared_embedder(llm)), encoder=by_words) as library:
        library.add(documents, show_progress=False)
        library.remove([str(at) for at in range(299)])
        assert ends_in_free_pages(library.store.environment)
    with Library(tmp_path / "l", encoder=by_words) as library:
        assert [record["source"] for record in library.documents()] == ["299"]
        assert library.verify().clean


def filled(folder: Path, n_kept: int, value_bytes: int, n_removed: int, n_transactions: int) -> int:
    """Make an environment; while another thread reads, pages that are given back are listed for each transaction."""
    environment = open_environment(folder, readonly=False)
    keys = [b"%06d" % at for at in range(n_kept + n_removed)]

    def put(transaction):
        for key in keys:
            transaction.put(key, key * (value_bytes // 6), db=environment.database("entries"))

    def remove(transaction, some):
        for key in some:
            transaction.delete(key, db=environment.database("entries"))

    environment.write(put)
    goes_on = threading.Event()
    reads = threading.Event()

    def read():
        with environment.read():
            reads.set()
            goes_on.wait()

    reader = threading.Thread(target=read)
    reader.start()
    reads.wait()
    step = -(-n_removed // n_transactions)
    for start in range(n_kept, n_kept + n_removed, step):
        environment.write(lambda transaction, start=start: remove(transaction, keys[start : start + step]))
    goes_on.set()
    reader.join()
    environment.close()
    return n_kept


@pytest.mark.skipif(os.name == "nt", reason="processes of POSIX")
@pytest.mark.parametrize(
    ("kept", "value_bytes", "removed", "transactions"),
    [
        (5, 60, 200, 1),
        (5, 9000, 400, 1),  # so many pages that their list has pages of its own
        (5, 9000, 300, 150),  # so many lists that their tree has branches
    ],
)
def test_what_is_missing_a_page_in_use_is_refused_and_what_is_not_is_read(
    tmp_path, kept, value_bytes, removed, transactions
):
    folder = tmp_path / "e"
    folder.mkdir()
    expected = filled(folder, kept, value_bytes, removed, transactions)
    step = max(PAGE, (folder / "data.mdb").stat().st_size // 60 // PAGE * PAGE)
    process = Process(CUTTER, folder / "data.mdb", str(expected), str(step))
    said, errors = process.communicate()
    assert process.returncode == 0, errors
    assert said.strip().startswith("w")
    assert "r" in said
    assert "rw" not in said  # what was refused is not whole where more is missing


def test_a_file_that_ends_in_free_pages_and_was_cut_is_refused(tmp_path):
    texts = [compressed(str(at), n_tokens=1) for at in range(200)]
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        store.remove([text.ref for text in texts[:199]])
        assert ends_in_free_pages(store.environment)
    file = tmp_path / "s" / "data.mdb"
    file.write_bytes(file.read_bytes()[: 4 * PAGE])
    for mode in ("r", "a"):
        with pytest.raises(StoreCorruptError, match="is truncated at 16,384 bytes"):
            EmbeddingStore.open(tmp_path / "s", mode)


@pytest.mark.parametrize(("kept", "cut"), [(0, False), (399, True)])
def test_a_missing_page_counts_where_it_is_in_use_and_not_where_it_is_free(tmp_path, kept, cut):
    """Where the list of free pages is whole, and on pages of its own: of the first or the last of many values."""
    environment = open_environment(tmp_path, readonly=False)

    def change(work):
        environment.write(lambda transaction: work(transaction, environment.database("entries")))

    change(lambda transaction, database: [
        transaction.put(b"%06d" % at, bytes(9000), db=database) for at in range(400)
    ] and None)  # fmt: skip
    change(lambda transaction, database: [
        transaction.delete(b"%06d" % at, db=database) for at in range(400) if at != kept
    ] and None)  # fmt: skip
    for at in range(4):  # the list moves to pages that are free, at the beginning
        change(lambda transaction, database, at=at: transaction.put(b"a", b"%d" % at, db=database))
    with environment.read() as transaction:
        state = transaction.id()
    environment.close()
    file = tmp_path / "data.mdb"
    assert not is_cut(file, state)
    last_used = 1202 if cut else 600  # of some 1,210 pages
    file.write_bytes(file.read_bytes()[: last_used * PAGE])
    assert is_cut(file, state) == cut
