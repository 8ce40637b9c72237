"""What integrations share: a model that is loaded once and late, and settings of a call before those of the object."""

from __future__ import annotations

import pytest
from tiny import SENTENCES, random_embedder, save_tiny, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.errors import ConfigError

pytest.importorskip("pydantic")
from extemb_core.frameworks.settings import GenerationSettings, ModelSettings


@pytest.fixture
def lm():
    llm = tiny_llm()
    return ExtensibleLM(llm, random_embedder(llm))


def test_a_model_is_loaded_when_it_is_needed_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr("extemb_core.frameworks.shared._models", {})
    monkeypatch.setattr("extemb_core.frameworks.shared._opened", {})
    save_tiny(tmp_path)
    one = ModelSettings.from_model_id(str(tmp_path / "llm"), embedder=str(tmp_path / "embedder"))
    two = GenerationSettings(model=str(tmp_path / "llm"), embedder=str(tmp_path / "embedder"), budget=9)
    assert one.lm is two.lm
    assert two._lm_of({"model": str(tmp_path / "llm"), "embedder": str(tmp_path / "embedder")}) is one.lm


def test_a_model_that_is_loaded_already(lm):
    made = GenerationSettings.from_lm(lm, ratio=4)
    assert (made.lm, made.model, made.ratio) == (lm, "tiny-llama", 4)
    assert made._lm_of({}) is lm


def test_an_embedder_of_a_call_is_taken_with_and_without_a_model(tmp_path):
    save_tiny(tmp_path)
    made = GenerationSettings(model=str(tmp_path / "llm"), embedder=str(tmp_path / "embedder"))
    for call in ({"embedder": "untrained"}, {"embedder": "untrained", "model": str(tmp_path / "llm")}):
        other = made._lm_of(call)
        assert other.llm is made.lm.llm
        assert (made.lm.embedder.config.entry_layer, other.embedder.config.entry_layer) == (0, 1)


def test_settings_of_a_call_go_before_those_of_the_object(lm):
    made = GenerationSettings.from_lm(lm, ratio=4, max_tokens=3, stop=["a"])
    asked = made._call_settings(None, {"ratio": 8, "temperature": None, "documents": ["x"]})
    assert (asked["ratio"], asked["max_new_tokens"], asked["temperature"], asked["stop"]) == (8, 3, 0.0, ["a"])
    assert made._call_settings(["b"], {})["stop"] == ["b"]
    assert "documents" not in asked
    with pytest.raises(ConfigError, match="unknown setting top_n=3; pass one of budget, documents"):
        made._call_settings(None, {"top_n": 3})


def test_an_answer_is_told_of_document_by_document(lm):
    told = GenerationSettings.from_lm(lm)._response_metadata(
        lm.ask("How many?", [SENTENCES], ratio=4, max_new_tokens=2), {}
    )
    (document,) = told["extemb"]["documents"]
    assert (document["fidelity"], document["cached"]) == (4, False)
    assert document["positions"] < document["raw_tokens"]
    assert told["finish_reason"] == "length"
    assert told["model_name"] == "tiny-llama"
