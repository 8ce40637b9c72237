"""The extensible embedder: the LLM's first layers, read out every `ratio` tokens (twin paper, section 2).

A document is cut into chunks, each chunk runs through the layers on its own with ordinary causal attention, the
down-scaling picks outputs and the connector moves them into the LLM's input space.

With `adaptation="lora"` the layers' base parameters *are* the LLM's tensors in memory; the embedder has modules
of its own around them, and the adapters live only there. The LLM is never touched, so one thread may compress
while another generates. With `adaptation="full"` the layers are a trained copy. Token embeddings are the LLM's
own, and frozen, in both.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from extemb_core.documents import text_ref
from extemb_core.errors import ConfigError, DocumentError, MismatchError, WeightsCorruptError, WeightsNotFoundError
from extemb_core.models.adapters import add_adapters
from extemb_core.models.compressed import Compressed
from extemb_core.models.config import ExtensibleEmbedderConfig
from extemb_core.models.connector import OutputConnector, recent_embeddings, trailing_means
from extemb_core.models.downscaling import downscale, n_embeddings, picks
from extemb_core.models.llm import LLM, first_line, quiet_transformers
from extemb_core.progress import progress

# The base tensors of an LLM are recognised by a sample of their values. Loading in bfloat16 moves these by about
# 0.2% (relative L2), another model by about 140%.
_PROBE_VALUES = 16
_PROBE_TOLERANCE = 0.01
_FINAL_NORMS = ("norm", "final_layernorm")
_SORT_WINDOW_BATCHES = 64
_SETTINGS, _TENSORS = "config.json", "model.safetensors"
_FINGERPRINTED = (
    "num_layers",
    "adaptation",
    "downscaling",
    "connector",
    "chunk_size",
    "residual_window",
    "lora_rank",
    "llm_layers_type",
    "bos_token_id",
    "tokenizer_digest",
)


class ChunkOutputs(NamedTuple):
    """What the layers give for a batch of chunks, and were given. All (B, T, D); `residuals` is in float32."""

    hidden: Tensor
    residuals: Tensor
    embedded: Tensor


@dataclass(frozen=True)
class _Chunk:
    """The ids of one chunk of text number `text`, whose embeddings begin at row `offset`."""

    text: int
    ids: np.ndarray[Any, Any]
    offset: int
    units: float  # on the progress bar


class _Rows:
    """A text's embeddings while they are made, (N, D) float32: memory that grows in place and is handed over."""

    def __init__(self, width: int) -> None:
        self._buffer = bytearray()
        self._width = width

    def write(self, offset: int, rows: Tensor) -> None:
        values = rows.float().cpu().numpy()
        end = 4 * self._width * (offset + len(values))
        if end > len(self._buffer):
            self._buffer.extend(bytes(end - len(self._buffer)))
        np.frombuffer(self._buffer, dtype=np.float32).reshape(-1, self._width)[offset : offset + len(values)] = values

    def tensor(self) -> Tensor:
        if not self._buffer:  # of which torch makes no tensor
            return torch.empty(0, self._width)
        return torch.frombuffer(self._buffer, dtype=torch.float32).view(-1, self._width)


