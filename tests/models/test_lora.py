"""Adapters: nothing at the start, and for inference the same as in peft's own form."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from extemb_core.errors import WeightsCorruptError
from extemb_core.models.lora import add_adapters, read_tensors


def layers():
    torch.manual_seed(0)
    return nn.ModuleDict({"q_proj": nn.Linear(8, 12), "o_proj": nn.Linear(12, 8, bias=False)})


def run(module, x):
    return module["o_proj"](module["q_proj"](x))


def randomise(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def test_new_adapters_change_nothing():
    plain = layers()
    x = torch.randn(2, 5, 8)
    adapted = copy.deepcopy(plain)
    add_adapters(adapted, rank=3)
    with torch.no_grad():
        assert torch.equal(run(adapted, x), run(plain, x))


@pytest.mark.parametrize("n_tokens", [2, 3, 50])  # below and above where merging pays: 8 * 12 / (8 + 12)
def test_the_forms_for_inference_agree_with_the_trained_one(n_tokens):
    adapted = layers()
    add_adapters(adapted, rank=3)
    randomise(adapted)
    x = torch.randn(2, n_tokens, 8)
    with_gradient = run(adapted, x)
    with torch.no_grad():
        frugal = run(adapted, x)
    assert with_gradient.requires_grad
    torch.testing.assert_close(frugal, with_gradient.detach(), atol=1e-5, rtol=1e-5)
    weight = adapted["q_proj"].base_layer.weight + 2 * (
        adapted["q_proj"].lora_B["default"].weight @ adapted["q_proj"].lora_A["default"].weight
    )
    by_hand = nn.functional.linear(x, weight, adapted["q_proj"].base_layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(adapted["q_proj"](x), by_hand, atol=1e-5, rtol=1e-5)


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


def test_a_layer_that_returns_more_than_a_product_gets_none():
    module = layers()
    module["router"] = Router(8, 2)
    add_adapters(module, rank=2)
    assert type(module["router"]) is Router
    assert type(module["q_proj"]) is not nn.Linear


def test_adapters_of_another_dtype_still_work():
    adapted = layers().to(torch.float16)
    add_adapters(adapted, rank=3)
    randomise(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        assert torch.isfinite(run(adapted, torch.randn(2, 5, 8, dtype=torch.float16))).all()


def test_adapted_layers_can_be_copied():
    adapted = layers()
    add_adapters(adapted, rank=3)
    randomise(adapted)
    x = torch.randn(1, 2, 8)
    with torch.no_grad():
        assert torch.equal(run(copy.deepcopy(adapted), x), run(adapted, x))


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 7])
def test_tensors_that_are_no_finite_numbers_are_refused(tmp_path, value):
    save_file({"a": torch.ones(2), "b": torch.tensor([1, value])}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsCorruptError, match="tensor 'b' holds what is no finite number; get it again"):
        read_tensors(tmp_path / "model.safetensors")
