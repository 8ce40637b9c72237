"""The one seam over transformers: a frozen causal LM that is fed token ids or embeddings.

Everything the rest of the library needs of an LLM is here: load, encode as plain text, embed, generate with
streaming and cancellation, score. The LLM's parameters never change and its modules are never touched.
"""

from __future__ import annotations

import hashlib
import math
import queue
import re
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging as hf_logging

from extemb_core.errors import ConfigError, DocumentError, MismatchError, WeightsCorruptError, WeightsError
from extemb_core.models.entry import AnchoredPrompt, reading_model
from extemb_core.weights.resolve import resolve_llm, resolve_reader

# Long texts are tokenised in pieces of at most this many characters, so that memory does not grow with the text.
# A space between two letters begins a new word for every byte-level BPE in use (not so the line break after a full
# stop), so cut there the ids are those of the whole text; other tokenizers may start a piece anew.
_PIECE_CHARS = 32_768
_WORD_BREAK = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_FEWEST_SHARED_POSITIONS = 128  # reading a prefix apart takes about as long as that many positions in a batch
_POSITIONS_AT_ONCE = 4096  # of one pass that scores, padding included
_LEAST_FULL = 0.8  # of the longest prompt of such a pass; shorter ones are not worth their padding
_LOGIT_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1}  # Cohere's, Granite's, Falcon-H1's
PromptInputs = Tensor | Sequence[int] | AnchoredPrompt  # (T, D) input embeddings, ids, or ids with states
_TOKENIZER_PROBE = "The 3 quick brown foxes\n\n\tjumped over naïve 東京 dogs; x_1 += 42.5  # ok?"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. The default, temperature 0, is greedy and repeatable.

    Attributes:
        max_new_tokens: The answer ends after so many.
        temperature: 0 is greedy.
        top_p: Draw from the likeliest tokens that have this probability together.
        top_k: Draw from this many of the likeliest tokens; 0 from all.
        repetition_penalty: Over the tokens of the answer, and of the prompt where that is text only: the anchors of
            compressed text are nothing that was said.
        stop: Texts that end the answer; they are not part of it.
        seed: Makes sampling repeatable; without it, draws follow torch's global generator.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
            ("max_new_tokens", self.max_new_tokens, lambda n: _is_whole(n) and n >= 1, "a whole number of at least 1"),
            ("temperature", self.temperature, lambda t: 0 <= t < math.inf, "0 (greedy) or above"),
            ("top_p", self.top_p, lambda p: 0 < p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, lambda k: _is_whole(k) and k >= 0, "0 (off) or a positive whole number"),
            ("repetition_penalty", self.repetition_penalty, lambda r: 0 < r < math.inf, "above 0 (1 is off)"),
            ("seed", self.seed, lambda s: s is None or _is_whole(s), "a whole number or None"),
        )
        for name, value, is_legal, rule in rules:
            try:
                legal = is_legal(value)
            except TypeError:  # not a number at all
                legal = False
            if not legal:
                raise ConfigError(f"{name}={value!r} must be {rule}; pass such a value")
        stop: Any = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop={self.stop!r} must be texts that are not empty; leave out what is empty")


