"""Items in batches of a size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

Item = TypeVar("Item")


def batches(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Group items in their order: a batch ends with the item that brings it to the limit."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def padded_batches(
    lengths: Mapping[Item, int], limit: int, batch_size: int | None = None, at_least: float = 0
) -> Iterator[list[Item]]:
    """Group items, shortest first, such that a batch padded to its longest stays within the limit; a long one is alone.

    Args:
        lengths: Item -> its length.
        limit: Of a batch, padding included.
        batch_size: Maximum number of items in a batch; None for no limit.
        at_least: Share of a batch's longest item that each of its others is long.
    """
    batch: list[Item] = []
    for item in sorted(lengths, key=lambda item: lengths[item]):
        length = lengths[item]
        full = len(batch) == batch_size or (len(batch) + 1) * length > limit
        if batch and (full or lengths[batch[0]] < at_least * length):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch
