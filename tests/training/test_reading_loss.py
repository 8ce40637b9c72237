"""The loss of readings against a slow, obvious one: one call for each answer and ratio, and one for each chunk."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, random_embedder, tiny_llm
from training.losses import (
    CHUNK,
    assert_same_gradients,
    entering,
    mixed,
    plain_logits,
    reading_loss,
    rows_of,
    samples_of,
    state_rows,
)

from extemb_core.context.assembly import Prompt
from extemb_core.errors import ConfigError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.training.objectives import reconstruction
from extemb_core.training.reading_loss import Reading, Span, reading_losses


def readings_of(llm):
    """Text and documents in turn, answers in two places; documents of one chunk, of several, with a tail of one."""
    ids = iter(samples_of([5, 40, 3, 33, 4, 6, 7, 8, 7, 16, 2, 9], len(llm.tokenizer)))
    roles = [("text", "document", "text", "document", "text", "answer", "text", "answer"),
             ("text", "document", "text", "answer")]  # fmt: skip
    return [Reading(tuple((next(ids).numpy(), role) for role in row)) for row in roles]


def slow_reading_loss(embedder, llm, readings, ratios, text=False):
    """One call of the LLM's own forward for each answer and ratio, and one of the embedder for each chunk."""
    losses = []
    for reading, wanted in zip(readings, ratios, strict=True):
        for ratio in wanted:
            row = torch.empty(0, llm.hidden_size)
            for ids, role in ((torch.from_numpy(part), role) for part, role in reading.parts):
                if role == "answer":
                    inputs = torch.cat([row, llm.embed(ids[:-1])])
                    logits = llm.model(inputs_embeds=inputs[None], use_cache=False).logits[0, len(row) - 1 :]
                    losses.append((logits.log_softmax(-1), ids))
                pieces = [llm.embed(ids)]
                if role == "document" and not text:
                    pieces = [embedder.read_out(embedder(chunk[None]), 0, len(chunk), ratio)
                              for chunk in ids.split(CHUNK)]  # fmt: skip
                row = torch.cat([row, *pieces])
    return losses


def mean_loss(rows):
    picked = [logits.gather(1, answer[:, None])[:, 0] for logits, answer in rows]
    return -torch.cat(picked).mean()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_loss_and_gradients_equal_the_slow_ones(architecture):
    llm = tiny_llm(architecture)
    embedder = random_embedder(llm)
    readings, ratios = readings_of(llm), [[2, 4], [8]]
    fast = reading_loss(llm, readings, embedder=embedder, ratios=ratios, chunk_size=CHUNK)
    slow = mean_loss(slow_reading_loss(embedder, llm, readings, ratios))
    assert fast.item() == pytest.approx(slow.item(), abs=1e-4)
    assert_same_gradients(embedder, fast, slow, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in llm.model.parameters())


def test_distillation_is_the_divergence_from_the_llm_that_reads_the_text(llm):
    embedder = random_embedder(llm)
    readings, ratios = readings_of(llm), [[2, 4], [8]]
    students = slow_reading_loss(embedder, llm, readings, ratios)
    teachers = slow_reading_loss(embedder, llm, readings, ratios, text=True)
    both = zip(teachers, students, strict=True)
    rows = [(teacher.exp() * (teacher - student)).sum(-1) for (teacher, _), (student, _) in both]
    options = {"embedder": embedder, "ratios": ratios, "chunk_size": CHUNK}
    pure = reading_loss(llm, readings, **options, distillation=1.0)
    assert pure.item() == pytest.approx(torch.cat(rows).mean().item(), abs=1e-4)
    assert pure.item() > 1e-3
    half = reading_loss(llm, readings, **options, distillation=0.5)
    assert half.item() == pytest.approx((pure.item() + mean_loss(students).item()) / 2, abs=1e-4)


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_logits_of_many_places_are_never_held_at_once_and_losses_and_gradients_stay(monkeypatch, distillation):
    llm, embedder = entering()
    readings = readings_of(llm)
    settings = {"embedder": embedder, "ratios": [[2]] * 2, "chunk_size": CHUNK, "distillation": distillation}
    whole = reading_losses(llm, readings, **settings)
    sizes, logits = [], llm.logits
    monkeypatch.setattr("extemb_core.training.reading_loss._MAX_SCORED", 5)
    monkeypatch.setattr(llm, "logits", lambda hidden: sizes.append(len(hidden)) or logits(hidden))
    parted = reading_losses(llm, readings, **settings)
    torch.testing.assert_close(parted.values, whole.values)
    assert_same_gradients(embedder, parted.mean(), whole.mean())
    assert max(sizes) == 5 < len(whole.values)


def test_what_is_read_as_text_alone_counts_for_no_ratio(llm):
    embedder = random_embedder(llm)
    (ids,) = samples_of([9], len(llm.tokenizer))
    readings = [*readings_of(llm), Reading(((ids[:4].numpy(), "text"), (ids[4:].numpy(), "answer")))]
    options = {"embedder": embedder, "chunk_size": CHUNK}
    losses = reading_losses(llm, readings, ratios=[[2, 4], [2], [8]], **options).by_ratio()
    coarse = reading_loss(llm, readings[:1], ratios=[[4]], **options)
    fine = reading_loss(llm, readings[:2], ratios=[[2], [2]], **options)
    assert {ratio: loss.item() for ratio, loss in losses.items()} == pytest.approx({2: fine.item(), 4: coarse.item()})
    assert not reading_losses(llm, readings).by_ratio()


