"""The packed two-stream loss against a slow, obvious one: one LLM call per chunk, no mask, no packing."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from tiny import ARCHITECTURES, random_embedder, tiny_llm, tiny_model, tiny_tokenizer
from training.losses import (
    CHUNK,
    assert_same_gradients,
    entering,
    mixed,
    plain_logits,
    rows_of,
    samples_of,
    state_rows,
    two_stream_loss,
)

from extemb_core.context.assembly import Prompt
from extemb_core.errors import ConfigError
from extemb_core.models.chunks import chunk_lengths
from extemb_core.models.llm import LLM
from extemb_core.training.two_stream import lay_out, plan_passes, two_stream_losses


def slow_logits(embedder, llm, sample, ratio):
    """Logits of every token after the first chunk, in the plainest form: for each chunk but the first, one call on
    [BOS?] + embeddings before it + its own tokens."""
    start = llm.embed([llm.bos_token_id] if llm.bos_token_id is not None else [])
    prompt, logits = start, []
    for chunk, following in pairwise(sample.split(CHUNK)):
        prompt = torch.cat([prompt, embedder.read_out(embedder(chunk[None]), 0, len(chunk), ratio)])
        inputs = torch.cat([prompt, llm.embed(following[:-1])])
        logits.append(llm.model(inputs_embeds=inputs[None], use_cache=False).logits[0, len(prompt) - 1 :])
    return torch.cat(logits)


def slow_loss(embedder, llm, samples, ratios):
    logits = [slow_logits(embedder, llm, *pair) for pair in zip(samples, ratios, strict=True)]
    return torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat([sample[CHUNK:] for sample in samples]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("downscaling", "adaptation"), [("strided", "lora"), ("mean", "full"), ("terminal", "lora")])
def test_packed_loss_and_gradients_equal_the_slow_ones(architecture, downscaling, adaptation):
    llm = tiny_llm(architecture)
    embedder = random_embedder(llm, downscaling=downscaling, adaptation=adaptation)
    # Whole chunks, a tail of one token, a tail between; a window that forces several passes for the longest.
    samples = samples_of([48, 65, 39, 80], len(llm.tokenizer))
    ratios = [2, 4, 8, 2]
    fast = two_stream_loss(embedder, samples, [[ratio] for ratio in ratios], CHUNK, window=80)
    slow = slow_loss(embedder, llm, samples, ratios)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-4)
    assert_same_gradients(embedder, fast, slow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral-sliding"])
def test_passes_are_no_longer_than_a_window_that_slides(family):
    llm = LLM(tiny_model(family, sliding_window=28), tiny_tokenizer())
    embedder = random_embedder(llm)
    (sample,) = samples_of([80], len(llm.tokenizer))
    fast = two_stream_loss(embedder, [sample], [[8]], CHUNK)
    assert fast.item() == pytest.approx(slow_loss(embedder, llm, [sample], [8]).item(), abs=1e-4)
    with pytest.raises(ConfigError, match=r"after 16 embeddings does not fit 28 positions; .* or another objective"):
        two_stream_loss(embedder, [sample], [[2]], CHUNK, window=80)


def test_layers_that_keep_a_state_are_refused():
    llm = tiny_llm("qwen3_next")
    with pytest.raises(ConfigError, match="tiny-qwen3_next has layers that keep a state .*; train with the objectives"):
        two_stream_loss(random_embedder(llm), samples_of([48], len(llm.tokenizer)), [[2]], CHUNK)


def test_bos_of_the_llm_stands_before_the_embeddings(monkeypatch):
    llm = tiny_llm()
    monkeypatch.setitem(llm.__dict__, "bos_token_id", 5)
    embedder = random_embedder(llm)
    assert embedder.config.bos_token_id == 5
    samples = samples_of([48, 40], len(llm.tokenizer))
    fast = two_stream_loss(embedder, samples, [[2], [4]], CHUNK)
    assert fast.item() == pytest.approx(slow_loss(embedder, llm, samples, [2, 4]).item(), abs=1e-4)


def test_gradient_reaches_the_embedder_alone(llm):
    embedder = random_embedder(llm, adaptation="lora")
    two_stream_loss(embedder, samples_of([40], len(llm.tokenizer)), [[4]], CHUNK).backward()
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
        two_stream_loss(embedder, samples_of([16], len(llm.tokenizer)), [[2]], CHUNK)


def test_several_ratios_from_one_pass_are_the_mean_of_each_alone(llm):
    embedder = random_embedder(llm)
    samples = samples_of([48, 40], len(llm.tokenizer))
    passes = []
    hook = embedder.stack.register_forward_hook(lambda *_: passes.append(1))
    together = two_stream_loss(embedder, samples, [[2, 8], [2, 8]], CHUNK)
    hook.remove()
    alone = [two_stream_loss(embedder, samples, [[ratio]] * 2, CHUNK) for ratio in (2, 8)]
    assert len(passes) == 1
    assert together.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-5)


def test_the_losses_of_each_ratio_are_those_of_its_samples(llm):
    embedder = random_embedder(llm)
    samples = samples_of([48, 40, 33], len(llm.tokenizer))
    losses = two_stream_losses(embedder, samples, [[2, 8], [2], [4]], CHUNK, window=50).by_ratio()
    alone = {
        2: two_stream_loss(embedder, samples[:2], [[2], [2]], CHUNK),
        4: two_stream_loss(embedder, samples[2:], [[4]], CHUNK),
        8: two_stream_loss(embedder, samples[:1], [[8]], CHUNK),
    }
    assert {ratio: loss.item() for ratio, loss in losses.items()} == pytest.approx(
        {ratio: loss.item() for ratio, loss in alone.items()}, abs=1e-5
    )
    assert not any(loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize("bos", [None, 5])
def test_the_teacher_of_two_streams_has_read_the_whole_sample(bos, monkeypatch):
    llm = tiny_llm()
    monkeypatch.setitem(llm.__dict__, "bos_token_id", bos)
    embedder = random_embedder(llm)
    samples = samples_of([40, 33], len(llm.tokenizer))
    start = [bos] if bos is not None else []
    teacher = [
        llm.model(input_ids=torch.tensor([[*start, *sample.tolist()]])).logits[0, len(start) :].log_softmax(-1)
        for sample in samples
    ]
    student_loss = two_stream_loss(embedder, samples, [[2], [2]], CHUNK)
    pure = two_stream_loss(embedder, samples, [[2], [2]], CHUNK, distillation=1.0)
    entropy = -torch.cat([(t[CHUNK - 1 : -1].exp() * t[CHUNK - 1 : -1]).sum(-1) for t in teacher]).mean()
    assert pure.item() >= 0
    # KL = cross-entropy under the teacher - its entropy: recompute the former from the student's own predictions.
    students = [slow_logits(embedder, llm, sample, 2).log_softmax(-1) for sample in samples]
    crossed = torch.cat([-(t[CHUNK - 1 : -1].exp() * s).sum(-1) for t, s in zip(teacher, students, strict=True)]).mean()
    assert pure.item() == pytest.approx((crossed - entropy).item(), abs=1e-4)
    assert pure.item() != pytest.approx(student_loss.item(), abs=1e-2)


# -- entry layers above 0 -----------------------------------------------------------------------------------------


def stream_logits(embedder, sample, ratio):
    """Logits of every token after the first chunk, each in a row of its own chunk and the states of those before it."""
    chunks = sample.split(CHUNK)
    states = [state_rows(embedder, chunk, ratio) for chunk in chunks]
    logits = []
    for number, chunk in enumerate(chunks[1:], start=1):
        row = [*chain(*states[:number]), *rows_of(chunk)]
        logits.append(plain_logits(embedder.llm, 2, row)[-len(chunk) - 1 : -1])
    return torch.cat(logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("window", [None, 34])
def test_two_streams_enter_where_they_are_served(architecture, window):
    llm, embedder = entering(architecture)
    (sample,) = samples_of([40], len(llm.tokenizer))
    chunks = sample.split(CHUNK)
    losses = []
    for ratio in (2, 8):
        scores = []
        for number in (1, 2):
            before = [embedder.compress_ids([chunk.numpy()], ratio=ratio)[0].part for chunk in chunks[:number]]
            scores.append(llm.score(Prompt(tuple(before)).inputs(llm), chunks[number].numpy()))
        losses.append(-torch.cat(scores).mean())
    packed = two_stream_loss(embedder, [sample], [[2, 8]], CHUNK, window=window)
    assert packed.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)


@pytest.mark.parametrize("distillation", [0.0, 0.4])
def test_two_streams_above_layer_0_have_the_gradients_of_one_row_per_chunk(distillation):
    llm, embedder = entering()
    (sample,) = samples_of([40], len(llm.tokenizer))
    fast = two_stream_loss(embedder, [sample], [[4]], CHUNK, window=26, distillation=distillation)
    logits = stream_logits(embedder, sample, 4)
    teacher = plain_logits(llm, 2, rows_of(sample))[CHUNK - 1 : -1].log_softmax(-1).detach()
    slow = mixed(logits, sample[CHUNK:], teacher, distillation)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    assert_same_gradients(embedder, fast, slow, atol=1e-5, rtol=1e-3)
