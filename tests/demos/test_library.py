"""The library's demo on a tiny LLM: documents once, answers with their sources, errors in one line."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from retrieval_encoder import by_words
from tiny import random_embedder, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.library.encoders import CallableEncoder
from extemb_core.models.embedder import ExtensibleEmbedder

pytest.importorskip("faiss")
SCRIPT = Path(__file__).resolve().parents[2] / "demos" / "library.py"


@pytest.fixture
def run(monkeypatch, tmp_path):
    spec = importlib.util.spec_from_file_location("library_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    llm = tiny_llm()
    lm = ExtensibleLM(llm, random_embedder(llm))
    monkeypatch.setattr(ExtensibleLM, "from_pretrained", classmethod(lambda cls, *args: lm))
    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    monkeypatch.setattr(module, "NEW_TOKENS", 2)
    monkeypatch.setenv("EXTEMB_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["library.py", *map(str, arguments)])
        return module.main()

    return call


def test_topics_are_compressed_once_and_asked(run, capsys, monkeypatch):
    arguments = ("--topics", "3", "--passages", "1", "--question", "What is an assertion?")
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "3 documents added, 0 brought up to date, 0 unchanged" in shown
    assert "topics/" in shown
    assert [way in shown for way in ("as text", "cut to as many positions", "as embeddings")] == [True] * 3
    cut, embeddings = (
        next(line for line in shown.splitlines() if way in line).split("│") for way in ("cut to", "as embeddings")
    )
    assert cut[2:4] == embeddings[2:4]  # passages and positions
    monkeypatch.setattr(ExtensibleEmbedder, "compress_ids", lambda *args, **kwargs: pytest.fail("compressed again"))
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "3 unchanged: 0 tokens compressed" in shown
    assert "from disk: topics/" in shown


def test_a_folder_of_the_user_and_one_that_is_not_there(run, capsys, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "mill.txt").write_text("The mill was built in 1820.")
    assert run("--documents", tmp_path / "docs", "--question", "When?") == 0
    assert "mill.txt:0-27" in capsys.readouterr().out
    assert run("--question", "When?", "--topics", "1") == 0  # in a library of its own
    assert "mill.txt" not in capsys.readouterr().out
    assert run("--documents", tmp_path / "none", "--question", "When?") == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--documents", tmp_path / "docs")
    assert "--documents needs a --question" in capsys.readouterr().err


def test_the_notebook_runs_from_its_first_cell_to_its_last(monkeypatch, tmp_path, capsys):
    llm = tiny_llm()
    lm = ExtensibleLM(llm, random_embedder(llm))
    monkeypatch.setattr(ExtensibleLM, "from_pretrained", classmethod(lambda cls, name: lm))
    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(SCRIPT.with_suffix(".ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        few = cell.replace("N_TOPICS = 40", "N_TOPICS = 2").replace('max_new_tokens=32, stop="\\n"', "max_new_tokens=2")
        exec(compile(few.replace("k=4", "k=1"), "cell", "exec"), names)
    shown = capsys.readouterr().out
    assert "2 added, 0 unchanged" in shown
    assert "from disk" in shown
    assert "2 documents; True that nothing was compressed" in shown
