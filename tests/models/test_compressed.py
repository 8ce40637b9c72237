"""`Compressed.at_ratio` chunk by chunk, and its refusals."""

from __future__ import annotations

import pytest
import torch

from extemb_core.errors import RatioError
from extemb_core.models.compressed import Compressed


def compressed(n_tokens, ratio=2, ratios=(2, 4, 8), embeddings=None):
    made = torch.arange(float(n_tokens))[1::2, None] if embeddings is None else embeddings
    return Compressed(
        embeddings=made, ratio=ratio, n_tokens=n_tokens, ref="r", fingerprint="f", chunk_size=8, ratios=ratios,
        downscaling="strided",
    )  # fmt: skip


def test_spans_do_not_cross_chunks():
    # 20 tokens in chunks of 8, 8 and 4: at ratio 8 the last outputs of each chunk remain.
    assert compressed(20).at_ratio(8).embeddings[:, 0].tolist() == [7, 15, 19]
    assert len(compressed(20).at_ratio(4)) == 5


def test_everything_else_is_kept():
    coarse = compressed(20).at_ratio(4)
    assert (coarse.ratio, coarse.n_tokens, coarse.ref, coarse.fingerprint) == (4, 20, "r", "f")


def test_the_same_ratio_and_the_empty_text_are_no_work():
    assert compressed(20).at_ratio(2).embeddings.tolist() == compressed(20).embeddings.tolist()
    empty = compressed(0, embeddings=torch.empty(0, 1)).at_ratio(8)
    assert (len(empty), empty.ratio) == (0, 8)


@pytest.mark.parametrize(("at_hand", "wanted"), [(4, 2), (2, 3), (2, 16), (8, 4), (2, 0)])
def test_what_cannot_be_derived_is_refused(at_hand, wanted):
    with pytest.raises(RatioError, match=f"ratio={wanted} cannot be derived from ratio {at_hand}"):
        compressed(8, ratio=at_hand).at_ratio(wanted)
