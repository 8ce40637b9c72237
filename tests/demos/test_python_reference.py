"""The main job on a tiny LLM: three ways per question, the user's own file, errors in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from tiny import SENTENCES, random_embedder, tiny_llm

from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.models.embedder import ExtensibleEmbedder

SCRIPT = Path(__file__).resolve().parents[2] / "demos" / "python_reference.py"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("python_reference", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "python_reference", module)
    spec.loader.exec_module(module)
    llm = tiny_llm()
    embedder = random_embedder(llm)

    def loaded(cls, *args, store=None):
        return cls(llm, embedder, None if store is None else EmbeddingStore.open(store))

    monkeypatch.setattr(ExtensibleLM, "from_pretrained", classmethod(loaded))
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "NEW_TOKENS", 4)
    monkeypatch.setattr(module, "BUDGET", 80)
    return module


def run(demo, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["python_reference.py", *map(str, arguments)])
    return demo.main()


def test_a_document_of_the_user_is_asked_three_ways(demo, monkeypatch, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text(SENTENCES, encoding="utf-8")
    out = tmp_path / "out.json"
    assert run(demo, monkeypatch, "--document", tmp_path / "notes.txt", "--question", "Who?", "--json", out) == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))
    ways = list(row["answers"])
    assert ways[1:] == ["truncation", "extensible embeddings"]
    assert ways[0].startswith("full text")
    for way in ("truncation", "extensible embeddings"):
        (entry,) = row["answers"][way]["context"]
        assert 0 < entry["positions"] <= 80
    assert row["answers"]["truncation"]["context"][0]["fidelity"] == "raw"
    assert isinstance(row["answers"]["extensible embeddings"]["context"][0]["fidelity"], int)
    assert "Who?" in capsys.readouterr().out


def test_a_second_run_takes_the_embeddings_from_disk(demo, monkeypatch, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text(SENTENCES, encoding="utf-8")
    arguments = ("--document", tmp_path / "notes.txt", "--question", "Who?", "--json", tmp_path / "out.json")
    assert run(demo, monkeypatch, *arguments) == 0
    first = json.loads((tmp_path / "out.json").read_text())[0]["answers"]["extensible embeddings"]
    assert "compressing" in capsys.readouterr().out
    assert (tmp_path / "cache" / "demo.extemb" / "data.mdb").is_file()
    calls = []
    monkeypatch.setattr(ExtensibleEmbedder, "compress_ids", lambda self, *args, **kwargs: calls.append(args))
    assert run(demo, monkeypatch, *arguments) == 0
    assert calls == []
    assert "compressed earlier" in capsys.readouterr().out
    again = json.loads((tmp_path / "out.json").read_text())[0]["answers"]["extensible embeddings"]
    assert again["text"] == first["text"]
    assert again["context"][0]["cached"]


def test_the_reference_is_asked_about_topics_and_as_a_whole(demo):
    lm = ExtensibleLM.from_pretrained()
    tasks = demo._reference_tasks(lm)
    assert len(tasks) == 6
    assert max(len(task.document.text) for task in tasks[:5]) > 60_000
    assert len(tasks[5].document.text) > 400_000


@pytest.mark.parametrize("arguments", [["--document", "missing.txt", "--question", "Who?"]])
def test_errors_are_one_line(demo, monkeypatch, capsys, arguments):
    assert run(demo, monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
