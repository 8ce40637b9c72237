"""The packed two-stream loss against a slow, obvious one: one LLM call per chunk, no mask, no packing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURES, random_embedder, tiny_llm

from extemb_core.errors import ConfigError
from extemb_core.models.downscaling import chunk_lengths
from extemb_core.training.objectives import lay_out, plan_passes, two_stream_loss

CHUNK = 16


def slow_loss(embedder, llm, samples, ratios):
    """METHOD in the plainest form: for each chunk but the first, [BOS?] + embeddings before it + its own tokens."""
    losses = []
    for sample, ratio in zip(samples, ratios, strict=True):
        chunks = list(sample.split(CHUNK))
        before = [torch.empty(0, llm.width)]
        for chunk, following in pairwise(chunks):
            before.append(embedder.read_out(embedder(chunk[None]), 0, len(chunk), ratio))
            prompt = torch.cat([llm.embed([llm.bos_token_id]) if llm.bos_token_id is not None else before[0], *before])
            inputs = torch.cat([prompt, llm.embed(following[:-1])])
            logits = llm.model(inputs_embeds=inputs[None], use_cache=False).logits[0, len(prompt) - 1 :]
            losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
    return torch.cat(losses).mean()


def gradients(embedder, loss):
    embedder.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in embedder.named_parameters() if p.requires_grad}


def samples_of(lengths, vocabulary):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("downscaling", "adaptation"), [("strided", "lora"), ("mean", "full"), ("terminal", "lora")])
def test_packed_loss_and_gradients_equal_the_slow_ones(architecture, downscaling, adaptation):
    llm = tiny_llm(architecture)
    embedder = random_embedder(llm, downscaling=downscaling, adaptation=adaptation)
    # Whole chunks, a tail of one token, a tail between; a window that forces several passes for the longest.
    samples = samples_of([48, 65, 39, 80], len(llm.tokenizer))
    ratios = [2, 4, 8, 2]
    fast = two_stream_loss(embedder, llm, samples, ratios, CHUNK, window=80)
    slow = slow_loss(embedder, llm, samples, ratios)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-4)
    quick, plain = gradients(embedder, fast), gradients(embedder, slow)
    assert quick.keys() == plain.keys()
    assert any(grad.abs().max() > 1e-3 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(quick[name], grad, atol=1e-4, rtol=1e-4, msg=name)


def test_bos_of_the_llm_stands_before_the_embeddings(monkeypatch):
    llm = tiny_llm()
    monkeypatch.setitem(llm.__dict__, "bos_token_id", 5)
    embedder = random_embedder(llm)
    assert embedder.config.bos_token_id == 5
    samples = samples_of([48, 40], len(llm.tokenizer))
    fast = two_stream_loss(embedder, llm, samples, [2, 4], CHUNK)
    assert fast.item() == pytest.approx(slow_loss(embedder, llm, samples, [2, 4]).item(), abs=1e-4)


def test_gradient_reaches_the_embedder_alone(llm):
    embedder = random_embedder(llm, adaptation="lora")
    two_stream_loss(embedder, llm, samples_of([40], len(llm.tokenizer)), [4], CHUNK).backward()
    assert all(p.grad is None for p in llm.model.parameters())
    assert all(p.grad is not None for p in embedder.parameters() if p.requires_grad)


def test_passes_fill_the_window_and_cover_every_chunk_once():
    lengths = chunk_lengths(1000, CHUNK)
    passes = plan_passes(lengths, 4, window=256 + 64)
    assert [run.first for run in passes] == [1, *[run.end for run in passes[:-1]]]
    assert passes[-1].end == len(lengths)
    for run in passes:
        layout = lay_out(lengths, 4, run)
        assert len(layout.positions) <= 256 + 64
        assert len(layout.positions) > 256 + 64 - CHUNK - 4 or run.end == len(lengths)


def test_a_window_too_small_for_one_chunk_is_an_error():
    with pytest.raises(ConfigError, match="does not fit 10 positions"):
        plan_passes([16, 16], 2, window=10)


def test_a_sample_without_a_second_chunk_is_an_error(llm):
    embedder = random_embedder(llm)
    with pytest.raises(ConfigError, match="no second chunk"):
        two_stream_loss(embedder, llm, samples_of([16], len(llm.tokenizer)), [2], CHUNK)
