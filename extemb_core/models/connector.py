"""Connectors: from the layers' outputs to the LLM's input space.

The RMSNorm is always there: the hidden states after a few layers have norms tens of times those of token
embeddings. Its scale starts at the token embeddings' RMS and is free after that; useful soft vectors may
have far larger norms, so nothing is ever clamped. With a connector, training starts from the mean of the
nearest token embeddings, which a frozen LLM reads at once, instead of from noise.

To add a connector, write a subclass of `OutputConnector` and name it in `CONNECTORS`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROTATED_SCALE = 0.3


class OutputConnector(nn.Module):
    """RMSNorm with a learnable scale, and nothing else (the paper's arm). Subclasses map its output further.

    Args:
        hidden_size: D.
        embedding_rms: Root mean square of the LLM's token embeddings.
        window: Number of token embeddings that `forward` gets as `recent`.
    """

    def __init__(self, hidden_size: int, embedding_rms: float, window: int = 1) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        nn.init.constant_(self.norm.weight, embedding_rms)

    def forward(self, outputs: Tensor, residuals: Tensor, recent: Tensor | None = None) -> Tensor:
        """Map outputs to extensible embeddings.

        Args:
            outputs: (..., D).
            residuals: (..., D), means of the token embeddings nearest to each.
            recent: (..., window * D), the last token embeddings side by side (see `recent_embeddings`); for "conv".

        Returns:
            (..., D).
        """
        return torch.as_tensor(self.norm(outputs.to(self.norm.weight.dtype)))


class LinearConnector(OutputConnector):
    """Token-embedding residual and a zero-initialised linear map over the RMSNorm."""

    def __init__(self, hidden_size: int, embedding_rms: float, window: int = 1) -> None:
        super().__init__(hidden_size, embedding_rms, window)
        nn.init.ones_(self.norm.weight)
        self.projection: nn.Module = nn.Linear(hidden_size, hidden_size)
        _zero(self.projection)

    def forward(self, outputs: Tensor, residuals: Tensor, recent: Tensor | None = None) -> Tensor:
        projected: Tensor = self.projection(super().forward(outputs, residuals))
        return projected + residuals.to(projected.dtype)


class MlpConnector(LinearConnector):
    """Token-embedding residual and two layers with a GELU, the last of them zero-initialised."""

    def __init__(self, hidden_size: int, embedding_rms: float, window: int = 1) -> None:
        super().__init__(hidden_size, embedding_rms, window)
        last = nn.Linear(2 * hidden_size, hidden_size)
        _zero(last)
        self.projection = nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), last)


class ConvConnector(LinearConnector):
    """The position's own token embedding, the linear map, and a map for each of the last `window` token embeddings.

    A mean does not show the order of its tokens; the maps, a causal convolution over the token embeddings, can. They
    start as random rotations at a small scale, so that the tokens between the selected positions contribute from the
    first step on.
    """

    def __init__(self, hidden_size: int, embedding_rms: float, window: int = 1) -> None:
        super().__init__(hidden_size, embedding_rms, window)
        self.maps = nn.Linear(window * hidden_size, hidden_size, bias=False)
        with torch.no_grad():
            for offset in range(window - 1):  # the last is the position's own, which is the residual already
                rotation = nn.init.orthogonal_(torch.empty(hidden_size, hidden_size))
                self.maps.weight[:, offset * hidden_size : (offset + 1) * hidden_size] = _ROTATED_SCALE * rotation
            self.maps.weight[:, (window - 1) * hidden_size :] = 0

    def forward(self, outputs: Tensor, residuals: Tensor, recent: Tensor | None = None) -> Tensor:
        assert recent is not None
        mapped: Tensor = self.maps(recent.to(self.maps.weight.dtype))
        return super().forward(outputs, residuals) + mapped


CONNECTORS: dict[str, type[OutputConnector]] = {
    "none": OutputConnector,
    "linear": LinearConnector,
    "mlp": MlpConnector,
    "conv": ConvConnector,
}


def _zero(linear: nn.Module) -> None:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)


def trailing_means(embedded: Tensor, window: int) -> Tensor:
    """Take the mean of the last `window` token embeddings at every position (fewer at the start).

    embedded: (B, T, D) -> (B, T, D), in float32 so that long chunks lose no precision.
    """
    if window == 1:
        return embedded.float()
    sums = nn.functional.pad(embedded.float().cumsum(1), (0, 0, 1, 0))
    ends = torch.arange(1, embedded.shape[1] + 1, device=embedded.device)
    starts = (ends - window).clamp(min=0)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)[None, :, None]


def recent_embeddings(embedded: Tensor, places: Tensor, window: int) -> Tensor:
    """Concatenate the last `window` token embeddings at some positions, the own one last; zeros before the start.

    embedded: (T, D), places: (N,) -> (N, window * D).
    """
    padded = nn.functional.pad(embedded, (0, 0, window - 1, 0))
    offsets = torch.arange(window, device=embedded.device)
    return padded[places[:, None] + offsets].flatten(1)
