"""Readers: low-rank adapters that teach an LLM to answer from the text it is given.

A reader's folder has peft's format: `adapter_config.json` and `adapter_model.safetensors`. Loaded as an LLM, it is its
base LLM with the adapters added to the weights, and frozen like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from extemb_core.errors import ConfigError, MismatchError, WeightsCorruptError, WeightsError
from extemb_core.models.lora import ADAPTER, add_adapters, first_mismatch, read_settings, read_tensors
from extemb_core.utils.files import safetensors_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from extemb_core.models.llm import LLM

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_MAX_SETTING = 10**6
_PREFIX = "base_model.model."  # begins all names in peft's files
# Settings of a plain adapter; any other value changes what has to be added to the weights.
_PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False,
          "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "target_parameters": None,
          "alora_invocation_tokens": None}  # fmt: skip
_BEGIN_AT_NOTHING = (None, True, False, "gaussian", "orthogonal", "eva")  # other initialisations change the LLM


def add_reader(llm: LLM, rank: int, first_layer: int = 0) -> LoraConfig:
    """Put trainable adapters on the linear layers of the LLM's decoder, in place; at first they change nothing.

    Args:
        llm: The LLM.
        rank: Rank of the adapters.
        first_layer: Decoder layers before this one get no adapters, so that an embedder trained with the reader can
            share them.

    Raises:
        ConfigError: No layer is left, or the LLM's experts would get adapters, which cannot be added to its weights.
    """
    decoder: Any = llm.model.base_model
    if first_layer >= len(decoder.layers):
        raise ConfigError(
            f"a reader gets none of the first {first_layer} layers, and {llm.name} has {len(decoder.layers)}; pass a "
            "smaller reader_first_layer, or fewer num_layers of the embedder beside it"
        )
    config = add_adapters(
        decoder,
        rank,
        task_type="CAUSAL_LM",
        base_model_name_or_path=llm.name,
        layers_to_transform=list(range(first_layer, len(decoder.layers))) if first_layer else None,
        layers_pattern="layers" if first_layer else None,
    )
    if config.target_parameters:  # peft takes the names of dense layers for those of experts
        raise ConfigError(
            f"{llm.name} is a mixture of experts whose layers peft adapts in another form than linear ones; train an "
            "embedder alone, with the recipe frozen, or pass another LLM"
        )
    for name, parameter in decoder.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # in bfloat16 small updates would be rounded away
    return config


def save_reader(llm: LLM, config: LoraConfig, folder: Path) -> None:
    """Write the reader that `add_reader` put on the LLM into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().float().cpu().contiguous() for name, p in reader_adapters(llm).items()}
    with safetensors_folder(folder, TENSORS, SETTINGS):
        save_file(tensors, folder / TENSORS)
        config.save_pretrained(str(folder))


def load_reader(llm: LLM, folder: Path) -> None:
    """Load the adapters in a reader's folder into those that `add_reader` put on the LLM.

    Raises:
        WeightsNotFoundError, WeightsCorruptError: The file is missing or damaged.
        MismatchError: The adapters are another LLM's, or of another rank.
    """
    tensors = read_tensors(folder / TENSORS)
    adapters = reader_adapters(llm)
    if wrong := first_mismatch(adapters, tensors):
        raise _mismatch(folder, wrong)
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensors[name])


@torch.no_grad()
def merge_reader(model: PreTrainedModel, folder: Path) -> None:
    """Add a reader's adapters to the weights of its base LLM, in place.

    Raises:
        WeightsNotFoundError, WeightsCorruptError: A file is missing or damaged.
        WeightsError: The adapters are of a kind that cannot be added to the weights.
        MismatchError: They are another LLM's.
    """
    settings = read_settings(folder / SETTINGS)
    for key in ("r", "lora_alpha"):
        if not (isinstance(settings.get(key), int | float) and 0 < settings[key] < _MAX_SETTING):
            raise WeightsCorruptError(
                f"{folder / SETTINGS} has {key}={settings.get(key)!r:.80}; get the adapters again"
            )
    for key, plain in _PLAIN.items():
        if settings.get(key, plain) not in (plain, None):
            raise WeightsError(
                f"{folder / SETTINGS} has {key}={settings[key]!r}, and plain LoRA has {plain!r}; merge the adapters "
                "into the model with peft, and pass the folder of the result"
            )
    if settings.get("init_lora_weights") not in _BEGIN_AT_NOTHING:
        raise WeightsError(
            f"{folder / SETTINGS} has init_lora_weights={settings['init_lora_weights']!r:.80}, which changes the LLM's "
            "own weights as well; convert the adapters to plain LoRA with peft's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    scale = settings["lora_alpha"] / settings["r"]
    tensors = read_tensors(folder / TENSORS)
    weights = dict(model.named_parameters())
    for key in sorted(key for key in tensors if key.endswith(".lora_A.weight")):
        layer = key.removesuffix(".lora_A.weight")
        weight = weights.get(layer.removeprefix(_PREFIX) + ".weight")
        down, up = tensors.pop(key), tensors.pop(f"{layer}.lora_B.weight", None)
        if weight is None or up is None or weight.shape != (up.shape[0], down.shape[1]):
            raise _mismatch(folder, key)
        weight.copy_(weight.float() + scale * (up.float() @ down.float()).to(weight.device))
    if tensors:
        raise _mismatch(folder, min(tensors))


def reader_adapters(llm: LLM) -> dict[str, nn.Parameter]:
    """List a reader's adapters by the names that peft gives them in its files."""
    return {
        _PREFIX + name.replace(f".{ADAPTER}.", "."): parameter
        for name, parameter in llm.model.named_parameters()
        if "lora_" in name
    }


def _mismatch(folder: Path, name: str) -> MismatchError:
    return MismatchError(
        f"{folder / TENSORS}: tensor {name!r} is missing, unknown or of another shape; load it with the LLM that "
        f"{SETTINGS} names"
    )
