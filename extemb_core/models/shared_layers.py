"""Put the LLM's first layers into modules of an embedder's own, and sample their values to recognise the LLM.

An LLM's base tensors are recognised by a sample of their values, rounded to bfloat16, so that the same LLM matches in
every dtype. (float16 may round some values the other way. If the embedder's file holds the sample, that is accounted
for; if not, an LLM whose weights are not bfloat16 values has another fingerprint in float16, and its texts are
compressed again.) A fine-tuned derivative differs by a few percent (relative L2) and is accepted as another embedder;
an unrelated model differs by about 140%. LLMs that are equal in bfloat16 count as the same.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extemb_core.models.entry import decoder_layers, final_norm, shared_parameters
from extemb_core.models.llm import LLM

PROBE_TOLERANCE = 0.01
_PROBE_VALUES = 16


def first_layers(llm: LLM, count: int, *, copied: bool) -> tuple[Any, set[int]]:
    """Make a decoder of the LLM's first layers, with modules of its own.

    Returns:
        The stack, and the ids of the parameters that it shares with the LLM (all but the layers' if `copied`).
    """
    layers = decoder_layers(llm.model, llm.name)
    decoder: Any = llm.model.base_model
    kept = list(layers[:count])
    # deepcopy takes from `memo` what it is not to copy: the shared parameters, the first layers in place of all, and
    # nothing in place of the final norm.
    memo: dict[int, Any] = {}
    for module in [decoder.get_input_embeddings()] + ([] if copied else kept):
        memo |= shared_parameters(module)
    shared = {id(parameter) for parameter in memo.values()}
    memo[id(layers)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in kept])
    memo[id(getattr(decoder, str(final_norm(decoder))))] = nn.Identity()
    stack = copy.deepcopy(decoder, memo)
    stack.config.num_hidden_layers = count
    if copied:
        stack.layers.requires_grad_(True)
    return stack, shared


def sample_of(llm: LLM, count: int) -> Tensor:
    """Sample evenly spaced values of each tensor the embedder builds on, (tensors, 16) in float32."""
    decoder = llm.model.base_model
    tensors = [decoder.get_input_embeddings().weight, *decoder.layers[:count].parameters()]
    rows = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, _PROBE_VALUES, dtype=torch.float64).long()
        rows.append(flat[at.to(flat.device)].float())
    return torch.stack(rows)


def same_in_bfloat16(here: Tensor, there: Tensor, *, through_float16: bool) -> bool:
    """Return whether two probes are the same in bfloat16; those `here` may have been rounded to float16 before."""
    if here.shape != there.shape:
        return False
    here, there = here.float().cpu(), there.to("cpu", torch.bfloat16).float()
    slack = torch.zeros(())
    if through_float16:  # by half a unit in the last place
        slack = torch.from_numpy(np.spacing(here.half().abs().numpy()).astype(np.float32)) / 2
    least, most = ((here + side * slack).bfloat16().float() for side in (-1, 1))
    return bool(((least <= there) & (there <= most)).all())
