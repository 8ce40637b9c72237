"""Reciprocal rank fusion against its formula."""

from __future__ import annotations

import pytest

from extemb_core.library.bm25 import fuse


def test_scores_are_the_sums_of_reciprocal_ranks():
    found = dict(fuse([[7, 8, 9], [9, 7]]))
    assert found == pytest.approx({7: 1 / 61 + 1 / 62, 8: 1 / 62, 9: 1 / 63 + 1 / 61})
    assert [item for item, _ in fuse([[7, 8, 9], [9, 7]])] == [7, 9, 8]


def test_weights_and_ties():
    assert [item for item, _ in fuse([[1, 2], [2, 1]])] == [1, 2]
    assert [item for item, _ in fuse([[1, 2], [2, 1]], [1.0, 2.0])] == [2, 1]
    assert fuse([[], []]) == []
