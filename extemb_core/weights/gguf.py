"""Convert a GGUF file to an ordinary model folder: float32 safetensors, and the tokenizer it was trained with."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extemb_core.errors import WeightsError
from extemb_core.utils.quiet import quiet_transformers

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Raised whenever the folder that comes out changes: a cache of an older conversion is then rebuilt.
CONVERSION_VERSION = 1

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def dequantise(gguf: Path, target: Path) -> None:
    """Write the model in ``gguf`` to the existing folder ``target`` as safetensors and JSON.

    float32 because it is the only lossless choice: a quantised weight is scale * q + minimum, with 16-bit
    scale and minimum, and in SmolLM2's file 212 of 273 tensors fit neither float16 nor bfloat16 exactly.

    Raises:
        WeightsError: The file has no chat template, or a tokenizer whose splitting rule is not known here.
    """
    tokenizer = _build_tokenizer(gguf)
    with _no_progress_bars():
        model = _load_dense(gguf)
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _load_dense(gguf: Path) -> Any:
    """Read the weights through transformers and put them, uncopied, into a model that can be saved."""
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may otherwise keep the quantised blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
    )
    config = loaded.config
    # A model loaded from a GGUF file stays marked as quantised, and transformers refuses to save it. The second
    # attribute is the file's internal title, which would be saved as if it were a path.
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    config.name_or_path = ""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    model.tie_weights()
    # GGUF has no generation settings. A padding token that differs from the end of a turn (Qwen's
    # <|endoftext|>) ends an answer too, as in the original settings; sampling is left to the caller.
    bos, eos, pad = config.bos_token_id, config.eos_token_id, config.pad_token_id
    ends = eos if pad in (None, eos) else [eos, pad]
    model.generation_config = transformers.GenerationConfig(bos_token_id=bos, eos_token_id=ends, pad_token_id=pad)
    return model


def _build_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer from the file's own tables.

    Not ``AutoTokenizer.from_pretrained(gguf_file=...)``: for SmolLM2 it loses the rule that splits digits off
    first (``tokenizer.ggml.pre`` = smollm), so white space before a number ("\\n\\n12", table columns) comes
    out as other tokens than the model was trained on; for Qwen2 it loses the NFC normalisation. Rows that
    only pad the embedding matrix are no tokens, as in the originals.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(gguf)
    tokens: list[str] = _field(reader, "tokens")
    kinds: list[int] = _field(reader, "token_type")
    backend = _backend(reader, tokens, kinds)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False, special=False)])
    named = {
        f"{name}_token": tokens[token_id]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (token_id := _field(reader, f"{key}_token_id", required=False)) is not None
    }
    template = reader.get_field("tokenizer.chat_template")
    if template is None:
        raise WeightsError(f"{gguf} has no chat template, and an instruct model needs one; use another GGUF file")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template.contents(), clean_up_tokenization_spaces=False, **named
    )


# Values of gguf.TokenType
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def _backend(reader: GGUFReader, tokens: list[str], kinds: list[int]) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, splitting = _field(reader, "model"), _field(reader, "pre")
    vocabulary = {token: i for i, (token, kind_) in enumerate(zip(tokens, kinds, strict=True)) if kind_ != _UNUSED}
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "merges")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.decoder = decoders.ByteLevel()
    if (kind, splitting) == ("gpt2", "smollm"):
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.Digits(individual_digits=True)
    elif (kind, splitting) == ("gpt2", "qwen2"):
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    else:
        raise WeightsError(
            f"the tokenizer {kind!r} with splitting {splitting!r} is not one of ('gpt2', 'smollm') and "
            f"('gpt2', 'qwen2'); add its splitting rule to extemb_core/weights/gguf.py"
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitting == "smollm")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return backend


def _field(reader: GGUFReader, name: str, *, required: bool = True) -> Any:
    field = reader.get_field(f"tokenizer.ggml.{name}")
    if field is None and required:
        raise WeightsError(f"the GGUF file has no field tokenizer.ggml.{name}; use another GGUF file")
    return None if field is None else field.contents()


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers: it is the caller's choice to show any."""
    with quiet_transformers(), contextlib.ExitStack() as undo:
        with contextlib.suppress(ImportError, AttributeError):
            # Its GGUF reader takes tqdm directly, past the switch above.
            loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
            undo.callback(setattr, loader, "tqdm", loader.tqdm)
            loader.tqdm = functools.partial(loader.tqdm, disable=True)
        yield
