"""Exports and imports: the same documents back, whole or refused, and nothing read from outside their folder."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from made import anchored, compressed, same

from extemb_core.errors import ConfigError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.store import transfer
from extemb_core.store.remote import StorageLocation
from extemb_core.store.shard_store import ShardStore
from extemb_core.store.shards import ShardReader, read_manifest, write_manifest, write_shard
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import export_store, import_shards

OTHER = "77" * 16


@pytest.fixture(params=[compressed, anchored])
def store(tmp_path, request):
    with EmbeddingStore.open(tmp_path / "store") as opened:
        opened.put(*(request.param(at, n_tokens=40 * at) for at in range(20)))
        opened.put(*(compressed(at, n_tokens=30, fingerprint=OTHER, width=8) for at in range(3)))
        yield opened


@pytest.mark.parametrize("shard_bytes", [1, 20_000, 2**30])
def test_an_export_imported_is_the_same_store(store, tmp_path, shard_bytes):
    shards = export_store(store, tmp_path / "out", shard_bytes=shard_bytes)
    assert sum(shard.n_documents for shard in shards) == 23
    assert len(shards) in {1: [22], 20_000: [5, 6], 2**30: [2]}[shard_bytes]  # an empty one joins its neighbour
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        assert import_shards(copy, tmp_path / "out") == 23
        assert import_shards(copy, tmp_path / "out") == 23  # again: nothing changes
        assert sorted(copy.items()) == sorted(store.items())
        for ref, fingerprint in store.items():
            one, other = store.finest(ref, fingerprint), copy.finest(ref, fingerprint)
            same(one, other)
            assert (one.ratio, one.n_tokens, one.ratios, one.chunk_size, one.downscaling) == (
                other.ratio, other.n_tokens, other.ratios, other.chunk_size, other.downscaling)  # fmt: skip
        assert copy.verify().clean
        assert copy.stats().live_bytes == store.stats().live_bytes


def test_what_is_kept_in_any_dtype_is_exported_and_imported_as_it_is(tmp_path):
    kinds = {"float32": anchored, "int8": compressed, "float16": anchored}
    with EmbeddingStore.open(tmp_path / "store") as store:
        for at, (dtype, make) in enumerate(kinds.items()):
            store.put(make(at, n_tokens=300), dtype=dtype)
        store.put(replace(compressed(7), embeddings=compressed(7).embeddings * 1e6))  # beyond float16
        kept = {ref: (dtype, store.finest(ref, fingerprint)) for ref, fingerprint, dtype in store.entries()}
        size = store.stats().live_bytes
        assert sorted(dtype for dtype, _ in kept.values()) == ["float16", "float32", "float32", "int8"]
    with EmbeddingStore.open(tmp_path / "store", "r") as store:
        export_store(store, tmp_path / "out")
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        import_shards(copy, tmp_path / "out")
        assert copy.stats().live_bytes == size
        for ref, fingerprint, dtype in copy.entries():
            assert dtype == kept[ref][0]
            same(copy.finest(ref, fingerprint), kept[ref][1])


def test_an_export_may_be_read_by_all_whom_the_umask_lets(store, tmp_path):
    before = os.umask(0o022)
    try:
        export_store(store, tmp_path / "out")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o644"}


def test_an_empty_store_is_exported_too(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        assert export_store(store, tmp_path / "out") == []
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        assert import_shards(copy, tmp_path / "out") == 0


def test_an_interrupted_export_is_begun_again_and_other_files_are_not_touched(store, tmp_path):
    out = tmp_path / "out"
    export_store(store, out, shard_bytes=20_000)
    (out / "manifest.json").unlink()
    (out / ".shard-00009.1.tmp").write_bytes(b"half")
    (out / ".manifest.json.1.tmp").write_bytes(b"half")
    for file in out.iterdir():
        os.utime(file, (0, 0))
    with (
        EmbeddingStore.open(tmp_path / "copy") as copy,
        pytest.raises(StoreNotFoundError, match="not known to be whole"),
    ):
        import_shards(copy, out)
    shards = export_store(store, out)
    assert {file.name for file in out.iterdir()} == {"manifest.json", *(shard.file for shard in shards)}
    assert len(shards) == 2
    with pytest.raises(StoreError, match="holds an export already"):
        export_store(store, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("words")
    with pytest.raises(StoreError, match="holds 'letter.txt', which is not a shard"):
        export_store(store, tmp_path / "mine")
    with pytest.raises(ConfigError, match="shard_bytes=0 is not a whole number of at least 1"):
        export_store(store, tmp_path / "new", shard_bytes=0)


def test_an_export_that_was_just_interrupted_is_begun_again(store, tmp_path):
    out = tmp_path / "out"
    export_store(store, out, shard_bytes=20_000)
    (out / "manifest.json").unlink()
    shards = export_store(store, out)
    assert {file.name for file in out.iterdir()} == {"manifest.json", *(shard.file for shard in shards)}
    assert len(shards) == 2
    assert len(ShardStore(out, verify=True)) == 23


def test_an_export_that_is_stopped_leaves_nothing_of_its_own(store, tmp_path, monkeypatch):
    def stopped(location, name, texts, dtype):
        if list((tmp_path / "out").glob("*.safetensors")):
            raise KeyboardInterrupt
        return write_shard(location, name, texts, dtype)

    monkeypatch.setattr("extemb_core.store.transfer.write_shard", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_store(store, tmp_path / "out", shard_bytes=20_000)
    assert not list((tmp_path / "out").iterdir())


def test_an_export_that_ends_before_the_first_shard_of_another_stays_whole(store, tmp_path, monkeypatch):
    out, groups = tmp_path / "out", transfer._groups

    def late(*args):
        monkeypatch.setattr(transfer, "_groups", groups)
        export_store(store, out)
        yield from groups(*args)

    monkeypatch.setattr(transfer, "_groups", late)
    with pytest.raises(StoreError, match="holds an export that ended before this one did"):
        export_store(store, out, shard_bytes=20_000)
    assert {file.name for file in out.iterdir()} == {"manifest.json", *(shard.file for shard in read_manifest(out))}
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        assert import_shards(copy, out) == 23


@pytest.mark.parametrize("second", ["is stopped", "ends first"])
def test_two_exports_into_one_folder_leave_a_whole_one(store, tmp_path, monkeypatch, second):
    out, begun = tmp_path / "out", []

    def first(location, name, texts, dtype):
        begun.append(name)
        if len(begun) == 3:
            if second == "ends first":
                export_store(store, out)
            else:
                with pytest.raises(KeyboardInterrupt):
                    export_store(store, out, shard_bytes=20_000)
        elif len(begun) == 5 and second == "is stopped":
            raise KeyboardInterrupt
        return write_shard(location, name, texts, dtype)

    monkeypatch.setattr("extemb_core.store.transfer.write_shard", first)
    if second == "ends first":
        with pytest.raises(StoreError, match="holds an export that ended before this one did; pass another folder"):
            export_store(store, out, shard_bytes=20_000)
    else:
        assert len(export_store(store, out, shard_bytes=20_000)) > 4
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        assert import_shards(copy, out) == 23


@pytest.fixture(params=["path", "url"])
def where(request, tmp_path):
    return str(tmp_path / "out") if request.param == "path" else f"memory://{tmp_path.name}/out"


@pytest.fixture
def other(tmp_path):
    with EmbeddingStore.open(tmp_path / "other") as opened:
        opened.put(*(compressed(at, n_tokens=40 * at) for at in range(100, 107)))
        yield opened


def is_whole(where, shards, count):
    place = StorageLocation(where)
    assert place.names() == sorted(["manifest.json", *(shard.file for shard in shards)])
    assert read_manifest(where) == shards
    assert len(ShardStore(where, verify=True)) == count


def test_two_exports_that_begin_at_one_moment_write_under_names_of_their_own(store, other, where, monkeypatch):
    ended = []

    def first(location, name, texts, dtype):
        monkeypatch.setattr(transfer, "write_shard", write_shard)
        ended.extend(export_store(other, where))  # whose folder is as empty as ours was
        return write_shard(location, name, texts, dtype)

    monkeypatch.setattr(transfer, "write_shard", first)
    with pytest.raises(StoreError, match="holds an export that ended before this one did; pass another folder"):
        export_store(store, where, shard_bytes=20_000)
    is_whole(where, ended, 7)


def test_two_exports_that_end_at_one_moment_do_not_both_succeed(store, other, where, monkeypatch):
    ended = []

    def meanwhile(location, shards):
        monkeypatch.setattr(transfer, "write_manifest", write_manifest)
        if location.local is None:  # which has no lock: the other's comes last
            write_manifest(location, shards)
            location.remove("manifest.json")  # as the other saw it
            ended.extend(export_store(other, where))
        else:
            with pytest.raises(StoreError, match="holds an export that ended before"):
                export_store(other, where)
            write_manifest(location, shards)

    monkeypatch.setattr(transfer, "write_manifest", meanwhile)
    if where.startswith("memory"):
        with pytest.raises(StoreError, match="holds an export that ended before"):
            export_store(store, where)
        is_whole(where, ended, 7)
    else:
        is_whole(where, export_store(store, where), 23)


@pytest.mark.parametrize("again", [KeyboardInterrupt, PermissionError])
def test_an_export_that_is_stopped_when_its_manifest_is_there_stays_whole(store, where, monkeypatch, again):
    def stopped(location, shards):
        write_manifest(location, shards)
        raise again

    monkeypatch.setattr(transfer, "write_manifest", stopped)
    with pytest.raises(again):
        export_store(store, where)
    is_whole(where, read_manifest(where), 23)


@pytest.mark.parametrize(
    "name",
    [
        *(f"shard-00000.{suffix}" for suffix in ("parquet", "json", "safetensors")),  # of another program
        f"shard-{'0a' * 16}.safetensors",  # of a corpus that is being compressed
        "shard-notes.txt",
        ".shard-notes.txt",
        "manifest.json.bak",
    ],
)
def test_a_file_of_others_that_is_named_like_a_shard_is_not_removed(store, tmp_path, name):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / name).write_text("words")
    with pytest.raises(StoreError):
        export_store(store, tmp_path / "corpus")
    assert [(file.name, file.read_text()) for file in (tmp_path / "corpus").iterdir()] == [(name, "words")]


def test_a_damaged_or_hostile_folder_is_refused_before_anything_is_put(store, tmp_path):
    out = tmp_path / "out"
    first, second, *_ = export_store(store, out, shard_bytes=20_000)
    secret = tmp_path / "secret.safetensors"
    shutil.copy(out / first.file, secret)

    def refused(match, error=StoreCorruptError):
        with EmbeddingStore.open(tmp_path / "copy") as copy:
            with pytest.raises(error, match=match):
                import_shards(copy, out)
            assert len(copy) == 0

    manifest = json.loads((out / "manifest.json").read_text())
    good = json.dumps(manifest)
    for name in ("../secret.safetensors", str(secret), "manifest.json"):
        manifest["shards"][0]["file"] = name
        (out / "manifest.json").write_text(json.dumps(manifest))
        refused("which is not a shard beside it")
    (out / "manifest.json").write_text(good)
    shard = out / second.file
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    refused("is not what was written .*; remove it, and copy, export or compress it again")
    shard.write_bytes(content[:-10])
    refused("missing or of another size")
    shard.unlink()
    shard.symlink_to(secret)
    refused("missing or of another size")
    for damaged in (good[:50].encode(), good.encode().replace(b"shard", b"\xff")):
        (out / "manifest.json").write_bytes(damaged)
        refused("is not a manifest of shards")
    (out / "manifest.json").write_text(good.replace('"version": 2', '"version": 9'))
    refused("version 9; export it again", StoreError)


def test_documents_of_one_fingerprint_with_other_ratios_are_kept_apart(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"), replace(compressed("b"), ratios=(4, 8)))
        shards = export_store(store, tmp_path / "out")
        assert len(shards) == 2
        readers = [ShardReader(tmp_path / "out", shard.file) for shard in read_manifest(tmp_path / "out")]
        found = {text.ref: text.ratios for reader in readers for text in reader.texts()}
    assert found == {compressed("a").ref: (2, 4, 8, 16), compressed("b").ref: (4, 8)}
