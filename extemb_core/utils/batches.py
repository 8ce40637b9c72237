"""Group items into batches of limited size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

Item = TypeVar("Item")


def batches(items: Iterable[Item], size_of: Callable[[Item], int], limit: int) -> Iterator[list[Item]]:
    """Group items in order; a batch ends with the item with which it reaches the limit."""
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
    """Group items, shortest first, so that a batch padded to its longest item fits the limit; a longer item is alone.

    Args:
        lengths: Item -> its length.
        limit: Maximum total length of a batch, padding included.
        batch_size: Maximum number of items in a batch; None for no limit.
        at_least: Minimum length of an item, as a share of the longest in its batch.
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
