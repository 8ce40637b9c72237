"""A corpus over a real cluster of two nodes: whole and the same as in one process, whatever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tiny import random_embedder, save_tiny, tiny_llm

from extemb_core.errors import (
    ConfigError,
    DocumentError,
    DocumentNotFoundError,
    ExtembError,
    MissingExtraError,
    StoreError,
    StoreNotFoundError,
)
from extemb_core.scale.corpus import (
    PARQUET,
    ROWS,
    _error_of,
    _inputs,
    _json_options,
    _RayWorker,
    _readable,
    compress_corpus,
)
from extemb_core.scale.worker import SHARD, Batch
from extemb_core.store.shard_store import ShardStore

TEXTS = [f"The tower number {at} was built in {1700 + at}. " * (1 + at % 3) for at in range(60)]
JOB = Path(__file__).with_name("ray_job.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a run left, with what it said in found.json."""
    pytest.importorskip("ray.data")
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("corpus")
    save_tiny(folder)
    rows = [{"id": at, "text": text} for at, text in enumerate(TEXTS)] + [{"id": 60, "text": ""}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "more").mkdir()
    pq.write_table(pa.table({"text": [*TEXTS, "The station is new.", None]}), folder / "more" / "a.parquet")
    done = subprocess.run([sys.executable, JOB, folder], capture_output=True, text=True, timeout=1800)
    assert (folder / "found.json").is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text())


@pytest.mark.cluster
def test_two_nodes_and_a_killed_worker_give_what_one_process_gives(folder, found):
    assert (found["nodes"], found["used"]) == (2, 2)
    assert (folder / "killed").exists()
    assert {name: found["killed"][name] for name in ("n_rows", "n_texts", "n_empty", "n_present")} == {
        "n_rows": 61, "n_texts": 60, "n_empty": 1, "n_present": 0}  # fmt: skip
    assert found["killed"]["shards"] >= 4
    assert found["left"] == {".safetensors": found["killed"]["shards"], ".json": found["killed"]["shards"] + 1}
    store = ShardStore(folder / "out", verify=True)
    embedder = random_embedder(tiny_llm())
    for text in embedder.compress(TEXTS, ratio=2):
        kept = store.get(text.ref, embedder.fingerprint, 2)
        assert torch.allclose(kept.embeddings, text.embeddings, rtol=2**-10, atol=1e-5)
        assert kept.n_tokens == text.n_tokens


@pytest.mark.cluster
def test_another_run_compresses_what_is_new(folder, found):
    again = found["again"]
    assert (again["n_rows"], again["n_texts"], again["n_present"], again["n_empty"]) == (62, 61, 60, 1)
    assert again["shards"] == found["killed"]["shards"] + 1
    assert len(ShardStore(folder / "out")) == 61


@pytest.mark.cluster
def test_what_is_wrong_is_said_as_it_was_where_it_happened(folder, found):
    assert found["column"]["error"] == "ConfigError"
    assert found["column"]["message"].startswith("column='body' is not a column of the input; pass one of id, text")
    assert not (folder / "other").exists()
    for setting, value in (("dtype", "float8"), ("device", "tpu")):
        assert found[setting]["error"] == "ConfigError"
        assert value in found[setting]["message"]


class OddError(ExtembError):
    """Of no type that the other side knows."""


ERRORS = {"bad": MissingExtraError("a", "b", "c"), "gone": StoreNotFoundError("no store"), "odd": OddError("odd")}


def test_an_error_of_a_worker_is_a_row_of_text():
    class Failing:
        def __init__(self, wrong=None):
            if wrong:
                raise ConfigError(wrong)

        def __call__(self, rows):
            if rows["text"] != ["good"]:
                raise ERRORS[rows["text"][0]]
            return {"n_rows": [1]}

    worker = _RayWorker(Failing)
    assert worker({"text": ["good"]}) == {"n_rows": [1], "error": [""]}
    for text, kind in (("bad", MissingExtraError), ("gone", StoreNotFoundError), ("odd", ExtembError)):
        raised = _error_of(worker({"text": [text]})["error"][0])
        assert type(raised) is kind
        assert str(raised) == str(ERRORS[text])
    raised = _error_of(_RayWorker(Failing, "no such llm")({"text": ["good"]})["error"][0])
    assert (type(raised), str(raised)) == (ConfigError, "no such llm")


