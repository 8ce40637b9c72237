"""vLLM's own models, in which states take their anchors' place at the input of the entry layer.

Anchors are ordinary tokens up to there. The states of a step are in a buffer of the entry layer, with a mask of the
positions that have one, as in Qwen3-VL's deepstack; the mask is cleared after each step.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY

from extemb_core.errors import ConfigError
from extemb_core.models.entry import clamp_to_dtype
from extemb_core.models.export import SETTINGS
from vllm_extemb.processing import PLACEHOLDER, ExtensibleDummyInputs, ExtensibleInfo, ExtensibleProcessor


class EnteredLayer:
    """Mixin of a decoder layer that replaces some of its inputs, hidden states plus residual, by given states."""

    entry_states: Tensor
    entry_mask: Tensor

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = hidden_states.shape[0]
        mask = self.entry_mask[:count]
        hidden_states = torch.where(mask, 0, hidden_states)
        residual = torch.where(mask, self.entry_states[:count], residual)
        return super().forward(positions, hidden_states, residual, *args, **kwargs)  # type: ignore[misc]


@cache
def entered_class(base: type) -> type:
    """Make the class of an entry layer from the class of the LLM's layers."""
    return type(f"Entered{base.__name__}", (EnteredLayer, base), {"__module__": __name__})


class ExtensibleModel:
    """Mixin of a model that reads compressed text; vLLM's own class of the model follows it in the MRO."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config, decoder = vllm_config.model_config.hf_config, self.model  # type: ignore[attr-defined]
        index = getattr(config, SETTINGS)["entry_layer"]
        if get_pp_group().is_first_rank and not decoder.start_layer < index < decoder.end_layer:
            raise ConfigError(
                f"entry_layer={index} is not one of the layers 1 to {decoder.end_layer - 1} of the first pipeline "
                "stage, which is where states arrive; use tensor parallelism, or fewer pipeline stages"
            )
        self._entry_layer = index
        if get_pp_group().is_first_rank:
            entry, rows = self._entry, vllm_config.scheduler_config.max_num_batched_tokens
            entry.register_buffer("entry_states", torch.zeros(rows, config.hidden_size), persistent=False)
            entry.register_buffer("entry_mask", torch.zeros(rows, 1, dtype=torch.bool), persistent=False)
            kind: Any = type(entry)
            entry.__class__ = entered_class(kind)

    @property
    def _entry(self) -> Any:
        return self.model.layers[self._entry_layer]  # type: ignore[attr-defined]

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return PLACEHOLDER

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Return the states of each text, (N, D): vLLM keeps them until all chunks of the prompt are computed."""
        return [clamp_to_dtype(states, self._entry.entry_states.dtype) for states in kwargs["states"]]

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed all tokens, anchors too, and store the states of this step for the entry layer."""
        if is_multimodal is not None:
            mask = is_multimodal.to(input_ids.device, non_blocking=True)[:, None]
            self._entry.entry_mask[: len(mask)] = mask
            if len(multimodal_embeddings or ()):
                states = torch.cat([*multimodal_embeddings])  # type: ignore[misc]
                self._entry.entry_states[: len(mask)].masked_scatter_(mask, states.to(self._entry.entry_states))
        embedded: Tensor = super().embed_input_ids(input_ids)  # type: ignore[misc]
        return embedded

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if get_pp_group().is_first_rank:
            self._entry.entry_mask.zero_()
        return output


_served = MULTIMODAL_REGISTRY.register_processor(
    ExtensibleProcessor, info=ExtensibleInfo, dummy_inputs=ExtensibleDummyInputs
)


@_served
class ExtensibleLlamaForCausalLM(ExtensibleModel, LlamaForCausalLM, SupportsMultiModal):
    """Llama and models of its architecture, such as SmolLM2."""


@_served
class ExtensibleQwen2ForCausalLM(ExtensibleModel, Qwen2ForCausalLM, SupportsMultiModal):
    """Qwen2 and Qwen2.5."""


@_served
class ExtensibleQwen3ForCausalLM(ExtensibleModel, Qwen3ForCausalLM, SupportsMultiModal):
    """Qwen3, dense."""
