"""Shards: whole or refused, whatever their checksums say, and under no name but their own."""

from __future__ import annotations

import hashlib
import re
import struct
from contextlib import suppress
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from made import anchored, compressed, same
from safetensors import safe_open
from safetensors.torch import save

from extemb_core.errors import ConfigError, MismatchError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.store.format import DTYPES, Entry, key_of
from extemb_core.store.remote import StorageLocation
from extemb_core.store.shard_store import ShardStore
from extemb_core.store.shards import ShardReader, read_manifest, write_manifest, write_shard
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import import_shards

OTHER = "77" * 16


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


@pytest.mark.parametrize("refusal", [PermissionError, type("NoCredentials", (Exception,), {})])
@pytest.mark.parametrize(
    "write", [lambda where: write_shard(where, "a", [compressed("a")]), partial(write_manifest, shards=[])]
)
def test_storage_that_refuses_what_is_written_is_told_of(tmp_path, monkeypatch, write, refusal):
    def refused(*args, **kwargs):
        raise refusal

    monkeypatch.setattr(MemoryFileSystem, "put_file", refused)
    said = rf"could not be written \({refusal.__name__}\); check the connection .*, and the same command goes on$"
    with pytest.raises(StoreError, match=f"^memory://{tmp_path.name}/.*{said}"):
        write(f"memory://{tmp_path.name}")


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


def test_a_file_that_is_no_shard(tmp_path):
    with pytest.raises(StoreNotFoundError):
        list(ShardReader(tmp_path, "none.safetensors").texts())
    (tmp_path / "a.safetensors").write_bytes(b"words")
    with pytest.raises(StoreCorruptError, match="is not a whole shard"):
        list(ShardReader(tmp_path, "a.safetensors").texts())


@pytest.mark.parametrize("call", ["open", "read"])
@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (ConnectionResetError("refused"), StoreError),
        (PermissionError("refused"), StoreError),
        (TimeoutError("refused"), StoreError),
        (Exception("refused"), StoreError),  # as storage's own are
        (FileNotFoundError("refused"), StoreNotFoundError),
    ],
)
def test_a_shard_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, call, refusal, kind):
    write_shard(tmp_path, "a", [compressed("a")])

    def refuse(*args):
        raise refusal

    class Unread(BytesIO):
        read = refuse

    with monkeypatch.context() as patched:
        patched.setattr(StorageLocation, "open", refuse if call == "open" else lambda *_: Unread())
        said = "does not exist" if kind is StoreNotFoundError else r"could not be read \(refused\); check .* again$"
        with pytest.raises(StoreError, match=rf"^{tmp_path}/a\.safetensors {said}") as raised:
            ShardReader(tmp_path, "a.safetensors")
        assert type(raised.value) is kind
    assert len(ShardReader(tmp_path, "a.safetensors")) == 1


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


@pytest.mark.parametrize("count", [1, 2, 10, 13])
@pytest.mark.parametrize("first", ["lost", "cut", "altered"])
def test_all_damaged_shards_are_named_at_once(tmp_path, count, first):
    shards = [write_shard(tmp_path, f"{at:02}", [compressed(at)]) for at in range(15)]
    write_manifest(tmp_path, shards)
    damages = ["lost", "cut", "altered"]
    for at, shard in enumerate(shards[1 : count + 1], damages.index(first)):
        file = tmp_path / shard.file
        content = file.read_bytes()
        file.write_bytes({"cut": content[:-1], "altered": content[:-1] + b"\xff", "lost": b""}[damages[at % 3]])
        if damages[at % 3] == "lost":
            file.unlink()
    what = "is not what was written" if first == "altered" else "is missing or of another size"
    others = [f"{at:02}.safetensors" for at in range(2, count + 1)]
    shown = ", ".join(others[:9]) + (", ..." if count > 10 else "")
    more = (
        f", and {len(others)} more are damaged too ({shown}); remove them, and copy" if others else "; remove it, and"
    )
    with pytest.raises(StoreCorruptError, match=rf"^01\.safetensors {what}[^;]*{re.escape(more)}.*again$"):
        read_manifest(tmp_path)
