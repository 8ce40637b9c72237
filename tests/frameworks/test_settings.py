"""What integrations share: a model that is loaded once and late, and settings of a call before those of the object."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import SENTENCES, Named, random_embedder, save_tiny, tiny_llm, tiny_model, tiny_tokenizer

from extemb_core import ExtensibleLM
from extemb_core.documents import Document
from extemb_core.errors import BudgetError, ConfigError, RatioError, StoreError
from extemb_core.models.generation import Sampling
from extemb_core.models.llm import LLM
from extemb_core.store.base import MemoryStore
from extemb_core.store.store import EmbeddingStore

pytest.importorskip("pydantic")
pytest.importorskip("langchain_core")
pytest.importorskip("llama_index.core")
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode

import langchain_extemb
from extemb_core.frameworks.settings import GenerationSettings, ModelSettings
from llama_index.llms import extemb as llamaindex_llms
from llama_index.postprocessor import extemb as llamaindex

MODELS = [langchain_extemb.ChatExtensible, langchain_extemb.ExtensibleLLM, llamaindex_llms.ExtensibleLLM]
COMPRESSORS = [
    langchain_extemb.ExtensibleCompressor,
    llamaindex.ExtensibleEmbeddingPostprocessor,
    llamaindex.ExtensibleTransform,
]


@pytest.fixture(scope="module")
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


@pytest.mark.parametrize("path", [Path, Named])
@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
def test_a_path_is_taken_where_a_name_is_and_is_text(kind, path, tmp_path):
    save_tiny(tmp_path)
    llm, embedder, store = (tmp_path / name for name in ("llm", "embedder", "docs.extemb"))
    made = kind.from_model_id(path(llm), embedder=path(embedder), store=path(store))
    assert (made.model, made.embedder, made.store) == (str(llm), str(embedder), str(store))
    assert made.model_dump_json() == kind(model=str(llm), embedder=str(embedder), store=str(store)).model_dump_json()
    assert pickle.loads(pickle.dumps(made)).store == str(store)
    assert made.lm.store.path == store
    if isinstance(made, GenerationSettings):
        assert made._lm_of({"model": path(llm), "embedder": path(embedder)}) is made.lm
    made.close()
    for name in ("model", "embedder"):
        with pytest.raises(ConfigError, match="7 is neither a name nor a path; pass a str or an os.PathLike"):
            kind(**{name: 7})


@pytest.mark.parametrize("kind", MODELS)
def test_a_path_in_a_call_is_a_models_name(kind, lm, tmp_path):
    save_tiny(tmp_path)
    call = {"model": Named(tmp_path / "llm"), "embedder": tmp_path / "embedder"}
    made = kind.from_lm(lm, max_tokens=1)
    assert made._response_metadata(lm.ask("Hi", max_new_tokens=1), call)["model_name"] == str(tmp_path / "llm")
    assert made._lm_of(call).llm.name == str(tmp_path / "llm")


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
    with pytest.raises(ConfigError, match="unknown setting top_n=3; pass top_p or top_k"):
        made._call_settings(None, {"top_n": 3})
    with pytest.raises(ConfigError, match="unknown setting user='me'; pass one of budget, documents"):
        made._call_settings(None, {"user": "me"})


def test_a_call_may_name_another_embedder(lm, monkeypatch):
    asked = []
    monkeypatch.setattr("extemb_core.frameworks.settings.share", lambda *args, **settings: asked.append(args))
    made = GenerationSettings.from_lm(lm)
    assert made._lm_of({"model": "tiny-llama", "embedder": None}) is lm
    for settings in ({"embedder": "mine"}, {"model": "other"}):
        made._lm_of(settings)
    assert asked == [("tiny-llama", "mine"), ("other", None)]


def test_another_embedder_of_a_call_is_for_the_model_that_is_loaded_and_its_store(tmp_path, monkeypatch):
    llm = tiny_llm()
    random_embedder(llm, seed=3).save_pretrained(tmp_path / "other")
    monkeypatch.setattr(LLM, "from_pretrained", lambda *args, **settings: pytest.fail("it is loaded already"))
    with EmbeddingStore.open(tmp_path / "docs.extemb") as store:
        loaded = ExtensibleLM(llm, random_embedder(llm), store)
        made = GenerationSettings.from_lm(loaded)
        call = {"embedder": str(tmp_path / "other")}
        other = made._lm_of(call)
        assert (other.llm, other.store, other.refs) == (llm, store, loaded.refs)
        assert other.embedder.fingerprint != loaded.embedder.fingerprint
        assert made._lm_of(call | {"model": "tiny-llama"}) is other
        assert GenerationSettings.from_lm(loaded)._lm_of({"embedder": tmp_path / "other"}) is other
        assert loaded.embedder.llm is llm
        (mark,) = loaded.refs.put(Document(SENTENCES))
        (found,) = other.refs.find(mark)
        assert found.text == SENTENCES
        elsewhere = GenerationSettings.from_lm(ExtensibleLM(llm, random_embedder(llm)))._lm_of(call)
        assert elsewhere is not other
        assert elsewhere.store is not store
        there = weakref.ref(other)
        del made, loaded, other, elsewhere
        gc.collect()
        assert there() is None  # with the model that it was made for


def test_another_model_of_a_call_is_where_the_one_that_is_loaded_is(tmp_path):
    save_tiny(tmp_path)
    call = {"model": str(tmp_path / "llm"), "embedder": str(tmp_path / "embedder")}
    llm = LLM(tiny_model("llama").bfloat16(), tiny_tokenizer(), name="tiny-half")
    loaded = ExtensibleLM(llm, random_embedder(llm), MemoryStore())
    other = GenerationSettings.from_lm(loaded)._lm_of(call)
    assert (other.llm.name, other.llm.dtype) == (str(tmp_path / "llm"), torch.bfloat16)
    assert (other.store, other.refs) == (loaded.store, loaded.refs)
    usual = tiny_llm()
    of_usual = GenerationSettings.from_lm(ExtensibleLM(usual, random_embedder(usual)))._lm_of(call)
    assert of_usual.llm is ModelSettings(**call).lm.llm  # one for all


def test_an_answer_is_told_of_document_by_document(lm):
    told = GenerationSettings.from_lm(lm)._response_metadata(
        lm.ask("How many?", [SENTENCES], ratio=4, max_new_tokens=2), {}
    )
    (document,) = told["extemb"]["documents"]
    assert (document["fidelity"], document["cached"]) == (4, False)
    assert document["positions"] < document["raw_tokens"]
    assert document["spans"] == []
    assert told["finish_reason"] == "length"
    assert told["model_name"] == "tiny-llama"


def test_older_turns_that_were_not_read_are_not_called_documents(lm, caplog):
    answer = lm.ask("How many?", [SENTENCES], ratio=4, max_new_tokens=2)
    unread = replace(answer.context[0], source="turn 1, user", fidelity="dropped", positions=0, turn=True)
    with caplog.at_level("WARNING"):
        GenerationSettings.from_lm(lm)._response_metadata(replace(answer, context=(*answer.context, unread)), {})
    assert "1 of 2 documents and older turns were not read" in caplog.text


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("raito", "pass ratio"), ("rat1o", "pass ratio"), ("embeder", "pass embedder"), ("stroe", "pass store"),
        ("context_window", "pass"), ("generate_kwargs", "pass one of"), ("tokenizer_name", "pass one of"),
    ],
)  # fmt: skip
def test_a_setting_that_there_is_not_is_an_error_that_names_the_nearest(kind, name, nearest):
    with pytest.raises(ConfigError, match=rf"unknown setting {name}=8; {nearest}\b"):
        kind.from_model_id("nobody/knows", **{name: 8})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("name", "nearest"),
    [("max_new_tokens", "max_tokens"), ("temprature", "temperature"), ("topp", "top_p"), ("buget", "budget")],
)
def test_a_model_s_setting_that_there_is_not_names_the_nearest(kind, name, nearest, lm):
    for make in (lambda **settings: kind.from_model_id("nobody/knows", **settings),
                 lambda **settings: kind.from_lm(lm, **settings)):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"unknown setting {name}=16; pass {nearest}\b"):
            make(**{name: 16})


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "budget", "ratio"])
def test_a_number_of_numpy_is_one(kind, name, lm):
    number = getattr(kind.from_lm(lm, **{name: np.int64(4)}), name)
    called = kind.from_lm(lm)._call_settings(None, {name: np.int32(4)})[name.replace("max_t", "max_new_t")]
    assert [(type(one), one) for one in (number, called)] == [(int, 4)] * 2
    assert type(Sampling(top_k=np.int64(4)).top_k) is int


@pytest.mark.parametrize("kind", MODELS)
def test_a_call_may_end_at_no_text(kind, lm):
    stopping = kind.from_lm(lm, stop=["END"])
    assert [stopping._call_settings(stop, {})["stop"] for stop in (None, [], "X")] == [["END"], [], ["X"]]


ILLEGAL = [
    ({"max_tokens": 0}, ConfigError), ({"max_tokens": 1.5}, ConfigError), ({"max_tokens": None}, ConfigError),
    ({"max_tokens": True}, ConfigError), ({"temperature": -1}, ConfigError), ({"temperature": "hot"}, ConfigError),
    ({"temperature": float("nan")}, ConfigError), ({"top_p": 0}, ConfigError), ({"top_p": 7}, ConfigError),
    ({"top_k": -1}, ConfigError), ({"repetition_penalty": 0}, ConfigError), ({"seed": "x"}, ConfigError),
    ({"stop": ""}, ConfigError), ({"stop": ["a", ""]}, ConfigError), ({"stop": [7]}, ConfigError),
    ({"budget": -1}, BudgetError), ({"budget": "100"}, BudgetError), ({"budget": True}, BudgetError),
]  # fmt: skip
ILLEGAL += [
    ({"plan": "best"}, ConfigError), ({"plan": 7}, ConfigError), ({"plan": ["focus"]}, ConfigError),
    ({"plan": "focus", "ratio": 4}, ConfigError), ({"plan": "select", "ratio": "raw"}, ConfigError),
]  # fmt: skip
ILLEGAL_RATIOS = ["fine", 0, -8, 2.5, True, "", None, "1.5"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("settings", "error"), ILLEGAL)
def test_an_illegal_value_is_an_error_of_the_object_and_of_a_call(kind, settings, error, lm):
    (name, value), *_ = settings.items()
    with pytest.raises(error, match=name):
        kind.from_model_id("nobody/knows", **settings)
    if value not in (None, "", [7]):  # the object's is taken then
        with pytest.raises(error, match=name):
            kind.from_lm(lm)._call_settings(None, settings)


@pytest.mark.parametrize(
    ("made", "called", "remedy"),
    [({"ratio": 4}, {"plan": "focus"}, {"ratio": "auto"}), ({"plan": "focus"}, {"ratio": 4}, {"plan": "even"})],
)
def test_a_ratio_and_a_plan_of_a_call_and_of_the_object_are_told_apart_by_the_call(made, called, remedy, lm):
    model = GenerationSettings.from_lm(lm, **made)
    with pytest.raises(ConfigError, match="plan='focus' came with ratio=4"):
        model._call_settings(None, called)
    chosen = model._call_settings(None, called | remedy)
    assert {name: chosen[name] for name in ("plan", "ratio")} == called | remedy


@pytest.mark.parametrize("plan", ["focus", "select"])
def test_a_model_for_plain_prompts_alone_has_no_question_to_plan_for(plan, lm):
    with pytest.raises(ConfigError, match=f"plan='{plan}' needs a question"):
        langchain_extemb.ExtensibleLLM.from_model_id("nobody/knows", plan=plan)
    assert langchain_extemb.ExtensibleLLM.from_lm(lm, plan="even").plan == "even"


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
@pytest.mark.parametrize("ratio", ILLEGAL_RATIOS)
def test_a_ratio_that_is_none_is_an_error(kind, ratio, lm):
    with pytest.raises(RatioError, match="ratio"):
        kind.from_model_id("nobody/knows", ratio=ratio)


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
def test_a_ratio_may_be_written_as_text(kind, lm):
    assert kind.from_model_id("nobody/knows", ratio="8").ratio == 8
    if kind in MODELS:
        assert kind.from_lm(lm)._call_settings(None, {"ratio": "8"})["ratio"] == 8


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
@pytest.mark.parametrize(
    "settings",
    [{"store": "docs.extemb"}, {"embedder": "mine"}, {"dtype": "float16"}, {"device": "cpu"}, {"model": "other"}],
)
def test_a_loaded_model_is_given_no_other_model_or_store(kind, settings, lm):
    with pytest.raises(ConfigError, match="makes no difference beside loaded_lm="):
        kind.from_lm(lm, **settings)
    if "llm" in kind.model_fields:
        with pytest.raises(ConfigError, match="makes no difference beside llm="):
            kind(llm=llamaindex_llms.ExtensibleLLM.from_lm(lm), **settings)


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
def test_a_loaded_model_stays_the_model_of_what_is_made_of_the_fields(kind, lm):
    """As LangChain's `configurable_fields` and LlamaIndex's unpickling make it."""
    made = kind.from_lm(lm, ratio=4)
    again = kind(**{**{name: made.__dict__[name] for name in kind.model_fields}, "ratio": 8})
    for copied in (again, deepcopy(made), made.model_copy(), made.model_copy(deep=True), copy(made)):
        assert copied.lm is lm
    assert again.ratio == 8
    assert "loaded_lm" not in made.model_dump()
    assert "loaded_lm" not in repr(made)


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
def test_of_a_store_its_folder_is_saved(kind, tmp_path):
    with EmbeddingStore.open(tmp_path / "docs.extemb") as store:
        saved = kind(store=store).model_dump_json()
        assert json.loads(saved)["store"] == str(tmp_path / "docs.extemb")
        assert json.dumps(kind(store=store).model_dump()) == json.dumps(json.loads(saved))
    assert json.loads(kind(store=MemoryStore()).model_dump_json())["store"] is None


@pytest.mark.parametrize("kind", [*MODELS, *COMPRESSORS])
def test_what_another_process_would_not_have_is_not_pickled(kind, lm):
    store = MemoryStore()
    unpicklable = [kind.from_lm(lm), kind.from_model_id("nobody/knows", store=store)]
    if "llm" in kind.model_fields:
        unpicklable.append(kind(llm=llamaindex_llms.ExtensibleLLM.from_lm(lm)))
    for made in unpicklable:
        with pytest.raises(ConfigError, match="cannot be pickled"):
            pickle.dumps(made)
    assert deepcopy(unpicklable[1]).store is store
    by_name = kind.from_model_id("nobody/knows", store="docs.extemb", ratio=8)
    again = pickle.loads(pickle.dumps(by_name))
    assert (again.model, again.store, again.ratio, again.loaded_lm) == ("nobody/knows", "docs.extemb", 8, None)


def test_taking_in_with_several_processes_is_an_error_and_no_other_model(lm):
    transform = llamaindex.ExtensibleTransform(llm=llamaindex_llms.ExtensibleLLM.from_lm(lm))
    pipeline = IngestionPipeline(transformations=[transform], disable_cache=True)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pipeline.run(nodes=[TextNode(text=SENTENCES) for _ in range(2)], num_workers=2)


def test_a_store_of_a_folder_is_closed_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr("extemb_core.frameworks.shared._models", {})
    monkeypatch.setattr("extemb_core.frameworks.shared._opened", {})
    save_tiny(tmp_path)
    named = {"embedder": str(tmp_path / "embedder"), "store": str(tmp_path / "docs.extemb"), "ratio": 4}
    made = ModelSettings.from_model_id(str(tmp_path / "llm"), **named)
    made.close()  # nothing is open
    for _ in range(2):
        lm = made.lm
        lm.compress(SENTENCES, ratio=4)
        assert len(lm.store) == 1
        made.close()
        with pytest.raises(StoreError, match="closed"):
            len(lm.store)
    over = ModelSettings.from_lm(made.lm)
    over.close()  # whoever opened it closes it
    assert len(over.lm.store) == 1
    made.close()
