"""The notebooks on a tiny LLM, from their first cell to their last, with what is long in them made short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from retrieval_encoder import by_words
from tiny import entering, tiny_model, tiny_tokenizer

from extemb_core import EmbeddingStore, ExtensibleLM
from extemb_core.library.encoders import CallableEncoder
from extemb_core.models.llm import LLM

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("IPython")
pytest.importorskip("faiss")
DEMOS = Path(__file__).resolve().parents[2] / "demos"
SHORT = {
    "01_quickstart": {"max_new_tokens=32": "max_new_tokens=2"},
    "02_what_is_an_extensible_embedding": {"max_new_tokens=32": "max_new_tokens=2"},
    "03_beyond_the_window": {"N_TOKENS = 100_000": "N_TOKENS = 2_500", "max_new_tokens=32": "max_new_tokens=2"},
    "04_train_your_own": {
        '"smollm2-135m-reader", 12': '"tiny", 1',
        "STEPS = 40": "STEPS = 2",
        '"lora_rank": 32': '"lora_rank": 2',
    },
    "05_chatbot": {"max_new_tokens=32": "max_new_tokens=2", "range(0, len(pasted), 1000)": "range(0, 3000, 1000)"},
    "reading_plans": {"max_new_tokens=32": "max_new_tokens=2"},
}
SHOWN = {
    "01_quickstart": ["for: ", "positions with the question", "embeddings at ratio 2"],
    "02_what_is_an_extensible_embedding": ["embeddings enter at layer 1 of 3", "ratio 8, ", "nothing: "],
    "03_beyond_the_window": ["2,500 tokens, a window of 2,048 positions", "  cut ", "  whole ", "  plan "],
    "04_train_your_own": ["6 passages held out", "2 steps, ", "ratio 2: "],
    "05_chatbot": ["positions so far", "tokens heard", "[", "tokens condensed"],
    "reading_plans": ["positions in full", "focus [", "select ["],
}


WINDOWS = {"03_beyond_the_window": 2048}  # else one that holds the documents in full


@pytest.fixture
def tiny(request, monkeypatch, tmp_path):
    """What the notebooks load is a tiny LLM, in an empty folder, and plots are drawn without a screen."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    window = WINDOWS.get(request.node.callspec.params["name"], 8192)
    model = tiny_model("llama", max_position_embeddings=window)
    llm = LLM(model, tiny_tokenizer(), name="tiny")
    embedder = entering(llm, chunk_size=64, ratios=(1, 2, 4, 8, 16, 32))
    model.save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    load = ExtensibleLM.from_pretrained

    def loaded(cls, name=None, *args, store=None):
        return load(name, *args) if name else cls(llm, embedder, store and EmbeddingStore.open(store))

    monkeypatch.setattr(ExtensibleLM, "from_pretrained", classmethod(loaded))
    monkeypatch.setattr("extemb_core.library.encoders._default", lambda: CallableEncoder(by_words))
    monkeypatch.setattr(plt, "show", plt.close)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs_from_its_first_cell_to_its_last(name, tiny, capsys):
    names = {}
    cells = json.loads((DEMOS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    source = {number: "".join(cell["source"]) for number, cell in enumerate(cells) if cell["cell_type"] == "code"}
    for long, short in SHORT[name].items():
        assert any(long in cell for cell in source.values()), long
        source = {number: cell.replace(long, short) for number, cell in source.items()}
    for number, cell in source.items():
        exec(compile(cell, f"cell {number}", "exec"), names)
    shown = capsys.readouterr().out
    assert [text for text in SHOWN[name] if text not in shown] == []
