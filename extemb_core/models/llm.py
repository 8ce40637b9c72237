"""The one seam over transformers: a frozen causal LM that is fed token ids or embeddings.

Everything the rest of the library needs of an LLM is here: load, encode as plain text, embed, generate with
streaming and cancellation, score. The LLM's parameters never change and its modules are never touched.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from extemb_core.errors import (
    ConfigError,
    ExtembError,
    MismatchError,
    WeightsCorruptError,
    WeightsError,
    WeightsNotFoundError,
    first_line,
)
from extemb_core.models import generation
from extemb_core.models.bulk import POSITIONS_AT_ONCE
from extemb_core.models.entry import AnchoredPrompt, PromptInputs, TokenIds, reading_model
from extemb_core.models.reader_lora import merge_reader
from extemb_core.models.stoppable import CACHE, StoppableCache
from extemb_core.models.tokenization import TextEncoder
from extemb_core.utils.batches import padded_batches
from extemb_core.utils.quiet import quiet_transformers
from extemb_core.utils.validation import name_or_path, require_one_of
from extemb_core.weights.resolve import resolve_base, resolve_llm

_MIN_SHARED_POSITIONS = 128  # reading a prefix apart takes about as long as that many positions in a batch
MIN_FULL = 0.8  # of the longest prompt of a pass; shorter ones are not worth their padding
_ROPES_BY_LENGTH = {"dynamic", "longrope"}  # these rotate all keys of a pass by its largest position
_LOGIT_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}  # Cohere's, Granite's, Falcon-H1's

if hasattr(os, "register_at_fork"):  # a forked child lacks the parent's threads, and would wait for them
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


class LLM(TextEncoder):
    """A frozen causal language model and its tokenizer.

    Args:
        model: A `transformers` causal LM; it is put in eval mode and its parameters stop requiring gradients.
        tokenizer: Its fast tokenizer.
        name: Name of the LLM in messages.

    Attributes:
        in_batches: Whether one call answers several prompts faster than a call for each.
    """

    in_batches = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        super().__init__(tokenizer, name or str(getattr(model.config, "_name_or_path", "")))
        self.model = model.eval().requires_grad_(False)
        self._reading: dict[int, PreTrainedModel] = {}
        self._reading_lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], *, device: str = "auto", dtype: str | torch.dtype = "auto"
    ) -> LLM:
        """Load by local path, known name or Hugging Face id (see `weights/resolve.py`).

        A reader's folder or name gives its base LLM with the reader's adapters merged in.

        Args:
            name: Path, known name or hub id.
            device: "auto" (CUDA, then CPU) or a torch device.
            dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype or its name.
        """
        name = name_or_path(name)
        readers, base = resolve_base(name)
        chosen = choose_device(device)
        source = resolve_llm(base)
        wanted = choose_dtype(dtype, chosen)
        with quiet_transformers():
            try:
                config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
                _require_plain(config, name)
                tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    source, config=config, dtype=wanted, use_safetensors=True, trust_remote_code=False,
                    output_loading_info=True,
                )  # fmt: skip
            except (ExtembError, MemoryError, torch.OutOfMemoryError):
                raise
            except SafetensorError as error:
                raise WeightsCorruptError(f"{name}: a file is damaged ({first_line(error)}); get it again") from error
            except Exception as error:  # a broken config or tokenizer makes it raise nearly anything
                if isinstance(error, OSError) and isinstance(source, str):
                    raise not_from_hub(name, error) from error
                raise WeightsError(f"{name}: transformers fails ({first_line(error)}); pass a causal LM") from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):  # transformers would initialise them at random
            raise WeightsCorruptError(f"{name}: {len(missing)} tensors are missing, {missing[0]} first; get it again")
        model = model.to(chosen)
        for reader in readers:
            merge_reader(model, reader)
        return cls(model, tokenizer, name=name)

    # -- what it is -------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @cached_property
    def text_config(self) -> Any:
        """The decoder's configuration (multimodal models nest it)."""
        return self.model.config.get_text_config()

    def weights_digest(self) -> str:
        """Hash of the model's tensors (128 bits, hex), rounded to bfloat16: the same in every dtype."""
        digest = xxhash.xxh3_128()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            rounded = tensor.detach().to("cpu", torch.bfloat16) if tensor.is_floating_point() else tensor.detach().cpu()
            digest.update(rounded.contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def hidden_size(self) -> int:
        """D, the width of an input embedding and of the states between layers."""
        return int(self.model.get_input_embeddings().embedding_dim)

    def reading_model(self, layer: int) -> PreTrainedModel:
        """Return the model that reads compressed text at entry layer `layer`; made once, over the LLM's own tensors.

        Raises:
            ConfigError: See `entry.reading_model`.
        """
        plain: PreTrainedModel = self.model
        if getattr(plain, "entry_layer", None) == layer:
            return plain
        with self._reading_lock:
            model = self._reading.get(layer)
            if model is None or _memory_of(model) != _memory_of(plain):  # the LLM was moved, or is in another dtype now
                model = self._reading[layer] = reading_model(plain, layer, self.name)
            return model

    @cached_property
    def reads_in_parts(self) -> bool:
        """Whether reading a text in parts equals reading it in one pass: all layers attend to all of it, and cache it.

        Not if a layer has a sliding window or keeps a state instead (Mamba, linear attention), or if the encoding of
        positions depends on their number (RoPE of type longrope or dynamic).
        """
        rope = getattr(self.text_config, "rope_parameters", None) or {}
        kinds = {one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)}
        layers = DynamicCache(config=self.model.config).layers
        kept = not self.model._is_stateful and all(type(layer) is DynamicLayer for layer in layers)
        return kept and kinds.isdisjoint(_ROPES_BY_LENGTH)

    @cached_property
    def mask_window(self) -> int:
        """Longest pass, in positions, in which every layer obeys the mask of `hidden_of`.

        At most the smallest sliding window; 0 if a layer keeps a recurrent state.
        """
        layers: list[Any] = DynamicCache(config=self.model.config).layers
        if any(hasattr(layer, "recurrent_states") for layer in layers):
            return 0
        windows = (getattr(layer, "sliding_window", None) for layer in layers)
        return min([self.context_window, *(int(window) for window in windows if window)])

    @property
    def context_window(self) -> int:
        """Positions the LLM was trained for."""
        return int(self.text_config.max_position_embeddings)

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer (see `generation`)."""
        return generation.stop_token_ids(self.model, self.tokenizer)

    def embed(self, ids: TokenIds | Tensor) -> Tensor:
        """Look up token embeddings as the LLM itself does. ids: (..., T) -> (..., T, D)."""
        tensor = torch.as_tensor(np.asarray(ids) if not isinstance(ids, Tensor) else ids, dtype=torch.long)
        return torch.as_tensor(self.model.get_input_embeddings()(tensor.to(self.device)))

    # -- running it -------------------------------------------------------------------------------------------

    def hidden(self, inputs_embeds: Tensor) -> Tensor:
        """Compute the last hidden states, gradients allowed. inputs_embeds: (B, T, D) -> (B, T, D)."""
        return self.hidden_of(list(inputs_embeds))

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute next-token logits of hidden states, (..., D) -> (..., V)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        for name, power in _LOGIT_SCALES.items():
            if scale := getattr(self.text_config, name, None):
                logits = logits * scale**power
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def hidden_of(
        self, prompts: Sequence[PromptInputs], *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Compute the last hidden states of prompts, padded on the right, gradients allowed.

        Args:
            prompts: (T, D) embeddings, ids, or ids with states.
            mask: (B, 1, T, T), True where a query may look, T at most `mask_window`; causal when not given.
            positions: (B, T); contiguous from 0 when not given.

        Returns:
            (B, T, D).
        """
        model, rows = self.rows_of(prompts)
        inputs = {name: torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) for name, tensors in rows.items()}
        if mask is not None:  # an additive mask, which every attention implementation accepts
            mask = torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)
        outputs = model.base_model(**inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        return torch.as_tensor(outputs.last_hidden_state)

    @torch.no_grad()
    def log_probs(
        self, prompts: Sequence[PromptInputs], targets: Sequence[TokenIds], *, at_once: bool = False
    ) -> list[Tensor]:
        """Compute the log-probability of each token that follows each prompt.

        Args:
            prompts: (T, D) embeddings, ids, or ids with states; at least one position each.
            targets: (S,) ids that follow each prompt.
            at_once: Read all prompts in one pass, and a prefix that they share once; otherwise in several small passes.

        Returns:
            (S,) float32 natural logarithms for each.
        """
        if any(not len(prompt) for prompt in prompts):
            raise ConfigError("the prompt has 0 positions; at least one is needed to predict what follows")
        self._require_one_entry(prompts)
        if at_once and prompts and self.reads_in_parts:
            return generation.score_at_once(self, prompts, targets)[-1]
        ids = [[int(index) for index in target] for target in targets]
        whole = [self.continued(prompt, target[:-1]) for prompt, target in zip(prompts, ids, strict=True)]
        log_probs: dict[int, Tensor] = {}
        for batch in padded_batches(dict(enumerate(map(len, whole))), POSITIONS_AT_ONCE, at_least=MIN_FULL):
            for at, states in zip(batch, self.hidden_of([whole[at] for at in batch]), strict=True):
                log_probs[at] = self.log_probs_of(states[len(prompts[at]) - 1 :], ids[at])
        return [log_probs[at] for at in range(len(prompts))]

    def log_probs_of(self, hidden: Tensor, targets: TokenIds) -> Tensor:
        """Compute the log-probability of each target from the state before it: (T, D), T >= S, and S ids -> (S,)."""
        scores = self.logits(hidden[: len(targets)]).float().log_softmax(-1)
        expected = torch.tensor([int(index) for index in targets], device=scores.device, dtype=torch.long)
        return scores.gather(1, expected[:, None])[:, 0]

    def score(self, prompt: PromptInputs, targets: TokenIds) -> Tensor:
        """Return `log_probs` of one prompt: (S,)."""
        return self.log_probs([prompt], [targets])[0]

    generate = generation.generate
    generate_and_score = generation.generate_and_score
    stream = generation.stream
    stream_batch = generation.stream_batch

    def rows_of(self, prompts: Sequence[PromptInputs]) -> tuple[PreTrainedModel, dict[str, list[Tensor]]]:
        """Return the model that reads these prompts, and its inputs by name, one tensor for each prompt."""
        self._require_one_entry(prompts)
        anchored = next((prompt for prompt in prompts if isinstance(prompt, AnchoredPrompt)), None)
        if anchored is not None:
            rows = [p if isinstance(p, AnchoredPrompt) else AnchoredPrompt.of_text(p, anchored) for p in prompts]  # type: ignore[arg-type]
            fields = {"input_ids": "ids", "entry_states": "states", "entry_mask": "mask"}
            named = {name: [getattr(row, field) for row in rows] for name, field in fields.items()}
            return self.reading_model(max(row.layer for row in rows)), named
        if any(isinstance(prompt, Tensor) for prompt in prompts):
            embedded = [p.to(self.device, self.dtype) if isinstance(p, Tensor) else self.embed(p) for p in prompts]  # type: ignore[arg-type]
            return self.model, {"inputs_embeds": embedded}
        ids = [torch.tensor([int(index) for index in prompt], device=self.device) for prompt in prompts]  # type: ignore[union-attr]
        return self.model, {"input_ids": ids}

    def _require_one_entry(self, prompts: Sequence[PromptInputs]) -> None:
        """Raise `MismatchError` if compressed texts of one batch enter at different layers."""
        layers = {prompt.layer for prompt in prompts if isinstance(prompt, AnchoredPrompt) and prompt.layer}
        layers |= {0 for prompt in prompts if isinstance(prompt, Tensor)}
        if len(layers) > 1:
            raise MismatchError(
                f"prompts with compressed text for entry layers {sorted(layers)} stand in one batch; pass them to "
                f"{self.name} one entry layer at a time"
            )

    def continued(self, prompt: PromptInputs, ids: Sequence[int]) -> PromptInputs:
        """Append token ids to a prompt."""
        if isinstance(prompt, AnchoredPrompt):
            more = AnchoredPrompt.of_text(ids, prompt)
            joined = {n: torch.cat([getattr(prompt, n), getattr(more, n)]) for n in ("ids", "states", "mask")}
            return AnchoredPrompt(**joined, layer=prompt.layer)
        if isinstance(prompt, Tensor):
            return torch.cat([prompt.to(self.device, self.dtype), self.embed(ids)])
        return [*prompt, *ids]

    def batch_inputs(
        self, prompts: Sequence[PromptInputs], own: int = 1, *, is_stopped: Callable[[], bool] | None = None
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Pad prompts for transformers to continue; a prefix that all share is read once, if it is long enough.

        Args:
            prompts: Prompts to pad on the left.
            own: Positions at the end of each prompt that are never read as part of the prefix.
            is_stopped: Asked at each layer of each pass, here and when the inputs are read; see `StoppableCache`.
        """
        if any(len(prompt) < own for prompt in prompts):
            raise ConfigError("a prompt has 0 positions; at least one token is needed to continue from")
        model, named = self.rows_of(prompts)
        shared = self._shared(named, own)
        lengths = [len(row) for row in next(iter(named.values()))]
        longest = max(lengths)
        mask = torch.ones(len(lengths), longest, dtype=torch.long, device=self.device)
        for visible, length in zip(mask, lengths, strict=True):
            visible[shared : shared + longest - length] = 0
        inputs: dict[str, Any] = {"attention_mask": mask}

        def padded(row: Tensor) -> Tensor:  # padding is masked, so any values do
            return torch.cat([row[:shared], row[:1].expand(longest - len(row), *row.shape[1:]), row[shared:]])

        inputs |= {name: torch.stack([padded(row) for row in rows]) for name, rows in named.items()}
        if not shared and is_stopped is None:
            return model, inputs
        config = self.model.config
        cache = DynamicCache(config=config) if is_stopped is None else StoppableCache(config, is_stopped)
        if shared:
            start = {name: inputs[name][:1, :shared] for name in named}
            with torch.no_grad():
                model(**start, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(lengths))
        return model, inputs | {CACHE: cache}

    def shares_prefix(self, prompts: Sequence[PromptInputs]) -> bool:
        """Return whether prompts begin alike for so long that reading it once is worth a batch of their own."""
        return self._shared(self.rows_of(prompts)[1]) > 0

    def _shared(self, named: dict[str, list[Tensor]], own: int = 1) -> int:
        """Return the length of the prefix that all prompts share, or 0 if reading it once does not pay.

        At least `own` positions of each prompt are left. Compressed texts count as shared only if their states are
        equal, not just their anchors.
        """
        if not self.reads_in_parts:  # a sliding window would count the padding after the prefix, too
            return 0
        first = next(iter(named.values()))
        length = min(map(len, first)) - own
        for rows in named.values():
            for row in rows[1:]:
                differs = (row[:length] != rows[0][:length]).unsqueeze(-1).flatten(1).any(1).nonzero()
                length = int(differs[0]) if len(differs) else length
        return length if length * (len(first) - 1) >= _MIN_SHARED_POSITIONS else 0


def _memory_of(model: PreTrainedModel) -> tuple[Any, ...]:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.data_ptr()), weight.dtype, weight.device


def _require_plain(config: Any, name: str | os.PathLike[str]) -> None:
    """Refuse a configuration that asks for code from a hub, or for quantised weights."""
    for part in (config, config.get_text_config()):
        for kernel in (getattr(part, "_attn_implementation", None), getattr(part, "_experts_implementation", None)):
            if "/" in str(kernel):
                raise WeightsError(f"{name}: its config.json asks for code, {kernel!r}, which is not run; drop that")
        if getattr(part, "quantization_config", None):
            raise WeightsError(
                f"{name} has quantised weights, which are not read; pass the model that it was made from"
            )


def choose_device(device: str = "auto") -> torch.device:
    """Return a torch device; "auto" is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r} is not a torch device; pass auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):  # torch.accelerator may be slow, so it is asked only for other devices
        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if here is None or here.type != chosen.type:
            raise ConfigError(f"device={device!r} is not on this machine; pass auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices; pass auto or cpu")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return a torch dtype; "auto" is bfloat16 on CUDA and float32 elsewhere.

    Low-precision matmuls are slow or unsafe on many CPUs.
    """
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype} is none of floating point; pass e.g. torch.float32")
        return dtype
    names = {"auto": torch.bfloat16 if device.type == "cuda" else torch.float32}
    names |= {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    require_one_of(dtype, "dtype", names)
    return names[dtype]


def not_from_hub(name: str, error: BaseException) -> WeightsNotFoundError:
    """Make the error for something that the hub did not provide."""
    return WeightsNotFoundError(
        f"{name} cannot be had from the hub ({first_line(error)}); check the name and the network, or pass a folder"
    )