def test_a_batch_that_always_ends_its_worker_ends_the_run(tmp_path, monkeypatch):
    exceptions = pytest.importorskip("ray.exceptions")
    data = MagicMock()
    results = data.read_json.return_value.map_batches
    results.return_value.iter_rows.side_effect = exceptions.ActorUnavailableError("gone", actor_id=None)
    monkeypatch.setattr("extemb_core.scale.corpus._cluster", lambda address: nullcontext(data))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match="a batch of rows_per_batch=7 lost its worker 5 times; what was done is kept"):
        compress_corpus(tmp_path / "a.jsonl", tmp_path / "out", llm="x", rows_per_batch=7)
    assert results.call_args.kwargs["max_task_retries"] == 4
    assert data.read_json.call_args.kwargs["read_options"].block_size == _json_options().block_size


def test_a_run_names_what_its_workers_wrote(tmp_path, monkeypatch):
    pytest.importorskip("ray.exceptions")

    class Writing:
        def __call__(self, rows):
            if rows == "wrong":
                raise ConfigError("wrong")
            return {name: [1] for name in asdict(Batch())} | {SHARD: [rows]}

    data = MagicMock()
    made = map(_RayWorker(Writing), ["shard-a", "", "shard-b", "shard-a", "wrong"])
    rows = ({name: value for name, (value,) in row.items()} for row in made)
    results = data.read_json.return_value.map_batches.return_value.iter_rows
    monkeypatch.setattr("extemb_core.scale.corpus._cluster", lambda address: nullcontext(data))
    (tmp_path / "a.jsonl").touch()
    results.return_value = list(islice(rows, 4))
    with pytest.raises(StoreError, match="does not list 2 of the shards that were written there, shard-a for one"):
        compress_corpus(tmp_path / "a.jsonl", tmp_path / "out", llm="x")
    results.return_value = rows
    with pytest.raises(ConfigError, match="^wrong$"):
        compress_corpus(tmp_path / "a.jsonl", tmp_path / "out", llm="x")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": "b', r"rows\.jsonl, line 2: not JSON"),
        (
            "rows.jsonl",
            '{"text": "a"}\n{"text": [1]}\n',
            r"rows\.jsonl, line 2: 'text' is \[1\], and text in other rows, which Ray does not read; fix or remove it",
        ),
        ("rows.parquet", "PAR1 noise", r"rows\.parquet cannot be read \(what Arrow says\); fix or remove them"),
    ],
)
def test_rows_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    failed = ValueError("\x1b[36mray::ReadJSON\x1b[39m")
    failed.cause = ValueError("Traceback ...\nwhat Arrow says")
    with pytest.raises(DocumentError, match=message), _readable([str(tmp_path / name)], "text"):
        raise failed
    with pytest.raises(MissingExtraError), _readable([str(tmp_path / name)], "text"):
        raise MissingExtraError("a", "b", "c")


def test_long_rows_are_read(tmp_path):
    reader = pytest.importorskip("pyarrow.json")
    (tmp_path / "books.jsonl").write_text("".join(json.dumps({"text": letter * 5_000_000}) + "\n" for letter in "ab"))
    assert len(reader.read_json(tmp_path / "books.jsonl", read_options=_json_options())) == 2


def test_inputs_are_of_one_kind(tmp_path):
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "d.json").touch()
    assert _inputs([tmp_path / "rows", tmp_path / "a.jsonl"], "out") == (
        ROWS, [str(tmp_path / "rows" / "d.json"), str(tmp_path / "a.jsonl")])  # fmt: skip
    assert _inputs(["s3://bucket/a.parquet"], "s3://bucket/out") == (PARQUET, ["s3://bucket/a.parquet"])
    for wrong in ([], [tmp_path], [tmp_path / "notes.txt"], [tmp_path / "a.jsonl", tmp_path / "c.parquet"]):
        with pytest.raises(ConfigError, match="pass one kind at a time"):
            _inputs(wrong, "out")
    with pytest.raises(DocumentNotFoundError, match="does not exist; pass files or folders"):
        _inputs([tmp_path / "none.jsonl"], "out")


def test_what_was_made_in_the_folder_that_is_read_is_no_input(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("a.jsonl", "out/manifest.json", f"out/shard-{'0a' * 16}.json"):
        (tmp_path / name).touch()
    assert _inputs([tmp_path], tmp_path / "out") == (ROWS, [str(tmp_path / "a.jsonl")])
    with pytest.raises(StoreError, match=r"holds 'a\.jsonl', which is not a shard; pass a new or empty folder"):
        compress_corpus([tmp_path], tmp_path, llm="none")


@pytest.mark.parametrize("setting", ["rows_per_batch", "workers"])
def test_settings_are_checked_before_anything_starts(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{setting}=0 is not a whole number of at least 1"):
        compress_corpus(tmp_path / "a.jsonl", tmp_path / "out", llm="x", **{setting: 0})
