"""Let compressed text enter an LLM at the input of one of its layers, in place of the states that stand there.

At an entry layer J above 0, a group of tokens is one position. Its last token, the *anchor*, stands in the prompt like
any token and runs through layers 0 to J - 1; at the input of layer J its state is replaced by the group's. From there
on everything goes its ordinary way. (At J = 0, the papers' way, embeddings stand among the input embeddings, and
nothing of this module is needed.)

`reading_model` makes a model of the LLM's own class whose layer J does this. It shares the LLM's tensors but has
modules of its own, so that the LLM itself stays unchanged. The states are passed as two keyword arguments of `forward`
and `generate`, `entry_states` (B, T, D) and `entry_mask` (B, T), which transformers hands on to every layer.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.stoppable import CACHE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from extemb_core.models.llm import LLM

FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True, eq=False)
class AnchoredStates:
    """A compressed text, or a part of it, as it stands in a prompt.

    Attributes:
        anchors: (N,) int32 ids, the last token of each group.
        states: (N, D), one state for each group.
        layer: J, the entry layer.
    """

    anchors: np.ndarray[Any, Any]
    states: Tensor
    layer: int

    def __post_init__(self) -> None:
        if len(self.anchors) != len(self.states):
            raise MismatchError(
                f"{len(self.anchors)} anchors came with {len(self.states)} states; pass one anchor for each state"
            )

    def __len__(self) -> int:
        return len(self.anchors)

    def __getitem__(self, part: slice) -> AnchoredStates:
        return AnchoredStates(self.anchors[part], self.states[part], self.layer)

    @classmethod
    def cat(cls, parts: Sequence[AnchoredStates]) -> AnchoredStates:
        """Concatenate one or more parts made by the same embedder."""
        anchors = np.concatenate([part.anchors for part in parts])
        return cls(anchors, torch.cat([part.states for part in parts]), parts[0].layer)


@dataclass(frozen=True, eq=False)
class AnchoredPrompt:
    """A whole prompt with compressed text in it.

    Attributes:
        ids: (T,) int64, anchors among them.
        states: (T, D); rows where `mask` is False are not read.
        mask: (T,) bool, True where a state replaces the token's own.
        layer: J, the entry layer.
    """

    ids: Tensor
    states: Tensor
    mask: Tensor
    layer: int

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of(
        cls, segments: Sequence[np.ndarray[Any, Any] | AnchoredStates], width: int, device: Any, dtype: torch.dtype
    ) -> AnchoredPrompt:
        """Join ids, (T,) each, and compressed texts. Gradient flows through the states.

        Raises:
            MismatchError: The compressed texts enter at different layers, or are not of this width.
        """
        ids, states, mask, layers = [], [], [], set()
        for segment in segments:
            mask.append(np.full(len(segment), isinstance(segment, AnchoredStates)))
            if isinstance(segment, AnchoredStates):
                layers.add(segment.layer)
                states.append(clamp_to_dtype(segment.states.to(device), dtype))
                ids.append(segment.anchors)
            else:
                states.append(torch.zeros(len(segment), width, device=device, dtype=dtype))
                ids.append(segment)
        if len(layers) > 1 or any(part.shape[-1] != width for part in states):
            raise MismatchError(
                f"compressed texts for entry layers {sorted(layers)} of widths {sorted({p.shape[-1] for p in states})} "
                f"stand in one prompt of an LLM of width {width}; compress them all with one embedder of this LLM"
            )
        # Joined on the CPU, for one transfer to a GPU per prompt and not per segment.
        joined_ids = torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device)
        joined_mask = torch.from_numpy(np.concatenate(mask)).to(device)
        return cls(joined_ids, torch.cat(states), joined_mask, layers.pop() if layers else 0)

    @classmethod
    def of_text(cls, ids: Sequence[int], like: AnchoredPrompt) -> AnchoredPrompt:
        """Make a prompt of text alone, to stand in a batch beside `like`."""
        text = torch.tensor([int(index) for index in ids], dtype=torch.long, device=like.ids.device)
        return cls(text, like.states.new_zeros(len(text), like.states.shape[1]), torch.zeros_like(text) > 0, like.layer)


PromptInputs = Tensor | Sequence[int] | AnchoredPrompt
"""What an LLM reads: (T, D) input embeddings, ids, or ids with states."""
TokenIds = Sequence[int] | np.ndarray[Any, Any]
"""(T,) ids of text."""


def clamp_to_dtype(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert states to `dtype`; values beyond its range become its largest value, not infinite."""
    if dtype == torch.float16:
        states = states.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return states.to(dtype)


