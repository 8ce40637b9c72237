"""A planted layer is chosen, ties go to the earlier one, and layers that spoil text are out."""

from __future__ import annotations

import numpy as np
import pytest

from extemb_core.evaluation.calibration_rule import choose_layer


def planted(layers, none=3.0, n=20, noise=0.0, seed=0):
    """Samples whose losses at ratios 2 and 4 are those given for each layer, around a level of their own."""
    draw = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        level = float(draw.normal())
        arms = {"none": none + level, "full": 1.0 + level, "truncated/2": 2.0 + level, "truncated/4": 2.5 + level}
        for layer, losses in layers.items():
            arms[f"{layer}/1"] = 1.0 + level
            arms |= {f"{layer}/{r}": loss + level + noise * float(draw.normal()) for r, loss in losses.items()}
        samples.append({"target_tokens": 10, "arms": arms})
    return samples


def chosen(text, answers=None):
    tasks = {"text": planted(text)} | ({"answers": planted(answers, none=4.0)} if answers else {})
    return choose_layer(tasks, list(text), (1, 2, 4))


def test_the_layer_with_the_lowest_loss_is_chosen():
    found = chosen({1: {2: 2.3, 4: 2.9}, 2: {2: 2.0, 4: 2.5}, 3: {2: 2.2, 4: 2.4}})
    assert (found["layer"], found["best"], found["unfit"]) == (2, 2, {})
    table = found["tasks"]["text"]["layers"]
    assert table["2"]["minus_best"]["mean"] == 0
    assert table["1"]["minus_best"]["mean"] == pytest.approx(0.35)
    assert found["reason"] == "the lowest mean loss of text over ratios 2, 4"


def test_a_tie_within_noise_goes_to_the_earlier_layer():
    layers = {1: {2: 2.02, 4: 2.02}, 2: {2: 2.0, 4: 2.0}, 3: {2: 2.2, 4: 2.2}}
    samples = planted(layers, noise=0.1, seed=1)
    found = choose_layer({"text": samples}, (1, 2, 3), (2, 4))
    assert (found["layer"], found["best"]) == (1, 2)
    assert found["reason"].startswith("the earliest that is level with layer 2, the best by mean loss of text over")
    assert choose_layer({"text": planted(layers, noise=0.001)}, (1, 2, 3), (2, 4))["layer"] == 2


def test_answers_decide_but_not_for_a_layer_that_spoils_text():
    answers = {1: {2: 2.0, 4: 2.0}, 2: {2: 2.3, 4: 2.3}, 3: {2: 2.1, 4: 2.1}}
    readable = {layer: {2: 2.5 - layer / 10, 4: 2.5} for layer in answers}
    assert chosen(readable, answers)["layer"] == 1
    found = chosen(readable | {1: {2: 2.0, 4: 3.2}}, answers)
    assert (found["layer"], found["unfit"]) == (3, {"1": [4]})
    assert "worse than no text there: layer 1 (ratio 4)" in found["reason"]


def test_where_every_layer_spoils_text_that_is_said():
    found = chosen({1: {2: 3.3, 4: 3.3}, 2: {2: 3.2, 4: 3.2}})
    assert found["layer"] == 2
    assert "try other layers" in found["reason"]


def test_each_token_counts_the_same():
    one, other = planted({1: {2: 1.0}, 2: {2: 2.0}}, n=1), planted({1: {2: 2.0}, 2: {2: 1.5}}, n=1)
    one[0]["target_tokens"] = 90
    assert choose_layer({"text": [*one, *other]}, (1, 2), (2,))["best"] == 1
    one[0]["target_tokens"] = 1
    assert choose_layer({"text": [*one, *other]}, (1, 2), (2,))["best"] == 2
