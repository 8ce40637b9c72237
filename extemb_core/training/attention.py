"""Attention in training.

torch's own kernel for CPUs is slow in the backward pass of short rows in bfloat16: at 128 positions it takes four
times as long as this one, at 350 more than twice (docs/experiments.md). Here the probabilities are kept instead of
computed again, one row of the batch after another, so that a row's scores stay in the processor's cache. On a GPU,
cuDNN prepares its kernels anew for each shape, and in training every step has another shape: that took about half of
the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "extemb_rows"
_MAX_LENGTH = 512  # beyond, torch's kernel is faster: the scores no longer fit a cache
_PREPARED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def training_attention(*models: Any) -> Iterator[None]:
    """Make transformers models that use torch's attention attend row by row on a CPU, and without cuDNN on a GPU."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    chosen = [model for model in models if model.config._attn_implementation == "sdpa" and model.device.type == "cpu"]
    with ExitStack() as stack:
        if any(model.device.type == "cuda" for model in models):
            stack.enter_context(sdpa_kernel(_PREPARED))
        for model in chosen:
            model.set_attn_implementation(NAME)
            stack.callback(model.set_attn_implementation, "sdpa")
        yield


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention. query (B, H, T, D), key and value (B, G, S, D), mask (B or 1, 1, T, S) -> (B, T, H, D).

    transformers calls this. Without a mask attention is causal. Other cases go to torch's kernel: float32, long rows, a
    cache, no gradient.
    """
    length = query.shape[2]
    ours = query.dtype == torch.bfloat16 and 1 < length <= _MAX_LENGTH and length == key.shape[2] and not dropout
    if not (ours and torch.is_grad_enabled()):
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return output, None
    mask = attention_mask
    if mask is None:
        mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu_(1)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended: Tensor = _Rows.apply(query, key, value, mask, scale)  # type: ignore[no-untyped-call]
    return attended.transpose(1, 2).contiguous(), None


class _Rows(torch.autograd.Function):
    """Softmax attention of grouped heads, one row of the batch after another."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        output = torch.empty_like(query)
        probabilities = query.new_empty(batch, groups, heads // groups * length, length)
        for row in range(batch):
            asked = query[row].view(groups, -1, width)
            scores = torch.matmul(asked, key[row].transpose(-1, -2)).float().mul_(scale)
            scores.view(heads, length, length).add_(mask[min(row, len(mask) - 1)])
            probabilities[row] = scores.softmax(-1)
            torch.matmul(probabilities[row], value[row], out=output[row].view(groups, -1, width))
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, probabilities = ctx.saved_tensors
        groups, width = key.shape[1], query.shape[-1]
        gradient = gradient.contiguous()
        to_query, to_key, to_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for row in range(len(query)):
            of_output = gradient[row].view(groups, -1, width)
            torch.matmul(probabilities[row].transpose(-1, -2), of_output, out=to_value[row])
            change = torch.matmul(of_output, value[row].transpose(-1, -2)).float()
            change = torch._softmax_backward_data(change, probabilities[row].float(), -1, torch.float32)
            change = change.mul_(ctx.scale).to(query.dtype)
            torch.matmul(change, key[row], out=to_query[row].view(groups, -1, width))
            torch.matmul(change.transpose(-1, -2), query[row].view(groups, -1, width), out=to_key[row])
        return to_query, to_key, to_value, None, None
