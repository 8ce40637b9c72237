"""Down-scaling by definition, and its two promises: nothing is left out, and coarser ratios are derived exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.chunks import n_embeddings
from extemb_core.models.downscaling import DOWNSCALINGS, check_ratios, coarsen

METHODS = tuple(DOWNSCALINGS)
RATIOS = (1, 2, 4, 8, 16, 32)


def select(method, length, ratio):
    return DOWNSCALINGS[method].select(length, ratio)


def downscale(outputs, ratio, method):
    return DOWNSCALINGS[method].reduce(outputs[select(method, len(outputs), ratio)], ratio)


@given(length=st.integers(1, 200), ratio=st.sampled_from(RATIOS), method=st.sampled_from(METHODS))
@settings(deadline=None)
def test_count_is_the_ceiling(length, ratio, method):
    assert len(downscale(torch.randn(length, 3), ratio, method)) == -(-length // ratio) == n_embeddings(length, ratio)


@given(length=st.integers(1, 200), ratio=st.sampled_from(RATIOS))
@settings(deadline=None)
def test_every_span_has_its_own_output(length, ratio):
    spans = [range(start, min(start + ratio, length)) for start in range(0, length, ratio)]
    strided, random = select("strided", length, ratio).tolist(), select("random", length, ratio).tolist()
    assert strided == [span[-1] for span in spans]
    assert all(pick in span for pick, span in zip(random, spans, strict=True))
    assert select("terminal", length, ratio).tolist() == list(range(length - len(spans), length))


def test_mean_is_the_mean_of_each_span():
    outputs = torch.arange(10.0)[:, None]
    assert downscale(outputs, 4, "mean")[:, 0].tolist() == [1.5, 5.5, 8.5]


def test_random_is_neither_strided_nor_redrawn():
    assert select("random", 64, 8).tolist() == select("random", 64, 8).tolist() != select("strided", 64, 8).tolist()


@given(
    length=st.integers(0, 200),
    fine=st.sampled_from(RATIOS),
    factor=st.sampled_from(RATIOS),
    kind=st.sampled_from(METHODS),
)
@settings(deadline=None)
def test_coarser_is_derived_from_finer(length, fine, factor, kind):
    outputs = torch.randn(length, 3, generator=torch.Generator().manual_seed(length))
    derived = coarsen(downscale(outputs, fine, kind), length, fine, fine * factor, kind)
    torch.testing.assert_close(derived, downscale(outputs, fine * factor, kind), atol=1e-6, rtol=0)


def test_what_does_not_divide_cannot_be_derived():
    with pytest.raises(RatioError, match="ratio=6 is not a multiple of 4"):
        coarsen(torch.randn(4, 3), 16, 4, 6, "strided")


def test_ratios_must_form_a_chain_within_the_chunk():
    assert check_ratios([8, 2, 4], 8) == (2, 4, 8)
    with pytest.raises(ConfigError, match="6 is not a multiple of 4"):
        check_ratios((2, 4, 6), 512)
    with pytest.raises(ConfigError, match="ratio=16 is above chunk_size=8"):
        check_ratios((2, 16), 8)
