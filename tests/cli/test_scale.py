"""`extemb scale compress`: what it hands on, and what it says at its end."""

from __future__ import annotations

import json
import logging

import pytest
from typer.testing import CliRunner

from extemb_core.cli.main import app
from extemb_core.errors import MissingExtraError
from extemb_core.scale import corpus
from extemb_core.scale.worker import Batch
from extemb_core.store.shards import Shard


@pytest.fixture
def asked(monkeypatch):
    """The settings of the last run, which is not done."""
    settings = {}

    def compress_corpus(inputs, output, **others):
        settings.update({"inputs": inputs, "output": output} | others)
        batch = Batch(n_rows=9, n_empty=settings.get("column") == "body", n_texts=8, n_present=3, n_tokens=1200)
        return corpus.Compression(batch=batch, shards=(Shard("a.safetensors", "00", 1, 8),), seconds=2.0)

    monkeypatch.setattr(corpus, "compress_corpus", compress_corpus)
    return settings


def run(*args):
    return CliRunner().invoke(app, ["scale", "compress", *args])


def test_settings_are_handed_on(asked):
    result = run("--input", "a.parquet", "b.parquet", "--output", "out", "--ratio", "8", "--workers", "3",
                 "--gpus-per-worker", "0.5", "--passage-tokens", "256", "--ray-address", "auto",
                 "--device", "cuda:1", "--llm-dtype", "bfloat16")  # fmt: skip
    assert result.exit_code == 0
    assert asked["inputs"] == ["a.parquet", "b.parquet"]
    assert (asked["ratio"], asked["workers"], asked["gpus_per_worker"], asked["passage_tokens"]) == (8, 3, 0.5, 256)
    assert (asked["ray_address"], asked["embedder"], asked["rows_per_batch"]) == ("auto", None, 64)
    assert (asked["device"], asked["llm_dtype"], asked["dtype"]) == ("cuda:1", "bfloat16", "float16")
    assert result.stderr.strip() == (
        "8 texts of 9 rows, 3 of them compressed before; 1,200 tokens in 2.0 s, 1 shards in out"
    )
    assert logging.root.manager.disable == logging.NOTSET


def test_rows_left_out_are_told(asked):
    result = run("--input", "a.parquet", "--output", "out", "--column", "body")
    assert "; 1 rows are empty, 0 are no text; " in result.stderr
    found = json.loads(run("--input", "a.parquet", "--output", "out", "--json").stdout)
    assert (found["batch"]["n_texts"], found["shards"][0]["n_documents"]) == (8, 8)


def test_without_ray(monkeypatch):
    def compress_corpus(*args, **settings):
        raise MissingExtraError("ray", "ray", "compressing a corpus")

    monkeypatch.setattr(corpus, "compress_corpus", compress_corpus)
    result = run("--input", "a.parquet", "--output", "out")
    assert result.exit_code == 1
    assert "pip install 'extemb[ray]'" in result.stderr