@dataclass(kw_only=True)
class Generated:
    """What one prompt's generation came to. `finish_reason`: "stop", "length" or "cancelled"."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"


class LLM:
    """A frozen causal language model and its tokenizer.

    Args:
        model: A `transformers` causal LM; it is put in eval mode and its parameters stop requiring gradients.
        tokenizer: Its fast tokenizer.
        name: What it is called in messages.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str = "") -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"the tokenizer of {name!r} has no fast version; use a model that ships tokenizer.json")
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "_name_or_path", ""))
        self._template_lock = threading.Lock()
        self._reading: dict[int, PreTrainedModel] = {}
        self._reading_lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str = "auto", dtype: str | torch.dtype = "auto") -> LLM:
        """Load by local path, known name or Hugging Face id (see `models/weights.py`).

        A reader's folder or name gives its base LLM with the reader's adapters merged in.

        Args:
            name: What to load.
            device: "auto" (CUDA, then CPU) or a torch device.
            dtype: "auto" (bfloat16 on CUDA, float32 elsewhere) or a torch dtype or its name.
        """
        if (reader := resolve_reader(name)) is not None:
            from extemb_core.models.reader_lora import base_of, merged

            return merged(cls.from_pretrained(base_of(reader), device=device, dtype=dtype), reader, str(name))
        chosen = choose_device(device)
        source = resolve_llm(name)
        wanted = choose_dtype(dtype, chosen)
        with quiet_transformers():
            try:
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source, dtype=wanted, use_safetensors=True, trust_remote_code=False, output_loading_info=True
                )
            except SafetensorError as error:
                raise WeightsCorruptError(
                    f"{name}: a weights file is damaged ({first_line(error)}); get the model again"
                ) from error
            except (OSError, ValueError, RuntimeError) as error:
                raise WeightsError(
                    f"{name}: transformers cannot load it ({first_line(error)}); check that it is a causal LM"
                ) from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):  # transformers would make them up at random
            raise WeightsCorruptError(f"{name}: {len(missing)} tensors are missing, {missing[0]} first; get it again")
        return cls(model.to(chosen), tokenizer, name=str(name))

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

    @property
    def width(self) -> int:
        """D, the width of an input embedding and of the states between layers."""
        return int(self.model.get_input_embeddings().embedding_dim)

    def reading_model(self, layer: int) -> PreTrainedModel:
        """The model that reads compressed text at entry layer `layer`: made once, over the LLM's own tensors.

        Raises:
            ConfigError: See `entry.reading_model`.
        """
        own: PreTrainedModel = self.model
        if getattr(own, "entry_layer", None) == layer:
            return own
        with self._reading_lock:
            made = self._reading.get(layer)
            if made is None or _memory_of(made) != _memory_of(own):  # the LLM was moved, or is in another dtype now
                made = self._reading[layer] = reading_model(own, layer, self.name)
            return made

    @property
    def has_sliding_window(self) -> bool:
        """Whether layers see a limited number of tokens back, and caches let go of those before."""
        return bool(getattr(self.text_config, "sliding_window", None))

    @property
    def window(self) -> int:
        """Positions the LLM was trained for."""
        return int(self.text_config.max_position_embeddings)

    @cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of the vocabulary and of how a fixed text is split."""
        digest = hashlib.sha256()
        for token, index in sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
        digest.update(repr(self.encode(_TOKENIZER_PROBE).tolist()).encode())
        return digest.hexdigest()

    @cached_property
    def bos_token_id(self) -> int | None:
        """The id this tokenizer puts before a text by itself, if it does."""
        bos = self.tokenizer.bos_token_id
        ids = self.tokenizer("a").input_ids
        return int(bos) if bos is not None and len(ids) > 1 and ids[0] == bos else None

    @cached_property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer: those of the generation config and of the tokenizer."""
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return sorted({int(i) for i in (*ids, self.tokenizer.eos_token_id) if i is not None})

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Added tokens that are not mere white space (some vocabularies add runs of spaces as ordinary tokens)."""
        added = self.tokenizer.added_tokens_decoder
        return {token.content: int(index) for index, token in sorted(added.items()) if token.content.strip()}

    @cached_property
    def control_ids(self) -> np.ndarray[Any, Any]:
        """Ids that no text may become. A character outside the vocabulary becomes the unknown token, rightly."""
        ids = (index for index in self.control_tokens.values() if index != self.tokenizer.unk_token_id)
        return np.array(list(ids), dtype=np.int64)

    @cached_property
    def _plain_encoder(self) -> Tokenizer:
        """A copy of the tokenizer that obeys no special token and truncates nothing.

        A copy, because these switches are state: the tokenizer itself is in use by other threads, and others who
        hold it may have set a truncation.
        """
        encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        encoder.encode_special_tokens = True
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    # -- text and ids -----------------------------------------------------------------------------------------

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Encode as data: control tokens inside `text` become the ids of their characters, never the control id.

        Returns:
            (T,) int32 ids, no BOS and no other token added.

        Raises:
            DocumentError: The text holds half of a surrogate pair, which is no character.
        """
        ids = array("i")  # grows in place: joining pieces at the end would hold all ids twice
        for piece, _ in self.encode_pieces(text):
            ids.frombytes(piece.tobytes())
        return np.frombuffer(ids, dtype=np.int32) if ids else np.empty(0, dtype=np.int32)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each of some texts."""
        return [len(self.encode(text)) for text in texts]

    def encode_pieces(self, text: str) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
        """`encode` piece by piece, so that a long text's ids need not be in memory together.

        Returns:
            (T,) ids and the number of characters that they stand for, in the text's order.
        """
        if lone := _LONE_SURROGATE.search(text):
            raise DocumentError(
                f"character {lone.start()} of the text is a lone surrogate ({lone[0]!a}), which no tokenizer can read; "
                "decode the text with errors='replace'"
            )
        return ((self._encode_piece(piece), len(piece)) for piece in pieces_of(text, _PIECE_CHARS))

    def _encode_piece(self, text: str) -> np.ndarray[Any, Any]:
        encoding = self._plain_encoder.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int32)
        if not np.isin(ids, self.control_ids).any():
            return ids
        # Added tokens that the tokenizer does not flag as special are still recognised: take them apart, by
        # encoding their first character on its own.
        parts: list[np.ndarray[Any, Any]] = []
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if index in self.control_ids and end - start > 1:
                parts += [self._encode_piece(text[start : start + 1]), self._encode_piece(text[start + 1 : end])]
            else:
                parts.append(np.array([index], dtype=np.int32))
        return np.concatenate(parts)

    def encode_template(self, text: str) -> list[int]:
        """Encode as the model's own prompt text: control tokens are obeyed. Only for chat templates."""
        with self._template_lock:  # calling a fast tokenizer sets its state
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def embed(self, ids: Sequence[int] | np.ndarray[Any, Any] | Tensor) -> Tensor:
        """Token embeddings as the LLM itself makes them. ids: (..., T) -> (..., T, D)."""
        tensor = torch.as_tensor(np.asarray(ids) if not isinstance(ids, Tensor) else ids, dtype=torch.long)
        return torch.as_tensor(self.model.get_input_embeddings()(tensor.to(self.device)))

    # -- running it -------------------------------------------------------------------------------------------

    def hidden(self, inputs_embeds: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Last hidden states, gradients allowed.

        Args:
            inputs_embeds: (B, T, D).
            mask: (B, T) with 0 for padding, or (B, 1, T, T) boolean with True where a query may look.
            positions: (B, T); contiguous from 0 when not given.
        """
        outputs = self.model.base_model(
            inputs_embeds=inputs_embeds.to(self.dtype),
            attention_mask=self._additive(mask),
            position_ids=positions,
            use_cache=False,
        )
        return torch.as_tensor(outputs.last_hidden_state)

    def _additive(self, mask: Tensor | None) -> Tensor | None:
        """A (B, 1, T, T) boolean mask in the form that every attention implementation reads; others as they are."""
        if mask is None or mask.ndim != 4:
            return mask
        return torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, torch.finfo(self.dtype).min)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states, (..., D) -> (..., V)."""
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        for name, power in _LOGIT_SCALES.items():
            if scale := getattr(self.text_config, name, None):
                logits = logits * scale**power
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    def hidden_of(
        self, prompts: Sequence[PromptInputs], *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """`hidden` of prompts, padded on the right: (B, T, D)."""
        model, rows = self._rows(prompts)
        inputs = {name: torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for name, each in rows.items()}
        if "entry_states" not in inputs:
            embedded = inputs["inputs_embeds"] if "inputs_embeds" in inputs else self.embed(inputs["input_ids"])
            return self.hidden(embedded, mask=mask, positions=positions)
        outputs = model.base_model(
            **inputs, attention_mask=self._additive(mask), position_ids=positions, use_cache=False
        )
        return torch.as_tensor(outputs.last_hidden_state)

    @torch.no_grad()
    def log_probs(
        self, prompts: Sequence[PromptInputs], targets: Sequence[Sequence[int] | np.ndarray[Any, Any]]
    ) -> list[Tensor]:
        """Log-probability of each token that follows each prompt.

        Args:
            prompts: (T, D) embeddings, ids, or ids with states; at least one position each.
            targets: (S,) ids that follow each prompt.

        Returns:
            (S,) float32 natural logarithms for each.
        """
        if any(not len(prompt) for prompt in prompts):
            raise ConfigError("the prompt has 0 positions; at least one is needed to predict what follows")
        self._require_one_entry(prompts)
        ids = [[int(index) for index in each] for each in targets]
        whole = [self._continued(prompt, own[:-1]) for prompt, own in zip(prompts, ids, strict=True)]
        found: dict[int, Tensor] = {}
        order = sorted(range(len(whole)), key=lambda at: -len(whole[at]))
        while order:
            longest = len(whole[order[0]])
            most = order[: max(1, _POSITIONS_AT_ONCE // longest)]
            group = [at for at in most if len(whole[at]) >= _LEAST_FULL * longest]
            order = order[len(group) :]
            for at, states in zip(group, self.hidden_of([whole[at] for at in group]), strict=True):
                first = len(prompts[at]) - 1
                scores = self.logits(states[first : first + len(ids[at])]).float().log_softmax(-1)
                expected = torch.tensor(ids[at], device=scores.device, dtype=torch.long)
                found[at] = scores.gather(1, expected[:, None])[:, 0]
        return [found[at] for at in range(len(prompts))]

    def score(self, prompt: PromptInputs, targets: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
        """`log_probs` of one prompt: (S,)."""
        return self.log_probs([prompt], [targets])[0]

    def generate(
        self, prompts: Sequence[PromptInputs], sampling: Sampling, on_token: Callable[[], None] | None = None
    ) -> list[Generated]:
        """Continue a batch of prompts: (T, D) embeddings, ids, or ids with states (`Prompt.inputs`).

        Prompts are padded on the left and positions counted from each prompt's own start, so that the answer to
        one does not depend on the others. What all have in common at their start is read once.

        Args:
            prompts: What to continue.
            sampling: How tokens are chosen.
            on_token: Called after each step.
        """
        if not prompts:
            return []
        step = None if on_token is None else _Step(on_token)
        rows = self._run(*self._batch(prompts), sampling, step, said=_text_of(prompts))
        return [self._finish(row, sampling) for row in rows.tolist()]

    def stream(self, prompt: PromptInputs, sampling: Sampling, result: Generated | None = None) -> Iterator[str]:
        """Continue one prompt, yielding text as it comes. Closing the iterator stops the LLM at the next token.

        Args:
            prompt: (T, D) embeddings, ids, or ids with states.
            sampling: How tokens are chosen.
            result: Filled with the whole of it as the stream goes on.
        """
        result = result if result is not None else Generated()
        relay = _TokenRelay()
        model, inputs = self._batch([prompt])

        def work() -> None:
            try:
                self._run(model, inputs, sampling, relay, said=_text_of([prompt]))
            except BaseException as error:
                relay.fail(error)
            finally:
                relay.end()

        worker = threading.Thread(target=work, name="extemb-generate", daemon=True)
        worker.start()
        sent, ended = "", False
        try:
            for token in relay:
                if token in self.stop_token_ids:
                    ended = True
                    break
                result.token_ids.append(token)
                text, stopped = self._visible(result.token_ids, sampling, final=False)
                if text.startswith(sent) and len(text) > len(sent):
                    piece, sent = text[len(sent) :], text  # before yielding: the reader may close here
                    yield piece
                if stopped:
                    break
            finished = self._finish(result.token_ids, sampling)
            result.text, result.finish_reason = finished.text, "stop" if ended else finished.finish_reason
            if len(result.text) > len(sent):
                yield result.text[len(sent) :]
        except GeneratorExit:
            result.text, result.finish_reason = sent, "cancelled"
            raise
        finally:
            relay.cancel()
            worker.join()

    def _rows(self, prompts: Sequence[PromptInputs]) -> tuple[PreTrainedModel, dict[str, list[Tensor]]]:
        """The model that reads these prompts, and its inputs by name, one tensor for each prompt."""
        self._require_one_entry(prompts)
        anchored = next((prompt for prompt in prompts if isinstance(prompt, AnchoredPrompt)), None)
        if anchored is not None:
            rows = [p if isinstance(p, AnchoredPrompt) else AnchoredPrompt.of_text(p, anchored) for p in prompts]  # type: ignore[arg-type]
            named = {
                "input_ids": [row.ids for row in rows],
                "entry_states": [row.states for row in rows],
                "entry_mask": [row.mask for row in rows],
            }
            return self.reading_model(max(row.layer for row in rows)), named
        if any(isinstance(prompt, Tensor) for prompt in prompts):
            embedded = [p.to(self.device, self.dtype) if isinstance(p, Tensor) else self.embed(p) for p in prompts]  # type: ignore[arg-type]
            return self.model, {"inputs_embeds": embedded}
        ids = [torch.tensor([int(index) for index in prompt], device=self.device) for prompt in prompts]  # type: ignore[union-attr]
        return self.model, {"input_ids": ids}

    def _require_one_entry(self, prompts: Sequence[PromptInputs]) -> None:
        """Raise `MismatchError` where compressed texts of one batch enter at different layers."""
        entering = {prompt.layer for prompt in prompts if isinstance(prompt, AnchoredPrompt) and prompt.layer}
        entering |= {0 for prompt in prompts if isinstance(prompt, Tensor)}
        if len(entering) > 1:
            raise MismatchError(
                f"prompts with compressed text for entry layers {sorted(entering)} stand in one batch; pass them to "
                f"{self.name} one entry layer at a time"
            )

    def _continued(self, prompt: PromptInputs, ids: Sequence[int]) -> PromptInputs:
        """A prompt with text after it."""
        if isinstance(prompt, AnchoredPrompt):
            more = AnchoredPrompt.of_text(ids, prompt)
            joined = {n: torch.cat([getattr(prompt, n), getattr(more, n)]) for n in ("ids", "states", "mask")}
            return AnchoredPrompt(**joined, layer=prompt.layer)
        if isinstance(prompt, Tensor):
            return torch.cat([prompt.to(self.device, self.dtype), self.embed(list(ids))]) if len(ids) else prompt
        return [*prompt, *ids]

    def _batch(self, prompts: Sequence[PromptInputs]) -> tuple[PreTrainedModel, dict[str, Any]]:
        """What transformers continues; with the cache of what the prompts share at their start, if that is much."""
        if any(len(prompt) == 0 for prompt in prompts):
            raise ConfigError("a prompt has 0 positions; at least one token is needed to continue from")
        model, named = self._rows(prompts)
        shared = self._shared(named)
        lengths = [len(row) for row in next(iter(named.values()))]
        longest = max(lengths)
        mask = torch.ones(len(lengths), longest, dtype=torch.long, device=self.device)
        for visible, length in zip(mask, lengths, strict=True):
            visible[shared : shared + longest - length] = 0
        inputs: dict[str, Any] = {"attention_mask": mask}
        for name, rows in named.items():
            # Padding is masked, so that any values do: those of each row's first position.
            inputs[name] = torch.stack(
                [
                    torch.cat([row[:shared], row[:1].expand(longest - len(row), *row.shape[1:]), row[shared:]])
                    for row in rows
                ]
            )
        if shared:
            cache = DynamicCache(config=self.model.config)
            start = {name: inputs[name][:1, :shared] for name in named}
            with torch.no_grad():
                model(**start, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(lengths))
            inputs["past_key_values"] = cache
        return model, inputs

    def _shared(self, named: dict[str, list[Tensor]]) -> int:
        """Positions that all begin with, where reading them once is worth it; each keeps one of its own.

        Texts with the same anchors are the same only if their states are.
        """
        if self.has_sliding_window:  # counts the padding after the prefix
            return 0
        count = len(next(iter(named.values())))
        length = min(len(row) for row in next(iter(named.values()))) - 1
        for rows in named.values():
            for row in rows[1:]:
                differs = (row[:length] != rows[0][:length]).unsqueeze(-1).flatten(1).any(1).nonzero()
                length = int(differs[0]) if len(differs) else length
        return length if length * (count - 1) >= _FEWEST_SHARED_POSITIONS else 0

    def _run(
        self,
        model: Any,
        inputs: dict[str, Any],
        sampling: Sampling,
        watcher: StoppingCriteria | None = None,
        *,
        said: Sequence[Sequence[int]],
    ) -> Tensor:
        """New token ids, (B, S), padded on the right with a stop token. `said`: see `_Penalty`."""
        stop_ids = self.stop_token_ids
        prompt_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=stop_ids or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
            do_sample=False,  # greedy, or the greatest after `_Draw` added its noise
            num_beams=1,
        )
        criteria = StoppingCriteriaList([watcher] if watcher else [])
        if sampling.stop:
            criteria.append(_StopStrings(self, sampling))
        with torch.no_grad():
            output: Tensor = model.generate(
                **inputs,
                generation_config=config,
                logits_processor=_processors(sampling, said, prompt_length),
                stopping_criteria=criteria,
                streamer=watcher if isinstance(watcher, _TokenRelay) else None,
            )
        return output[:, prompt_length:]

    def _visible(self, ids: list[int], sampling: Sampling, *, final: bool) -> tuple[str, bool]:
        """The text to show of `ids`, cut at a stop string; while streaming, what may still change is held back."""
        text = self.decode(ids)
        cuts = [at for at in (text.find(stop) for stop in sampling.stop) if at >= 0]
        if cuts:
            return text[: min(cuts)], True
        if final:
            return text, False
        held = max((_overlap(text, stop) for stop in sampling.stop), default=0)
        text = text[: len(text) - held]
        return text.rstrip("\ufffd"), False

    def _finish(self, ids: list[int], sampling: Sampling) -> Generated:
        ends = [at for at, index in enumerate(ids) if index in self.stop_token_ids]
        kept = ids[: ends[0]] if ends else ids
        text, stopped = self._visible(kept, sampling, final=True)
        return Generated(text=text, token_ids=kept, finish_reason="stop" if ends or stopped else "length")


class _TokenRelay(StoppingCriteria):
    """Hands tokens from the generating thread to the reading one, and a cancellation back."""

    def __init__(self) -> None:
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._cancelled = threading.Event()

    def put(self, tokens: Tensor) -> None:
        """Called by transformers: first with the prompt's ids (none here to relay), then with each new token."""
        if tokens.ndim == 1 and tokens.numel() == 1:
            self._tokens.put(int(tokens))

    def end(self) -> None:
        self._tokens.put(None)

    def fail(self, error: BaseException) -> None:
        self._tokens.put(error)

    def cancel(self) -> None:
        self._cancelled.set()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._cancelled.is_set(), device=input_ids.device)

    def __iter__(self) -> Iterator[int]:
        while (item := self._tokens.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class _Step(StoppingCriteria):
    """Tells of each step; it stops nothing."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._on_token()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _StopStrings(StoppingCriteria):
    """Ends each row of a batch once its own text holds a stop string."""

    def __init__(self, llm: LLM, sampling: Sampling) -> None:
        self._llm = llm
        self._sampling = sampling
        self._longest = max(len(stop) for stop in sampling.stop)
        self._generated: int = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._generated += 1
        recent = input_ids[:, -min(self._generated, 4 * self._longest + 8) :].tolist()
        found = [any(stop in self._llm.decode(row) for stop in self._sampling.stop) for row in recent]
        return torch.tensor(found, device=input_ids.device)


class _Draw(LogitsProcessor):
    """Draws each row's next token with a generator of its own: noise is added such that the greatest is the draw.

    So neither other threads, nor the batch around a row, nor torch's global generator play a part (Gumbel-max).
    """

    def __init__(self, seed: int | None, rows: int) -> None:
        seeds = [seed] * rows if seed is not None else torch.randint(2**62, (rows,)).tolist()
        self._generators = [torch.Generator().manual_seed(each) for each in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        uniform = torch.stack([torch.rand(width, generator=each) for each in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores + gumbel.to(scores.device, scores.dtype)


class _Penalty(LogitsProcessor):
    """Makes less likely what was said: in each row's answer, and in its prompt where that is text.

    Not transformers' own, which takes all ids of a batch: padding, and anchors of compressed text, are not said.

    Args:
        penalty: Divides the scores of what was said, or multiplies them below 0.
        said: Ids of each row's prompt that count.
        start: Where in a row's ids the answer begins.
    """

    def __init__(self, penalty: float, said: Sequence[Sequence[int]], start: int) -> None:
        self._penalty = penalty
        self._prompts = said
        self._start = start
        self._said: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._said is None:
            self._said = torch.zeros_like(scores, dtype=torch.bool)
            for row, ids in enumerate(self._prompts):
                self._said[row, list(ids)] = True
        said = self._said.scatter(1, input_ids[:, self._start :], True)
        return torch.where(said, torch.where(scores < 0, scores * self._penalty, scores / self._penalty), scores)


def _memory_of(model: PreTrainedModel) -> tuple[Any, ...]:
    weight: Any = model.get_input_embeddings().weight
    return int(weight.data_ptr()), weight.dtype, weight.device


def _text_of(prompts: Sequence[PromptInputs]) -> list[Sequence[int]]:
    """The ids of prompts that are text only; none of others."""
    return [() if isinstance(p, Tensor | AnchoredPrompt) else [int(index) for index in p] for p in prompts]


def _processors(sampling: Sampling, said: Sequence[Sequence[int]], start: int) -> LogitsProcessorList:
    """What transformers runs over the scores; given whole, so that a model's own defaults add nothing."""
    steps: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        steps.append(_Penalty(float(sampling.repetition_penalty), said, start))
    if sampling.temperature > 0:
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(_Draw(sampling.seed, len(said)))
    return LogitsProcessorList(steps)


def choose_device(device: str = "auto") -> torch.device:
    """ "auto" takes CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a torch device; pass auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device={device!r}: torch sees {torch.cuda.device_count()} CUDA devices; pass auto or cpu")
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 on CUDA and float32 elsewhere: low-precision matmuls are slow or unsafe on many CPUs."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in names:
        raise ConfigError(f"dtype={dtype!r} is not one of auto, {', '.join(names)}; pass one of them")
    return names[dtype]


def pieces_of(text: str, n_chars: int) -> Iterator[str]:
    """A text in pieces of at most `n_chars` characters, cut between two words where there are some."""
    start = 0
    while len(text) - start > n_chars:
        middle, end = start + n_chars // 2, start + n_chars
        cut = end
        for match in _WORD_BREAK.finditer(text, middle, end):
            cut = match.start()
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bar and no notices of transformers while local files are read or written."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()
