"""The seam over transformers: scores are those of its logits, and a folder loads as it was saved or not at all."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LONG_PROMPT, tiny_llm, tiny_model, tiny_tokenizer
from transformers.utils import logging as hf_logging

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsError, WeightsNotFoundError
from extemb_core.models.llm import LLM, choose_device, choose_dtype
from extemb_core.models.stoppable import CACHE
from extemb_core.utils.quiet import quiet_transformers

# -- reading and scoring -------------------------------------------------------------------------------------------


def test_a_prefix_too_short_to_gain_by_is_read_with_the_rest():
    llm = LLM(tiny_model("llama"), tiny_tokenizer())
    text = llm.encode(LONG_PROMPT).tolist()[:20]
    assert CACHE not in llm.batch_inputs([[*text, 3], [*text, 4]])[1]
    assert CACHE not in llm.batch_inputs([[3, *text * 8], [4, *text * 8]])[1]
    assert CACHE in llm.batch_inputs([[*text, 3 + at] for at in range(8)])[1]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_score_is_the_log_softmax_of_transformers_logits(architecture):
    llm = tiny_llm(architecture)
    prompt, targets = llm.encode("The keeper counted"), llm.encode(" forty-one ships")
    ids = torch.from_numpy(np.concatenate([prompt, targets]))[None].long()
    logits = llm.model(ids).logits[0, len(prompt) - 1 : -1].float()
    expected = logits.log_softmax(-1).gather(1, torch.from_numpy(targets).long()[:, None])[:, 0]
    torch.testing.assert_close(llm.score(llm.embed(prompt), targets), expected, atol=1e-4, rtol=1e-4)
    assert llm.score(llm.embed(prompt), targets[:1]).shape == (1,)
    assert llm.score(llm.embed(prompt), []).shape == (0,)
    with pytest.raises(ConfigError, match="0 positions"):
        llm.score(llm.embed([]), targets)


# -- loading ------------------------------------------------------------------------------------------------------


def test_a_saved_llm_loads_as_it_was_and_silently(saved, capfd):
    llm = LLM.from_pretrained(saved, device="cpu")
    assert capfd.readouterr().err == ""
    for name, tensor in tiny_llm().model.state_dict().items():
        assert torch.equal(llm.model.state_dict()[name], tensor)
    assert llm.tokenizer_digest == tiny_llm().tokenizer_digest
    assert (llm.context_window, llm.hidden_size, llm.dtype) == (256, 32, torch.float32)
    assert LLM.from_pretrained(saved, dtype="bfloat16", device="cpu").dtype is torch.bfloat16


def test_two_threads_that_load_leave_transformers_as_they_found_it(saved):
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    first_in, second_in, dtypes = threading.Event(), threading.Event(), []

    def first():
        with quiet_transformers():
            first_in.set()
            second_in.wait(0.1)

    def second():
        assert first_in.wait(600)
        with quiet_transformers():
            second_in.set()
            one.join()

    def load(dtype):
        dtypes.append(LLM.from_pretrained(saved, device="cpu", dtype=dtype).dtype is dtype)

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    loading = [threading.Thread(target=load, args=[dtype]) for dtype in (torch.bfloat16, torch.float32) * 2]
    for thread in (one, other, *loading):
        thread.start()
    for thread in (one, other, *loading):
        thread.join()
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before
    assert dtypes == [True] * 4


def test_a_missing_tensor_is_not_made_up(saved):
    file = saved / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsCorruptError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        LLM.from_pretrained(saved, device="cpu")


def test_a_truncated_or_foreign_folder(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError):
        LLM.from_pretrained(saved, device="cpu")
    file.unlink()
    torch.save({}, saved / "pytorch_model.bin")
    with pytest.raises(WeightsError):
        LLM.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"attn_implementation": "owner/kernel"}, "its config.json asks for code, 'owner/kernel', which is not run"),
        ({"_attn_implementation": "owner/kernel@v1"}, "its config.json asks for code"),
        ({"experts_implementation": "owner/kernel"}, "its config.json asks for code"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "has quantised weights"),
        ({"hidden_size": "wide"}, "transformers fails"),
        ({"num_attention_heads": 0}, "transformers fails"),
        ({"model_type": 5}, "transformers fails"),
    ],
)
def test_a_config_that_is_no_plain_models_is_one_sentence(saved, setting, message):
    settings = json.loads((saved / "config.json").read_text()) | setting
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=message):
        LLM.from_pretrained(saved, device="cpu")


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = r"nobody/nothing-here cannot be had from the hub \(.*\); check the name and the network, or pass a folder"
    with pytest.raises(WeightsNotFoundError, match=said):
        LLM.from_pretrained("nobody/nothing-here", device="cpu")


def test_device_and_dtype_are_checked():
    assert choose_device("cpu").type == "cpu"
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype(torch.float16, torch.device("cpu")) is torch.float16
    with pytest.raises(ConfigError, match="'gpu' is not a torch device"):
        choose_device("gpu")
    with pytest.raises(ConfigError, match="CUDA devices"):
        choose_device("cuda:99")
    with pytest.raises(ConfigError, match="'int8' is not one of"):
        choose_dtype("int8", torch.device("cpu"))
    with pytest.raises(ConfigError, match="none of floating point"):
        choose_dtype(torch.int8, torch.device("cpu"))
    with pytest.raises(ConfigError, match="device=None is not a torch device"):
        choose_device(None)
    with pytest.raises(ConfigError, match="'xpu' is not on this machine"):
        choose_device("xpu")


def test_scoring_pads_no_prompt_to_one_of_another_length(llm, monkeypatch):
    prompts, targets = [[5, 6] * size for size in (20, 3, 19, 2, 20)], [[7, 8, 9]] * 5
    alone = [llm.score(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    passes, read = [], llm.hidden_of
    monkeypatch.setattr(llm, "hidden_of", lambda batch: passes.append([len(one) for one in batch]) or read(batch))
    for one, other in zip(llm.log_probs(prompts, targets), alone, strict=True):
        torch.testing.assert_close(one, other)
    assert passes == [[6], [8], [40, 42, 42]]
