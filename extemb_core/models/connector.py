"""From the layers' outputs to the LLM's input space.

    none    RMSNorm with a learnable scale; nothing else (the paper's arm)
    linear  token-embedding residual + zero-initialised linear over the RMSNorm
    mlp     token-embedding residual + two layers with a GELU, the last zero-initialised
    conv    the token embedding at the place itself + zero-initialised linear over the RMSNorm + a map of its own for
            each of the last `residual_window` token embeddings

The norm is always there: the hidden states after a few layers have norms tens of times those of token
embeddings. Its scale starts at the token embeddings' RMS and is free after that; useful soft vectors may
have far larger norms, so nothing is ever clamped. With a connector, training starts from the mean of the
nearest token embeddings, which a frozen LLM reads at once, instead of from noise. A mean does not say in which
order its tokens stood; the maps of "conv", a causal convolution over the token embeddings, can. They start as random
rotations at a small scale, so that what is between the places is there to be learned from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from extemb_core.models.config import Connector

_ROTATED_SCALE = 0.3


class OutputConnector(nn.Module):
    """Maps selected outputs and their residuals to extensible embeddings."""

    def __init__(self, kind: Connector, width: int, embedding_rms: float, window: int = 1) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.projection: nn.Module | None = None
        self.maps: nn.Linear | None = None
        if kind == "conv":
            self.maps = nn.Linear(window * width, width, bias=False)
            with torch.no_grad():
                for offset in range(window - 1):  # the last is the place's own, which the residual has
                    rotation = nn.init.orthogonal_(torch.empty(width, width))
                    self.maps.weight[:, offset * width : (offset + 1) * width] = _ROTATED_SCALE * rotation
                self.maps.weight[:, (window - 1) * width :] = 0
        if kind == "none":
            nn.init.constant_(self.norm.weight, embedding_rms)
        elif kind in ("linear", "conv"):
            self.projection = nn.Linear(width, width)
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
        else:
            last = nn.Linear(2 * width, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.projection = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), last)

    def forward(self, outputs: Tensor, residuals: Tensor, recent: Tensor | None = None) -> Tensor:
        """outputs, residuals: (..., D) -> (..., D).

        "none" does not use the residuals; "conv" alone uses `recent`, (..., window * D), the last token embeddings (see
        `recent_embeddings`).
        """
        scaled = self.norm(outputs.to(self.norm.weight.dtype))
        if self.projection is None:
            return torch.as_tensor(scaled)
        projected: Tensor = self.projection(scaled)
        if self.maps is not None:
            assert recent is not None
            projected = projected + self.maps(recent.to(self.maps.weight.dtype))
        return projected + residuals.to(projected.dtype)


def trailing_means(embedded: Tensor, window: int) -> Tensor:
    """Mean of the last `window` token embeddings at every position (fewer at the start).

    embedded: (B, T, D) -> (B, T, D), in float32 so that long chunks lose no precision.
    """
    if window == 1:
        return embedded.float()
    sums = nn.functional.pad(embedded.float().cumsum(1), (0, 0, 1, 0))
    ends = torch.arange(1, embedded.shape[1] + 1, device=embedded.device)
    starts = (ends - window).clamp(min=0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)[None, :, None]


def recent_embeddings(embedded: Tensor, places: Tensor, window: int) -> Tensor:
    """The last `window` token embeddings at some places, side by side, the place's own last; zeros before the start.

    embedded: (T, D), places: (N,) -> (N, window * D).
    """
    padded = nn.functional.pad(embedded, (0, 0, window - 1, 0))
    offsets = torch.arange(window, device=embedded.device)
    return padded[places[:, None] + offsets].flatten(1)
