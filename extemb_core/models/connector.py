"""From the layers' outputs to the LLM's input space.

    none    RMSNorm with a learnable scale; nothing else (the paper's arm)
    linear  token-embedding residual + zero-initialised linear over the RMSNorm
    mlp     token-embedding residual + two layers with a GELU, the last zero-initialised

The norm is always there: the hidden states after a few layers have norms tens of times those of token
embeddings. Its scale starts at the token embeddings' RMS and is free after that; useful soft vectors may
have far larger norms, so nothing is ever clamped. With a connector, training starts from the mean of the
nearest token embeddings, which a frozen LLM reads at once, instead of from noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from extemb_core.models.config import Connector


class OutputConnector(nn.Module):
    """Maps selected outputs and their residuals to extensible embeddings."""

    def __init__(self, kind: Connector, width: int, embedding_rms: float) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.projection: nn.Module | None = None
        if kind == "none":
            nn.init.constant_(self.norm.weight, embedding_rms)
        elif kind == "linear":
            self.projection = nn.Linear(width, width)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        else:
            last = nn.Linear(2 * width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.projection = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), last)

    def forward(self, outputs: Tensor, residuals: Tensor) -> Tensor:
        """outputs, residuals: (..., D) -> (..., D). "none" does not use the residuals."""
        scaled = self.norm(outputs.to(self.norm.weight.dtype))
        if self.projection is None:
            return torch.as_tensor(scaled)
        projected: Tensor = self.projection(scaled)
        return projected + residuals.to(projected.dtype)


def trailing_means(embedded: Tensor, window: int) -> Tensor:
    """Mean of the last `window` token embeddings at every position (fewer at the start).

    embedded: (B, T, D) -> (B, T, D), in float32 so that long chunks lose no precision.
    """
    sums = nn.functional.pad(embedded.float().cumsum(1), (0, 0, 1, 0))
    ends = torch.arange(1, embedded.shape[1] + 1, device=embedded.device)
    starts = (ends - window).clamp(min=0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)[None, :, None]
