"""A full map: it is grown and what was begun is done anew, and a process that comes later reads all of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import lmdb
import numpy as np
import pytest
from made import FINGERPRINT, compressed
from retrieval_encoder import by_words

from extemb_core import Document
from extemb_core.errors import StoreError
from extemb_core.frameworks.refs import Refs
from extemb_core.library.catalog import Catalogue, Split
from extemb_core.library.encoders import as_encoder
from extemb_core.store.lmdb_env import Environment
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import export_store, import_shards

OTHER = "77" * 16
MAP_BYTES = 2**20
# In bytes, next to a map of 1 MiB: 0.2, 1.5 and 6.
SMALL, LARGE, HUGE = ({"n_tokens": n, "width": 64, "chunk_size": 2**20} for n in (6_000, 48_000, 200_000))

READER = """
import hashlib, json, sys
from extemb_core.store.store import EmbeddingStore
for line in sys.stdin:
    try:
        with EmbeddingStore.open(line.strip(), "r") as store:
            assert store.verify().clean, store.verify()
            texts = [store.finest(*item) for item in store.items()]
        answer = sorted([text.ref, text.fingerprint, text.ratio, text.chunk_size, text.ratios,
                         hashlib.sha256(text.embeddings.numpy()).hexdigest()] for text in texts)
    except Exception as error:
        answer = repr(error)
    print(json.dumps(answer), flush=True)
