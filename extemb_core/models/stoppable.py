"""A cache that can stop a pass through the LLM at the next layer, when nobody waits for it any more."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from torch import Tensor
from transformers import DynamicCache, __version__

CACHE = "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"
"""Name of the cache among the arguments of a transformers model."""


class StoppableCache(DynamicCache):
    """transformers' own cache, which each layer updates before its attention.

    So a long prompt can be stopped without cutting it into pieces, which would round differently, or changing modules.

    Args:
        config: Configuration of the model.
        is_stopped: Asked at each layer, in the thread of the pass; true ends it with a `CancelledError`.
    """

    def __init__(self, config: Any, is_stopped: Callable[[], bool]) -> None:
        super().__init__(config=config)
        self._is_stopped = is_stopped

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a layer, and return all of them."""
        if self._is_stopped():
            raise CancelledError("nobody waits for this pass any more")
        return super().update(*args, **kwargs)
