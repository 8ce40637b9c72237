"""A cache that ends a pass through the LLM where nobody waits for it any more: at the next layer, not at its end."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from torch import Tensor
from transformers import DynamicCache, __version__

CACHE = "cache" if tuple(map(int, __version__.split(".")[:2])) >= (5, 24) else "past_key_values"
"""What transformers calls the cache among the arguments of a model."""


class StoppableCache(DynamicCache):
    """transformers' own cache, to which each layer of a pass comes before its attention.

    So a long prompt need not be cut into pieces to be stopped, which would round differently, and no module is touched.

    Args:
        config: Of the model.
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
