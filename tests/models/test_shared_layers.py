"""Layers that an embedder shares with its LLM, and the LLM known again in another dtype, a derivative not."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, entering, random_embedder, tiny_llm, tiny_model, tiny_tokenizer, tuned

from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM

TEXT = "The lighthouse keeper counted forty-one ships before the fog came in. " * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_shares_the_llms_tensors_and_full_copies_the_layers(architecture):
    llm = tiny_llm(architecture)
    theirs = {p.data_ptr() for p in llm.model.parameters()}
    lora, full = (random_embedder(llm, adaptation=adaptation) for adaptation in ("lora", "full"))
    base = [p for name, p in lora.stack.named_parameters() if "lora_" not in name]
    assert len(base) > 8
    assert all(p.data_ptr() in theirs and not p.requires_grad for p in base)
    assert not any(p.data_ptr() in theirs for p in full.stack.layers.parameters())
    assert full.stack.get_input_embeddings().weight.data_ptr() in theirs
    assert len(lora.stack.layers) == 2
    assert len(llm.model.base_model.layers) == 3


def of_dtype(dtype, factor=1.0, *, rounded=False, name="other"):
    """A tiny LLM, or with `factor` a derivative; `rounded`: of bfloat16 values, as nearly all published LLMs are."""
    model = tiny_model("llama")
    model = model.bfloat16().float() if rounded else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return LLM(model.to(dtype), tiny_tokenizer(), name=name)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_slight_derivative_has_another_fingerprint(dtype, layer, tmp_path):
    base = tiny_llm()
    derivative = of_dtype(dtype, 1 + 1e-3)
    assert entering(derivative, layer).fingerprint != entering(base, layer).fingerprint
    assert entering(derivative, layer).fingerprint != entering(of_dtype(dtype), layer).fingerprint
    trained = tuned(base, layer)
    trained.save_pretrained(tmp_path)
    assert ExtensibleEmbedder.from_pretrained(tmp_path, llm=derivative).fingerprint != trained.fingerprint


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_llm_itself_has_the_same_fingerprint_in_every_dtype(dtype, rounded):
    fingerprints = [entering(of_dtype(each, rounded=rounded)).fingerprint for each in (torch.float32, dtype)]
    # Rounded to float16 first, weights may round the other way to bfloat16: then nothing kept is found, or mixed.
    assert (fingerprints[0] == fingerprints[1]) == (rounded or dtype is not torch.float16)


@pytest.mark.parametrize("entry_layer", [0, 1])
def test_a_trained_embedder_knows_its_llm_through_float16_whatever_its_weights_are(tmp_path, entry_layer):
    base = tiny_llm()  # whose weights are no bfloat16 values
    half, derivative = of_dtype(torch.float16), of_dtype(torch.float16, 1 + 1e-3)
    trained = random_embedder(base, entry_layer=entry_layer, num_layers=1)
    trained.save_pretrained(tmp_path)
    assert ExtensibleEmbedder.from_pretrained(tmp_path, llm=half).fingerprint == trained.fingerprint
    assert ExtensibleEmbedder.from_pretrained(tmp_path, llm=derivative).fingerprint != trained.fingerprint
    in_bfloat16 = of_dtype(torch.bfloat16)
    random_embedder(in_bfloat16, entry_layer=entry_layer, num_layers=1).save_pretrained(tmp_path / "b")
    every = (in_bfloat16, base, half)
    made = [ExtensibleEmbedder.from_pretrained(tmp_path / "b", llm=each).fingerprint for each in every]
    assert len(set(made)) == 1
    assert ExtensibleEmbedder.from_pretrained(tmp_path / "b", llm=derivative).fingerprint != made[0]


def test_an_embedder_for_a_far_derivative_is_taken_when_asked(llm, tmp_path):
    trained = tuned(llm)
    trained.save_pretrained(tmp_path)
    far = tiny_llm(seed=1)
    adapted = ExtensibleEmbedder.from_pretrained(tmp_path, llm=far, adapt=True)
    assert adapted.fingerprint != trained.fingerprint
    assert torch.isfinite(adapted.compress(TEXT).embeddings).all()
