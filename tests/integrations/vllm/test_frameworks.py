"""LangChain's and LlamaIndex's models have a server write their answers, by `engine="vllm"` alone."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import URL, FakeVllm
from tiny import SENTENCES, entering, save_tiny, tiny_llm

from extemb_core import ExtensibleLM
from extemb_core.errors import ConfigError
from extemb_core.frameworks import shared
from extemb_core.models.vllm_client import VllmLLM
from langchain_extemb import ChatExtensible, ExtensibleCompressor, ExtensibleLLM
from llama_index.llms.extemb import ExtensibleLLM as LlamaIndexLLM
from llama_index.llms.extemb import extensible_prompt_helper
from llama_index.postprocessor.extemb import ExtensibleEmbeddingPostprocessor, ExtensibleTransform

QUESTION, DOCUMENT = "What did the keeper count?", SENTENCES[:170]
SETTINGS: dict[str, Any] = {"ratio": 4, "max_tokens": 6, "temperature": 1.0, "seed": 1}


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeVllm, dict[str, Any], str]]:
    """A server, how it is named, and what this process answers."""
    shared.release()
    save_tiny(tmp_path)
    entering(tiny_llm()).save_pretrained(tmp_path / "entering")
    here = ExtensibleLM.from_pretrained(tmp_path / "llm", tmp_path / "entering")
    server = FakeVllm(here.llm, here.embedder.fingerprint)
    monkeypatch.setattr(VllmLLM, "_client", property(lambda self: server.client()))
    drawn = {"ratio": 4, "max_new_tokens": 6, "temperature": 1.0, "seed": 1}
    expected = here.ask(QUESTION, [DOCUMENT], **drawn).text
    named = {"model": str(tmp_path / "llm"), "embedder": str(tmp_path / "entering"), "engine": "vllm", "base_url": URL}
    yield server, named | SETTINGS, expected
    shared.release()


def test_a_chat_model_of_langchain(served: Any) -> None:
    server, named, expected = served
    llm = ChatExtensible(**named)
    assert llm.invoke(QUESTION, documents=[DOCUMENT]).content == expected
    assert "".join(str(chunk.content) for chunk in llm.stream(QUESTION, documents=[DOCUMENT])) == expected
    assert asyncio.run(llm.ainvoke(QUESTION, documents=[DOCUMENT])).content == expected
    assert [message.content for message in llm.batch([QUESTION] * 3, documents=[DOCUMENT])] == [expected] * 3
    assert len(server.prompts) == 6
    assert llm.lm is ExtensibleCompressor(**{name: named[name] for name in list(named)[:4]}).lm


def test_an_llm_of_langchain_answers_its_prompts_at_once(served: Any) -> None:
    server, named, _ = served
    result = ExtensibleLLM(**named).generate(["Ships?", "Wires?"], documents=[DOCUMENT])
    assert len(result.generations) == len(server.prompts) == 2


def test_an_llm_of_llamaindex(served: Any) -> None:
    _, named, expected = served
    llm = LlamaIndexLLM(**named)
    assert llm.complete(QUESTION, documents=[DOCUMENT]).text == expected
    assert [piece.text for piece in llm.stream_complete(QUESTION, documents=[DOCUMENT])][-1] == expected


def test_the_window_that_frameworks_are_told_is_no_larger_than_the_servers(served: Any) -> None:
    server, named, _ = served
    server.max_model_len = 96
    by_name = ChatExtensible(**named)
    assert by_name.profile is not None
    assert "max_input_tokens" not in by_name.profile  # nothing is asked of a server for it
    assert by_name.profile["max_output_tokens"] == 6
    loaded = ChatExtensible.from_lm(by_name.lm)
    assert loaded.profile is not None
    assert loaded.profile["max_input_tokens"] == 96
    for llm in (LlamaIndexLLM(**named), LlamaIndexLLM.from_lm(by_name.lm)):
        assert llm.metadata.context_window == llm.lm.llm.context_window == 96
        assert extensible_prompt_helper(llm).context_window == 96
    here = {name: named[name] for name in ("model", "embedder")}
    assert LlamaIndexLLM(**here).metadata.context_window == 256
    profile = ChatExtensible(**here).profile
    assert profile is not None
    assert profile["max_input_tokens"] == 256


def test_another_embedder_of_a_call_is_asked_of_the_server_of_the_loaded_model(served: Any, tmp_path: Path) -> None:
    server, named, expected = served
    made = ExtensibleLM.from_pretrained(**{"llm" if n == "model" else n: named[n] for n in list(named)[:4]})
    llm = ChatExtensible.from_lm(made, **SETTINGS)
    for model in ({}, {"model": made.llm.name}):
        other = llm._lm_of({"embedder": "untrained", **model})
        assert isinstance(other.llm, VllmLLM)
        assert (other.llm.base_url, other.llm.model) == (URL, made.llm.model)
        assert other.llm.fingerprint == other.embedder.fingerprint != made.embedder.fingerprint
    assert llm.invoke(QUESTION, documents=[DOCUMENT], ratio="raw", embedder="untrained").content
    assert llm.invoke(QUESTION, documents=[DOCUMENT]).content == expected  # with its own, as before
    assert len(server.bodies) == 2
    save_tiny(tmp_path / "more")
    elsewhere = llm._lm_of({"model": str(tmp_path / "more" / "llm"), "embedder": str(tmp_path / "more" / "embedder")})
    assert isinstance(elsewhere.llm, VllmLLM)
    assert elsewhere.llm.base_url == URL


@pytest.mark.parametrize("kind", [ChatExtensible, LlamaIndexLLM])
def test_a_server_is_named_with_its_engine_and_its_key_is_not_shown(kind: Any, caplog: Any) -> None:
    with pytest.raises(ConfigError, match="engine='transformers' came with base_url="):
        kind(base_url=URL)
    with pytest.raises(ConfigError, match="makes no difference beside loaded_lm="):
        kind.from_lm(ExtensibleLM(tiny_llm(), entering(tiny_llm())), engine="vllm", base_url=URL)
    kind(api_key="hidden-key")
    assert "api_key= makes no difference to a " in caplog.text
    llm = kind(engine="vllm", base_url=URL, api_key="hidden-key")
    assert "hidden-key" not in repr(llm) + str(llm.model_dump())
    assert pickle.loads(pickle.dumps(llm)).api_key.get_secret_value() == "hidden-key"


@pytest.mark.parametrize("kind", [LlamaIndexLLM, ExtensibleEmbeddingPostprocessor, ExtensibleTransform])
def test_what_llamaindex_saves_as_json_has_all_but_the_key(kind: Any) -> None:
    made = kind(engine="vllm", base_url=URL, api_key="hidden-key", ratio=4)
    saved = made.to_json()
    assert "hidden-key" not in saved
    assert (
        json.loads(saved)
        == json.loads(json.dumps(made.to_dict()))
        == kind(engine="vllm", base_url=URL, ratio=4).to_dict()
    )
    again = kind.from_json(saved)
    assert (again.base_url, again.ratio, again.api_key) == (URL, 4, None)