"""


def told(*texts):
    """What another process should say of a store of these."""
    return sorted([text.ref, text.fingerprint, text.ratio, text.chunk_size, list(text.ratios),
                   hashlib.sha256(text.embeddings.half().float().numpy()).hexdigest()] for text in texts)  # fmt: skip


@pytest.fixture(scope="module")
def elsewhere():
    """Reads a store in a process that has never written, nor was forked from one."""
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def read(folder):
            print(folder, file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield read


@pytest.fixture
def grown(monkeypatch):
    """Every growth of a map, which is small at first."""
    monkeypatch.setattr("extemb_core.store.lmdb_env._FIRST_MAP_BYTES", MAP_BYTES)
    sizes = []
    grow = Environment._grow
    monkeypatch.setattr(Environment, "_grow", lambda self: (sizes.append(self._env.info()["map_size"]), grow(self)))
    return sizes


@pytest.mark.parametrize(
    ("texts", "least"),
    [
        ([compressed("a", **LARGE)], 1),
        ([compressed("a", **HUGE)], 3),
        ([compressed(at, **SMALL) for at in range(30)], 2),  # of two blocks
        ([compressed("a", **SMALL), compressed("b", **LARGE), compressed("a", fingerprint=OTHER, **SMALL)], 1),
    ],
    ids=["one large document", "one that is larger than the grown map", "several at once", "of two embedders"],
)
def test_a_first_put_that_is_larger_than_the_map_is_read_by_later_processes(tmp_path, elsewhere, grown, texts, least):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        assert len(grown) >= least
        store.put(compressed("later", **SMALL))
    assert elsewhere(tmp_path / "s") == told(*texts, compressed("later", **SMALL))


def test_a_second_embedders_first_put_that_does_not_fit_is_read_by_later_processes(tmp_path, elsewhere, grown):
    texts = [compressed("a", **SMALL)]
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        for at, fingerprint in enumerate((OTHER, "99" * 16, "aa" * 16)):
            texts.append(compressed("a", fingerprint=fingerprint, **(HUGE | {"width": 64 << at})))
            grown.clear()
            store.put(texts[-1])
            assert grown
    assert elsewhere(tmp_path / "s") == told(*texts)


def test_an_import_that_is_larger_than_the_map_is_read_by_later_processes(tmp_path, elsewhere, grown):
    texts = [compressed(at, **LARGE) for at in range(3)] + [compressed("a", fingerprint=OTHER, **HUGE)]
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        export_store(store, tmp_path / "out")
    grown.clear()
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        import_shards(copy, tmp_path / "out")
    assert len(grown) > 1
    assert elsewhere(tmp_path / "copy") == told(*texts)


def test_a_collection_that_does_not_fit_the_map_leaves_everything_to_be_read(tmp_path, elsewhere, grown):
    texts = [compressed(at, **SMALL) for at in range(30)]
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        store.remove([text.ref for text in texts[::9]])
    grown.clear()
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.gc()
    assert grown
    kept = [text for at, text in enumerate(texts) if at % 9]
    assert elsewhere(tmp_path / "s") == told(*kept)


def fill(folder):
    with EmbeddingStore.open(folder) as store:
        store.put(compressed("a"), compressed("b", n_tokens=300), compressed("a", fingerprint=OTHER, width=16))
        store.put(compressed("c", ratio=8))


def put(store):
    store.put(compressed("a", ratio=2), compressed("d"), compressed("c"), compressed("d", fingerprint="99" * 16))


def remove(store):
    store.remove([compressed("a").ref, compressed("c").ref])


def collect(store):
    store.gc(keep=[FINGERPRINT])


def hand_out(store):
    Refs(store).put(Document("Words."), Document("More words."))


def catalogue(store):
    catalogue = Catalogue(store.environment)
    for year in (1820, 1999):
        document = Document(f"The mill. It is of {year}.", metadata={"source": "mill.txt"})
        split = Split(document, [(0, 9), (10, len(document.text))], [document.text[:9], document.text[10:]])
        store.write(
            lambda transaction, split=split: catalogue.put(
                transaction, [split], np.ones((2, 64), "<f2"), FINGERPRINT, 2, as_encoder(by_words)
            )
        )


def content(folder):
    """All rows of all databases, but the secret."""
    with EmbeddingStore.open(folder, "r") as store:
        rows = {name: dict(store.environment.items(name)) for name in store.environment._databases}
    rows["settings"].pop(b"refs", None)
    return rows


class Full:
    """A transaction in which the map is full from some change on."""

    def __init__(self, transaction, after):
        self._transaction, self._after = transaction, after

    def __getattr__(self, name):
        if name in ("put", "delete"):
            self._after -= 1
            if self._after < 0:
                raise lmdb.MapFullError("here")
        return getattr(self._transaction, name)


@pytest.mark.parametrize("work", [put, remove, collect, hand_out, catalogue])
def test_wherever_in_a_change_the_map_is_full_the_change_is_the_same(tmp_path, monkeypatch, work):
    fill(tmp_path / "whole")
    with EmbeddingStore.open(tmp_path / "whole") as store:
        work(store)
    begun = Environment._begun
    after, stumbled = 0, True
    while stumbled:
        fill(tmp_path / str(after))
        stumbled = False

        @contextmanager
        def once_full(self, *, write, after=after):
            nonlocal stumbled
            with begun(self, write=write) as transaction:
                try:
                    yield Full(transaction, after) if write and not stumbled else transaction
                except lmdb.MapFullError:
                    stumbled = True
                    raise

        with EmbeddingStore.open(tmp_path / str(after)) as store, monkeypatch.context() as patched:
            patched.setattr(Environment, "_begun", once_full)
            work(store)
        assert content(tmp_path / str(after)) == content(tmp_path / "whole")
        after += 1
    assert after > 3


class Cramped:
    """An environment whose map cannot be resized."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name):
        return getattr(self._env, name)

    def set_mapsize(self, size):
        raise lmdb.MemoryError("Cannot allocate memory")


def test_a_map_that_cannot_grow_is_an_error_and_loses_nothing(tmp_path, elsewhere, grown):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a", **SMALL))
        store.environment._env = Cramped(store.environment._env)
        with pytest.raises(StoreError, match=r"/s could not grow to 2,097,152 bytes \(Cannot .*; nothing .*ulimit -v"):
            store.put(compressed("b", **LARGE))
        assert store.finest(compressed("a").ref, FINGERPRINT) is not None
        store.put(compressed("b", **LARGE))  # in a new map: LMDB gives the old one up before it asks for more
    assert elsewhere(tmp_path / "s") == told(compressed("a", **SMALL), compressed("b", **LARGE))


