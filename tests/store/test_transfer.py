"""Shards: whole or refused, the same documents back, and nothing read from outside their folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import anchored, compressed
from safetensors import safe_open
from safetensors.torch import save

from extemb_core.errors import ConfigError, MismatchError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.store.format import DTYPES, Entry, key_of
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


def same(one, other):
    assert torch.equal(one.embeddings, other.embeddings)
    assert one.entry_layer == other.entry_layer
    if one.entry_layer:
        assert np.array_equal(one.anchors, other.anchors)
        for name in ("mean_norms", "norms", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name))


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


@pytest.mark.parametrize("dtype", ["float16", "int8", "float32"])
def test_a_shard_holds_what_was_written(tmp_path, dtype):
    texts = [compressed(at, n_tokens=at, scale=30.0) for at in (0, 5, 70)]
    write_shard(tmp_path, "a", texts, dtype)
    found = list(ShardReader(tmp_path, "a.safetensors").texts())
    assert [text.ref for text in found] == [text.ref for text in texts]
    for one, other in zip(texts, found, strict=True):
        assert torch.allclose(one.embeddings, other.embeddings, atol={"float16": 0.1, "int8": 0.6, "float32": 0}[dtype])


def test_a_shard_is_written_under_no_name_but_its_own_and_that_of_a_leftover(tmp_path, monkeypatch):
    begun = []
    touch = Path.touch

    def touched(self, *args, **kwargs):
        touch(self, *args, **kwargs)
        begun.append((self.name, self.stat().st_ino))

    monkeypatch.setattr(Path, "touch", touched)
    write_shard(tmp_path, "shard-0", [compressed("a")])
    inode = (tmp_path / "shard-0.safetensors").stat().st_ino  # of the file that was begun: no other took its place
    [(name, begun_inode)] = begun
    assert re.fullmatch(r"\.shard-0\.safetensors\.[0-9a-f]{16}\.tmp", name)
    assert begun_inode == inode


def test_states_in_a_shard_are_what_was_written(tmp_path):
    texts = [anchored(at, n_tokens=at) for at in (0, 5, 70)]
    write_shard(tmp_path, "a", texts, "float32")
    for one, other in zip(texts, ShardReader(tmp_path, "a.safetensors").texts(), strict=True):
        assert torch.allclose(one.embeddings, other.embeddings, rtol=1e-6, atol=0)
        same(one, replace(other, embeddings=one.embeddings))
    with pytest.raises(MismatchError, match="dtype='int8' is too coarse"):
        write_shard(tmp_path, "b", texts, "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_value_beyond_float16_makes_the_shard_float32(tmp_path):
    texts = [compressed("a"), compressed("b", scale=1e6)]
    write_shard(tmp_path, "a", texts)
    for one, other in zip(texts, ShardReader(tmp_path, "a.safetensors").texts(), strict=True):
        assert torch.equal(one.embeddings, other.embeddings)


def test_a_shard_is_of_one_embedder(tmp_path):
    for texts in ([], [compressed("a"), compressed("a", fingerprint=OTHER)]):
        with pytest.raises(ConfigError, match="a shard holds documents of one embedder"):
            write_shard(tmp_path, "a", texts)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_is_begun_again_and_other_files_are_not_touched(store, tmp_path):
    out = tmp_path / "out"
    export_store(store, out, shard_bytes=20_000)
    (out / "manifest.json").unlink()
    (out / ".shard-00009.1.tmp").write_bytes(b"half")
    (out / ".manifest.json.1.tmp").write_bytes(b"half")
    with (
        EmbeddingStore.open(tmp_path / "copy") as copy,
        pytest.raises(StoreNotFoundError, match="not known to be whole"),
    ):
        import_shards(copy, out)
    export_store(store, out)
    assert {file.name for file in out.iterdir()} == {
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    }
    with pytest.raises(StoreError, match="holds an export already"):
        export_store(store, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("words")
    with pytest.raises(StoreError, match="holds 'letter.txt', which is not a shard"):
        export_store(store, tmp_path / "mine")
    with pytest.raises(ConfigError, match="shard_bytes=0 is not a whole number of at least 1"):
        export_store(store, tmp_path / "new", shard_bytes=0)


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
    export_store(store, out, shard_bytes=20_000)
    secret = tmp_path / "secret.safetensors"
    shutil.copy(out / "shard-00000.safetensors", secret)

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
    shard = out / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    refused("is not what was written")
    shard.write_bytes(content[:-10])
    refused("missing or of another size")
    shard.unlink()
    shard.symlink_to(secret)
    refused("missing or of another size")
    (out / "manifest.json").write_text(good[:50])
    refused("is not a manifest of shards")
    (out / "manifest.json").write_text(good.replace('"version": 2', '"version": 9'))
    refused("version 9; export it again", StoreError)


def test_a_file_that_is_no_shard(tmp_path):
    with pytest.raises(StoreNotFoundError):
        list(ShardReader(tmp_path, "none.safetensors").texts())
    (tmp_path / "a.safetensors").write_bytes(b"words")
    with pytest.raises(StoreCorruptError, match="is not a whole shard"):
        list(ShardReader(tmp_path, "a.safetensors").texts())


def forged(folder, make=compressed, *, settings=None, **changes):
    """Write a shard and its manifest by hand, with checksums of its own, as whoever sends one can."""
    text = make("a")
    whole = write_shard(folder, "a", [text])
    with safe_open(folder / whole.file, "pt") as opened:
        metadata = opened.metadata() | (settings or {})
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, value in changes.items():
        tensors[name][0] = value
    values = [int(tensors[name][0]) for name in ("n_tokens", "n_embeddings", "ratios")]
    with suppress(struct.error, ValueError):  # what no store can hold
        entry = Entry(0, 0, *values, 0, DTYPES.index(metadata["dtype"]), 0)
        total = entry.sum_of(key_of(text.ref, metadata["fingerprint"]), tensors["payload"].numpy().tobytes())
        tensors["checksums"] = torch.from_numpy(np.array([total], np.uint64).view(np.int64))
    (folder / whole.file).write_bytes(save(tensors, metadata))
    data = (folder / whole.file).read_bytes()
    write_manifest(folder, [replace(whole, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))])


@pytest.mark.parametrize("make", [compressed, anchored])
@pytest.mark.parametrize(
    "forgery",
    [
        *({"ratios": ratio} for ratio in (0, 1, -2, 2, 16, 2**62)),
        *({"n_tokens": count} for count in (0, 7, 10**9, 2**62, -1)),
        *({"n_embeddings": count} for count in (0, 12, -1, 2**62)),
        *({"settings": {"chunk_size": size}} for size in ("0", "-5", "1", "1e999", "x")),
        *({"settings": {"width": width}} for width in ("0", "16", "-24")),
        *({"settings": {"trained_ratios": ratios}} for ratios in ("[0]", "[3, 4]", "[]", "4", "null", "[" * 9999)),
        *({"settings": {name: value}} for name, value in (("downscaling", "evil"), ("entry_layer", "-1"))),
        *({"settings": {name: value}} for name, value in (("dtype", "int4"), ("fingerprint", "\u00e9"))),
        {"value": float("nan")},
        {"value": float("inf")},
    ],
)  # fmt: skip
def test_a_forged_shard_is_refused_whatever_its_checksums_say(tmp_path, make, forgery):
    values = make("a").embeddings * forgery.get("value", 1)
    changes = {name: value for name, value in forgery.items() if name != "value"}
    forged(tmp_path / "out", lambda name: replace(make(name), embeddings=values), **changes)
    with EmbeddingStore.open(tmp_path / "copy") as copy:
        with pytest.raises(StoreCorruptError):
            import_shards(copy, tmp_path / "out")
        assert len(copy) == 0
    with pytest.raises(StoreCorruptError):
        ShardStore(tmp_path / "out").get(make("a").ref, make("a").fingerprint, 8)


@pytest.mark.parametrize("file", [5, None, "", "a", ["a.safetensors"]])
def test_a_manifest_that_names_no_shard_is_refused(tmp_path, file):
    shard = write_shard(tmp_path, "a", [compressed("a")])
    write_manifest(tmp_path, [replace(shard, file=file)])
    with pytest.raises(StoreCorruptError, match="which is not a shard beside it"):
        read_manifest(tmp_path)


def test_documents_of_one_fingerprint_with_other_ratios_are_kept_apart(tmp_path):
    with EmbeddingStore.open(tmp_path / "s") as store:
        store.put(compressed("a"), replace(compressed("b"), ratios=(4, 8)))
        shards = export_store(store, tmp_path / "out")
        assert len(shards) == 2
        readers = [ShardReader(tmp_path / "out", shard.file) for shard in read_manifest(tmp_path / "out")]
        found = {text.ref: text.ratios for reader in readers for text in reader.texts()}
    assert found == {compressed("a").ref: (2, 4, 8, 16), compressed("b").ref: (4, 8)}
