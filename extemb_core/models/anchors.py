"""Anchors: the token of each group that stands in the prompt above entry layer 0 (see `entry.py`)."""

from __future__ import annotations

from torch import Tensor

from extemb_core.models.downscaling import DOWNSCALINGS

ANCHOR = "last"  # the rule's name: part of an embedder's fingerprint


def anchor_positions(length: int, ratio: int) -> Tensor:
    """Choose the anchor of each group: its last token. Nested, as the groups are.

    Returns:
        (ceil(length / ratio),) positions, ascending.
    """
    return DOWNSCALINGS["strided"].select(length, ratio)
