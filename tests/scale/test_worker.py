"""The work an engine hands out: shards that are whole, done once, and the same whoever does it."""

from __future__ import annotations

import errno
import os
import re
from datetime import datetime, timezone
from functools import partial

import fsspec
import pytest
import torch
from retrieval_encoder import by_words
from tiny import random_embedder, save_tiny, tiny_llm

from extemb_core import Document, ExtensibleLM
from extemb_core.documents import text_ref
from extemb_core.errors import ConfigError, RatioError, StoreError
from extemb_core.library.library import Library
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.scale.worker import SHARD, Batch, CompressWorker, check_output, finished, receipts, seal
from extemb_core.store.remote import StorageLocation
from extemb_core.store.shard_store import ShardStore
from extemb_core.store.shards import write_manifest
from extemb_core.store.store import EmbeddingStore
from extemb_core.store.transfer import export_store, import_shards

TEXTS = [f"The mill number {at} was built in {1800 + at}. " * (1 + at % 4) for at in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder)
    return {"llm": folder / "llm", "embedder": folder / "embedder"}


@pytest.fixture(params=["embedder", "untrained"])
def any_models(request, models):
    return models if request.param == "embedder" else models | {"embedder": "untrained"}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def of_long_ago(*files):
    for file in files:
        os.utime(file, (0, 0))


def batch_of(made):
    return Batch(**{name: value for name, (value,) in made.items() if name != SHARD})


def test_a_batch_becomes_one_shard_of_what_compressing_gives(any_models, out):
    worker = CompressWorker(out, **any_models, ratio=2)
    made = batch_of(worker({"text": [*TEXTS, TEXTS[0]], "id": list(range(13))}))
    assert (made.n_rows, made.n_texts, made.n_present) == (13, 12, 0)
    (shard,) = seal(out)
    assert (shard.n_documents, shard.size_bytes) == (12, made.n_bytes)
    store = ShardStore(out, verify=True)
    embedder = ExtensibleLM.from_pretrained(**any_models).embedder
    expected = embedder.compress(TEXTS, ratio=2)
    for text in expected:
        found = store.get(text.ref, embedder.fingerprint, 2)
        assert torch.allclose(found.embeddings, text.embeddings, rtol=2**-10, atol=1e-6)
        assert found.n_tokens == text.n_tokens
    assert made.n_tokens == sum(text.n_tokens for text in expected)
    assert made.n_embeddings == sum(map(len, expected))


def test_the_llm_runs_in_the_dtype_asked_for(models, out):
    worker = CompressWorker(out, **models, llm_dtype="bfloat16", dtype="float32")
    worker({"text": [TEXTS[0]]})
    seal(out)
    full, half = (ExtensibleLM.from_pretrained(**models, dtype=dtype).embedder for dtype in ("float32", "bfloat16"))
    near, expected = (embedder.compress(TEXTS[0], ratio=2) for embedder in (full, half))
    kept = ShardStore(out).get(expected.ref, half.fingerprint, 2)
    assert torch.equal(kept.embeddings, expected.embeddings)
    assert not torch.equal(kept.embeddings, near.embeddings)


def test_rows_without_text_are_counted_and_the_others_compressed(models, out):
    made = batch_of(CompressWorker(out, **models)({"text": [TEXTS[0], "", None, 7, "lone \ud800", b"bytes"]}))
    assert (made.n_rows, made.n_empty, made.n_unreadable, made.n_texts) == (6, 2, 3, 1)
    nothing = batch_of(CompressWorker(out, **models)({"text": [""]}))
    assert (nothing.n_texts, nothing.n_bytes) == (0, 0)
    assert len(seal(out)) == 1


def test_a_column_that_is_not_there(models, out):
    with pytest.raises(ConfigError, match="column='text' is not a column of the input; pass one of body, id"):
        CompressWorker(out, **models)({"body": ["a"], "id": [1]})
    assert batch_of(CompressWorker(out, **models, column="body")({"body": ["a"]})).n_texts == 1
    with pytest.raises(RatioError):
        CompressWorker(out, **models, ratio=3)


def counting(monkeypatch):
    made = []
    whole = ExtensibleEmbedder.compress

    def compress(self, texts, **settings):
        made.extend(texts)
        return whole(self, texts, **settings)

    monkeypatch.setattr(ExtensibleEmbedder, "compress", compress)
    return made


