"""The model that a run trains, from before the first step: an embedder, a reader, or both, with their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn

from extemb_core.errors import ConfigError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.entry import reading_model
from extemb_core.models.llm import LLM
from extemb_core.models.reader_lora import add_reader, load_reader, reader_adapters, save_reader
from extemb_core.training.batches import token_file
from extemb_core.training.checkpoints import named_if_damaged
from extemb_core.training.config import TrainingConfig
from extemb_core.training.reading_loss import Reading, reading_losses
from extemb_core.training.two_stream import two_stream_losses

READER = "reader"


class TrainableModel(nn.Module):
    """Trained parts with their losses: an embedder, a reader (adapters on the LLM), or both.

    An LLM without a reader is not a submodule, so that it is neither moved nor saved. Above entry layer 0, a reader's
    adapters are put on a separate reading model (see `models/entry.py`), and `llm` is that model.
    """

    def __init__(
        self,
        llm: LLM,
        embedder: ExtensibleEmbedder | None = None,
        reader: LoraConfig | None = None,
        distillation: float = 0.0,
    ) -> None:
        super().__init__()
        self.llm = llm
        self.embedder = embedder
        self.reader = reader
        self.adapted = llm.model if reader is not None else None
        self.distillation = distillation

    def forward(
        self,
        ratios: Sequence[Sequence[int]],
        chunk_size: int,
        samples: Sequence[Tensor] | None = None,
        readings: Sequence[Reading] | None = None,
    ) -> dict[str, Any]:
        """Compute the loss, with gradient, and the loss of each ratio, without."""
        distillation = self.distillation if self.training else 0.0
        if samples is not None:
            assert self.embedder is not None
            losses = two_stream_losses(
                self.embedder, samples, ratios, chunk_size, llm=self.llm, distillation=distillation
            )
        else:
            losses = reading_losses(
                self.llm,
                readings or (),
                embedder=self.embedder,
                ratios=ratios,
                chunk_size=chunk_size,
                distillation=distillation,
            )
        loss = losses.mean()
        if self.training and not loss.requires_grad:  # only raw text in this batch, and only the embedder is trained
            loss = loss + 0 * next(iter(self.trainable().values())).sum()
        return {"loss": loss, "by_ratio": losses.by_ratio()}

    def train(self, mode: bool = True) -> TrainableModel:
        super().train(mode)
        self.llm.model.train(False)  # keeps its dropout off
        return self

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the files, which do not depend on the version of the code."""
        embedder, reader = {}, {}
        if self.embedder is not None:
            embedder = {f"embedder.{n}": self.embedder.get_parameter(n) for n in self.embedder.trainable_names}
        if self.reader is not None:
            reader = {f"reader.{name}": parameter for name, parameter in reader_adapters(self.llm).items()}
        return {name: parameter for name, parameter in (embedder | reader).items() if parameter.requires_grad}

    def transformers(self) -> list[Any]:
        """List the transformers models that take part in a step."""
        models: list[Any] = [self.llm.model]
        if self.embedder is not None:
            models.append(self.embedder.stack)
            if layer := self.embedder.config.entry_layer:  # a separate model reads the embeddings
                models.append(self.llm.reading_model(layer))
        return models

    def save(self, folder: Path) -> None:
        if self.embedder is not None:
            self.embedder.save_pretrained(folder)
        if self.reader is not None:
            save_reader(self.llm, self.reader, folder / READER)

    def load(self, folder: Path) -> None:
        if self.embedder is not None:
            self.embedder.load_own(folder / "model.safetensors")
        if self.reader is not None:
            load_reader(self.llm, folder / READER)


def starting_point(config: TrainingConfig, llm: LLM, checkpoint: Path | None = None) -> TrainableModel:
    """Make the model that a run trains, as before the first step.

    With a checkpoint, an embedder that weighs tokens by counts takes its weights: the text may have changed since.
    """
    embedder: ExtensibleEmbedder | None = None
    reader: LoraConfig | None = None
    layer = int(config.embedder.get("entry_layer", 0))
    before = Path(config.start_from) if config.start_from is not None else None
    torch.manual_seed(config.seed)
    if config.trained != "reader":
        reader_alone = before is not None and holds_reader_alone(before)
        if reader_alone and config.trained != "both":
            raise ConfigError(
                f"start_from={config.start_from!r} holds a reader and no embedder; pass "
                f"llm={f'{config.start_from}/{READER}'!r} for an embedder that is trained for it"
            )
        if before is None or reader_alone:
            embedder = _new_embedder(config, llm, checkpoint, config.embedder)
        else:
            embedder = ExtensibleEmbedder.from_pretrained(before, llm=llm, adapt=True)
        embedder.trainable_to(torch.float32)  # in bfloat16 small updates would be rounded away
        layer = embedder.config.entry_layer
    elif layer:  # a reader of the unchanged states of the LLM's first layers
        settings = {**config.embedder, "adaptation": "none", "has_reader": True}
        embedder = _new_embedder(config, llm, checkpoint, settings)
    for name in ("mixed_share", "focus_share"):
        if getattr(config, name) and not layer:
            raise ConfigError(
                f"{name}={getattr(config, name)} needs an embedder with an entry_layer above 0, and this one's is 0; "
                "leave it out"
            )
    if config.trained == "connector" and embedder is not None:
        embedder.stack.requires_grad_(False)
    if config.trained in ("reader", "both"):
        shared = embedder.config.num_layers if embedder is not None else 0
        if layer:
            llm = LLM(reading_model(llm.model, layer, llm.name), llm.tokenizer, name=llm.name)
        reader = add_reader(llm, config.reader_rank, max(shared, config.reader_first_layer))
        if before is not None and (before / READER).is_dir():
            load_reader(llm, before / READER)
    return TrainableModel(llm, embedder, reader, config.distillation)


def _new_embedder(
    config: TrainingConfig, llm: LLM, checkpoint: Path | None, settings: Mapping[str, Any]
) -> ExtensibleEmbedder:
    if settings.get("token_weighting") != "frequency":
        return ExtensibleEmbedder.from_llm(llm, **settings)
    if checkpoint is not None:
        with named_if_damaged(checkpoint):
            return ExtensibleEmbedder.from_pretrained(checkpoint, llm=llm)
    return ExtensibleEmbedder.from_llm(llm, token_counts=_token_counts(config, llm), **settings)


def _token_counts(config: TrainingConfig, llm: LLM) -> Tensor:
    """Count how often each token occurs in the training text."""
    if not config.data:
        raise ConfigError("token_weighting='frequency' counts tokens in data, and data is empty; pass text files")
    tokens = token_file(config, llm, config.data).tokens
    size = int(llm.model.get_input_embeddings().num_embeddings)
    parts = (tokens[at : at + 2**24] for at in range(0, len(tokens), 2**24))
    return torch.from_numpy(sum(np.bincount(part, minlength=size) for part in parts))


def holds_reader_alone(folder: Path) -> bool:
    """Return whether a run's folder has a reader, and no embedder beside it."""
    return (folder / READER).is_dir() and not (folder / "config.json").is_file()
