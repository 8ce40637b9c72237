"""The real default model, made from its GGUF file: tokenizer, weights and an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from extemb_core.weights import registry as known


@pytest.mark.real_model
def test_the_real_tokenizer_is_the_one_the_model_was_trained_with(real_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert all(token.special for token in tokenizer.added_tokens_decoder.values())
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))
    assert tokenizer("")["input_ids"] == []  # nothing is added in front
    texts = [
        " leading",
        "trailing  ",
        "\n\n12",
        "a\t 1,234.50",
        "na\u00efve e\u0301 \u65e5\u672c\u8a9e \U0001f642",
        "\r\n x",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    # Digits are split off first, so white space before a number is one token and each digit another.
    assert tokenizer.tokenize("\n\n12") == ["\u010a\u010a", "1", "2"]
    assert tokenizer.tokenize("x   3") == ["x", "\u0120\u0120\u0120", "3"]
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.real_model
def test_the_real_weights_are_those_of_the_file(real_source: Path, real_folder: Path) -> None:
    """Bit for bit, and against the de-quantiser of the gguf package rather than that of transformers."""
    import numpy as np
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(real_source).tensors if ".0." in t.name}
    layer, n_heads, width = "model.layers.0", {"q": 9, "k": 3}, 64
    with safe_open(real_folder / "model.safetensors", framework="numpy") as file:
        assert np.array_equal(file.get_tensor(f"{layer}.mlp.down_proj.weight"), tensors["blk.0.ffn_down.weight"])
        assert np.array_equal(file.get_tensor(f"{layer}.self_attn.v_proj.weight"), tensors["blk.0.attn_v.weight"])
        for which, heads in n_heads.items():  # GGUF interleaves the two halves of each rotary pair
            rows = tensors[f"blk.0.attn_{which}.weight"].reshape(heads, width // 2, 2, -1).swapaxes(1, 2)
            expected = rows.reshape(heads * width, -1)
            assert np.array_equal(file.get_tensor(f"{layer}.self_attn.{which}_proj.weight"), expected)


@pytest.mark.real_model
def test_the_real_model_answers(real_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder)
    config = model.config
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (100_000, 8192)
    assert config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.eos_token_id == 2
    assert model.num_parameters() == known.KNOWN_MODELS["smollm2-135m-instruct"].n_parameters
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"
