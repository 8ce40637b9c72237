"""The folder that vLLM serves: transformers reads it as the plain LLM, and its config says what the plugin needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SENTENCES, entering, random_embedder, tiny_llm, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from extemb_core.context.assembly import assemble_text
from extemb_core.errors import ConfigError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.export import export_for_vllm
from extemb_core.models.llm import LLM

TEXT, QUESTION = SENTENCES[:170], " What did the keeper count?"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_folder_is_read_as_the_plain_llm_and_reads_compressed_text_alike(family: str, tmp_path: Path) -> None:
    llm = tiny_llm(family)
    embedder = entering(llm)
    export_for_vllm(embedder, tmp_path / "served")
    config = config_of(tmp_path / "served")
    assert config["architectures"] == [f"Extensible{type(llm.model).__name__}"]
    assert config["extemb"] == {"entry_layer": 1, "fingerprint": embedder.fingerprint}
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "served", output_loading_info=True)
    assert type(loaded) is type(llm.model)
    assert not report["missing_keys"]
    ids = torch.tensor([llm.encode(TEXT).tolist()])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, llm.model(ids).logits)
    again = LLM(loaded, llm.tokenizer)
    prompt = assemble_text(llm, [embedder.compress(TEXT, ratio=4).part, QUESTION]).inputs(llm)
    assert torch.equal(again.hidden_of([prompt]), llm.hidden_of([prompt]))


def test_the_tokenizer_and_the_fingerprint_are_the_llm_s(tmp_path: Path) -> None:
    llm = tiny_llm()
    embedder = entering(llm)
    export_for_vllm(embedder, tmp_path / "served")
    again = LLM.from_pretrained(tmp_path / "served")
    assert (again.tokenizer_digest, again.tokenizer.chat_template) == (
        llm.tokenizer_digest,
        llm.tokenizer.chat_template,
    )
    assert ExtensibleEmbedder.untrained(again, 1, chunk_size=16, ratios=(1, 2, 4, 8)).fingerprint == (
        embedder.fingerprint
    )


def test_at_entry_layer_0_it_is_the_plain_llm(tmp_path: Path) -> None:
    export_for_vllm(random_embedder(tiny_llm()), tmp_path / "served")
    config = config_of(tmp_path / "served")
    assert (config["architectures"], "extemb" in config) == (["LlamaForCausalLM"], False)


def test_without_a_chat_template_vllm_gets_one_that_joins(tmp_path: Path) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = None
    export_for_vllm(entering(LLM(tiny_model("llama"), tokenizer, name="base")), tmp_path / "served")
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    read = AutoTokenizer.from_pretrained(tmp_path / "served")
    assert read.apply_chat_template(messages, tokenize=False) == "a\n\nb\n\n"


def test_what_cannot_be_served_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tiny-phi is a PhiForCausalLM, and the vLLM plugin serves LlamaForCausalLM"):
        export_for_vllm(entering(tiny_llm("phi")), tmp_path / "served")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ConfigError, match="taken is there already; name a new folder"):
        export_for_vllm(entering(tiny_llm()), tmp_path / "taken")
    with pytest.raises(ConfigError, match=r"taken.file cannot be made \(.*\); name a folder elsewhere"):
        export_for_vllm(entering(tiny_llm()), tmp_path / "taken" / "file" / "served")
    monkeypatch.setattr("extemb_core.models.export.atomic_write_text", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_for_vllm(entering(tiny_llm()), tmp_path / "broken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_what_a_killed_export_left_goes_with_a_later_one(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".served.export-a1", ".served.export-b2", ".served2.export-c3"))
    for folder in (old, new, other):
        folder.mkdir()
        (folder / "model.safetensors").touch()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    export_for_vllm(entering(tiny_llm()), tmp_path / "served")
    assert sorted(tmp_path.iterdir()) == sorted([new, other, tmp_path / "served"])


def test_a_tilde_is_the_home_folder(home: Path) -> None:
    export_for_vllm(random_embedder(tiny_llm()), "~/served")
    assert (home / "served" / "config.json").is_file()


def test_an_empty_folder_is_filled_and_everybody_reads_it(tmp_path: Path) -> None:
    target = tmp_path / "served"
    target.mkdir()
    export_for_vllm(entering(tiny_llm()), target)
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1
    assert target.stat().st_mode == tmp_path.stat().st_mode


@pytest.mark.real_model
@pytest.mark.usefixtures("real_weights_once")
def test_the_default_model_with_its_reader_merged_in(tmp_path: Path) -> None:
    from extemb_core import ExtensibleLM

    lm = ExtensibleLM.from_pretrained(device="cpu")
    export_for_vllm(lm.embedder, tmp_path / "served")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "served", dtype=torch.float32)
    ids = torch.tensor([lm.llm.encode(QUESTION).tolist()])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, lm.llm.model(ids).logits)
