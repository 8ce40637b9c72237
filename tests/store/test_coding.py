"""Bytes of embeddings: exact, half or an eighth-bit step of each vector, and never an infinity."""

from __future__ import annotations

import pytest
import torch

from extemb_core.errors import ConfigError
from extemb_core.store.coding import check_dtype, decode, encode, n_bytes


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_sizes(dtype, size):
    data, kept = encode(torch.randn(5, 12), dtype)
    assert kept == dtype
    assert len(data) == n_bytes(5, 12, dtype) == 60 * size + (20 if dtype == "int8" else 0)


def test_float32_is_exact_and_float16_is_its_rounding():
    values = torch.randn(7, 9)
    assert torch.equal(decode(encode(values, "float32")[0], 7, 9, "float32"), values)
    assert torch.equal(decode(encode(values, "float16")[0], 7, 9, "float16"), values.half().float())


def test_int8_is_within_half_a_step_of_each_vector():
    values = torch.randn(20, 9) * torch.logspace(-3, 3, 20)[:, None]
    found = decode(encode(values, "int8")[0], 20, 9, "int8")
    steps = values.abs().amax(1, keepdim=True) / 127
    assert ((found - values).abs() <= 0.5001 * steps).all()
    assert (found != values).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_nothing_and_zeros(dtype):
    assert decode(encode(torch.zeros(0, 4), dtype)[0], 0, 4, dtype).shape == (0, 4)
    assert torch.equal(decode(encode(torch.zeros(3, 4), dtype)[0], 3, 4, dtype), torch.zeros(3, 4))


def test_what_float16_cannot_hold_is_kept_in_float32():
    values = torch.tensor([[1.0, 70000.0]])
    data, kept = encode(values, "float16")
    assert kept == "float32"
    assert torch.equal(decode(data, 1, 2, kept), values)


def test_a_coarser_ratio_is_a_slice_of_the_same_bytes():
    values = torch.randn(8, 6)
    for dtype in ("float16", "int8"):
        whole = decode(encode(values, dtype)[0], 8, 6, dtype)
        assert torch.equal(whole[1::2], decode(encode(values[1::2], dtype)[0], 4, 6, dtype))


def test_another_dtype_is_an_error():
    with pytest.raises(ConfigError, match="dtype='int4' is not one of float32, float16, int8"):
        check_dtype("int4")
