"""Which token of a group stands in the prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from extemb_core.models.anchors import anchor_positions


@given(length=st.integers(1, 40), ratio=st.sampled_from([1, 2, 4, 8, 64]))
def test_the_anchor_of_each_group_is_its_last_token(length, ratio):
    groups = [range(length)[start : start + ratio] for start in range(0, length, ratio)]
    assert anchor_positions(length, ratio).tolist() == [group[-1] for group in groups]


@given(length=st.integers(1, 40), fine=st.sampled_from([1, 2, 4]), times=st.sampled_from([1, 2, 4]))
def test_anchors_of_a_coarser_ratio_are_anchors_of_the_anchors(length, fine, times):
    anchors = anchor_positions(length, fine)
    assert anchors[anchor_positions(len(anchors), times)].tolist() == anchor_positions(length, fine * times).tolist()