def test_a_batch_handed_out_again_is_compressed_again_only_where_its_shard_is_not_whole(models, out, monkeypatch):
    worker = CompressWorker(out, **models)
    worker({"text": TEXTS})
    made = counting(monkeypatch)
    assert batch_of(CompressWorker(out, **models)({"text": TEXTS[::-1]})).n_present == 12
    assert made == []
    (shard,) = receipts(out)
    for lost in (shard.file, shard.file.replace(".safetensors", ".json")):
        made.clear()
        (out / lost).unlink()
        assert receipts(out) == []
        assert batch_of(CompressWorker(out, **models)({"text": TEXTS})).n_present == 0
        assert sorted(made) == sorted(TEXTS)
        assert [(again.file, again.n_documents) for again in receipts(out)] == [(shard.file, 12)]


def test_what_earlier_runs_compressed_is_not_compressed_again(models, out, monkeypatch):
    CompressWorker(out, **models, ratio=4)({"text": TEXTS[:5]})
    CompressWorker(out, **models, ratio=4)({"text": TEXTS[5:8]})
    made = counting(monkeypatch)
    done = finished(out)
    assert {ratio: len(refs) for (_, ratio), refs in done.items()} == {4: 8}
    result = batch_of(CompressWorker(out, **models, ratio=8, done=done)({"text": TEXTS}))
    assert (result.n_texts, result.n_present) == (12, 8)  # 8 is derived from 4
    assert sorted(made) == sorted(TEXTS[8:])
    made.clear()
    result = batch_of(CompressWorker(out, **models, ratio=2, done=finished(out))({"text": TEXTS}))
    assert (result.n_present, len(made)) == (0, 12)  # 2 is not
    other = {("77" * 16, ratio): refs for (_, ratio), refs in done.items()}
    worker = CompressWorker(out, **models, ratio=4, done=other)
    assert worker._missing([text_ref(text) for text in TEXTS]) == [text_ref(text) for text in TEXTS]


@pytest.mark.parametrize("texts", [TEXTS, [*TEXTS, "One more."]])
@pytest.mark.parametrize("damage", ["cut", "lost", "header", "receipt"])
def test_what_is_damaged_after_it_was_sealed_is_compressed_again(models, out, damage, texts):
    CompressWorker(out, **models)({"text": TEXTS})
    (sealed,) = seal(out)
    shard = out / sealed.file
    content = shard.read_bytes()
    damaged = {"cut": content[:-5], "header": content[:3] + b"\xff" + content[4:]}
    if damage in damaged:
        shard.write_bytes(damaged[damage])
    else:
        (shard if damage == "lost" else shard.with_suffix(".json")).unlink()
    of_long_ago(*out.iterdir())
    assert batch_of(CompressWorker(out, **models, done=finished(out))({"text": texts})).n_present == 0
    seal(out)
    assert len(ShardStore(out, verify=True)) == len(texts)
    assert len(os.listdir(out)) == 3


def test_a_shard_that_cannot_be_read_is_not_taken_for_damaged(models, out, monkeypatch):
    CompressWorker(out, **models)({"text": TEXTS})

    def refused(*_):
        raise OSError("the network is gone")

    with monkeypatch.context() as patched:
        patched.setattr(StorageLocation, "open", refused)
        with pytest.raises(StoreError, match="the network is gone"):
            finished(out)
    assert sum(map(len, finished(out).values())) == 12


