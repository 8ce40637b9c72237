"""The embedder's configuration says no to what cannot work, before anything is built."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_llm

from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.models.embedder import ExtensibleEmbedder


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("adaptation", "prefix"),
        ("downscaling", "max"),
        ("connector", 3),
        ("token_weighting", "length"),
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


# -- above entry layer 0 ------------------------------------------------------------------------------------------


def test_what_is_usual_above_entry_layer_0():
    config = ExtensibleEmbedderConfig(entry_layer=5)
    assert (config.num_layers, config.downscaling, config.connector, config.adaptation) == (5, "mean", "none", "lora")
    assert (config.ratios, config.kept_ratio, config.plan_ratios) == ([1, 2, 4, 8, 16, 32], 2, [2, 4, 8])
    assert (config.token_weighting, config.residual_window, config.chunk_size) == ("rank", None, 512)
    assert ExtensibleEmbedderConfig(entry_layer=5, chunk_size=16).ratios == [1, 2, 4, 8, 16]
    coarse = ExtensibleEmbedderConfig(entry_layer=5, ratios=(16, 32))
    assert (coarse.kept_ratio, coarse.plan_ratios) == (16, [16, 32])
    alone = ExtensibleEmbedderConfig(entry_layer=5, ratios=(1,))
    assert (alone.kept_ratio, alone.plan_ratios) == (1, [1])
    assert config.finest() == 2
    assert config.finest(1) == 1
    with pytest.raises(RatioError, match="ratio=64 is not one of the ratios"):
        config.finest(64)


def test_entry_layer_0_is_as_it_was():
    config = ExtensibleEmbedderConfig()
    assert (config.num_layers, config.downscaling, config.connector, config.adaptation) == (
        8, "strided", "linear", "lora"
    )  # fmt: skip
    assert (config.entry_layer, config.ratios, config.residual_window) == (0, [2, 4, 8, 16, 32], 8)
    assert (config.kept_ratio, config.plan_ratios) == (2, [2, 4, 8, 16, 32])


@pytest.mark.parametrize("layer", [-1, 1.0, 0.0, "1", "", True, False, None, (1,)])
def test_an_entry_layer_is_0_or_a_positive_whole_number(layer):
    with pytest.raises(
        ConfigError, match=r"entry_layer=.* is not a whole number of at least 0; pass a layer of the LLM, or 0"
    ):
        ExtensibleEmbedderConfig(entry_layer=layer)


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("num_layers", 3, "it must be 4, the layers below the entry"),
        ("num_layers", 5, "it must be 4"),
        ("num_layers", 0, "it must be 4"),
        ("num_layers", "4", "it must be 4"),
        ("downscaling", "strided", "it must be 'mean'"),
        ("downscaling", "terminal", "it must be 'mean'"),
        ("downscaling", "random", "it must be 'mean'"),
        ("connector", "conv", "'none', 'linear' or 'mlp'"),
        ("residual_window", 8, "left out: states start from themselves"),
        ("residual_window", 1, "left out"),
    ],
)
def test_what_has_no_meaning_above_entry_layer_0_is_refused(setting, value, rule):
    with pytest.raises(ConfigError, match=f"{setting}={value!r} has no meaning at entry_layer=4; .*{rule}"):
        ExtensibleEmbedderConfig(entry_layer=4, **{setting: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adaptation": "none"}, "adaptation='none' needs an entry_layer above 0"),
        ({"token_weighting": "uniform"}, "token_weighting='uniform' has no meaning at entry_layer=0"),
        ({"token_weighting": "frequency"}, "token_weighting='frequency' has no meaning at entry_layer=0"),
        ({"token_weights_digest": "ab"}, "has no meaning at entry_layer=0"),
    ],
)
def test_what_has_no_meaning_at_entry_layer_0_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        ExtensibleEmbedderConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_weighting": "length"}, "token_weighting='length' is not one of uniform, rank, frequency"),
        ({"connector": "wide"}, "connector='wide' is not one of"),
        ({"lora_rank": 0}, "lora_rank=0"),
        ({"num_layers": 4.0}, "num_layers=4.0"),
        ({"ratios": (1, 3, 4)}, "4 is not a multiple of 3"),
        ({"kept_ratio": 3}, "ratio=3 is not one of the ratios"),
        ({"plan_ratios": (2, 64)}, "ratio=64 is not one of the ratios"),
        ({"plan_ratios": ()}, r"ratios=\(\) must be positive"),
    ],
)
def test_an_illegal_setting_above_entry_layer_0(settings, words):
    with pytest.raises(ConfigError, match=words):
        ExtensibleEmbedderConfig(entry_layer=4, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"entry_layer": 4},
        {"entry_layer": 4, "ratios": (2, 4, 8, 16, 32), "adaptation": "none"},
        {"entry_layer": 1, "connector": "mlp", "token_weighting": "frequency", "token_weights_digest": "ab"},
        {"entry_layer": 2, "kept_ratio": 4, "plan_ratios": (4, 8), "token_weighting": "uniform", "chunk_size": 64},
        {"num_layers": 2, "ratios": (2, 4), "kept_ratio": 4},
    ],
)
def test_json_gives_every_setting_back(settings, tmp_path):
    config = ExtensibleEmbedderConfig(**settings)
    config.save_pretrained(tmp_path)
    again = ExtensibleEmbedderConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


def test_a_file_from_before_there_were_entry_layers(tmp_path):
    config = ExtensibleEmbedderConfig(num_layers=2, ratios=(2, 4))
    values = config.to_dict()
    for name in ("entry_layer", "kept_ratio", "plan_ratios", "token_weighting", "token_weights_digest"):
        del values[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ExtensibleEmbedderConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("ratio", [True, "2", None, 3])
def test_a_ratio_is_a_whole_number_of_those_that_there_are(ratio):
    config = ExtensibleEmbedderConfig(ratios=(1, 2, 4))
    assert config.require_ratio(2) == 2
    with pytest.raises(RatioError, match=f"ratio={ratio} is not one of the ratios"):
        config.require_ratio(ratio)


def test_a_setting_that_there_is_not_is_named():
    llm = tiny_llm()
    for misspelt in ({"chunksize": 8}, {"token_wieghting": "uniform"}, {"rations": (2, 4)}, {"llm_name": "other"}):
        (name,) = misspelt
        with pytest.raises(ConfigError, match=f"unknown setting {name}="):
            ExtensibleEmbedder.from_llm(llm, **misspelt)
    with pytest.raises(ConfigError, match="pass chunk_size"):
        ExtensibleEmbedder.untrained(llm, 1, chunksize=8)
