"""The extensible embedder: the LLM's first layers, read out every `ratio` tokens (twin paper, section 2).

A document is cut into chunks, and each chunk runs through the layers on its own with ordinary causal attention. At
entry layer 0 the down-scaling then picks outputs and the connector moves them into the LLM's input space. At an entry
layer J above 0 the embedder is the LLM's first J layers, and the weighted mean of each group's outputs is what the LLM
reads at the input of layer J (see `entry` and `pooling`): states that it knows, also when nothing was trained.

With `adaptation="lora"` or "none" the layers' base parameters share the LLM's memory; the embedder has modules of its
own around them, and the adapters live only there. The LLM is never touched, so one thread may compress while another
generates. Only the embedder's own tensors can be trained. It runs in the LLM's dtype and on its device; moving it
elsewhere with `half()` or `to()` is an error. With `adaptation="full"` the layers are a trained copy. The token
embeddings are the LLM's own, and frozen, with every adaptation.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from extemb_core.documents import is_open_file, text_ref
from extemb_core.errors import (
    ConfigError,
    DocumentError,
    ExtembError,
    MismatchError,
    WeightsCorruptError,
    WeightsNotFoundError,
    first_line,
)
from extemb_core.models.anchors import ANCHOR, anchor_positions
from extemb_core.models.bulk import compress_pieces
from extemb_core.models.chunks import chunk_lengths
from extemb_core.models.compressed import Compressed
from extemb_core.models.config import EMBEDDER_SETTINGS, ExtensibleEmbedderConfig
from extemb_core.models.connector import CONNECTORS, OutputConnector, recent_embeddings, trailing_means
from extemb_core.models.downscaling import DOWNSCALINGS
from extemb_core.models.entry import AnchoredPrompt, AnchoredStates, decoder_layers, default_entry_layer
from extemb_core.models.llm import LLM, not_from_hub
from extemb_core.models.lora import add_adapters, first_mismatch, read_settings, read_tensors
from extemb_core.models.pooling import Groups, digest_of, pool, pool_groups, token_groups, token_weights
from extemb_core.models.shared_layers import PROBE_TOLERANCE, first_layers, same_in_bfloat16, sample_of
from extemb_core.utils.files import safetensors_folder
from extemb_core.utils.quiet import quiet_transformers
from extemb_core.utils.validation import name_or_path, path_of, refuse_unknown
from extemb_core.weights.resolve import UNTRAINED

_CHECKED_TOKENS, _EXACT_TOLERANCE = 8, 0.02
_SETTINGS, _TENSORS = "config.json", "model.safetensors"
_FINGERPRINTED = (
    "num_layers", "adaptation", "downscaling", "connector", "chunk_size", "lora_rank", "llm_layers_type",
    "bos_token_id", "tokenizer_digest",
)  # fmt: skip
_FINGERPRINTED_AT_0 = ("residual_window",)
_FINGERPRINTED_ABOVE_0 = ("entry_layer", "token_weighting", "token_weights_digest", "anchor")


class ChunkOutputs(NamedTuple):
    """Inputs and outputs of the layers for a batch of chunks.

    Attributes:
        ids: (B, T) token ids, on the device where they were passed.
        hidden: (B, T, D).
        weights: (B, T) weights of the tokens in their groups' means; above entry layer 0.
        residuals, embedded: (B, T, D), the first in float32; at entry layer 0.
    """

    ids: Tensor
    hidden: Tensor
    weights: Tensor | None = None
    residuals: Tensor | None = None
    embedded: Tensor | None = None


class ExtensibleEmbedder(PreTrainedModel):
    """Turns text into extensible embeddings for one LLM.

    Make one with `from_llm` (untrained) or `from_pretrained` (a folder or hub id), both of which take the LLM
    whose layers it shares.
    """

    config_class = ExtensibleEmbedderConfig
    config: ExtensibleEmbedderConfig
    llm_probe: Tensor
    token_weights: Tensor
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ExtensibleEmbedderConfig, llm: LLM) -> None:
        super().__init__(config)
        n_layers = len(decoder_layers(llm.model, llm.name))
        for name, value, limit in (
            ("entry_layer", config.entry_layer, n_layers - 1),  # checked first: num_layers defaults to it
            ("num_layers", config.num_layers, n_layers),
        ):
            if value > limit:
                raise ConfigError(f"{name}={value} is beyond the {n_layers} layers of {llm.name}; pass at most {limit}")
        self.llm = llm
        stack, shared = first_layers(llm, config.num_layers, copied=config.adaptation == "full")
        self.stack: Any = stack
        if config.adaptation == "lora":
            add_adapters(stack.layers, config.lora_rank)
        embedding = llm.model.get_input_embeddings()
        self.connector: OutputConnector | None = None
        if not (config.entry_layer and config.connector == "none"):
            rms = float(embedding.weight.float().pow(2).mean().sqrt())
            self.connector = CONNECTORS[config.connector](config.hidden_size, rms, self._residual_window)
            self.connector.to(llm.device)
        self.register_buffer("llm_probe", sample_of(llm, config.num_layers), persistent=True)
        weighting = "uniform" if config.token_weighting == "frequency" else config.token_weighting  # until it is loaded
        table = token_weights(weighting, int(embedding.num_embeddings)).to(llm.device)
        self.register_buffer("token_weights", table, persistent=False)
        self.trainable_names = [name for name, p in self.named_parameters() if id(p) not in shared]
        parents = ((name, *name.rpartition(".")[::2]) for name in self.trainable_names)
        self._parents = {name: (self.get_submodule(parent), leaf) for name, parent, leaf in parents}  # for fast look-up
        self._fingerprint: tuple[int, str] | None = None
        self.train(False)
        if config.entry_layer:
            self._check_exact()
        else:
            self._check_runs()

    @torch.no_grad()
    def _check_exact(self) -> None:
        """Check that a new embedder's states equal the LLM's own, so that ratio 1 is read exactly as the text would be.

        Raises:
            ConfigError: They do not, as the LLM does more than run its layers one after another; or the LLM's logits
                are not those that `LLM.logits` computes from its states.
        """
        bos = [] if self.config.bos_token_id is None else [self.config.bos_token_id]
        ids = np.linspace(0, self.token_weights.numel() - 1, _CHECKED_TOKENS).astype(np.int32)
        layer, llm = self.config.entry_layer, self.llm
        with self._running_alone("entry_layer=0, or another LLM"):
            states = AnchoredStates(ids, self(torch.from_numpy(ids).long()[None]).hidden[0], layer)
            prompt = AnchoredPrompt.of([np.array(bos, np.int32), states], llm.hidden_size, llm.device, llm.dtype)
            text = [*bos, *map(int, ids)]
            plain, read = llm.hidden_of([text]), llm.hidden_of([prompt])
            own = llm.model(input_ids=torch.tensor([text], device=llm.device), use_cache=False).logits
        if not _alike(llm.logits(plain), own):
            raise ConfigError(
                f"the logits of {llm.name} are not its states through its output embeddings, as in scores; "
                "use another LLM"
            )
        if not _alike(read, plain):
            raise ConfigError(
                f"the first {layer} layers of {llm.name} give other states by themselves than within it, so that "
                f"entry_layer={layer} would not be exact; use entry_layer=0, or another LLM"
            )

    @torch.no_grad()
    def _check_runs(self) -> None:
        """Check that a new embedder's layers run by themselves, and that the LLM can generate from embeddings.

        Raises:
            ConfigError: The layers do not run by themselves, or the LLM cannot generate from embeddings.
        """
        with self._running_alone("another LLM"):
            self(torch.arange(min(_CHECKED_TOKENS, self.token_weights.numel()))[None])
        if "inputs_embeds" not in inspect.signature(self.llm.model.prepare_inputs_for_generation).parameters:
            raise ConfigError(
                f"{self.llm.name} generates from token ids alone; use an entry_layer above 0, or another LLM"
            )

    @contextmanager
    def _running_alone(self, instead: str) -> Iterator[None]:
        """Turn the error of layers that do not run by themselves into one that says what to use instead."""
        try:
            yield
        except ExtembError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"the first {self.config.num_layers} layers of {self.llm.name} do not run by themselves "
                f"({first_line(error)}); use {instead}"
            ) from error

    def _apply(self, fn: Any, recurse: bool = True) -> ExtensibleEmbedder:
        """Move or convert the embedder, for `to`, `half`, `float`, `cuda`, ...

        Raises:
            ConfigError: The result would not be on the LLM's device, or in its dtype or that of the layers' own copy.
        """
        now = torch.empty(0, dtype=self._layer_dtype, device=self.stack.get_input_embeddings().weight.device)
        then = fn(now)
        if then.dtype not in (now.dtype, self.llm.dtype) or then.device not in (now.device, self.llm.device):
            raise ConfigError(
                f"the embedder cannot be moved to {then.dtype} on {then.device}: its layers share the tensors of "
                f"{self.llm.name}; load the LLM there, or use trainable_to for what the embedder has of its own"
            )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def requires_grad_(self, requires_grad: bool = True) -> ExtensibleEmbedder:
        """Let the embedder's own tensors require gradients, or not; the LLM's are never trained through it."""
        for name in self.trainable_names:
            self.get_parameter(name).requires_grad_(requires_grad)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the embedder's own tensors; the LLM's stay unchanged, even if the state holds others."""
        shared = {name: p.detach() for name, p in self.named_parameters() if name not in self._parents}
        loaded = super().load_state_dict({**state_dict, **shared}, strict, assign)
        self._fingerprint = None  # replaced tensors may have the same version number
        return loaded

    # -- making, saving, loading ------------------------------------------------------------------------------

    @classmethod
    def from_llm(cls, llm: LLM, *, token_counts: Tensor | None = None, **settings: Any) -> ExtensibleEmbedder:
        """Make an untrained embedder for `llm`; `settings` are those of `ExtensibleEmbedderConfig`.

        Args:
            llm: The LLM whose layers it shares.
            token_counts: (V,) how often each token occurs in text; needed for `token_weighting="frequency"`, which is
                the default if they are given.

        Raises:
            ConfigError: A setting is not legal, or the LLM has fewer layers or an unsupported layout.
        """
        refuse_unknown(settings, EMBEDDER_SETTINGS)
        table: Tensor | None = None
        if token_counts is not None or settings.get("token_weighting") == "frequency":
            size = int(llm.model.get_input_embeddings().num_embeddings)
            table = token_weights("frequency", size, token_counts).half()
            settings |= {"token_weighting": "frequency", "token_weights_digest": digest_of(table)}
        config = ExtensibleEmbedderConfig(
            **settings,
            hidden_size=llm.hidden_size,
            llm_name=llm.name,
            llm_layers_type=str(llm.text_config.model_type),
            bos_token_id=llm.bos_token_id,
            tokenizer_digest=llm.tokenizer_digest,
        )
        model = cls(config, llm)
        if table is not None:
            model.token_weights.copy_(table)
        return model

    @classmethod
    def untrained(cls, llm: LLM, entry_layer: int | None = None, **settings: Any) -> ExtensibleEmbedder:
        """Make an embedder from the LLM's own first layers, unchanged: for any LLM, without training or files.

        Args:
            llm: The LLM.
            entry_layer: J; `default_entry_layer` of the LLM when not given.
            **settings: Further settings of `ExtensibleEmbedderConfig`.

        Raises:
            ConfigError: See `from_llm`.
        """
        layer = default_entry_layer(llm) if entry_layer is None else entry_layer
        return cls.from_llm(llm, entry_layer=layer, adaptation="none", **settings)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, llm: LLM, adapt: bool = False, **hub: Any
    ) -> ExtensibleEmbedder:
        """Load an embedder for the LLM it was made with.

        Args:
            pretrained_model_name_or_path: A folder with config.json and model.safetensors, a hub id, or "untrained"
                (see `untrained`).
            llm: The LLM whose tensors it shares.
            adapt: Accept an LLM with other tensors, fine-tuned from the same model; the result is another embedder,
                with another fingerprint.
            **hub: Passed to `huggingface_hub` for a hub id (`revision`, `token`, `cache_dir`, ...).

        Raises:
            WeightsNotFoundError, WeightsCorruptError: The files are missing or damaged.
            MismatchError: The embedder was made for another LLM.
        """
        if str(pretrained_model_name_or_path) == UNTRAINED:
            return cls.untrained(llm)
        folder = _local_folder(pretrained_model_name_or_path, hub)
        settings = read_settings(folder / _SETTINGS)
        kind = settings.get("model_type")
        if kind != ExtensibleEmbedderConfig.model_type:
            raise MismatchError(
                f"{folder / _SETTINGS} has model_type={kind!r}, an embedder has 'extemb'; pass an embedder's folder"
            )
        try:
            config: ExtensibleEmbedderConfig = ExtensibleEmbedderConfig.from_dict(settings)
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            if isinstance(error, ExtembError):
                raise
            raise WeightsCorruptError(
                f"{folder / _SETTINGS} does not describe an embedder ({error}); get it again"
            ) from error
        for what, made_for, other in (
            ("input width", config.hidden_size, llm.hidden_size),
            ("architecture", config.llm_layers_type, str(llm.text_config.model_type)),
            ("tokenizer", str(config.tokenizer_digest)[:12], llm.tokenizer_digest[:12]),
            ("first token", config.bos_token_id, llm.bos_token_id),
        ):
            if made_for != other:
                raise MismatchError(
                    f"the embedder was made for {config.llm_name!r} ({what} {made_for}) and {llm.name!r} has {what} "
                    f"{other}; load it with its own LLM or train one for this LLM"
                )
        model = cls(config, llm)
        model.load_own(folder / _TENSORS, adapt=adapt)
        return model

    def load_own(self, file: Path, *, adapt: bool = False) -> None:
        """Load the embedder's own tensors from a file that `save_pretrained` wrote. See `from_pretrained`."""
        tensors = read_tensors(file)
        probe, table = tensors.pop("llm_probe", None), tensors.pop("token_weights", None)
        counted = self.config.token_weighting == "frequency"
        if counted and (table is None or digest_of(table) != self.config.token_weights_digest):
            raise WeightsCorruptError(f"{file} does not hold the token weights that config.json names; get it again")
        own = {name: self.get_parameter(name) for name in self.trainable_names}
        wrong = first_mismatch(own, tensors)
        if probe is None or wrong:
            raise WeightsCorruptError(
                f"{file}: tensor {wrong or 'llm_probe'!r} is missing, unknown or of another shape; get the folder "
                "again, with the config.json that belongs to it"
            )
        here = self.llm_probe.float().cpu()
        distance = float((here - probe).norm() / probe.norm()) if here.shape == probe.shape else float("inf")
        if not distance <= PROBE_TOLERANCE and not (adapt and here.shape == probe.shape):
            raise MismatchError(
                f"the embedder in {file.parent} was trained on the tensors of {self.config.llm_name!r}, and those of "
                f"{self.llm.name!r} differ by {distance:.0%} (at most {PROBE_TOLERANCE:.0%} is allowed); "
                "load it with its own LLM or train one for this LLM"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
            if counted and table is not None:
                self.token_weights.copy_(table)
            if same_in_bfloat16(here, probe, through_float16=self.llm.dtype == torch.float16):
                self.llm_probe.copy_(probe)  # as trained, so that the fingerprint does not depend on the dtype
        # Hash the file's values: tensors converted to float16 may round to bfloat16 differently.
        made = self.trainable_state_dict()
        self._fingerprint = (_version_of(made), self._digest(tensors | {"llm_probe": made["llm_probe"]}))

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Collect the embedder's own tensors, which are trained, saved and hashed, without the LLM's."""
        parameters = [(name, parent._parameters[leaf]) for name, (parent, leaf) in self._parents.items()]
        own = {name: tensor.detach() for name, tensor in parameters if tensor is not None}
        return own | {"llm_probe": self.llm_probe.detach()}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json and model.safetensors (the embedder's own tensors only)."""
        tensors = self.trainable_state_dict()
        if self.config.token_weighting == "frequency":
            tensors["token_weights"] = self.token_weights.half()
        kwargs["state_dict"] = {name: t.contiguous().cpu() for name, t in tensors.items()}
        kwargs["save_original_format"] = False  # it names an LLM's experts differently than its modules do
        folder = path_of(save_directory)
        with quiet_transformers(), safetensors_folder(folder, _TENSORS, _SETTINGS):
            super().save_pretrained(folder, **kwargs)

    @property
    def fingerprint(self) -> str:
        """sha256 (32 hex digits) of what the embeddings depend on: own tensors, LLM probe, config, tokenizer.

        Tensors are rounded to bfloat16 first, so that the same weights have the same fingerprint in every dtype. But a
        reader's adapters are added in the dtype in which it is loaded: other weights, and another fingerprint.
        """
        own = self.trainable_state_dict()
        version = _version_of(own)
        if self._fingerprint is None or self._fingerprint[0] != version:
            self._fingerprint = (version, self._digest(own))
        return self._fingerprint[1]

    def _digest(self, own: dict[str, Tensor]) -> str:
        digest = hashlib.sha256()
        values = self.config.to_dict() | {"anchor": ANCHOR}
        names = {*_FINGERPRINTED, *(_FINGERPRINTED_ABOVE_0 if self.config.entry_layer else _FINGERPRINTED_AT_0)}
        if self.config.entry_layer and self.config.adaptation != "lora":
            names.remove("lora_rank")  # there are no adapters
        settings = {name: values[name] for name in names}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name in sorted(own):
            digest.update(name.encode())
            digest.update(own[name].to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:32]

    # -- the model --------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor) -> ChunkOutputs:
        """Run a batch of chunks through the layers.

        Padding stands on the right; causal attention keeps it from reaching the tokens before it, so no mask is
        needed and a chunk's outputs do not depend on its batch.

        Args:
            input_ids: (B, T) token ids, on any device; if they are on the CPU, the anchors are known without waiting
                for a GPU.

        Returns:
            See `ChunkOutputs`.
        """
        bos = self.config.bos_token_id
        own = input_ids.to(self.llm.device)
        ids = own if bos is None else nn.functional.pad(own, (1, 0), value=bos)
        embedded = self.stack.get_input_embeddings()(ids)
        hidden = self.stack(inputs_embeds=embedded.to(self._layer_dtype), use_cache=False).last_hidden_state
        first = int(bos is not None)
        hidden, embedded = hidden[:, first:], embedded[:, first:]
        if self.config.entry_layer:
            hidden = hidden if self.connector is None else self.connector(hidden, hidden)
            return ChunkOutputs(input_ids, hidden, self.token_weights[own])
        window = 1 if self.config.connector == "conv" else self._residual_window
        return ChunkOutputs(input_ids, hidden, None, trailing_means(embedded, window), embedded)

    @property
    def _residual_window(self) -> int:
        return self.config.residual_window or 1  # None above entry layer 0, where it has no meaning

    @property
    def _layer_dtype(self) -> torch.dtype:
        """Dtype of the layers' base tensors: that of a copy in training may be wider than the LLM's."""
        dtype: torch.dtype = next(p.dtype for name, p in self.stack.layers.named_parameters() if "lora_" not in name)
        return dtype

    def trainable_to(self, dtype: torch.dtype) -> None:
        """Convert the embedder's own tensors to `dtype` (training needs float32); the LLM's stay as they are."""
        for name in self.trainable_names:
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.to(dtype)

    def read_out(
        self, outputs: ChunkOutputs, row: int, length: int, ratio: int, start: int = 0
    ) -> Tensor | AnchoredStates:
        """Read out the extensible embeddings of one chunk of a batch, in float32, as they stand in a prompt.

        Args:
            outputs: Outputs of the batch.
            row: Row of the chunk in the batch.
            length: Tokens of the chunk, or the token at which a part of it ends.
            ratio: Tokens per embedding.
            start: Token at which a part begins; only above entry layer 0.

        Returns:
            (ceil((length - start) / ratio), D), with the groups' anchors above entry layer 0.
        """
        if self.config.entry_layer:
            return self.read_out_parts(outputs, [(row, length, ratio, start)])[0]
        assert outputs.residuals is not None
        assert outputs.embedded is not None
        assert self.connector is not None
        hidden, residuals = outputs.hidden[row, :length], outputs.residuals[row, :length]
        downscaling = DOWNSCALINGS[self.config.downscaling]
        chosen = downscaling.select(length, ratio).to(hidden.device)
        recent = None
        if self.config.connector == "conv":
            recent = recent_embeddings(outputs.embedded[row, :length], chosen, self._residual_window)
        return downscaling.reduce(self.connector(hidden[chosen], residuals[chosen], recent), ratio)

    def read_out_parts(
        self, outputs: ChunkOutputs, parts: Sequence[tuple[int, int, int, int]]
    ) -> Sequence[Tensor | AnchoredStates]:
        """Read out parts of chunks, given as `read_out` takes them: (row, length, ratio, start).

        Above entry layer 0 they are pooled together: on a GPU many short parts cost as little as one long one.
        """
        if not self.config.entry_layer:
            return [self.read_out(outputs, *part) for part in parts]
        assert outputs.weights is not None
        width = outputs.hidden.shape[1]
        tokens = torch.cat([torch.arange(start, stop) + row * width for row, stop, _, start in parts])
        tokens = tokens.to(outputs.hidden.device)
        lengths = [chunk_lengths(stop - start, ratio) for _, stop, ratio, start in parts]
        groups = token_groups(outputs.hidden.flatten(0, 1)[tokens], outputs.weights.flatten()[tokens])
        states = pool_groups(groups, torch.tensor(list(chain(*lengths)))).states.split([*map(len, lengths)])
        ids = outputs.ids.cpu()
        return [
            AnchoredStates(
                ids[row, start:stop][anchor_positions(stop - start, ratio)].numpy().astype(np.int32),
                own,
                self.config.entry_layer,
            )
            for (row, stop, ratio, start), own in zip(parts, states, strict=True)
        ]

    def pool(self, outputs: ChunkOutputs, row: int, length: int, ratio: int) -> Groups:
        """Pool the groups of one chunk of a batch (see `read_out`)."""
        assert outputs.weights is not None
        return pool(outputs.hidden[row, :length], outputs.weights[row, :length], ratio)

    # -- compressing ------------------------------------------------------------------------------------------

    @overload
    def compress(  # type: ignore[overload-overlap]  # a str is a Sequence[str], and taken as one text
        self, texts: str, *, ratio: int | None = None, batch_size: int | None = None, show_progress: bool | None = None
    ) -> Compressed: ...

    @overload
    def compress(
        self,
        texts: Sequence[str],
        *,
        ratio: int | None = None,
        batch_size: int | None = None,
        show_progress: bool | None = None,
    ) -> list[Compressed]: ...

    def compress(
        self,
        texts: str | Sequence[str],
        *,
        ratio: int | None = None,
        batch_size: int | None = None,
        show_progress: bool | None = None,
    ) -> Compressed | list[Compressed]:
        """Compress one text or several.

        Chunks of all texts are batched together, by length. Apart from the embeddings it returns, memory does not grow
        with the texts.

        Args:
            texts: A text, or several.
            ratio: Tokens per embedding, one of the trained ratios; `kept_ratio` of the configuration when not given.
            batch_size: Chunks per forward pass; by the device when not given (see `default_batch_size`).
            show_progress: Show a bar; None shows it on a terminal.

        Returns:
            A `Compressed`, or a list of them; an empty text has 0 embeddings.

        Raises:
            RatioError: The ratio was not trained.
        """
        given: Any = texts
        one = isinstance(given, str) or is_open_file(given) or not isinstance(given, Iterable)
        several: list[str] = [given] if one else list(given)
        wrong = next((text for text in several if not isinstance(text, str)), None)
        if wrong is not None:
            raise DocumentError(f"a text to compress is a {type(wrong).__name__}; pass a str or several")
        pieces = [self.llm.encode_pieces(text) for text in several]
        refs = [text_ref(text) for text in several]
        total = sum(map(len, several))
        results = compress_pieces(self, pieces, refs, ratio, batch_size, total, show_progress)
        return results[0] if isinstance(texts, str) else results

    def compress_ids(
        self,
        ids: Sequence[np.ndarray[Any, Any]],
        *,
        refs: Sequence[str] | None = None,
        ratio: int | None = None,
        batch_size: int | None = None,
        show_progress: bool | Callable[[float], None] | None = None,
    ) -> list[Compressed]:
        """Compress texts that are token ids already, (T,) each, as `compress` does.

        `show_progress` may be a function that is called with the number of tokens done (see `progress`).
        """
        pieces = [[(tokens, len(tokens))] for tokens in ids]
        refs = [""] * len(ids) if refs is None else refs
        return compress_pieces(self, pieces, refs, ratio, batch_size, sum(map(len, ids)), show_progress)


def _alike(found: Tensor, own: Tensor) -> bool:
    """Return whether a result equals the LLM's own up to rounding; True also if the LLM's own is not finite."""
    found, own = found.float(), own.float()
    near = found.shape == own.shape and bool((found - own).norm() <= _EXACT_TOLERANCE * own.norm())
    return near or not own.isfinite().all()


def _version_of(tensors: dict[str, Tensor]) -> int:
    """Return a number that rises whenever one of them is changed in place."""
    return sum(tensor._version for tensor in tensors.values())


def _local_folder(name: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    text = name_or_path(name)
    if (folder := Path(os.path.expanduser(text))).is_dir():
        return folder
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise WeightsNotFoundError(f"{text} is not a folder; pass an embedder's folder or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[_SETTINGS, _TENSORS], **hub))
    except (OSError, ValueError, RuntimeError) as error:
        raise not_from_hub(text, error) from error
