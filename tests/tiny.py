"""Tiny random LLMs of many families, and a byte-level tokenizer trained on a few sentences written here."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from inspect import ismethod
from typing import Any

ARCHITECTURES = ("llama", "qwen2", "mistral", "gemma2", "phi")  # one of each kind, for large matrices
# Those and the others that are tested, each with what it has besides the settings of `tiny_model`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "gemma2": {"sliding_window": 128, "query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3": {"tie_word_embeddings": True},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    },
    "phi3": {},
    "olmo2": {},
    "gpt_neox": {"use_parallel_residual": True, "rotary_pct": 0.5, "num_key_value_heads": None},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": True, "tie_word_embeddings": True},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}

_MAY_BE_NONE = ("bos_token_id", "sliding_window")

SENTENCES = """The lighthouse keeper counted forty-one ships before the fog came in.
Copper wires ran from the cellar to the roof, where a small dish turned slowly.
In 1987 the bridge was closed for repairs; it opened again 3 years later.
def area(width: float, height: float) -> float: return width * height
Please answer in one short sentence. The user asked: what is 7 + 5?
Rivers carry sand to the sea, and the sea carries it back to the beach."""
LONG_PROMPT = "In 1987 the bridge was closed for repairs; it opened again 3 years later."

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        SENTENCES.splitlines(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def bos_tokenizer() -> Any:
    """The same with a token that it puts before every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    bos = "<|endoftext|>"
    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=bos,
        eos_token="<|im_end|>",
        pad_token=bos,
        chat_template="{{ bos_token }}" + CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(architecture: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random causal LM with 3 layers of width 32."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sliding_window": None,
        "initializer_range": 0.2,
    }
    settings |= FAMILIES[architecture] | changes
    settings = {name: value for name, value in settings.items() if value is not None or name in _MAY_BE_NONE}
    config = CONFIG_MAPPING[settings.pop("model_type", architecture)](**settings)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


@cache
def tiny_llm(architecture: str = "llama", seed: int = 0, *, bos: bool = False) -> Any:
    from extemb_core.models.llm import LLM

    tokenizer = bos_tokenizer() if bos else tiny_tokenizer()
    return LLM(tiny_model(architecture, seed=seed), tokenizer, name=f"tiny-{architecture}")


@cache
def roomy_llm(window: int = 1024) -> Any:
    """The same with a longer window."""
    from extemb_core.models.llm import LLM

    return LLM(tiny_model("llama", max_position_embeddings=window), tiny_tokenizer(), name="tiny")


def entering(llm: Any, layer: int = 1, **settings: Any) -> Any:
    """An embedder that enters at a layer of the LLM: as it is, but planned like one that was trained."""
    from extemb_core.context.focus import shipped_losses
    from extemb_core.models.embedder import ExtensibleEmbedder

    chosen = {"chunk_size": 16, "ratios": (1, 2, 4, 8), "sentence_losses": shipped_losses()} | settings
    return ExtensibleEmbedder.untrained(llm, layer, **chosen)


@cache
def tool_llm() -> Any:
    """A tiny LLM whose chat template has a place for tools, shared as well."""
    from extemb_core.models.llm import LLM

    tokenizer = deepcopy(tiny_tokenizer())
    tokenizer.chat_template = TOOLS_TEMPLATE
    return LLM(tiny_model("llama", max_position_embeddings=2048), tokenizer, name="tiny-tools")


def random_embedder(llm: Any, *, seed: int = 1, **settings: Any) -> Any:
    import torch

    from extemb_core.models.embedder import ExtensibleEmbedder

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        chosen = {"num_layers": 2, "chunk_size": 16, "ratios": (2, 4, 8)} | settings
        embedder = ExtensibleEmbedder.from_llm(llm, **chosen)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in embedder.trainable_state_dict().items():
            if name != "llm_probe":
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return embedder


def tuned(llm: Any, layer: int = 1, *, seed: int = 1, **settings: Any) -> Any:
    """An embedder that enters at a layer, with own tensors that were changed as training would."""
    chosen = {"adaptation": "lora", "chunk_size": 16, "ratios": (1, 2, 4, 8), "num_layers": layer} | settings
    return random_embedder(llm, seed=seed, entry_layer=layer, **chosen)


def save_tiny(folder: Any) -> None:
    """A tiny LLM in `folder`/llm and an embedder for it in `folder`/embedder."""
    tiny_model("llama").save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    random_embedder(tiny_llm()).save_pretrained(folder / "embedder")


_shared: dict[Any, Any] = {}  # embedders by what they were made of, each with what it was
_used: set[Any] = set()  # those that were asked for since anybody looked whether they are what they were
_SAVED = ("architectures", "dtype")  # which a config does not say until it is saved


def shared_embedder(llm: Any, layer: int = 0, **settings: Any) -> Any:
    """`random_embedder`, or `entering` at a layer, made once for each LLM: shared too (nothing may change it)."""
    key = (llm, layer, *sorted(settings.items()))
    if key not in _shared:
        made = entering(llm, layer, **settings) if layer else random_embedder(llm, **settings)
        _shared[key] = made, _state(made)
    _used.add(key)
    return _shared[key][0]


def changed() -> list[str]:
    """Name the shared embedders that were changed since the last look, or whose LLM was, and share them no more."""
    found = [key for key in _used if _state(_shared[key][0]) != _shared[key][1]]
    for key in found:
        del _shared[key]
    _used.clear()
    return [f"{llm.name}, layer {layer}" for llm, layer, *_ in found]


def _state(embedder: Any) -> Any:
    """What tells that an embedder or its LLM was trained, moved, set otherwise, or left with a hook or a patch."""
    models = (embedder, embedder.llm.model)
    parts = [part for model in models for part in model.modules()]
    hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return (
        [(tensor.data_ptr(), tensor._version) for model in models for tensor in model.state_dict().values()],
        [hook for hook in hooks if not hook.__module__.startswith("transformers.")],  # which leaves its own
        [name for model in models for name, value in vars(model).items() if ismethod(value)],
        [{name: value for name, value in model.config.to_dict().items() if name not in _SAVED} for model in models],
        [model.training for model in models],
    )


class Named:
    """A path of somebody else's class."""

    def __init__(self, path: Any) -> None:
        self.path = str(path)

    def __fspath__(self) -> str:
        return self.path


class RawEmbedder:
    """A perfect embedder: at ratio 1 its embeddings are those of the tokens themselves, so nothing is lost."""

    def __init__(self, llm: Any) -> None:
        from extemb_core.models.config import ExtensibleEmbedderConfig

        self.llm = llm
        self.fingerprint = "raw"
        self.config = ExtensibleEmbedderConfig(ratios=(1,), chunk_size=16)

    def compress_ids(self, ids: Any, *, ratio: int | None = None, **settings: Any) -> list[Any]:
        from extemb_core.models.compressed import Compressed

        return [
            Compressed(
                embeddings=self.llm.embed(tokens), ratio=1, n_tokens=len(tokens), ref="", fingerprint=self.fingerprint,
                chunk_size=16, ratios=(1,), downscaling="strided",
            )
            for tokens in ids
        ]  # fmt: skip
