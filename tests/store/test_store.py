"""The store on disk: what was written or an error; the finest once; many openers; nothing silently new."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from made import FINGERPRINT, VERSION_1_FINGERPRINT, anchored, compressed, version_1

from extemb_core.errors import ConfigError, MismatchError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.store.base import missing_from
from extemb_core.store.maintenance import keys_in, move
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import import_shards


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def same(found, text, dtype=torch.float16):
    if text.entry_layer:
        scale = torch.where(text.norms > 0, text.norms, 1)[:, None]
        assert torch.equal(found.embeddings, (text.embeddings / scale).to(dtype).float() * scale)
        assert np.array_equal(found.anchors, text.anchors)
        assert all(torch.equal(getattr(found, n), getattr(text, n)) for n in ("mean_norms", "norms", "weights"))
    else:
        assert torch.equal(found.embeddings, text.embeddings.to(dtype).float())
    for name in ("entry_layer", "ratio", "n_tokens", "ref", "fingerprint", "chunk_size", "ratios", "downscaling"):
        assert getattr(found, name) == getattr(text, name)


@pytest.mark.parametrize("make", [compressed, anchored])
def test_what_was_put_comes_back_from_another_opening(tmp_path, make):
    texts = [make(at, n_tokens=at) for at in (0, 1, 31, 32, 33, 100)]
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(*texts)
        assert len(store) == 6
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        for text in texts:
            same(store.get(text.ref, FINGERPRINT, 4), text)
        assert set(store.items()) == {(text.ref, FINGERPRINT) for text in texts}
        assert (texts[0].ref, FINGERPRINT) in store
        assert store.get(compressed("other").ref, FINGERPRINT, 4) is None
        assert store.verify().clean


def test_float32_is_exact(tmp_path):
    text = compressed("a")
    with EmbeddingStore.open(tmp_path / "s", dtype="float32") as store:
        store.put(text)
        same(store.get(text.ref, FINGERPRINT, 4), text, torch.float32)


def test_states_of_a_coarser_ratio_are_those_of_what_was_stored(store):
    text = anchored("a", n_tokens=75)
    store.put(text)
    found = store.get(text.ref, FINGERPRINT, 8)
    assert len(found) == len(text.at_ratio(8)) == 10
    assert torch.equal(found.embeddings, store.finest(text.ref, FINGERPRINT).at_ratio(8).embeddings)
    assert np.array_equal(found.anchors, text.at_ratio(8).anchors)


def test_states_in_int8_are_refused_before_anything_is_put(tmp_path):
    with EmbeddingStore.open(tmp_path / "s", dtype="int8") as store:
        with pytest.raises(MismatchError, match="dtype='int8' is too coarse"):
            store.put(compressed("a"), anchored("b"))
        assert len(store) == 0


def test_what_is_missing_is_told_without_reading(store, monkeypatch):
    store.put(compressed("a"), compressed("b"))
    monkeypatch.setattr(store, "get", lambda *args: pytest.fail("read"))
    monkeypatch.setattr(store._blocks, "payload", lambda *args: pytest.fail("read"))
    refs = [compressed(name).ref for name in "xab"]
    assert store.missing(refs, FINGERPRINT, 4) == missing_from(store, refs, FINGERPRINT, 8) == refs[:1]
    assert store.missing(refs, FINGERPRINT, 2) == refs  # are here at 4 alone
    assert store.missing(refs, "0" * 32, 4) == refs


def test_coarser_ratios_come_from_the_finest(store):
    text = compressed("a", n_tokens=75)
    store.put(text)
    found = store.get(text.ref, FINGERPRINT, 8)
    assert found.ratio == 8
    assert torch.equal(found.embeddings, text.at_ratio(8).embeddings.half().float())
    assert store.get(text.ref, FINGERPRINT, 2) is None
    assert store.get(text.ref, "00" * 16, 4) is None


def test_a_finer_copy_replaces_a_coarser_one_and_not_the_other_way(store):
    text = compressed("a", ratio=2)
    store.put(text.at_ratio(8))
    store.put(text)
    store.put(text.at_ratio(4))
    same(store.get(text.ref, FINGERPRINT, 2), text)
    assert store.stats().n_documents == 1
    assert store.stats().live_bytes == store.stats().block_bytes == text.embeddings.numel() * 2
    store.put(compressed("b").at_ratio(8), compressed("b"), compressed("b").at_ratio(16))
    same(store.get(compressed("b").ref, FINGERPRINT, 4), compressed("b"))
    assert store.verify().clean


def test_a_copy_that_cannot_be_derived_from_a_finer_one_replaces_it(store):
    finer, wanted = (replace(compressed("a", ratio=ratio, chunk_size=30), ratios=(ratio, 30)) for ratio in (2, 3))
    store.put(finer)
    store.put(wanted)
    same(store.get(wanted.ref, FINGERPRINT, 3), wanted)
    assert missing_from(store, [wanted.ref], FINGERPRINT, 3) == []
    assert len(store) == 1
    assert store.verify().clean


def test_an_equal_copy_does_not_replace_the_first(store):
    text = compressed("a")
    store.put(text)
    store.put(replace(text, embeddings=2 * text.embeddings))
    same(store.get(text.ref, FINGERPRINT, 4), text)


def test_one_text_of_two_embedders_is_two_entries(store):
    one, other = compressed("a"), compressed("a", fingerprint="77" * 16, width=16, seed=1)
    store.put(one, other)
    same(store.get(one.ref, one.fingerprint, 4), one)
    same(store.get(one.ref, other.fingerprint, 4), other)
    assert store.stats().by_fingerprint == {one.fingerprint: 1, other.fingerprint: 1}
    assert store.remove([one.ref], one.fingerprint) == 1
    assert store.get(one.ref, one.fingerprint, 4) is None
    assert store.remove([one.ref]) == 1
    assert len(store) == 0
    assert store.stats().block_bytes == 0


def test_removed_documents_are_collected_and_the_others_stay(store):
    texts = [compressed(at, n_tokens=400) for at in range(60)]
    for at in range(0, 60, 20):
        store.put(*texts[at : at + 20])
    gone = [text.ref for text in texts if int(text.ref[-1], 16) % 3]
    assert store.remove(gone) == len(gone)
    before = store.stats()
    assert before.live_bytes < before.block_bytes
    freed = store.gc()
    after = store.stats()
    assert freed == before.block_bytes - after.block_bytes > 0
    assert after.live_bytes == after.block_bytes == before.live_bytes
    assert store.verify().clean
    for text in texts:
        found = store.get(text.ref, FINGERPRINT, 4)
        assert (found is None) == (text.ref in gone)
        if found is not None:
            same(found, text)
    assert store.gc() == 0


def test_collecting_keeps_the_embedders_that_are_named(store):
    store.put(compressed("a"), compressed("a", fingerprint="77" * 16))
    with pytest.raises(MismatchError, match="no document here is of the embedder 'abc'"):
        store.gc(keep=["abc"])
    store.gc(keep=[FINGERPRINT])
    assert store.stats().by_fingerprint == {FINGERPRINT: 1}


def test_the_map_grows_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("extemb_core.store.lmdb_env._FIRST_MAP_BYTES", 2**20)
    with EmbeddingStore.open(tmp_path / "s") as store, EmbeddingStore.open(tmp_path / "s") as second:
        for at in range(8):
            store.put(compressed(at, n_tokens=20_000, width=64, chunk_size=20_000))
        assert store.stats().file_bytes > 4 * 2**20
        assert len(second) == 8
        assert second.verify().clean


def test_threads_read_while_one_writes_and_the_map_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("extemb_core.store.lmdb_env._FIRST_MAP_BYTES", 2**20)
    texts = [compressed(at, n_tokens=4_000, chunk_size=4_000) for at in range(60)]
    failures = []
    with EmbeddingStore.open(tmp_path / "s") as store:
        done = threading.Event()

        def read():
            while not done.is_set():
                for text in texts:
                    found = store.get(text.ref, FINGERPRINT, 4)
                    if found is not None and not torch.equal(found.embeddings, text.embeddings.half().float()):
                        failures.append(text.ref)

        readers = [threading.Thread(target=read) for _ in range(4)]
        for thread in readers:
            thread.start()
        for text in texts:
            store.put(text)
        done.set()
        for thread in readers:
            thread.join()
        assert len(store) == 60
    assert not failures


def test_a_second_opening_in_a_process_shares_the_first(tmp_path):
    first = EmbeddingStore.open(tmp_path / "s")
    second = EmbeddingStore.open(tmp_path / "s", "r")
    assert first.environment is second.environment
    first.put(compressed("a"))
    first.close()
    first.close()
    assert len(second) == 1
    second.close()
    with pytest.raises(StoreError, match="is closed; open it again"):
        len(second)
    with EmbeddingStore.open(tmp_path / "s", "r") as reader, pytest.raises(StoreError, match="was opened to read"):
        reader.put(compressed("b"))


def test_what_is_read_in_a_process_may_be_opened_to_write_too(tmp_path, monkeypatch):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"))
    with EmbeddingStore.open(tmp_path / "s", "r") as reader:
        assert len(reader) == 1
        with monkeypatch.context() as patched:
            patched.setattr("lmdb.open", lambda *args, **settings: (_ for _ in ()).throw(lmdb.Error("no permission")))
            with pytest.raises(StoreError, match="no permission"):
                EmbeddingStore.open(tmp_path / "s")
        assert len(reader) == 1  # and goes on where it cannot be
        with EmbeddingStore.open(tmp_path / "s") as writer:
            writer.put(compressed("b"))
            assert len(reader) == len(writer) == 2
            with pytest.raises(StoreError, match="was opened to read"):
                reader.put(compressed("c"))
        assert len(reader) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_both_go_on(store):
    store.put(compressed("a"))
    child = os.fork()
    if not child:
        code = 1
        try:
            same(store.get(compressed("a").ref, FINGERPRINT, 4), compressed("a"))
            store.put(compressed("child"))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    store.put(compressed("parent"))
    assert len(store) == 3
    same(store.get(compressed("child").ref, FINGERPRINT, 4), compressed("child"))


def test_what_is_not_a_store_is_left_alone(tmp_path):
    with pytest.raises(StoreNotFoundError, match="has no store in it"):
        EmbeddingStore.open(tmp_path / "none", "r")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("words")
    with pytest.raises(StoreError, match="is a file, and a store is a folder"):
        EmbeddingStore.open(tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("words")
    with pytest.raises(StoreError, match="holds 'letter.txt', which is not a store's; pass a new or empty folder"):
        EmbeddingStore.open(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]
    with pytest.raises(ConfigError, match="mode='w' is neither 'r' nor 'a'"):
        EmbeddingStore.open(tmp_path / "s", "w")
    with pytest.raises(ConfigError, match="dtype='bfloat16'"):
        EmbeddingStore.open(tmp_path / "s", dtype="bfloat16")
    assert not (tmp_path / "s").exists()


def written(folder):
    with EmbeddingStore.open(folder) as store:
        store.put(*(compressed(at, n_tokens=300) for at in range(40)))
    return folder / "data.mdb"


def test_a_flipped_bit_is_an_error_and_the_others_are_read(tmp_path):
    data = written(tmp_path / "s")
    payload = compressed(7, n_tokens=300).embeddings.half().numpy().tobytes()
    content = bytearray(data.read_bytes())
    content[content.index(payload) + 100] ^= 4
    data.write_bytes(content)
    with EmbeddingStore.open(tmp_path / "s") as store:
        broken = compressed(7, n_tokens=300)
        with pytest.raises(StoreCorruptError, match=f"the embeddings of {broken.ref} are not what was written"):
            store.get(broken.ref, FINGERPRINT, 4)
        found = store.verify()
        assert found.n_documents == 39
        assert [(ref, name) for ref, name, _ in found.damaged] == [(broken.ref, FINGERPRINT)]
        assert not found.clean
        with pytest.raises(StoreCorruptError):  # it is not sealed with a new checksum
            store.write(partial(move, store._blocks, keys_in(store._blocks, {0})))
        store.remove([broken.ref])
        store.put(broken)
        assert store.verify().clean


def test_a_file_that_was_cut_is_an_error(tmp_path):
    data = written(tmp_path / "s")
    content = data.read_bytes()
    for length in (len(content) - 4096, len(content) // 2, 9000, 4096, 100):
        data.write_bytes(content[:length])
        for mode in ("r", "a"):
            with pytest.raises(StoreCorruptError, match="is truncated|damaged"):
                EmbeddingStore.open(tmp_path / "s", mode)
    data.write_bytes(b"")
    with pytest.raises(StoreCorruptError, match="missing or empty"):
        EmbeddingStore.open(tmp_path / "s")
    data.unlink()
    with pytest.raises(StoreCorruptError, match="missing or empty"):
        EmbeddingStore.open(tmp_path / "s")
    data.write_bytes(content)
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert store.verify().n_documents == 40


def test_a_store_of_version_1_is_read_as_it_is(tmp_path):
    folder = version_1(tmp_path) / "store"
    with EmbeddingStore.open(folder, "r") as store:
        assert store.verify().clean
        [(ref, fingerprint)] = store.items()
        assert fingerprint == VERSION_1_FINGERPRINT
        text = store.finest(ref, fingerprint)
        assert (text.n_tokens, len(text), text.ratio, text.entry_layer, text.anchors) == (33, 5, 8, 0, None)
        assert len(store.get(ref, fingerprint, 16)) == 3
    assert json.loads((folder / "store.json").read_text())["version"] == 1


def test_a_store_of_version_1_that_is_written_to_becomes_one_of_version_2(tmp_path):
    folder = version_1(tmp_path) / "store"
    for _ in range(2):
        with EmbeddingStore.open(folder) as store:
            store.put(anchored("a", fingerprint=VERSION_1_FINGERPRINT), compressed("b"))
            assert len(store) == 3
            assert store.verify().clean
    assert json.loads((folder / "store.json").read_text())["version"] == 2


def test_shards_of_version_1_are_imported(tmp_path):
    folder = version_1(tmp_path)
    with EmbeddingStore.open(tmp_path / "new") as store, EmbeddingStore.open(folder / "store", "r") as old:
        assert import_shards(store, folder / "shards") == 1
        [item] = store.items()
        assert torch.equal(store.finest(*item).embeddings, old.finest(*item).embeddings)


def test_a_store_of_another_version_is_not_touched(tmp_path):
    written(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text(json.dumps({"format": "extemb-store", "version": 99}))
    with pytest.raises(StoreError, match="version 99, and this library reads"):
        EmbeddingStore.open(tmp_path / "s")
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "s" / "store.json").write_text(damaged)
        with pytest.raises(StoreCorruptError, match="does not describe a store"):
            EmbeddingStore.open(tmp_path / "s", "r")


def test_a_description_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    written(tmp_path / "s")

    def refused(self, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", refused)
    with pytest.raises(
        StoreError, match="store.json cannot be read .Permission denied.; check that the folder"
    ) as told:
        EmbeddingStore.open(tmp_path / "s", "r")
    assert not isinstance(told.value, StoreCorruptError)


@pytest.mark.parametrize("left", [["lock.mdb"], [".store.json.0a.tmp"], ["lock.mdb", ".store.json.0a.tmp"]])
def test_a_folder_with_what_a_full_disk_left_of_a_store_becomes_one(tmp_path, left):
    (tmp_path / "s").mkdir()
    for name in left:
        (tmp_path / "s" / name).touch()
    written(tmp_path / "s")
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert store.verify().n_documents == 40


def test_a_disk_without_room_for_the_lock_is_an_error_and_not_the_end_of_the_process(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk)
        with pytest.raises(StoreError, match=r"lock.mdb has no room, as the disk is full; make room"):
            EmbeddingStore.open(tmp_path / "s")
    written(tmp_path / "s")
    opened, locks = lmdb.open, []
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk)
        patch.setattr(lmdb, "open", lambda *args, **options: locks.append(options["lock"]) or opened(*args, **options))
        with EmbeddingStore.open(tmp_path / "s", "r") as store:
            assert store.verify().n_documents == 40
    assert locks == [False], "what has no room is not written through a map"
    lock = (tmp_path / "s" / "lock.mdb").stat()
    assert lock.st_blocks * 512 >= lock.st_size, "what is written through a map is on the disk"
    (tmp_path / "s" / "lock.mdb").unlink()  # as of a copy
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert store.verify().n_documents == 40


@pytest.mark.parametrize("room", [0, 1, 4096, 8191])
def test_a_store_whose_disk_was_full_when_it_was_made_is_made_later(tmp_path, monkeypatch, room):
    def full(folder, *args, **options):
        (Path(folder) / "data.mdb").write_bytes(bytes(room))
        raise lmdb.DiskError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lmdb, "open", full)
        with pytest.raises(StoreError, match="cannot be opened"):
            EmbeddingStore.open(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr("extemb_core.store.format.atomic_write_text", full_disk)
        with pytest.raises(StoreError, match=r"store.json could not be written \(No space"):
            EmbeddingStore.open(tmp_path / "s")
    written(tmp_path / "s")
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert store.verify().n_documents == 40


@pytest.mark.parametrize(("forbidden", "locked"), [(None, True), ("s", True), ("lock.mdb", False)])
def test_a_reader_is_seen_wherever_it_may_write_the_lock(tmp_path, monkeypatch, forbidden, locked):
    written(tmp_path / "s")
    opened, access, locks = lmdb.open, os.access, []

    def noted(*args, **options):
        locks.append(options["lock"])
        return opened(*args, **options)

    monkeypatch.setattr(lmdb, "open", noted)
    monkeypatch.setattr(os, "access", lambda file, mode: Path(file).name != forbidden and access(file, mode))
    with EmbeddingStore.open(tmp_path / "s", "r") as store:
        assert store.verify().n_documents == 40
    assert set(locks) == {locked}


def test_a_folder_that_may_not_be_written_is_read(tmp_path):
    written(tmp_path / "s")
    (tmp_path / "s" / "lock.mdb").unlink()
    (tmp_path / "s").chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with EmbeddingStore.open(tmp_path / "s", "r") as store:
            assert store.verify().n_documents == 40
        if not os.access(tmp_path / "s", os.W_OK):  # root may write anywhere
            with pytest.raises(StoreError):
                EmbeddingStore.open(tmp_path / "s")
    finally:
        (tmp_path / "s").chmod(stat.S_IRWXU)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder(home, kind):
    with EmbeddingStore.open(kind("~/docs/s")) as store:
        store.put(compressed("a"))
        assert store.path == home / "docs" / "s"
    with EmbeddingStore.open(home / "docs" / "s", "r") as store:
        assert len(store) == 1


def test_a_ref_that_is_none_is_an_error(store):
    for ref in ("ext:12", "12" * 16, "ext:" + "zz" * 16, ""):
        with pytest.raises(ConfigError, match="is not a document's ref"):
            store.get(ref, FINGERPRINT, 4)


USES = {
    "get": lambda store, ref, fingerprint, ratio: store.get(ref, fingerprint, ratio),
    "get_many": lambda store, ref, fingerprint, ratio: store.get_many(iter([ref]), fingerprint, ratio),
    "missing": lambda store, ref, fingerprint, ratio: store.missing(iter([ref]), fingerprint, ratio),
    "missing_within": lambda store, ref, fingerprint, ratio: store.write(
        lambda transaction: store.missing_within(transaction, [ref], fingerprint, ratio)
    ),
    "finest": lambda store, ref, fingerprint, ratio: store.finest(ref, fingerprint),
    "in": lambda store, ref, fingerprint, ratio: (ref, fingerprint) in store,
    "remove": lambda store, ref, fingerprint, ratio: store.remove([ref], fingerprint or 5),
    "forget": lambda store, ref, fingerprint, ratio: store.write(
        lambda transaction: store.forget(transaction, ref, fingerprint or 5)
    ),
}


@pytest.mark.parametrize("use", USES)
def test_an_argument_that_cannot_be_is_not_called_damage(store, use):
    store.put(compressed("a"))
    ref = compressed("a").ref
    wrong = [(None, FINGERPRINT, 4), (5, FINGERPRINT, 4), (ref.encode(), FINGERPRINT, 4)]
    wrong += [(ref, None, 4), (ref, b"5e", 4), (ref, "\ud83d", 4)]
    if use in ("get", "get_many", "missing", "missing_within"):
        wrong += [(ref, FINGERPRINT, ratio) for ratio in ("8", None, 0, 2.5, True)]
    for arguments in wrong:
        with pytest.raises(ConfigError, match=r"; pass "):
            USES[use](store, *arguments)
    assert len(store) == 1


@pytest.mark.parametrize("wrong", [{"ratio": "4"}, {"ratio": 0}, {"n_tokens": -1}, {"n_tokens": None}])
def test_a_text_that_cannot_be_is_not_called_damage(store, wrong):
    store.put(compressed("a"))
    with pytest.raises(ConfigError, match=r"; pass a text as it was compressed"):
        store.put(compressed("b"), replace(compressed("a"), **wrong))
    assert len(store) == 1


def test_an_error_of_what_is_to_be_written_is_its_own(store):
    failures = [lambda _: "a" + 1, lambda _: [][0], lambda _: int("x"), lambda _: 1 // 0, lambda _: json.loads("{")]
    for work in [*failures, *map(partial, failures)]:
        with pytest.raises((TypeError, IndexError, ValueError, ZeroDivisionError)) as caught:
            store.write(work)
        assert not isinstance(caught.value, StoreError)
    with pytest.raises(ZeroDivisionError), store.environment.read():
        _ = 1 // 0

    def given():
        yield compressed("a").ref
        raise ValueError("of the caller")

    for use in (store.missing, lambda refs, *_: store.remove(refs)):
        with pytest.raises(ValueError, match="of the caller") as caught:
            use(given(), FINGERPRINT, 4)
        assert not isinstance(caught.value, StoreError)


def test_the_file_holds_nothing_but_what_was_put(tmp_path):
    texts = [compressed(at) for at in range(6)]
    for number in range(10):  # memory that was used before has copies of them
        with EmbeddingStore.open(tmp_path / str(number)) as store:
            store.put(*texts)
        content = (tmp_path / str(number) / "data.mdb").read_bytes()
        assert [content.count(text.embeddings.half().numpy().tobytes()) for text in texts] == [1] * 6
