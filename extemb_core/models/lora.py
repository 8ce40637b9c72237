"""Low-rank adapters over linear layers whose weights belong to the LLM.

peft makes them. Its forward is replaced by one that gives the same sum with less work. In training the scale goes to
the small matrix and not to every output. For inference, still without a merged copy of the shared weights: for many
tokens the adapter is added to a weight that lives for this one product, for few its output is added to the base
layer's in place.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

_NAME = "default"


def add_adapters(layers: nn.Module, rank: int) -> None:
    """Put an adapter of this rank, scaled by 2, on every linear layer in `layers`; at first it changes nothing."""
    names = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(names), bias="none")
    inject_adapter_in_model(config, layers)
    make_frugal(layers)


def make_frugal(layers: nn.Module) -> None:
    """Let the adapters that peft put into `layers` compute as described above."""
    for module in layers.modules():
        if type(module) is LoraLinear:
            module.__class__ = _FrugalLoraLinear


class _FrugalLoraLinear(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        adapter_in: Any = self.lora_A[_NAME]
        adapter_out: Any = self.lora_B[_NAME]
        down: Tensor = adapter_in.weight
        up: Tensor = adapter_out.weight
        scale = self.scaling[_NAME]
        if torch.is_grad_enabled() or not (x.dtype == down.dtype == up.dtype == base.weight.dtype):
            whole: Tensor = base(x)
            low = nn.functional.linear(x.to(whole.dtype), down.to(whole.dtype))
            return whole + nn.functional.linear(low, (up * scale).to(whole.dtype))
        n_tokens = x.numel() // down.shape[1]
        if n_tokens * (up.shape[0] + down.shape[1]) > up.shape[0] * down.shape[1]:
            # Adding the adapter to the weight is less work than running every token through it.
            return nn.functional.linear(x, torch.addmm(base.weight, up, down, alpha=scale), base.bias)
        output: Tensor = base(x)
        low = nn.functional.linear(x, down).view(-1, down.shape[0])
        output.view(-1, up.shape[0]).addmm_(low, up.t(), alpha=scale)
        return output