def test_a_change_that_ctrl_c_ends_while_it_waits_to_grow_the_map_holds_nobody_up(tmp_path, grown, monkeypatch):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a", **SMALL))
        gate, environment = store.environment._gate, store.environment
        waited = gate.wait_for

        def interrupted(holds):  # as another thread reads
            if environment._waiting:
                raise KeyboardInterrupt
            return waited(holds)

        with monkeypatch.context() as patch:
            patch.setattr(gate, "wait_for", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.put(compressed("b", **LARGE))
        assert (environment._open, environment._waiting) == (0, 0)
        store.put(compressed("b", **LARGE))
        assert len(store) == 2


def test_a_map_that_cannot_follow_another_process_is_an_error(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"))

        class Outgrown(Cramped):
            def begin(self, **settings):
                raise lmdb.MapResizedError("here")

        store.environment._env = Outgrown(store.environment._env)
        with pytest.raises(StoreError, match="could not grow to the size that another process gave it"):
            store.put(compressed("b"))
        store.put(compressed("b"))


def test_a_file_that_another_process_makes_larger_while_it_is_opened(tmp_path, monkeypatch):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"))
    begin, outgrown = lmdb.open, [lmdb.MapResizedError("here")]

    def opened(*args, **settings):
        if outgrown:
            raise outgrown.pop()
        return begin(*args, **settings)

    monkeypatch.setattr(lmdb, "open", opened)
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert len(store) == 1
    assert not outgrown


def test_a_change_that_failed_is_not_remembered(tmp_path, elsewhere):
    def failing(transaction):
        store._blocks.put(transaction, [(b"k" * 32, compressed("lost"), b"", "float16")])
        raise KeyError("in the middle")

    with EmbeddingStore.open(tmp_path / "s") as store:
        with pytest.raises(KeyError):
            store.environment.write(failing)  # as another thread sees it before the first has noticed
        store.put(compressed("a"))
    assert elsewhere(tmp_path / "s") == told(compressed("a"))


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb"])
@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_store_is_never_written_through_a_link(tmp_path, name, mode):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"))
    (tmp_path / "s" / name).replace(tmp_path / "elsewhere")
    (tmp_path / "s" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match=f"{name} is a link, and no store has one"):
        EmbeddingStore.open(tmp_path / "s", mode)


def removed(folder):
    shutil.rmtree(folder)


def moved(folder):
    folder.rename(folder.with_name("backup"))


def replaced(folder):
    """As a copy is restored: another file under the name, the lock beside it the same."""
    shutil.copy(folder / "data.mdb", folder / "copy")
    (folder / "copy").replace(folder / "data.mdb")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps what is open where it is")
@pytest.mark.parametrize(("away", "left"), [(removed, 0), (moved, 0), (replaced, 1)])
def test_a_folder_that_goes_while_it_is_open_takes_no_later_documents_with_it(tmp_path, elsewhere, away, left):
    first = EmbeddingStore.open(tmp_path / "s")
    first.put(compressed("a"))
    away(tmp_path / "s")
    for use in (lambda store: store.put(compressed("b")), EmbeddingStore.stats):
        with pytest.raises(StoreError, match="was removed, moved or replaced while it was open; open it again"):
            use(first)
    with EmbeddingStore.open(tmp_path / "s") as second:
        assert len(second) == left
        second.put(compressed("c"))
        for use in (len, lambda store: store.put(compressed("b"))):
            with pytest.raises(StoreError, match="/s was removed, moved or replaced"):
                use(first)
        first.close()  # which lets go of its own alone
        with EmbeddingStore.open(tmp_path / "s") as third:
            assert third.environment is second.environment
        if away is moved:
            with EmbeddingStore.open(tmp_path / "backup") as backup:
                backup.put(compressed("d"))
            assert elsewhere(tmp_path / "backup") == told(compressed("a"), compressed("d"))
    assert elsewhere(tmp_path / "s") == told(*[compressed("a")][:left], compressed("c"))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps what is open where it is")
def test_a_moved_folder_is_opened_where_it_is_once_in_a_process(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"))
        moved(tmp_path / "s")
        with EmbeddingStore.open(tmp_path / "backup") as backup:
            backup.put(compressed("b"))
            assert len(backup) == 2
            with pytest.raises(StoreError, match="/s was removed, moved or replaced"):
                len(store)
        assert not (tmp_path / "s").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps what is open where it is")
@pytest.mark.parametrize("away", [removed, replaced])
def test_what_a_fork_closes_is_not_opened_anew_where_its_folder_went(tmp_path, away):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"))
        with store.environment._gate:
            store.environment._disconnect()  # as before a fork
        held = (tmp_path / "s" / "data.mdb").open("rb")  # its inode is not given to another
        away(tmp_path / "s")
        (tmp_path / "s").mkdir(exist_ok=True)
        before = sorted((tmp_path / "s").iterdir())
        with held, pytest.raises(StoreError, match="/s was removed, moved or replaced"):
            len(store)
        assert sorted((tmp_path / "s").iterdir()) == before
