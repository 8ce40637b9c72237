"""Attention for training gives what torch's own gives, in output and gradient, and is in place only while asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from extemb_core.training.attention import NAME, attend, training_attention


class Heads:
    """What transformers hands over of an attention layer."""

    num_key_value_groups = 3
    is_causal = True


def tensors(length, dtype=torch.bfloat16, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, 8, generator=generator).to(dtype).requires_grad_() for heads in (6, 2, 2)]


def reference(query, key, value, mask):
    """Softmax attention in float32, written out."""
    query, key, value = query.float(), *(part.float().repeat_interleave(3, 1) for part in (key, value))
    scores = (query @ key.transpose(-1, -2)) * 0.5 + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


def masks(length, batch=2):
    causal = torch.full((length, length), float("-inf")).triu(1)
    holes = causal.expand(batch, 1, length, length).clone()
    holes[1, :, length // 2 :, 1:3] = float("-inf")
    return {"causal": (None, causal), "additive": (holes.bfloat16(), holes), "boolean": (holes == 0, holes)}


@pytest.mark.parametrize("kind", ["causal", "additive", "boolean"])
@pytest.mark.parametrize("length", [2, 37])
def test_output_and_gradients_are_those_of_the_definition(kind, length):
    given, mask = masks(length)[kind]
    own, plain = tensors(length), tensors(length)
    direction = torch.randn(2, length, 6, 8)
    output, _ = attend(Heads(), *own, given, scaling=0.5)
    expected = reference(*plain, mask)
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)
    (output.float() * direction).sum().backward()
    (expected * direction).sum().backward()
    for ours, theirs in zip(own, plain, strict=True):
        error = (ours.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
        assert error < 0.02


@pytest.mark.parametrize("case", ["float32", "long", "no gradient"])
def test_the_rest_goes_to_torch(case, monkeypatch):
    def refuse(*args):
        raise AssertionError("not meant for this")

    monkeypatch.setattr("extemb_core.training.attention._Rows.apply", refuse)
    own = tensors(600 if case == "long" else 5, torch.float32 if case == "float32" else torch.bfloat16, batch=1)
    with torch.set_grad_enabled(case != "no gradient"):
        output, _ = attend(Heads(), *own, None, scaling=0.5)
    mask = torch.full((len(own[0][0, 0]),) * 2, float("-inf")).triu(1)
    torch.testing.assert_close(output.float(), reference(*own, mask), atol=0.03, rtol=0.03)


def test_a_model_has_it_within_the_block_alone():
    model = tiny_model("llama").bfloat16()
    ids = torch.randint(0, 400, (2, 19))
    before = model(ids).logits
    with training_attention(model):
        assert model.config._attn_implementation == NAME
        here = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert (here - before).norm() < 0.03 * before.norm()
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids).logits, before)


def test_a_failure_takes_it_away_too():
    model = tiny_model("llama")
    with pytest.raises(KeyError), training_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_another_attention_stays():
    model = tiny_model("gemma2")
    model.set_attn_implementation("eager")
    with training_attention(model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_step_on_a_gpu_waits_for_cudnn(device):
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"), device=torch.device(device))
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    with training_attention(model):
        assert torch.backends.cuda.cudnn_sdp_enabled() is (allowed and device == "cpu")
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() is allowed
