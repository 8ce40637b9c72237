"""Adapters of a reader that cannot be merged are refused."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_model, tiny_tokenizer

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsError
from extemb_core.models.llm import LLM
from extemb_core.models.reader_lora import add_reader, save_reader


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", "8"), ("lora_alpha", 0), ("r", None), ("r", float("inf"))])
def test_a_reader_whose_scale_is_no_number_is_one_sentence(saved, tmp_path, name, value):
    reader = tmp_path / "reader"
    reader.mkdir()
    settings = {"base_model_name_or_path": str(saved), "r": 2, "lora_alpha": 4} | {name: value}
    (reader / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsCorruptError, match=f"has {name}=.*; get the adapters again"):
        LLM.from_pretrained(reader, device="cpu")


@pytest.mark.parametrize(("name", "value"), [
    ("init_lora_weights", "pissa"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"), ("init_lora_weights", "corda"), ("alora_invocation_tokens", [5, 6]),
    ("use_dora", True), ("use_rslora", True), ("target_parameters", ["experts.down_proj"]),
])  # fmt: skip
def test_adapters_that_are_more_than_a_sum_are_refused(saved, tmp_path, name, value):
    llm = LLM.from_pretrained(saved, device="cpu")
    reader = tmp_path / "reader"
    save_reader(llm, add_reader(llm, 2), reader)
    LLM.from_pretrained(reader, device="cpu")
    settings = reader / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {name: value}))
    with pytest.raises(WeightsError, match=f"has {name}=.* with peft"):
        LLM.from_pretrained(reader, device="cpu")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # peft's own, on the way
def test_experts_that_peft_adapts_in_another_form_are_refused_before_training():
    add_reader(LLM(tiny_model("qwen3_moe"), tiny_tokenizer(), name="sparse"), 2)
    mixed = LLM(tiny_model("qwen3_moe", mlp_only_layers=[0]), tiny_tokenizer(), name="mixed")
    with pytest.raises(ConfigError, match="mixed is a mixture of experts .* recipe frozen"):
        add_reader(mixed, 2)
