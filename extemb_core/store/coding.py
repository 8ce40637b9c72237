"""Embeddings as bytes and back: float16, int8 with a scale for each vector, or float32."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError

Dtype = Literal["float32", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_LARGEST_INT8 = 127


def check_dtype(dtype: str) -> Dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}; pass one of them")
    return dtype


def encode(embeddings: Tensor, dtype: Dtype) -> tuple[bytes, Dtype]:
    """(N, D) float32 -> bytes, and what they are: float32 where a value is beyond float16, so that none becomes inf.

    float16 rounds to 11 bits; int8, which is N float32 scales and then the rows, to 1/127 of a vector's largest value.
    """
    values = embeddings.detach().to("cpu", torch.float32).contiguous().numpy()
    if dtype == "float16":
        with np.errstate(over="ignore"):
            halves = values.astype("<f2")
        if np.isfinite(halves).all() or not np.isfinite(values).all():
            return halves.tobytes(), dtype
        dtype = "float32"
    if dtype == "float32":
        return values.astype("<f4").tobytes(), dtype
    scales = (np.abs(values).max(axis=1, initial=0.0) / _LARGEST_INT8).astype("<f4")
    steps = np.divide(values, scales[:, None], out=np.zeros_like(values), where=scales[:, None] > 0)
    return scales.tobytes() + np.rint(steps).clip(-_LARGEST_INT8, _LARGEST_INT8).astype(np.int8).tobytes(), dtype


def n_bytes(count: int, width: int, dtype: Dtype) -> int:
    """What (count, width) embeddings take."""
    return count * (width + 4 if dtype == "int8" else width * (2 if dtype == "float16" else 4))


def decode(buffer: Any, count: int, width: int, dtype: Dtype) -> Tensor:
    """`n_bytes(count, width, dtype)` bytes -> (count, width) float32, a copy."""
    if dtype == "int8":
        scales = np.frombuffer(buffer, "<f4", count)
        steps = np.frombuffer(buffer, np.int8, count * width, offset=4 * count).reshape(count, width)
        return torch.from_numpy(steps * scales[:, None])
    kind = "<f2" if dtype == "float16" else "<f4"
    return torch.from_numpy(np.frombuffer(buffer, kind, count * width).reshape(count, width).astype(np.float32))
