"""The LangChain notebook on a tiny LLM, from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from retrieval_encoder import by_words
from tiny import random_embedder, tiny_model, tiny_tokenizer

from extemb_core import ExtensibleLM
from extemb_core.library.encoders import CallableEncoder
from extemb_core.models.llm import LLM

pytest.importorskip("langchain.agents")
NOTEBOOK = Path(__file__).resolve().parents[2] / "demos" / "langchain.ipynb"


@pytest.mark.filterwarnings("ignore::langchain_core._api.deprecation.LangChainDeprecationWarning")
def test_the_notebook_runs_from_its_first_cell_to_its_last(monkeypatch, capsys):
    llm = LLM(tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(), name="tiny")
    lm = ExtensibleLM(llm, random_embedder(llm))
    monkeypatch.setattr("extemb_core.frameworks.settings.share", lambda *args, **settings: lm)
    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            few = "".join(cell["source"]).replace("max_tokens=32", "max_tokens=2").replace("K = 4", "K = 2")
            few = few.replace('stop=["\\n"]', 'stop=["never"]').replace("budget=300", "budget=30")
            exec(compile(few, "cell", "exec"), names)
    shown = capsys.readouterr().out
    assert "10 topics in " in shown
    assert shown.count("ratio 4") == 2
    assert shown.count("  embeddings ") == 4
    assert shown.count("  cut text             0") == 4  # the tiny tokenizer makes more tokens than fit
