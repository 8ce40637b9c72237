"""Settings that every kind of measurement shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from extemb_core.errors import ConfigError
from extemb_core.models.downscaling import is_count


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What is measured, on what.

    Attributes:
        llm: Name, path or hub id of the frozen LLM.
        embedder: Folder or hub id of its embedder; None measures the controls alone.
        data: Files.
        ratios: Of the extensible arms and of the controls that take as many positions.
        limit: At most so many samples, evenly from all.
        seed: Of the bootstrap and of all that is drawn.
        batch_size: Samples at once.
        device: "auto" or a torch device.
        dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype's name.
    """

    llm: str
    embedder: str | None = None
    data: tuple[str, ...] = ()
    ratios: tuple[int, ...] = (4, 8, 16, 32)
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        data: object = self.data
        if isinstance(data, str):  # else each of its letters would be a file
            raise ConfigError(f"data={self.data!r} is one str; pass a tuple of files")
        require_counts(self, "ratios", "batch_size")
        if not self.ratios:
            raise ConfigError("ratios is empty; pass at least one ratio")
        if self.limit is not None:
            require_counts(self, "limit")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} is not a whole number of at least 0; pass e.g. 0")


def require_counts(config: Any, *names: str) -> None:
    """Raise `ConfigError` unless these fields are positive whole numbers, or tuples of distinct ones."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, tuple):
            if not all(is_count(number) for number in value) or len(set(value)) != len(value):
                raise ConfigError(f"{name}={value!r} must be distinct positive whole numbers; pass e.g. (4, 8)")
        elif not is_count(value):
            raise ConfigError(f"{name}={value!r} is not a positive whole number; pass 1 or more")
