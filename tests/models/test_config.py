"""The embedder's configuration says no to what cannot work, before anything is built."""

from __future__ import annotations

import pytest

from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.config import ExtensibleEmbedderConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adaptation", "prefix"),
        ("downscaling", "max"),
        ("connector", None),
        ("num_layers", 0),
        ("num_layers", "8"),
        ("num_layers", True),
        ("chunk_size", 51.2),
        ("residual_window", -1),
        ("lora_rank", None),
        ("ratios", ()),
        ("ratios", (0, 2)),
        ("ratios", (2, 2.5)),
        ("ratios", ("2", "4")),
        ("ratios", "248"),
        ("ratios", 4),
        ("ratios", (2, 3)),
        ("ratios", (2, 1024)),
    ],
)
def test_an_illegal_setting_is_named(setting, value):
    with pytest.raises(ConfigError, match="ratio" if setting == "ratios" else f"{setting}={value!r}"):
        ExtensibleEmbedderConfig(**{setting: value})


def test_json_gives_the_same_configuration_back(tmp_path):
    config = ExtensibleEmbedderConfig(num_layers=3, ratios=(8, 2, 4, 4), bos_token_id=5, tokenizer_digest="ab")
    config.save_pretrained(tmp_path)
    again = ExtensibleEmbedderConfig.from_pretrained(tmp_path)
    assert again.ratios == config.ratios == [2, 4, 8]
    assert {k: getattr(again, k) for k in ("num_layers", "bos_token_id", "tokenizer_digest", "connector")} == {
        "num_layers": 3,
        "bos_token_id": 5,
        "tokenizer_digest": "ab",
        "connector": "linear",
    }


def test_only_trained_ratios_are_let_through():
    config = ExtensibleEmbedderConfig(ratios=(2, 4))
    assert config.require_ratio(4) == 4
    with pytest.raises(RatioError, match=r"ratio=8 is not one of the ratios \(2, 4\)"):
        config.require_ratio(8)
