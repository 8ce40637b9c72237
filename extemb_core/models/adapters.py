"""Low-rank adapters over linear layers whose weights belong to the LLM.

peft makes and trains them. For inference its forward is replaced by one that adds the adapter's product to the base
layer's output in place: the same sum with fewer passes over memory, and no merged copy of the shared weights.
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
    for module in layers.modules():
        if type(module) is LoraLinear:
            module.__class__ = _InPlaceLoraLinear


class _InPlaceLoraLinear(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        adapter_in: Any = self.lora_A[_NAME]
        adapter_out: Any = self.lora_B[_NAME]
        down: Tensor = adapter_in.weight
        up: Tensor = adapter_out.weight
        if torch.is_grad_enabled() or not (x.dtype == down.dtype == up.dtype == base.weight.dtype):
            summed: Tensor = super().forward(x, *args, **kwargs)
            return summed
        output: Tensor = base(x)
        low = nn.functional.linear(x, down).view(-1, down.shape[0])
        output.view(-1, up.shape[0]).addmm_(low, up.t(), alpha=self.scaling[_NAME])
        return output
