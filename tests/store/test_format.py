"""Bytes of embeddings: exact, half or an eighth-bit step of each vector, and never an infinity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from made import anchored, compressed

from extemb_core.errors import ConfigError, MismatchError
from extemb_core.store.format import check_dtype, decode, encode, n_bytes


def text_of(values):
    return replace(compressed("a"), embeddings=values)


def rows(values, dtype):
    """What is read of rows that were written, and what they were written in."""
    data, kept = encode(text_of(values), dtype)
    assert len(data) == n_bytes(*values.shape, kept, anchored=False)
    return decode(data, *values.shape, kept, anchored=False)["embeddings"], kept


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("int8", 1)])
def test_a_document_takes_the_bytes_that_its_format_says(dtype, size):
    data, kept = encode(text_of(torch.randn(5, 12)), dtype)
    assert kept == dtype
    assert len(data) == n_bytes(5, 12, dtype, anchored=False) == 60 * size + (20 if dtype == "int8" else 0)


def test_float32_is_exact_and_float16_is_its_rounding():
    values = torch.randn(7, 9)
    assert torch.equal(rows(values, "float32")[0], values)
    assert torch.equal(rows(values, "float16")[0], values.half().float())


def test_int8_is_within_half_a_step_of_each_vector():
    values = torch.randn(20, 9) * torch.logspace(-3, 3, 20)[:, None]
    found = rows(values, "int8")[0]
    steps = values.abs().amax(1, keepdim=True) / 127
    assert ((found - values).abs() <= 0.5001 * steps).all()
    assert (found != values).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_nothing_and_zeros(dtype):
    assert rows(torch.zeros(0, 4), dtype)[0].shape == (0, 4)
    assert torch.equal(rows(torch.zeros(3, 4), dtype)[0], torch.zeros(3, 4))


def test_what_float16_cannot_hold_is_kept_in_float32():
    values = torch.tensor([[1.0, 70000.0]])
    found, kept = rows(values, "float16")
    assert kept == "float32"
    assert torch.equal(found, values)


def test_a_coarser_ratio_is_a_slice_of_the_same_bytes():
    values = torch.randn(8, 6)
    for dtype in ("float16", "int8"):
        assert torch.equal(rows(values, dtype)[0][1::2], rows(values[1::2], dtype)[0])


def test_another_dtype_is_an_error():
    with pytest.raises(ConfigError, match="dtype='int4' is not one of float32, float16, int8"):
        check_dtype("int4")


def read_again(text, dtype):
    data, kept = encode(text, dtype)
    assert len(data) == n_bytes(*text.embeddings.shape, kept, anchored=True)
    return replace(text, **decode(data, *text.embeddings.shape, kept, anchored=True)), kept


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e12])
def test_above_layer_0_a_direction_is_rounded_to_float16_whatever_its_length(scale):
    text = anchored("a", scale=scale)
    found, kept = read_again(text, "float16")
    assert kept == "float16"
    for name in ("mean_norms", "norms", "weights"):
        assert torch.equal(getattr(found, name), getattr(text, name))
    assert np.array_equal(found.anchors, text.anchors)
    assert ((found.embeddings - text.embeddings).norm(dim=-1) <= 2**-11 * text.norms).all()
    assert torch.isfinite(found.embeddings).all()


def test_above_layer_0_sixteen_bytes_stand_beside_each_vector():
    text = anchored("a")
    assert len(encode(text, "float16")[0]) == len(text) * (2 * 24 + 16)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_above_layer_0_what_was_read_is_written_as_the_same_bytes(dtype):
    text = anchored("a", n_tokens=4000, ratio=2)
    once = read_again(text, dtype)[0]
    assert torch.equal(read_again(once, dtype)[0].embeddings, once.embeddings)
    assert encode(once, dtype) == encode(read_again(once, dtype)[0], dtype)


def test_above_layer_0_coarser_ratios_nest_to_the_rounding_of_what_is_stored():
    text = anchored("a", n_tokens=75, ratio=2)
    exact, found = text.at_ratio(8), read_again(text, "float16")[0].at_ratio(8)
    assert torch.equal(found.weights, exact.weights)
    assert torch.equal(found.norms, exact.norms)
    assert ((found.embeddings - exact.embeddings).norm(dim=-1) <= 2**-9 * exact.norms).all()


def test_above_layer_0_groups_of_zeros_stay_zero():
    text = anchored("a")
    text = replace(text, embeddings=text.embeddings * 0, mean_norms=text.mean_norms * 0, norms=text.norms * 0)
    found = read_again(text, "float16")[0]
    assert not found.embeddings.any()
    assert not found.at_ratio(8).embeddings.any()


def test_above_layer_0_int8_is_refused():
    with pytest.raises(MismatchError, match="dtype='int8' is too coarse for embeddings of entry layer 3"):
        encode(anchored("a"), "int8")
