"""Embeddings as bytes and back: float16, int8 with a scale for each vector, or float32.

Above entry layer 0 each has 16 bytes more, so that every coarser ratio can still be derived, and is kept as a
direction, which no range of numbers is too small for.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError, MismatchError
from extemb_core.models.compressed import Compressed

Dtype = Literal["float32", "float16", "int8"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_LARGEST_INT8 = 127
_STORED = {"float32": "<f4", "float16": "<f2", "int8": "i1"}
_COLUMNS = {"anchors": "<i4", "mean_norms": "<f4", "norms": "<f4", "weights": "<f4"}


def check_dtype(dtype: str) -> Dtype:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}; pass one of them")
    return dtype


def encode(text: Compressed, dtype: Dtype) -> tuple[bytes, Dtype]:
    """Write the embeddings of a text as bytes: `n_bytes` of them.

    float16 rounds to 11 bits; int8, which is N float32 scales and then the rows, to 1/127 of a vector's largest value.
    Above entry layer 0: N anchors, mean norms, norms and weights, and then the embeddings, each divided by its norm.

    Returns:
        The bytes, and what they are: float32 where a value is beyond float16, so that none becomes infinite.

    Raises:
        MismatchError: int8 above entry layer 0.
    """
    if not text.entry_layer:
        return _encode_rows(text.embeddings, dtype)
    if dtype == "int8":
        raise MismatchError(
            f"dtype='int8' is too coarse for embeddings of entry layer {text.entry_layer}: a few of their dimensions "
            "are far larger than the rest; keep them in float16"
        )
    assert text.norms is not None
    columns = [np.asarray(getattr(text, name)).astype(kind).tobytes() for name, kind in _COLUMNS.items()]
    directions = text.embeddings / torch.where(text.norms > 0, text.norms, 1)[:, None]
    data, dtype = _encode_rows(directions, dtype)
    return b"".join([*columns, data]), dtype


def n_bytes(count: int, width: int, dtype: Dtype, *, anchored: bool) -> int:
    """What (count, width) embeddings take; `anchored` above entry layer 0."""
    each = width + 4 if dtype == "int8" else width * (2 if dtype == "float16" else 4)
    return count * (each + 4 * len(_COLUMNS) * anchored)


def decode(buffer: Any, count: int, width: int, dtype: Dtype, *, anchored: bool) -> dict[str, Any]:
    """Read what `encode` wrote: the fields of a `Compressed` that hold its (count, width) embeddings, as copies."""
    if not anchored:
        return {"embeddings": _decode_rows(buffer, count, width, dtype)}
    fields: dict[str, Any] = {}
    for at, (name, kind) in enumerate(_COLUMNS.items()):
        fields[name] = _numbers(memoryview(buffer)[4 * count * at :], kind, count)
    rows = memoryview(buffer)[4 * count * len(_COLUMNS) :]
    embeddings = _decode_rows(rows, count, width, dtype, fields["norms"])
    return fields | {"anchors": fields["anchors"].numpy(), "embeddings": embeddings}


def _encode_rows(embeddings: Tensor, dtype: Dtype) -> tuple[bytes, Dtype]:
    values = embeddings.detach().to("cpu", torch.float32)
    if dtype == "float16":
        halves = values.half()
        if halves.isfinite().all() or not values.isfinite().all():
            return _bytes_of(halves), dtype
        dtype = "float32"
    if dtype == "float32":
        return _bytes_of(values), dtype
    scales = values.abs().amax(1, keepdim=True) / _LARGEST_INT8 if values.numel() else values.new_zeros(len(values), 1)
    steps = torch.where(scales > 0, values / scales, 0).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return _bytes_of(scales) + _bytes_of(steps.to(torch.int8)), dtype


def _decode_rows(buffer: Any, count: int, width: int, dtype: Dtype, scales: Tensor | None = None) -> Tensor:
    """(count, width) float32 rows, each times its scale, (count,), if there are any."""
    if dtype == "int8":
        scales, buffer = _numbers(buffer, "<f4", count), memoryview(buffer)[4 * count :]
    rows = _numbers(buffer, _STORED[dtype], count * width).view(count, width)
    return rows.float() if scales is None else torch.mul(rows, scales[:, None])


def _numbers(buffer: Any, kind: str, count: int) -> Tensor:
    """The first numbers of a buffer, (count,), as a copy: torch converts them many times faster than numpy does."""
    return torch.from_numpy(np.frombuffer(buffer, kind, count).copy())


def _bytes_of(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()
