"""The embedder's configuration: everything its outputs depend on, besides its tensors."""

from __future__ import annotations

from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.downscaling import Downscaling, check_ratios, is_count

Adaptation = Literal["lora", "full"]
Connector = Literal["none", "linear", "mlp", "conv"]


class ExtensibleEmbedderConfig(PretrainedConfig):
    """Configuration of an `ExtensibleEmbedder`.

    Args:
        num_layers: How many of the LLM's first layers the embedder uses (twin paper, section 2: 8).
        adaptation: "lora" trains low-rank adapters over the LLM's own tensors, "full" trains a copy of the layers.
        downscaling: Which outputs become extensible embeddings (see `models/downscaling.py`).
        connector: What stands between the layers' outputs and the LLM's input space (see `models/connector.py`).
        chunk_size: Tokens per chunk; chunks are compressed independently.
        ratios: The trained ratios, finest first.
        residual_window: With a connector: each output starts from the mean of this many token embeddings; "conv" has a
            map for each of them. It does not depend on the ratio, so a coarser ratio stays a slice of a finer one.
        lora_rank: Rank of the adapters; their scale is `2 * rank`, as usual.
        hidden_size: Width of the LLM's input embeddings, D.
        llm_name: What the LLM was called when the embedder was made; only for messages and defaults.
        llm_layers_type: The LLM's `model_type`; an embedder is not moved between architectures.
        bos_token_id: Put before every chunk where the LLM's tokenizer does so itself; its output is not used.
        tokenizer_digest: sha256 of the tokenizer's vocabulary and rules.
    """

    model_type = "extemb"

    def __init__(
        self,
        num_layers: int = 8,
        adaptation: Adaptation = "lora",
        downscaling: Downscaling = "strided",
        connector: Connector = "linear",
        chunk_size: int = 512,
        ratios: tuple[int, ...] | list[int] = (2, 4, 8, 16, 32),
        residual_window: int = 8,
        lora_rank: int = 16,
        hidden_size: int = 0,
        llm_name: str = "",
        llm_layers_type: str = "",
        bos_token_id: int | None = None,
        tokenizer_digest: str = "",
        **kwargs: Any,
    ) -> None:
        for name, value, legal in (
            ("adaptation", adaptation, get_args(Adaptation)),
            ("downscaling", downscaling, get_args(Downscaling)),
            ("connector", connector, get_args(Connector)),
        ):
            if value not in legal:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(legal)}; pass one of them")
        for name, number in (
            ("num_layers", num_layers),
            ("chunk_size", chunk_size),
            ("residual_window", residual_window),
            ("lora_rank", lora_rank),
        ):
            if not is_count(number):
                raise ConfigError(f"{name}={number!r} is not a positive whole number; pass 1 or more")
        self.num_layers = num_layers
        self.adaptation = adaptation
        self.downscaling = downscaling
        self.connector = connector
        self.chunk_size = chunk_size
        self.ratios = list(check_ratios(ratios, chunk_size))
        self.residual_window = residual_window
        self.lora_rank = lora_rank
        self.hidden_size = hidden_size
        self.llm_name = llm_name
        self.llm_layers_type = llm_layers_type
        self.tokenizer_digest = tokenizer_digest
        super().__init__(**kwargs)
        self.bos_token_id = bos_token_id

    def finest(self, ratio: int | None = None) -> int:
        """`ratio`, which must be a trained one; the finest trained one when not given.

        Raises:
            RatioError: It is none of `ratios`.
        """
        return min(self.ratios) if ratio is None else self.require_ratio(ratio)

    def require_ratio(self, ratio: int) -> int:
        """Return `ratio` if it was trained, else raise a `RatioError` that names the legal ones."""
        if ratio not in self.ratios:
            trained = tuple(self.ratios)
            raise RatioError(
                f"ratio={ratio} is not one of the trained ratios {trained}; "
                f"pass one of them or train with ratios=[..., {ratio}]"
            )
        return ratio
