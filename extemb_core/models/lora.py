"""Low-rank adapters over linear layers whose weights belong to the LLM, and the files that hold what was trained.

peft makes them. Its forward is replaced by one that computes the same sum with less work. In training, the small matrix
is scaled instead of every output. In inference, there is still no permanent merged copy of the shared weights: for many
tokens the adapter is added to a temporary copy of the weight, for few its output is added to the base layer's in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsNotFoundError, first_line
from extemb_core.utils.files import parse_json

ADAPTER = "default"  # peft's name for the only adapter


def add_adapters(layers: nn.Module, rank: int, **settings: Any) -> LoraConfig:
    """Put an adapter of this rank, scaled by 2, on every linear layer in `layers`; at first it changes nothing.

    Subclasses of `Linear`, such as a router that returns more than a product, get none. `settings` are further settings
    of peft's `LoraConfig`.

    Raises:
        ConfigError: peft does not adapt these layers.
    """
    names = {name.rsplit(".", 1)[-1] for name, module in layers.named_modules() if type(module) is nn.Linear}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=sorted(names), bias="none", **settings
    )
    try:
        inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
    except ValueError as error:  # a layer of another kind has the name of a linear one
        raise ConfigError(f"peft cannot adapt these layers ({first_line(error)}); use another LLM") from error
    for module in layers.modules():
        if type(module) is LoraLinear:
            module.__class__ = _FrugalLoraLinear
    return config


def read_settings(file: Path) -> dict[str, Any]:
    """Read the JSON file that describes an embedder or a reader; no settings if it does not hold an object.

    Raises:
        WeightsNotFoundError, WeightsCorruptError: The file is missing, or not JSON.
    """
    try:
        settings = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"{file} does not exist; pass the folder that save_pretrained wrote") from error
    except ValueError as error:
        raise WeightsCorruptError(f"{file} is not JSON ({error}); get it again") from error
    return settings if isinstance(settings, dict) else {}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of an embedder or a reader.

    Raises:
        WeightsNotFoundError, WeightsCorruptError: The file is missing or damaged.
    """
    try:
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"{file} does not exist; its folder holds it beside a file of settings") from error
    except (SafetensorError, OSError) as error:
        raise WeightsCorruptError(f"{file} is not a whole safetensors file ({error}); get it again") from error
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise WeightsCorruptError(f"{file}: tensor {name!r} holds what is no finite number; get it again")
    return tensors


def first_mismatch(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """Name a tensor that is missing, unknown or of another shape than expected, if there is one."""
    shapes, others = ({name: tensor.shape for name, tensor in group.items()} for group in (expected, tensors))
    return min((name for name, _ in shapes.items() ^ others.items()), default=None)


class _FrugalLoraLinear(LoraLinear):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module: Any = self  # peft does not declare its types
        base, scale = module.base_layer, module.scaling[ADAPTER]
        down: Tensor = module.lora_A[ADAPTER].weight
        up: Tensor = module.lora_B[ADAPTER].weight
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
