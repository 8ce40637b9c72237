"""Settings of a run that are not legal, or do not go together, are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from extemb_core.errors import ConfigError
from extemb_core.training.trainer import is_first_process


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("data", ()), ("data", "one.txt"), ("eval_data", "one.txt"), ("batch_size", 0), ("sample_length", 4.5),
        ("chunk_sizes", (0,)), ("ratios", ("2",)), ("warmup_steps", -1), ("learning_rate", 0), ("learning_rate", 3),
        ("connector_lr_factor", 0), ("max_grad_norm", -1), ("max_minutes", 0), ("seed", -1), ("weight_decay", -0.1),
        ("dtype", "int8"), ("learning_rate", "3e-4"), ("weight_decay", "0.1"), ("save_minutes", "5"), ("spans", (32,)),
        ("spans", 32), ("chunk_sizes", 16), ("objectives", ("two_stream",)), ("objectives", {"two_stream": "1"}),
        ("objectives", {"two_stream": float("nan")}), ("distillation", "0.5"), ("max_grad_norm", True),
        ("embedder", ("entry_layer",)), ("learning_rate", float("nan")),
    ],
)  # fmt: skip
def test_an_illegal_setting_is_named(config, name, value):
    with pytest.raises(ConfigError, match=name):
        replace(config, **{name: value})


def test_settings_of_objectives_that_do_not_go_together(asked):
    for change, message in (
        ({"objectives": {"twostream": 1}}, "'twostream' is not one of two_stream, reconstruction, recall, questions"),
        ({"objectives": {}}, "shares are at least 0 and not all 0"),
        ({"objectives": {"two_stream": 1}}, "data is empty"),
        ({"questions": ()}, "questions is empty"),
        ({"distillation": 1.5}, "distillation=1.5 is not between 0 and 1"),
        ({"raw_share": -0.1}, "raw_share=-0.1 is not between 0 and 1"),
        ({"trained": "all"}, "trained='all' is not one of embedder, connector, reader, both"),
        (
            {"trained": "reader", "data": ("a.txt",), "objectives": {"two_stream": 1}},
            "a reader of text learns from questions",
        ),
        ({"trained": "reader", "eval_data": ("a.txt",)}, "eval_data is text for an embedder's loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(asked, **change)


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "0"), ("WORLD_SIZE", "two"), ("RANK", "-1"), ("RANK", "x")])
def test_what_torchrun_would_never_say_is_named(config, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"the environment has {name}='{value}', no whole number"):
        _ = config.max_steps, is_first_process()
    monkeypatch.setenv(name, "")
    assert (config.processes, is_first_process()) == (1, True)