class ExtensibleEmbedder(PreTrainedModel):
    """Turns text into extensible embeddings for one LLM.

    Make one with `from_llm` (untrained) or `from_pretrained` (a folder or hub id), both of which take the LLM
    whose layers it shares.
    """

    config_class = ExtensibleEmbedderConfig
    config: ExtensibleEmbedderConfig
    llm_probe: Tensor
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ExtensibleEmbedderConfig, llm: LLM) -> None:
        super().__init__(config)
        available = int(llm.text_config.num_hidden_layers)
        if config.num_layers > available:
            raise ConfigError(
                f"num_layers={config.num_layers} is above the {available} layers of {llm.name}; pass fewer"
            )
        self.llm = llm
        stack, shared = _first_layers(llm, config.num_layers, copied=config.adaptation == "full")
        self.stack: Any = stack
        if config.adaptation == "lora":
            add_adapters(stack.layers, config.lora_rank)
        rms = float(llm.model.get_input_embeddings().weight.float().pow(2).mean().sqrt())
        self.connector: OutputConnector = OutputConnector(
            config.connector, config.hidden_size, rms, config.residual_window
        ).to(llm.device)
        self.register_buffer("llm_probe", _probe(llm, config.num_layers), persistent=True)
        self._own_names = [name for name, p in self.named_parameters() if id(p) not in shared]
        parents = ((name, *name.rpartition(".")[::2]) for name in self._own_names)
        self._own_places = {
            name: (self.get_submodule(parent), leaf) for name, parent, leaf in parents
        }  # quick to look up
        self._fingerprint: tuple[int, str] | None = None
        self.train(False)

    # -- making, saving, loading ------------------------------------------------------------------------------

    @classmethod
    def from_llm(cls, llm: LLM, **settings: Any) -> ExtensibleEmbedder:
        """An untrained embedder for `llm`; `settings` are those of `ExtensibleEmbedderConfig`.

        Raises:
            ConfigError: A setting is not legal, or the LLM has fewer layers or an unsupported layout.
        """
        config = ExtensibleEmbedderConfig(
            **settings,
            hidden_size=llm.width,
            llm_name=llm.name,
            llm_layers_type=str(llm.text_config.model_type),
            bos_token_id=llm.bos_token_id,
            tokenizer_digest=llm.tokenizer_digest,
        )
        return cls(config, llm)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, llm: LLM, adapt: bool = False, **hub: Any
    ) -> ExtensibleEmbedder:
        """Load a trained embedder for the LLM it was trained with.

        Args:
            pretrained_model_name_or_path: A folder with config.json and model.safetensors, or a hub id.
            llm: The LLM whose tensors it shares.
            adapt: Take it for an LLM with other tensors too, a fine-tuned relative of its own; it is then another
                embedder, with another fingerprint.
            **hub: Passed to `huggingface_hub` for a hub id (`revision`, `token`, `cache_dir`, ...).

        Raises:
            WeightsNotFoundError, WeightsCorruptError: The files are missing or damaged.
            MismatchError: The embedder was made for another LLM.
        """
        folder = _local_folder(pretrained_model_name_or_path, hub)
        config = _read_config(folder / _SETTINGS)
        check_llm(config, llm)
        model = cls(config, llm)
        model.load_own(folder / _TENSORS, adapt=adapt)
        return model

    def load_own(self, file: Path, *, adapt: bool = False) -> None:
        """Take the embedder's own tensors from a file that `save_pretrained` wrote. See `from_pretrained`."""
        try:
            tensors = load_file(file)
        except FileNotFoundError as error:
            raise WeightsNotFoundError(
                f"{file} does not exist; an embedder's folder holds it beside config.json"
            ) from error
        except (SafetensorError, OSError) as error:
            raise WeightsCorruptError(f"{file} is not a whole safetensors file ({error}); get it again") from error
        probe = tensors.pop("llm_probe", None)
        own = {name: self.get_parameter(name) for name in self._own_names}
        wrong = sorted(n for n in own.keys() | tensors.keys() if n not in own or n not in tensors)
        wrong += sorted(n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape)
        if probe is None or wrong:
            what = wrong[0] if wrong else "llm_probe"
            raise WeightsCorruptError(
                f"{file}: tensor {what!r} is missing, unknown or of another shape; get the folder again, with the "
                "config.json that belongs to it"
            )
        here = self.llm_probe.float().cpu()
        distance = float((here - probe).norm() / probe.norm()) if here.shape == probe.shape else float("inf")
        if not distance <= _PROBE_TOLERANCE and not (adapt and here.shape == probe.shape):
            raise MismatchError(
                f"the embedder in {file.parent} was trained on the tensors of {self.config.llm_name!r}, and those of "
                f"{self.llm.name!r} differ by {distance:.0%} (at most {_PROBE_TOLERANCE:.0%} is allowed); "
                "load it with its own LLM or train one for this LLM"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
            if distance <= _PROBE_TOLERANCE:
                self.llm_probe.copy_(probe)  # as trained, so that the fingerprint does not depend on the dtype

    def own_state_dict(self) -> dict[str, Tensor]:
        """The tensors that are the embedder's and not the LLM's: what is trained, saved and hashed."""
        own = {name: module._parameters[leaf] for name, (module, leaf) in self._own_places.items()}
        return {name: tensor.detach() for name, tensor in own.items() if tensor is not None} | {
            "llm_probe": self.llm_probe.detach()
        }

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json and model.safetensors (the embedder's own tensors only)."""
        kwargs["state_dict"] = {name: t.contiguous().cpu() for name, t in self.own_state_dict().items()}
        with quiet_transformers():
            super().save_pretrained(save_directory, **kwargs)
        # safetensors leaves its file readable by its owner alone; config.json has the mode that files have here.
        folder = Path(save_directory)
        (folder / _TENSORS).chmod((folder / _SETTINGS).stat().st_mode)

    @property
    def fingerprint(self) -> str:
        """sha256 (32 hex digits) of what the embeddings depend on: own tensors, LLM probe, config, tokenizer.

        Tensors are rounded to bfloat16 first, so that the same weights have one fingerprint in every dtype.
        """
        own = self.own_state_dict()
        version = sum(t._version for t in own.values())
        if self._fingerprint is None or self._fingerprint[0] != version:
            digest = hashlib.sha256()
            settings = self.config.to_dict()
            digest.update(json.dumps({key: settings[key] for key in _FINGERPRINTED}, sort_keys=True).encode())
            for name in sorted(own):
                digest.update(name.encode())
                digest.update(own[name].to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
            self._fingerprint = (version, digest.hexdigest()[:32])
        return self._fingerprint[1]

    # -- the model --------------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor) -> ChunkOutputs:
        """Run a batch of chunks through the layers.

        Padding stands on the right; causal attention keeps it from reaching the tokens before it, so no mask is
        needed and a chunk's outputs do not depend on its batch.

        Args:
            input_ids: (B, T) token ids.

        Returns:
            Outputs, residuals and token embeddings, (B, T, D) each.
        """
        bos = self.config.bos_token_id
        if bos is not None:
            input_ids = torch.nn.functional.pad(input_ids, (1, 0), value=bos)
        embedded = self.stack.get_input_embeddings()(input_ids)
        hidden = self.stack(inputs_embeds=embedded.to(self._layer_dtype), use_cache=False).last_hidden_state
        first = int(bos is not None)
        embedded = embedded[:, first:]
        window = 1 if self.config.connector == "conv" else self.config.residual_window
        return ChunkOutputs(hidden[:, first:], trailing_means(embedded, window), embedded)

    @property
    def _layer_dtype(self) -> torch.dtype:
        """That of the layers' own base tensors: a copy in training may be wider than the LLM's."""
        dtypes: Iterator[torch.dtype] = (
            p.dtype for name, p in self.stack.layers.named_parameters() if "lora_" not in name
        )
        return next(dtypes)

    def own_to(self, dtype: torch.dtype) -> None:
        """Hold the embedder's own tensors in `dtype` (training needs float32); the LLM's stay as they are."""
        for name in self._own_names:
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.to(dtype)

    def read_out(self, outputs: ChunkOutputs, row: int, length: int, ratio: int) -> Tensor:
        """The extensible embeddings of one chunk of a batch: (ceil(length / ratio), D) in float32."""
        hidden, residuals = outputs.hidden[row, :length], outputs.residuals[row, :length]
        method = self.config.downscaling
        chosen = torch.arange(length) if method == "mean" else picks(method, length, ratio)
        chosen = chosen.to(hidden.device)
        recent = None
        if self.config.connector == "conv":
            recent = recent_embeddings(outputs.embedded[row, :length], chosen, self.config.residual_window)
        made: Tensor = self.connector(hidden[chosen], residuals[chosen], recent)
        return downscale(made, ratio, method) if method == "mean" else made

    # -- compressing ------------------------------------------------------------------------------------------

    @overload
    def compress(  # type: ignore[overload-overlap]  # a str is a Sequence[str], and taken as one text
        self, texts: str, *, ratio: int | None = None, batch_size: int = 4, show_progress: bool | None = None
    ) -> Compressed: ...

    @overload
    def compress(
        self, texts: Sequence[str], *, ratio: int | None = None, batch_size: int = 4, show_progress: bool | None = None
    ) -> list[Compressed]: ...

    def compress(
        self,
        texts: str | Sequence[str],
        *,
        ratio: int | None = None,
        batch_size: int = 4,
        show_progress: bool | None = None,
    ) -> Compressed | list[Compressed]:
        """Compress one text or several.

        Chunks of all texts are batched together, those of like length side by side. Beyond the embeddings it
        returns, memory does not grow with the texts.

        Args:
            texts: A text, or several.
            ratio: Tokens per embedding, one of the trained ratios; the finest when not given.
            batch_size: Chunks per forward pass.
            show_progress: Show a bar; None shows it on a terminal.

        Returns:
            A `Compressed`, or a list of them; an empty text has 0 embeddings.

        Raises:
            RatioError: The ratio was not trained.
        """
        several = [texts] if isinstance(texts, str) else list(texts)
        wrong = next((text for text in several if not isinstance(text, str)), None)
        if wrong is not None:
            raise DocumentError(f"a text to compress is a {type(wrong).__name__}; pass a str or several")
        pieces = [self.llm.encode_pieces(text) for text in several]
        refs = [text_ref(text) for text in several]
        results = self._compress(pieces, refs, ratio, batch_size, sum(map(len, several)), show_progress)
        return results[0] if isinstance(texts, str) else results

    def compress_ids(
        self,
        ids: Sequence[np.ndarray[Any, Any]],
        *,
        refs: Sequence[str] | None = None,
        ratio: int | None = None,
        batch_size: int = 4,
        show_progress: bool | None = None,
    ) -> list[Compressed]:
        """`compress` for texts that are token ids already, (T,) each."""
        pieces = [[(tokens, len(tokens))] for tokens in ids]
        names = [""] * len(ids) if refs is None else refs
        return self._compress(pieces, names, ratio, batch_size, sum(map(len, ids)), show_progress)

    @torch.no_grad()
    def _compress(
        self,
        texts: Sequence[Iterable[tuple[np.ndarray[Any, Any], int]]],
        refs: Sequence[str],
        ratio: int | None,
        batch_size: int,
        total: int,
        show_progress: bool | None,
    ) -> list[Compressed]:
        """Compress texts that come as pieces of ids; what a piece counts for on the bar comes with it."""
        ratio = self.config.finest(ratio)
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} is below 1; pass a positive whole number")
        made = [_Rows(self.config.hidden_size) for _ in texts]
        n_tokens = [0] * len(texts)
        chunks = self._chunks(texts, ratio, n_tokens)
        with progress("compress", total, show_progress) as advance:
            while window := list(islice(chunks, batch_size * _SORT_WINDOW_BATCHES)):
                window.sort(key=lambda chunk: -len(chunk.ids))
                for at in range(0, len(window), batch_size):
                    batch = window[at : at + batch_size]
                    self._compress_batch(batch, ratio, made)
                    advance(sum(chunk.units for chunk in batch))
        fingerprint = self.fingerprint
        return [
            Compressed(
                embeddings=rows.tensor(),
                ratio=ratio,
                n_tokens=count,
                ref=ref,
                fingerprint=fingerprint,
                chunk_size=self.config.chunk_size,
                ratios=tuple(self.config.ratios),
                downscaling=self.config.downscaling,
            )
            for rows, count, ref in zip(made, n_tokens, refs, strict=True)
        ]

    def _chunks(
        self, texts: Sequence[Iterable[tuple[np.ndarray[Any, Any], int]]], ratio: int, n_tokens: list[int]
    ) -> Iterator[_Chunk]:
        """The chunks of all texts, made as they are asked for; counts each text's tokens in `n_tokens`."""
        for text, pieces in enumerate(texts):
            offset = 0
            for ids, units in _regrouped(pieces, self.config.chunk_size):
                yield _Chunk(text, ids, offset, units)
                offset += n_embeddings(len(ids), ratio)
                n_tokens[text] += len(ids)

    def _compress_batch(self, batch: list[_Chunk], ratio: int, made: list[_Rows]) -> None:
        padded = np.zeros((len(batch), len(batch[0].ids)), dtype=np.int64)
        for row, chunk in enumerate(batch):
            padded[row, : len(chunk.ids)] = chunk.ids
        outputs = self(torch.from_numpy(padded).to(self.llm.device))
        for row, chunk in enumerate(batch):
            made[chunk.text].write(chunk.offset, self.read_out(outputs, row, len(chunk.ids), ratio))


def _regrouped(
    pieces: Iterable[tuple[np.ndarray[Any, Any], int]], size: int
) -> Iterator[tuple[np.ndarray[Any, Any], float]]:
    """Pieces of ids as chunks of `size` and a tail, each with its share of what the pieces count for."""
    held: list[np.ndarray[Any, Any]] = []
    count, units = 0, 0.0
    for ids, worth in pieces:
        start = 0
        while start < len(ids):
            part = ids[start : start + size - count]
            held.append(part)
            start, count, units = start + len(part), count + len(part), units + worth * len(part) / len(ids)
            if count == size:
                yield np.concatenate(held), units
                held, count, units = [], 0, 0.0
    if held:
        yield np.concatenate(held), units


def check_llm(config: ExtensibleEmbedderConfig, llm: LLM) -> None:
    """Raise `MismatchError` when an embedder of this configuration cannot belong to `llm`."""
    facts = (
        ("input width", config.hidden_size, llm.width),
        ("architecture", config.llm_layers_type, str(llm.text_config.model_type)),
        ("tokenizer", config.tokenizer_digest[:12], llm.tokenizer_digest[:12]),
    )
    for what, made_for, here in facts:
        if made_for != here:
            raise MismatchError(
                f"the embedder was made for {config.llm_name!r} ({what} {made_for}) and {llm.name!r} has {what} {here}"
                "; load it with its own LLM or train one for this LLM"
            )


def _first_layers(llm: LLM, count: int, *, copied: bool) -> tuple[Any, set[int]]:
    """The LLM's decoder cut to its first layers, in modules of its own.

    Returns:
        The stack, and the ids of the parameters that it shares with the LLM (all but the layers' if `copied`).
    """
    decoder = llm.model.base_model
    layers = getattr(decoder, "layers", None)
    norm = next((name for name in _FINAL_NORMS if hasattr(decoder, name)), None)
    if not isinstance(layers, nn.ModuleList) or norm is None or decoder is llm.model:
        raise ConfigError(
            f"{llm.name}: a {llm.text_config.model_type} model has no decoder of plain layers and a final norm; "
            "use a Llama-, Qwen-, Mistral-, Gemma- or Phi-style causal LM"
        )
    kept = list(layers[:count])
    keep_shared = [decoder.get_input_embeddings()] + ([] if copied else kept)
    shared = {id(p): p for module in keep_shared for p in module.parameters()}
    # deepcopy takes from `memo` what it must not copy: the shared parameters, and empty modules in place of what
    # the embedder does not use.
    memo: dict[int, Any] = dict(shared)
    memo[id(layers)] = nn.ModuleList([copy.deepcopy(layer, memo) for layer in kept])
    memo[id(getattr(decoder, norm))] = nn.Identity()
    stack = copy.deepcopy(decoder, memo)
    stack.config.num_hidden_layers = count
    if copied:
        stack.layers.requires_grad_(True)
    return stack, set(shared)


def _probe(llm: LLM, count: int) -> Tensor:
    """Evenly spaced values of each tensor the embedder builds on, (tensors, 16) in float32."""
    decoder = llm.model.base_model
    tensors = [decoder.get_input_embeddings().weight, *decoder.layers[:count].parameters()]
    rows = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        at = torch.linspace(0, flat.numel() - 1, _PROBE_VALUES, dtype=torch.float64).long()
        rows.append(flat[at.to(flat.device)].float())
    return torch.stack(rows)


def _local_folder(name: str | Path, hub: dict[str, Any]) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    text = str(name)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise WeightsNotFoundError(f"{text} is not a folder; pass an embedder's folder or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=[_SETTINGS, _TENSORS], **hub))
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsNotFoundError(
            f"{text} cannot be had from the hub ({first_line(error)}); check the name and the network, or pass a folder"
        ) from error


def _read_config(file: Path) -> ExtensibleEmbedderConfig:
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"{file} does not exist; pass the folder that save_pretrained wrote") from error
    except ValueError as error:
        raise WeightsCorruptError(f"{file} is not JSON ({error}); get it again") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != ExtensibleEmbedderConfig.model_type:
        raise MismatchError(f"{file} has model_type={kind!r}, an embedder has 'extemb'; pass an embedder's folder")
    config: ExtensibleEmbedderConfig = ExtensibleEmbedderConfig.from_dict(values)
    return config
