"""The LlamaIndex notebook on a tiny LLM, from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from retrieval_encoder import by_words
from tiny import random_embedder, tiny_model, tiny_tokenizer

from extemb_core import ExtensibleLM
from extemb_core.library.encoders import CallableEncoder
from extemb_core.models.llm import LLM

pytest.importorskip("llama_index.core")
from llama_index.core import Settings

NOTEBOOK = Path(__file__).resolve().parents[2] / "demos" / "llamaindex.ipynb"


def test_the_notebook_runs_from_its_first_cell_to_its_last(monkeypatch, capsys):
    llm = LLM(tiny_model("llama", max_position_embeddings=8192), tiny_tokenizer(), name="tiny")
    lm = ExtensibleLM(llm, random_embedder(llm, chunk_size=128))
    monkeypatch.setattr("extemb_core.frameworks.settings.share", lambda *args, **settings: lm)
    monkeypatch.setattr("llama_index.llms.extemb.base.window_of", lambda name: lm.llm.context_window)
    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    monkeypatch.setattr(Settings, "_llm", None)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            few = (
                "".join(cell["source"])
                .replace("max_tokens=32", "max_tokens=2")
                .replace("N_TOPICS = 40", "N_TOPICS = 3")
            )
            few = few.replace('stop=["\\n"]', 'stop=["never"]')
            exec(compile(few, "cell", "exec"), names)
    shown = capsys.readouterr().out
    assert "3 documents, " in shown
    assert shown.count(" tokens in ") == 4
    rows = [line.split() for line in shown.splitlines() if line.startswith(("  all as text", "  embeddings"))]
    assert len(rows) == 8
    for text, embeddings in zip(rows[::2], rows[1::2], strict=True):
        assert int(text[3]) == int(embeddings[1]) == 4  # nodes read
        assert int(embeddings[2]) < int(text[4])  # positions