class SharedParameter(nn.Parameter):
    """A parameter over the LLM's memory. It never requires gradients: an optimiser would write into the LLM."""

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        pass

    def requires_grad_(self, requires_grad: bool = True) -> SharedParameter:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Make an independent parameter with memory of its own."""
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.data.clone(memory_format=torch.preserve_format), requires_grad=False)
        copied: nn.Parameter = memo[id(self)]
        return copied


def decoder_layers(model: PreTrainedModel, name: str) -> nn.ModuleList:
    """Return the layers of a causal LM's decoder.

    Raises:
        ConfigError: They cannot be found, or the model is quantised or spread over several devices.
    """
    decoder: Any = model.base_model
    layers = getattr(decoder, "layers", None)
    kind = model.config.get_text_config().model_type
    if not isinstance(layers, nn.ModuleList) or final_norm(decoder) is None or decoder is model:
        raise ConfigError(
            f"{name}: a {kind} model has no decoder of plain layers and a final norm; "
            "use a Llama-, Qwen-, Mistral-, Gemma-, Phi-, OLMo- or GPT-NeoX-style causal LM"
        )
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if len(places) > 1 or any(p.device.type == "meta" for p in model.parameters()):
        raise ConfigError(
            f"{name} is spread over {', '.join(sorted(places)) or 'devices'}, and its layers are shared with the "
            "embedder, which runs on one device; load it without device_map or offload"
        )
    plain = (nn.Parameter, SharedParameter)
    if getattr(model, "is_quantized", False) or any(type(p) not in plain for p in model.parameters()):
        raise ConfigError(
            f"{name} is quantised, and the embedder shares its tensors as they are; load it in float32, bfloat16 or "
            "float16"
        )
    return layers


def default_entry_layer(llm: LLM) -> int:
    """Choose the entry layer if none is known: two fifths of the LLM's layers, and at least 1 (docs/experiments.md).

    Raises:
        ConfigError: The LLM has a single layer.
    """
    available = len(decoder_layers(llm.model, llm.name))
    if available == 1:
        raise ConfigError(
            f"{llm.name} has a single layer, and an entry layer above 0 needs one above it; train an embedder for "
            "entry layer 0"
        )
    return max(1, round(0.4 * available))


def final_norm(decoder: Any) -> str | None:
    """Return the name of a decoder's norm after the last layer, if it has one."""
    return next((name for name in FINAL_NORMS if hasattr(decoder, name)), None)


def shared_parameters(module: nn.Module) -> dict[int, Any]:
    """Make the `memo` for `copy.deepcopy` with which it copies a module, but not the memory of its parameters.

    The parameters of the copy are objects of their own over the same memory, so that `half()` and `to()` of the copy do
    not reach the original, and are never trained.
    """
    return {id(p): SharedParameter(p.data, requires_grad=False) for p in module.parameters()}


def reading_model(model: PreTrainedModel, layer: int, name: str = "") -> PreTrainedModel:
    """Make a model that shares `model`'s tensors and reads compressed text at the input of layer `layer`.

    Args:
        model: A causal LM, which stays unchanged.
        layer: J, from 1 to its last layer.
        name: Name of the model in messages.

    Raises:
        ConfigError: It has no such layer, or its architecture does not allow this.
    """
    layers = decoder_layers(model, name)
    if not 1 <= layer < len(layers):
        raise ConfigError(
            f"entry_layer={layer} is not one of the layers 1 to {len(layers) - 1} of {name}; pass one of them, or 0 "
            "for embeddings among the input embeddings"
        )
    if (own := getattr(model, "entry_layer", layer)) != layer:
        raise ConfigError(
            f"{name} reads compressed text at layer {own} already, and was asked for entry_layer={layer}; make both "
            "from the LLM itself"
        )
    for part in (model, model.base_model, *layers):
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(part.forward).parameters.values()):
            raise ConfigError(
                f"{name}: {type(part).__name__}.forward takes no further keyword arguments, by which states reach "
                f"layer {layer}; use entry_layer=0, or a newer transformers"
            )
    made: Any = copy.deepcopy(model, shared_parameters(model))
    entered: Any = made.base_model.layers[layer]
    kinds: list[Any] = [type(made), type(entered)]
    made.__class__, entered.__class__ = _reading_class(kinds[0]), _entered_class(kinds[1])
    made.entry_layer = layer
    return made  # type: ignore[no-any-return]


class _ReadingModel:
    """Mixin of a reading model; the LLM's own class follows it in the MRO."""

    entry_layer: int

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        entry_states: Tensor | None = None,
        entry_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Add the states of the positions that this step reads; after the prompt there are none."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        if entry_states is None or entry_mask is None:
            return inputs
        past = kwargs.get(CACHE)
        start = 0 if past is None else int(past.get_seq_length())
        length = inputs["input_ids"].shape[1]
        states, mask = entry_states[:, start : start + length], entry_mask[:, start : start + length]
        if mask.shape[1]:
            after = length - mask.shape[1]  # without a cache, every step reads prompt and answer
            inputs["entry_states"] = nn.functional.pad(states, (0, 0, 0, after))
            inputs["entry_mask"] = nn.functional.pad(mask, (0, after))
        return inputs


class _EnteredLayer:
    """Mixin of a decoder layer that replaces some of its input states by the compressed text's."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        entry_states: Tensor | None = None,
        entry_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if entry_states is not None and entry_mask is not None:
            hidden_states = torch.where(entry_mask[..., None], entry_states.to(hidden_states.dtype), hidden_states)
        return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]


@cache
def _reading_class(base: type) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    # generate() accepts the arguments in the signature, and looks there for position_ids.
    signature = inspect.signature(base.forward)  # type: ignore[attr-defined]
    own = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in ("entry_states", "entry_mask")]
    named = list(signature.parameters.values())
    forward.__signature__ = signature.replace(parameters=[*named[:-1], *own, named[-1]])  # type: ignore[attr-defined]
    # Pipelines and saved folders go by the class name, so it is the base's.
    own_class = type(base.__name__, (_ReadingModel, base), {"forward": forward, "__module__": __name__})
    own_class.__qualname__ = f"Reading{base.__name__}"
    return own_class


@cache
def _entered_class(base: type) -> type:
    return type(f"Entered{base.__name__}", (_EnteredLayer, base), {"__module__": __name__})
