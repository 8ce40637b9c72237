"""Shards asked where they lie."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made import FINGERPRINT, anchored, compressed
from tiny import random_embedder, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.errors import RatioError, StoreCorruptError, StoreError, StoreNotFoundError
from extemb_core.store.shard_store import ShardStore, is_sharded
from extemb_core.store.shards import ShardReader, write_manifest, write_shard
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import export_store, import_shards

TEXTS = [compressed(at, n_tokens=40 * at) for at in range(6)]


@pytest.fixture(params=["path", "url"])
def where(request, tmp_path):
    return str(tmp_path / "shards") if request.param == "path" else f"memory://{tmp_path.name}/shards"


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_it_gives_what_was_written_at_every_coarser_ratio(where, dtype):
    write_manifest(where, [write_shard(where, "a", TEXTS[:4], dtype), write_shard(where, "b", TEXTS[4:], dtype)])
    store = ShardStore(where, verify=True)
    assert len(store) == 6
    assert store.readonly
    for text in TEXTS:
        for ratio in (4, 8, 16):
            found = store.get(text.ref, FINGERPRINT, ratio)
            assert torch.allclose(
                found.embeddings, text.at_ratio(ratio).embeddings, atol=0 if dtype == "float32" else 0.05
            )
            assert (found.ratio, found.n_tokens, found.ref) == (ratio, text.n_tokens, text.ref)
        assert store.get(text.ref, FINGERPRINT, 2) is None
        assert store.get(text.ref, "77" * 16, 8) is None
    assert store.get(compressed("else").ref, FINGERPRINT, 8) is None
    for ratio in ("8", None, 0, -4, 2.5, True):
        with pytest.raises(RatioError, match=r"^ratio=.*; pass one of the embedder's ratios"):
            store.get(TEXTS[0].ref, FINGERPRINT, ratio)
    with pytest.raises(StoreError, match="never changed; import it into a store"):
        store.put(TEXTS[0])


def test_of_a_text_at_two_ratios_the_finer_is_given(where):
    fine = replace(compressed("a", ratio=2), ratios=(2, 4, 8, 16))
    coarse = compressed("a", ratio=8)
    write_manifest(
        where, [write_shard(where, "a", [coarse]), write_shard(where, "b", [fine]), write_shard(where, "c", [coarse])]
    )
    assert ShardStore(where).get(fine.ref, FINGERPRINT, 2).ratio == 2


def test_many_shards_of_several_embedders(where):
    """Their headers are read at once, and each document is found in the shard and at the place where it is."""
    draw = random.Random(0)
    texts = [compressed(at, n_tokens=40 + at) for at in range(60)]
    others = [replace(text, fingerprint="77" * 16) for text in texts[:20]]
    groups = [draw.sample(texts, 9) for _ in range(12)] + [others, texts[:1]]
    write_manifest(where, [write_shard(where, str(at), group) for at, group in enumerate(groups)])
    store = ShardStore(where)
    kept = {text.ref for group in groups if group is not others for text in group}
    for text in texts:
        found = store.get(text.ref, FINGERPRINT, 4)
        assert (found is None) == (text.ref not in kept)
        assert found is None or (found.ref, found.n_tokens) == (text.ref, text.n_tokens)
    assert all(store.get(text.ref, "77" * 16, 4).n_tokens == text.n_tokens for text in others)
    assert len(store) == len(kept) + len(others)


def test_headers_are_read_at_once(where, monkeypatch):
    write_manifest(where, [write_shard(where, str(at), [text]) for at, text in enumerate(TEXTS[1:4])])
    together = threading.Barrier(3, timeout=60)
    read = ShardReader._read_header
    monkeypatch.setattr(ShardReader, "_read_header", lambda self: together.wait() + 1 and read(self))
    assert len(ShardStore(where)) == 3


def test_shards_behind_a_url_are_imported(where, tmp_path):
    write_manifest(where, [write_shard(where, "a", TEXTS)])
    with EmbeddingStore.open(tmp_path / "store") as store:
        assert import_shards(store, where) == 6
        assert len(store) == 6


def test_only_what_a_manifest_names_is_read_and_every_text_is_checked(tmp_path):
    with pytest.raises(StoreNotFoundError, match="not known to be whole"):
        ShardStore(tmp_path / "shards")
    shard = write_shard(tmp_path / "shards", "a", TEXTS)
    write_shard(tmp_path / "shards", "b", [compressed("not named")])
    write_manifest(tmp_path / "shards", [shard])
    assert len(ShardStore(tmp_path / "shards")) == 6
    file = tmp_path / "shards" / shard.file
    content = bytearray(file.read_bytes())
    content[content.index(TEXTS[3].embeddings.half().numpy().tobytes())] ^= 1
    file.write_bytes(content)
    store = ShardStore(tmp_path / "shards")
    assert store.get(TEXTS[2].ref, FINGERPRINT, 4) is not None
    with pytest.raises(StoreCorruptError, match=f"another checksum for {TEXTS[3].ref}"):
        store.get(TEXTS[3].ref, FINGERPRINT, 4)
    with pytest.raises(StoreCorruptError, match="another sha256"):
        ShardStore(tmp_path / "shards", verify=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:5],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" * (len(data) - 8),
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data.replace(b'"n_tokens":{"dtype":"I64"', b'"n_tokens":{"dtype":"F64"'),
        lambda data: data.replace(b'"width":"24"', b'"width":"23"'),
        lambda data: data.replace(b'"checksums"', b'"checksumz"'),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path, damage):
    shard = write_shard(tmp_path, "a", TEXTS)
    file = tmp_path / shard.file
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    with pytest.raises(StoreCorruptError, match="is not a whole shard"):
        ShardReader(tmp_path, shard.file)


def test_a_model_answers_from_shards_without_compressing(tmp_path, monkeypatch):
    llm = tiny_llm()
    embedder = random_embedder(llm)
    text = "The mill was built in 1820. " * 8
    with EmbeddingStore.open(tmp_path / "store") as store:
        first = ExtensibleLM(llm, embedder, store).ask("When?", text, ratio=4, max_new_tokens=4)
        export_store(store, tmp_path / "shards")
    assert is_sharded(tmp_path / "shards")
    assert not is_sharded(tmp_path / "store")
    monkeypatch.setattr(type(embedder), "compress_ids", lambda *args, **kwargs: pytest.fail("was compressed again"))
    lm = ExtensibleLM(llm, embedder, ShardStore(tmp_path / "shards"))
    again = lm.ask("When?", text, ratio=4, max_new_tokens=4)
    assert again.text == first.text
    assert again.context[0].cached


def test_a_text_that_shards_lack_serves_its_call_alone(tmp_path):
    llm = tiny_llm()
    write_manifest(tmp_path, [])
    lm = ExtensibleLM(llm, random_embedder(llm), ShardStore(tmp_path))
    assert lm.ask("When?", "The mill was built in 1820. " * 8, ratio=4, max_new_tokens=4).context[0].cached is False


def test_states_are_read_where_they_lie(where):
    write_manifest(where, [write_shard(where, "a", [anchored("a"), anchored("b")])])
    found = ShardStore(where).get(anchored("b").ref, FINGERPRINT, 8)
    assert (found.entry_layer, len(found)) == (3, len(anchored("b").at_ratio(8)))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder(home, kind):
    with EmbeddingStore.open(home / "s") as store:
        store.put(compressed("a"))
        export_store(store, kind("~/out"))
    assert is_sharded(kind("~/out"))
    assert not is_sharded(kind("~/s"))
    assert len(ShardStore(kind("~/out"))) == 1
