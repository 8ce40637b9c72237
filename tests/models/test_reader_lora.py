"""Adapters of a reader that cannot be merged are refused."""

from __future__ import annotations

import json

import pytest

from extemb_core.errors import WeightsCorruptError
from extemb_core.models.llm import LLM


@pytest.mark.parametrize(("name", "value"), [("lora_alpha", "8"), ("lora_alpha", 0), ("r", None), ("r", float("inf"))])
def test_a_reader_whose_scale_is_no_number_is_one_sentence(saved, tmp_path, name, value):
    reader = tmp_path / "reader"
    reader.mkdir()
    settings = {"base_model_name_or_path": str(saved), "r": 2, "lora_alpha": 4} | {name: value}
    (reader / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsCorruptError, match=f"has {name}=.*; get the adapters again"):
        LLM.from_pretrained(reader, device="cpu")