def test_without_an_embedder_every_piece_is_text(llm):
    readings = readings_of(llm)
    plain = mean_loss(slow_reading_loss(None, llm, readings, [[1], [1]], text=True))
    assert reading_loss(llm, readings).item() == pytest.approx(plain.item(), abs=1e-4)


def test_a_reading_without_an_answer_is_an_error(llm):
    with pytest.raises(ConfigError, match="does not end with an answer"):
        reading_loss(llm, [Reading(((np.array([3]), "text"),))])


# -- entry layers above 0 -----------------------------------------------------------------------------------------


def test_a_reading_slices_the_states_of_whole_chunks_and_keeps_its_gradients():
    llm, embedder = entering()
    head, document, middle, answer = samples_of([5, 40, 3, 6], len(llm.tokenizer))
    whole = document.numpy()
    parts = (
        (head.numpy(), "text"), (Span(whole, 0, 12), "document"), (whole[12:20], "text"),
        (Span(whole, 20, 40), "document"), (middle.numpy(), "text"), (answer.numpy(), "answer"),
    )  # fmt: skip
    fast = reading_loss(llm, [Reading(parts)], embedder=embedder, ratios=[[4]], chunk_size=CHUNK)
    chunks = document.split(CHUNK)
    text = [rows_of(ids) for ids in (head, document[12:20], middle, answer)]
    row = [
        *text[0], *state_rows(embedder, chunks[0], 4)[:3], *text[1],
        *state_rows(embedder, chunks[1], 4, start=4), *state_rows(embedder, chunks[2], 4), *text[2], *text[3],
    ]  # fmt: skip
    logits = plain_logits(llm, 2, row)[-len(answer) - 1 : -1]
    slow = torch.nn.functional.cross_entropy(logits, answer)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    assert_same_gradients(embedder, fast, slow, atol=1e-5, rtol=1e-3)
    assert all(p.grad is None for p in llm.model.parameters())


def test_a_reading_reads_what_is_served():
    llm, embedder = entering()
    head, document, answer = samples_of([5, 40, 6], len(llm.tokenizer))
    reading = Reading(((head.numpy(), "text"), (document.numpy(), "document"), (answer.numpy(), "answer")))
    for ratio in (1, 2, 8):
        served = embedder.compress_ids([document.numpy()], ratio=ratio)[0].part
        prompt = Prompt((head.numpy(), served)).inputs(llm)
        trained = reading_loss(llm, [reading], embedder=embedder, ratios=[[ratio]])
        assert trained.item() == pytest.approx(-llm.score(prompt, answer.numpy()).mean().item(), abs=1e-5)


@pytest.mark.parametrize("distillation", [0.0, 0.4])
@pytest.mark.parametrize("size", [8, CHUNK])
def test_a_reconstruction_above_layer_0_reads_every_chunk(size, distillation):
    """In chunks of any size, whatever that of the embedder is."""
    llm, embedder = entering()
    (ids,) = samples_of([21], len(llm.tokenizer))
    reading = reconstruction(llm, ids.numpy())
    fast = reading_loss(llm, [reading], embedder=embedder, ratios=[[4]], chunk_size=size, distillation=distillation)
    states = chain(*(state_rows(embedder, chunk, 4) for chunk in ids.split(size)))
    asked = rows_of(reading.parts[1][0])
    logits = plain_logits(llm, 2, [*states, *asked, *rows_of(ids)])[-len(ids) - 1 : -1]
    teacher = plain_logits(llm, 2, [*rows_of(ids), *asked, *rows_of(ids)])[-len(ids) - 1 : -1].log_softmax(-1)
    assert fast.item() == pytest.approx(mixed(logits, ids, teacher, distillation).item(), abs=1e-5)


def test_what_the_llm_would_have_computed_itself_diverges_in_nothing():
    llm = tiny_llm()
    embedder = ExtensibleEmbedder.untrained(llm, 2, chunk_size=CHUNK, ratios=(1, 2, 4))
    document, text = samples_of([14, 9], len(llm.tokenizer))
    reading = Reading(((document.numpy(), "document"), (text.numpy(), "answer")))
    divergence = {
        ratio: reading_loss(llm, [reading], embedder=embedder, ratios=[[ratio]], distillation=1.0).item()
        for ratio in (1, 4)
    }
    assert divergence[1] == pytest.approx(0, abs=1e-5)
    assert divergence[4] > 1e-2


def test_a_span_of_a_document_needs_an_entry_layer_above_0(llm):
    (document, answer) = samples_of([20, 3], len(llm.tokenizer))
    reading = Reading(((Span(document.numpy(), 4, 20), "document"), (answer.numpy(), "answer")))
    with pytest.raises(ConfigError, match="tokens 4 to 20 of a document of 20 .* entry layer 0"):
        reading_loss(llm, [reading], embedder=random_embedder(llm), ratios=[[2]], chunk_size=CHUNK)
