"""Samples, and losses in their plainest form, for the tests of the objectives."""

from __future__ import annotations

import torch
from tiny import random_embedder, tiny_llm

from extemb_core.training.reading_loss import reading_losses
from extemb_core.training.two_stream import two_stream_losses

CHUNK = 16


def reading_loss(*args, **settings):
    return reading_losses(*args, **settings).mean()


def two_stream_loss(*args, **settings):
    return two_stream_losses(*args, **settings).mean()


def gradients(embedder, loss):
    embedder.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in embedder.named_parameters() if p.requires_grad}


def assert_same_gradients(embedder, fast, slow, **tolerances):
    quick, plain = gradients(embedder, fast), gradients(embedder, slow)
    assert quick.keys() == plain.keys()
    assert any(grad.abs().max() > 1e-3 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(quick[name], grad, **tolerances, msg=name)


def samples_of(lengths, vocabulary):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocabulary, (length,), generator=generator) for length in lengths]


def entering(architecture="llama", **settings):
    """A plain LLM, and an embedder for its middle layer with adapters that do something."""
    llm = tiny_llm(architecture)
    chosen = {"num_layers": None, "ratios": (1, 2, 4, 8), "entry_layer": 2, "lora_rank": 2} | settings
    return llm, random_embedder(llm, **chosen)


def state_rows(embedder, chunk, ratio, start=0):
    """A chunk's groups in the plainest form: one loop over groups, one over their tokens."""
    hidden = embedder(chunk[None]).hidden[0]
    rows = []
    for at in range(start, len(chunk), ratio):
        group = slice(at, min(at + ratio, len(chunk)))
        w = embedder.token_weights[chunk[group]]
        mean = sum(weight * state for weight, state in zip(w, hidden[group], strict=True)) / w.sum()
        norm = sum(weight * state.norm() for weight, state in zip(w, hidden[group], strict=True)) / w.sum()
        rows.append((int(chunk[group][-1]), mean / mean.norm() * norm))
    return rows


def plain_logits(llm, layer, row):
    """Logits of a row of (id, state or None), by a loop over the LLM's own layers."""
    decoder = llm.model.model
    hidden = llm.embed([index for index, _ in row])[None]
    places = torch.arange(len(row))[None]
    rotary = decoder.rotary_emb(hidden, places)
    for number, block in enumerate(decoder.layers):
        if number == layer:
            hidden = torch.stack([h if state is None else state for h, (_, state) in zip(hidden[0], row, strict=True)])
            hidden = hidden[None]
        hidden = block(hidden, attention_mask=None, position_ids=places, position_embeddings=rotary)
    return llm.logits(decoder.norm(hidden))[0]


def rows_of(ids):
    """Tokens as `plain_logits` reads them, with no state in their place."""
    return [(int(index), None) for index in ids]


def mixed(logits, targets, teacher, distillation):
    """The cross-entropy mixed with the divergence from the teacher's log-probabilities."""
    divergence = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1).mean()
    return (1 - distillation) * torch.nn.functional.cross_entropy(logits, targets) + distillation * divergence
