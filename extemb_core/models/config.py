"""The embedder's configuration: everything its outputs depend on, besides its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.connector import CONNECTORS
from extemb_core.models.downscaling import DOWNSCALINGS, check_ratios
from extemb_core.models.pooling import TOKEN_WEIGHTINGS
from extemb_core.utils.validation import is_count, require_one_of, whole_number

Adaptation = Literal["none", "lora", "full"]


class ExtensibleEmbedderConfig(PretrainedConfig):
    """Configuration of an `ExtensibleEmbedder`.

    Defaults depend on the entry layer: at 0 they are the papers'; above 0 they suit states that the LLM knows already.

    Args:
        num_layers: How many of the LLM's first layers the embedder uses; 8 (twin paper, section 2), or `entry_layer`.
        adaptation: "lora" trains low-rank adapters over the LLM's own tensors, "full" trains a copy of the layers,
            "none" takes them as they are (entry layers above 0 only).
        downscaling: How outputs become extensible embeddings: "strided", or above entry layer 0 "mean", weighted
            (see `models/downscaling.py` and `models/pooling.py`).
        connector: Module between the layers' outputs and the LLM: "linear", or above entry layer 0 "none" (see
            `models/connector.py`).
        chunk_size: Tokens per chunk; chunks are compressed independently.
        ratios: The ratios that may be asked for, finest first: (2, 4, 8, 16, 32) by default, and 1 as well above entry
            layer 0.
        residual_window: Number of token embeddings whose mean each output starts from, with a connector at entry layer
            0; "conv" has a map for each of them. It does not depend on the ratio, so that a coarser ratio stays a slice
            of a finer one.
        lora_rank: Rank of the adapters; their scale is `2 * rank`, as usual.
        entry_layer: J, the layer of the LLM at whose input the embeddings take their place; at 0 they stand among the
            input embeddings.
        kept_ratio: Ratio at which a text is compressed if none is asked for; coarser ones are derived from it. By
            default the finest, or 2 above entry layer 0.
        plan_ratios: Ratios that a plan chooses from by itself: all by default, or 2, 4 and 8 above entry layer 0.
        token_weighting: Above entry layer 0, how much each token counts in its group (see `models/pooling.py`).
        token_weights_digest: sha256 of the table of counted weights, if there is one.
        retrieval_heads: Above entry layer 0, layer and number of the LLM's attention heads that look at what answers a
            question (see `context/retrieval_heads.py`); plans use them. Empty if they were not looked for.
        sentence_losses: What an answer loses when a sentence is read in less detail: the `summary` of `extemb eval
            plan`, with which plans weigh. None for the one fitted for the shipped LLM.
        has_reader: Whether an LLM was trained to read what it makes, though it has learned nothing itself.
        hidden_size: Width of the LLM's input embeddings, D.
        llm_name: Name of the LLM when the embedder was made; only for messages and defaults.
        llm_layers_type: The LLM's `model_type`; an embedder is not moved between architectures.
        bos_token_id: Token put before every chunk if the LLM's tokenizer adds a BOS itself; its output is not used.
        tokenizer_digest: sha256 of the tokenizer's vocabulary and rules.

    Raises:
        ConfigError: A setting is not legal, or does not apply at this entry layer.
    """

    model_type = "extemb"

    def __init__(
        self,
        num_layers: int | None = None,
        adaptation: Adaptation = "lora",
        downscaling: str | None = None,
        connector: str | None = None,
        chunk_size: int = 512,
        ratios: tuple[int, ...] | list[int] | None = None,
        residual_window: int | None = None,
        lora_rank: int = 16,
        entry_layer: int = 0,
        kept_ratio: int | None = None,
        plan_ratios: tuple[int, ...] | list[int] | None = None,
        token_weighting: str = "rank",
        token_weights_digest: str = "",
        retrieval_heads: Sequence[Sequence[int]] = (),
        sentence_losses: Mapping[str, Any] | None = None,
        has_reader: bool = False,
        hidden_size: int = 0,
        llm_name: str = "",
        llm_layers_type: str = "",
        bos_token_id: int | None = None,
        tokenizer_digest: str = "",
        **kwargs: Any,
    ) -> None:
        entry_layer = whole_number(entry_layer, "entry_layer", 0, remedy="a layer of the LLM, or 0")
        enters = entry_layer > 0
        num_layers = (entry_layer or 8) if num_layers is None else num_layers
        downscaling = ("mean" if enters else "strided") if downscaling is None else downscaling
        connector = ("none" if enters else "linear") if connector is None else connector
        if ratios is None:
            allowed = (1, 2, 4, 8, 16, 32) if enters else (2, 4, 8, 16, 32)
            ratios = tuple(ratio for ratio in allowed if not is_count(chunk_size) or ratio <= chunk_size)
        if enters:
            for name, value, legal, rule in (
                ("num_layers", num_layers, num_layers == entry_layer, f"{entry_layer}, the layers below the entry"),
                ("downscaling", downscaling, downscaling == "mean",
                 "'mean', which keeps what a group's states have in common"),
                ("connector", connector, connector != "conv",
                 "'none', 'linear' or 'mlp', which map each state by itself"),
                ("residual_window", residual_window, residual_window is None,
                 "left out: states start from themselves"),
            ):  # fmt: skip
                if not legal:
                    raise ConfigError(
                        f"{name}={value!r} has no meaning at entry_layer={entry_layer}; it must be {rule}"
                    )
        elif adaptation == "none":
            raise ConfigError(
                "adaptation='none' needs an entry_layer above 0: at 0 nothing that is untrained can be read; pass "
                "entry_layer=J, or adaptation='lora' and train"
            )
        elif token_weighting != "rank" or token_weights_digest:
            raise ConfigError(
                f"token_weighting={token_weighting!r} has no meaning at entry_layer=0, where groups are not weighted; "
                "leave it and token counts out, or pass entry_layer=J"
            )
        else:
            residual_window = whole_number(8 if residual_window is None else residual_window, "residual_window")
        require_one_of(adaptation, "adaptation", get_args(Adaptation))
        require_one_of(downscaling, "downscaling", DOWNSCALINGS)
        require_one_of(connector, "connector", CONNECTORS)
        require_one_of(token_weighting, "token_weighting", TOKEN_WEIGHTINGS)
        self.num_layers = whole_number(num_layers, "num_layers")
        self.adaptation = adaptation
        self.downscaling = downscaling
        self.connector = connector
        self.chunk_size = whole_number(chunk_size, "chunk_size")
        self.ratios = list(check_ratios(ratios, chunk_size))
        self.residual_window = residual_window
        self.lora_rank = whole_number(lora_rank, "lora_rank")
        self.entry_layer = entry_layer
        if kept_ratio is None:
            kept_ratio = min((r for r in self.ratios if r >= 2), default=self.ratios[0]) if enters else self.ratios[0]
        self.kept_ratio = self.require_ratio(kept_ratio)
        if plan_ratios is None:
            plan_ratios = [r for r in self.ratios if 2 <= r <= 8] or self.ratios if enters else self.ratios
        self.plan_ratios = [self.require_ratio(ratio) for ratio in check_ratios(plan_ratios, chunk_size)]
        self.token_weighting = token_weighting
        self.token_weights_digest = token_weights_digest
        self.retrieval_heads = _checked_heads(retrieval_heads, entry_layer)
        self.sentence_losses = sentence_losses
        self.has_reader = has_reader
        self.hidden_size = hidden_size
        self.llm_name = llm_name
        self.llm_layers_type = llm_layers_type
        self.tokenizer_digest = tokenizer_digest
        super().__init__(**kwargs)
        self.bos_token_id = bos_token_id

    @property
    def untrained(self) -> bool:
        """Whether nothing was learned: the embedder is the LLM's own first layers, and no reader was trained for it."""
        return self.adaptation == self.connector == "none" and not self.has_reader

    def finest(self, ratio: int | None = None) -> int:
        """Return `ratio` after checking that it is one of `ratios`; `kept_ratio` when not given.

        Raises:
            RatioError: It is not one of `ratios`.
        """
        return self.kept_ratio if ratio is None else self.require_ratio(ratio)

    def require_ratio(self, ratio: int) -> int:
        """Return `ratio` if it may be asked for, else raise a `RatioError` that names the legal ones."""
        if isinstance(ratio, bool) or ratio not in self.ratios:
            legal = tuple(self.ratios)
            raise RatioError(
                f"ratio={ratio} is not one of the ratios {legal} of this embedder; pass one of them, or make one with "
                "other ratios, each a multiple of the one before"
            )
        return ratio


# Settings that a user may choose; those that describe the LLM are left out.
EMBEDDER_SETTINGS = frozenset(signature(ExtensibleEmbedderConfig.__init__).parameters) - {
    "self", "kwargs", "token_weights_digest", "hidden_size", "llm_name", "llm_layers_type", "bos_token_id",
    "tokenizer_digest",
}  # fmt: skip


def _checked_heads(heads: Any, entry_layer: int) -> list[list[int]]:
    """Check pairs of a layer and a head's number, and return them as lists, as JSON does."""
    pairs = [list(pair) for pair in heads] if all(isinstance(pair, list | tuple) for pair in heads) else [[]]
    if any(len(pair) != 2 or not all(number == 0 or is_count(number) for number in pair) for pair in pairs):
        raise ConfigError(f"retrieval_heads={heads!r} is not a list of [layer, head]; pass both as numbers from 0")
    if pairs and not entry_layer:
        raise ConfigError(
            "retrieval_heads has no meaning at entry_layer=0, where plans are not by sentence; leave it out, or pass "
            "entry_layer=J"
        )
    return pairs