@pytest.mark.parametrize("full", [".safetensors", ".json", "manifest.json"])
def test_a_full_disk_is_an_error_and_the_same_command_goes_on(models, out, monkeypatch, full):
    write = StorageLocation.write

    def without_room(location, name, fill):
        if name.endswith(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(location, name, fill)

    def compress():
        batch = CompressWorker(out, **models, done=finished(out))({"text": TEXTS})
        seal(out)
        return batch_of(batch)

    with monkeypatch.context() as patched:
        patched.setattr(StorageLocation, "write", without_room)
        said = rf"{full} could not be written \(.*No space left on device\); make room, and the same command goes on$"
        with pytest.raises(StoreError, match=said) as raised:
            compress()
    assert str(raised.value).startswith(str(out))
    assert compress().n_present == (12 if full == "manifest.json" else 0)
    assert len(ShardStore(out, verify=True)) == 12


def test_settings_make_another_shard_of_the_same_texts(models, out):
    for settings in ({"ratio": 2}, {"ratio": 4}, {"ratio": 4, "dtype": "int8"}):
        CompressWorker(out, **models, **settings)({"text": TEXTS})
    assert len(seal(out)) == 3


def test_a_library_finds_its_passages_in_what_workers_compressed(any_models, out, tmp_path):
    CompressWorker(out, **any_models, passage_tokens=40, ratio=2, dtype="float32")({"text": TEXTS})
    seal(out)
    lm = ExtensibleLM.from_pretrained(**any_models)
    with EmbeddingStore.open(tmp_path / "lib") as store:
        import_shards(store, out)
    with Library(tmp_path / "lib", lm, encoder=by_words, passage_tokens=40, ratio=2) as library:
        added = library.add([Document(text, title=str(at)) for at, text in enumerate(TEXTS)])
        assert (added.added, added.compressed_tokens) == (12, 0)
        assert added.n_passages > 12
        assert library.search("1807", 1)[0].text in TEXTS[7]


def test_sealing_leaves_what_another_run_has_just_finished(models, out, monkeypatch):
    whole = receipts(out) if out.is_dir() else []
    late = [out / f"shard-{'0' * 31}1{suffix}" for suffix in (".safetensors", ".json")]

    def meanwhile(output):
        for file in late:
            file.write_text("of another run")
        return whole

    out.mkdir(exist_ok=True)
    monkeypatch.setattr("extemb_core.scale.worker.receipts", meanwhile)
    seal(out)
    assert all(file.is_file() for file in late)


def test_sealing_removes_what_lost_workers_left(models, out):
    CompressWorker(out, **models)({"text": TEXTS})
    (shard,) = receipts(out)
    left = [out / f"shard-{'0' * 32}.safetensors", out / ".shard-01.safetensors.17.tmp"]
    for file in left:
        file.write_bytes((out / shard.file).read_bytes())  # no receipt
    check_output(out)
    assert seal(out) == [shard]
    assert all(file.is_file() for file in left)  # their workers may be about to finish them
    of_long_ago(*out.iterdir())
    assert seal(out) == [shard]
    assert sorted(os.listdir(out)) == sorted(["manifest.json", shard.file, shard.file.replace(".safetensors", ".json")])


def test_sealing_removes_what_lost_workers_left_behind_a_url(models, tmp_path):
    where = f"memory://{tmp_path.name}/out"
    CompressWorker(where, **models)({"text": TEXTS})
    location, left = StorageLocation(where), f"shard-{'0' * 32}.safetensors"
    location.write_text(left, "no receipt")
    assert len(seal(where)) == 1
    assert left in location.names()
    fsspec.filesystem("memory").store[f"/{tmp_path.name}/out/{left}"].modified = datetime.fromtimestamp(0, timezone.utc)
    assert len(seal(where)) == 1
    assert left not in location.names()


def test_sealing_between_a_shard_and_its_receipt_loses_neither(models, out, monkeypatch):
    ours, others = (CompressWorker(out, **models) for _ in range(2))
    ours({"text": TEXTS[:1]})
    temporary = []

    def and_seal(location, name, fill):
        def filled(file):
            fill(file)
            if not temporary:
                temporary.append(file)
                seal(out)

        written = write(location, name, filled)
        seal(out)
        return written

    write = StorageLocation.write
    with monkeypatch.context() as patched:
        patched.setattr(others._location, "write", partial(and_seal, others._location))
        others({"text": TEXTS[1:]})
    assert temporary[0].name.startswith(".shard-")
    assert sum(shard.n_documents for shard in seal(out)) == 12


def test_what_another_run_seals_meanwhile_is_in_the_last_manifest(models, out, monkeypatch):
    ours, others = (CompressWorker(out, **models) for _ in range(2))
    ours({"text": TEXTS[:1]})

    def meanwhile(location, shards):
        monkeypatch.setattr("extemb_core.scale.worker.write_manifest", write_manifest)
        others({"text": TEXTS[1:]})
        of_long_ago(*out.iterdir())
        assert len(seal(out)) == 2
        write_manifest(location, shards)

    monkeypatch.setattr("extemb_core.scale.worker.write_manifest", meanwhile)
    assert len(seal(out)) == 2
    assert len(ShardStore(out, verify=True)) == 12


@pytest.mark.parametrize("late", [".safetensors", ".json", ".+"])
def test_sealing_a_folder_that_lists_a_shard_late_is_an_error(models, out, monkeypatch, late):
    worker = CompressWorker(out, **models)
    made = [worker({"text": texts}) for texts in (TEXTS[:4], TEXTS[4:], [""], TEXTS[:4])]
    written = [row[SHARD][0] for row in made]
    assert (written[2], written[3]) == ("", written[0])  # nothing, and found whole
    assert {shard.file for shard in receipts(out)} == {*written} - {""}
    sizes = StorageLocation.sizes

    def listed(location):
        whole = sizes(location)
        hidden = re.compile(written[1].removesuffix(".safetensors") + late)
        return {name: size for name, size in whole.items() if not hidden.fullmatch(name)}

    with monkeypatch.context() as patched:
        patched.setattr(StorageLocation, "sizes", listed)
        with pytest.raises(StoreError, match=f"{out} does not list 1 of the shards .* {written[1]} .*; call again$"):
            seal(out, written)
    assert not (out / "manifest.json").exists()
    assert len(seal(out, written)) == 2


def test_sealing_removes_nothing_whose_receipt_has_just_come(models, out, monkeypatch):
    CompressWorker(out, **models)({"text": TEXTS})
    (receipt,) = out.glob("*.json")
    content = receipt.read_text()
    receipt.unlink()
    monkeypatch.setattr(StorageLocation, "is_left", lambda *_: receipt.write_text(content) > 0)
    seal(out)
    assert len(seal(out)) == 1


@pytest.mark.parametrize(
    "name", ["shard-00000.parquet", "shard-00000.jsonl", "shard-00000.json", "shard-0.safetensors"]
)
def test_a_corpus_in_files_that_are_called_shards_is_not_removed(models, out, name):
    out.mkdir()
    (out / name).write_text("words")
    with pytest.raises(StoreError, match=f"holds '{name}', which is not a shard"):
        finished(out)
    CompressWorker(out, **models)({"text": TEXTS})
    seal(out)
    assert (out / name).read_text() == "words"


def test_a_folder_of_something_else_is_not_touched(models, out, tmp_path):
    check_output(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("words")
    with pytest.raises(StoreError, match="holds 'letter.txt', which is not a shard"):
        check_output(tmp_path / "mine")
    with EmbeddingStore.open(tmp_path / "store") as store:
        store.put(*random_embedder(tiny_llm()).compress(TEXTS[:2]))
        export_store(store, tmp_path / "export")
    with pytest.raises(StoreError, match="holds the export of a store"):
        check_output(tmp_path / "export")


@pytest.mark.parametrize("texts", [TEXTS, [*TEXTS, "One more."]])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"null",
        lambda content: b'{"file": "../else"}',
        lambda content: b"\xff\xfe\x00",
        lambda content: content.replace(b"s", b"\xff"),
    ],
)
def test_the_texts_of_a_damaged_receipt_are_compressed_again(models, out, caplog, damage, texts):
    CompressWorker(out, **models)({"text": TEXTS[:4]})
    CompressWorker(out, **models)({"text": TEXTS[4:]})
    receipt = out / seal(out)[0].file.replace(".safetensors", ".json")
    receipt.write_bytes(damage(receipt.read_bytes()))
    of_long_ago(*out.iterdir())
    lost = 12 - sum(map(len, finished(out).values()))
    assert lost in (4, 8)
    assert f"its texts are compressed again: {receipt} is not a receipt of a shard (" in caplog.text
    made = batch_of(CompressWorker(out, **models, done=finished(out))({"text": texts}))
    assert (made.n_texts, made.n_present) == (len(texts), 12 - lost)
    assert sum(shard.n_documents for shard in seal(out)) == len(texts)  # none is lost, and none is there twice
    assert len(ShardStore(out, verify=True)) == len(texts)
    assert len(os.listdir(out)) == 5


def test_a_folder_may_have_a_name_with_the_signs_of_a_pattern(models, tmp_path):
    for where in (tmp_path / "run[1]*", f"memory://{tmp_path.name}/run[1]"):
        CompressWorker(where, **models)({"text": TEXTS})
        assert [shard.n_documents for shard in seal(where)] == [12]
        assert sum(map(len, finished(where).values())) == 12


def test_workers_write_behind_a_url_too(models, tmp_path):
    where = f"memory://{tmp_path.name}/out"
    CompressWorker(where, **models)({"text": TEXTS})
    assert [shard.n_documents for shard in seal(where)] == [12]
    assert len(ShardStore(where, verify=True)) == 12
    assert sum(map(len, finished(where).values())) == 12
