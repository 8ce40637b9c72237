"""Which LLM will read what is compressed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from extemb_core.frameworks.settings import LoadedWhenNeeded

if TYPE_CHECKING:
    from extemb_core.lm import ExtensibleLM


class ForReader(LoadedWhenNeeded):
    """What compresses for an LLM: with its weights, into its store."""

    llm: Any = Field(default=None, exclude=True)
    """The `ExtensibleLLM` that will read the nodes; in its place, `model`, `embedder` and `store`."""
    batch_size: int | None = Field(default=None, ge=1)
    """Chunks per forward pass; by the device when not given."""

    @field_validator("llm")
    @classmethod
    def _reads_embeddings(cls, llm: Any) -> Any:
        if llm is not None and not hasattr(type(llm), "lm"):  # of the object it would load weights
            raise ValueError(
                f"a {type(llm).__name__} reads text alone; pass an ExtensibleLLM, or model=, or leave it out"
            )
        return llm

    @property
    def lm(self) -> ExtensibleLM:
        """The model; it is loaded now if it was not."""
        if self.llm is not None:
            lm: ExtensibleLM = self.llm.lm
            return lm
        return super().lm
