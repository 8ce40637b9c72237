"""The packed two-stream loss against a slow, obvious one: one LLM call per chunk, no mask, no packing."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny import ARCHITECTURES, random_embedder, tiny_llm

from extemb_core.context.assembly import Prompt
from extemb_core.errors import ConfigError
from extemb_core.models.downscaling import chunk_lengths
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.training.reading_loss import Reading, Span, reading_loss, reading_losses
from extemb_core.training.readings import reconstruction
from extemb_core.training.two_stream import lay_out, plan_passes, two_stream_loss, two_stream_losses

CHUNK = 16


def slow_loss(embedder, llm, samples, ratios):
    """METHOD in the plainest form: for each chunk but the first, [BOS?] + embeddings before it + its own tokens."""
    losses = []
    for sample, ratio in zip(samples, ratios, strict=True):
        chunks = list(sample.split(CHUNK))
        before = [torch.empty(0, llm.hidden_size)]
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
    fast = two_stream_loss(embedder, samples, [[ratio] for ratio in ratios], CHUNK, window=80)
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
    found = two_stream_losses(embedder, samples, [[2, 8], [2], [4]], CHUNK, window=50).by_ratio()
    alone = {
        2: two_stream_loss(embedder, samples[:2], [[2], [2]], CHUNK),
        4: two_stream_loss(embedder, samples[2:], [[4]], CHUNK),
        8: two_stream_loss(embedder, samples[:1], [[8]], CHUNK),
    }
    assert {ratio: loss.item() for ratio, loss in found.items()} == pytest.approx(
        {ratio: loss.item() for ratio, loss in alone.items()}, abs=1e-5
    )
    assert not any(loss.requires_grad for loss in found.values())


# -- reading ------------------------------------------------------------------------------------------------------


def readings_of(llm):
    """Text and documents in turn, answers in two places; documents of one chunk, of several, with a tail of one."""
    ids = iter(samples_of([5, 40, 3, 33, 4, 6, 7, 8, 7, 16, 2, 9], len(llm.tokenizer)))
    roles = [("text", "document", "text", "document", "text", "answer", "text", "answer"),
             ("text", "document", "text", "answer")]  # fmt: skip
    return [Reading(tuple((next(ids), role) for role in row)) for row in roles]


def slow_reading_loss(embedder, llm, readings, ratios, text=False):
    """One call of the LLM's own forward for each answer and ratio, and one of the embedder for each chunk."""
    losses = []
    for reading, wanted in zip(readings, ratios, strict=True):
        for ratio in wanted:
            row = torch.empty(0, llm.hidden_size)
            for ids, role in reading.parts:
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
    quick, plain = gradients(embedder, fast), gradients(embedder, slow)
    assert any(grad.abs().max() > 1e-3 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(quick[name], grad, atol=1e-4, rtol=1e-4, msg=name)
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
    students = slow_predictions(embedder, llm, samples, 2)
    crossed = torch.cat([-(t[CHUNK - 1 : -1].exp() * s).sum(-1) for t, s in zip(teacher, students, strict=True)]).mean()
    assert pure.item() == pytest.approx((crossed - entropy).item(), abs=1e-4)
    assert pure.item() != pytest.approx(student_loss.item(), abs=1e-2)


def slow_predictions(embedder, llm, samples, ratio):
    """Log-probabilities of every token after the first chunk, as `slow_loss` scores them."""
    found = []
    for sample in samples:
        chunks = list(sample.split(CHUNK))
        before, rows = [torch.empty(0, llm.hidden_size)], []
        for chunk, following in pairwise(chunks):
            before.append(embedder.read_out(embedder(chunk[None]), 0, len(chunk), ratio))
            prompt = torch.cat([llm.embed([llm.bos_token_id]) if llm.bos_token_id is not None else before[0], *before])
            inputs = torch.cat([prompt, llm.embed(following[:-1])])
            rows.append(llm.model(inputs_embeds=inputs[None], use_cache=False).logits[0, len(prompt) - 1 :])
        found.append(torch.cat(rows).log_softmax(-1))
    return found


def test_what_is_read_as_text_alone_counts_for_no_ratio(llm):
    embedder = random_embedder(llm)
    (ids,) = samples_of([9], len(llm.tokenizer))
    readings = [*readings_of(llm), Reading(((ids[:4], "text"), (ids[4:], "answer")))]
    options = {"embedder": embedder, "chunk_size": CHUNK}
    found = reading_losses(llm, readings, ratios=[[2, 4], [2], [8]], **options).by_ratio()
    coarse = reading_loss(llm, readings[:1], ratios=[[4]], **options)
    fine = reading_loss(llm, readings[:2], ratios=[[2], [2]], **options)
    assert {ratio: loss.item() for ratio, loss in found.items()} == pytest.approx({2: fine.item(), 4: coarse.item()})
    assert not reading_losses(llm, readings).by_ratio()


def test_without_an_embedder_every_piece_is_text(llm):
    readings = readings_of(llm)
    plain = mean_loss(slow_reading_loss(None, llm, readings, [[1], [1]], text=True))
    assert reading_loss(llm, readings).item() == pytest.approx(plain.item(), abs=1e-4)


def test_a_reading_without_an_answer_is_an_error(llm):
    with pytest.raises(ConfigError, match="does not end with an answer"):
        reading_loss(llm, [Reading(((torch.tensor([3]), "text"),))])


# -- entry layers above 0 -----------------------------------------------------------------------------------------


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


def test_a_reading_slices_the_states_of_whole_chunks_and_keeps_its_gradients():
    llm, embedder = entering()
    head, document, middle, answer = samples_of([5, 40, 3, 6], len(llm.tokenizer))
    parts = (
        (head, "text"), (Span(document, 0, 12), "document"), (document[12:20], "text"),
        (Span(document, 20, 40), "document"), (middle, "text"), (answer, "answer"),
    )  # fmt: skip
    fast = reading_loss(llm, [Reading(parts)], embedder=embedder, ratios=[[4]], chunk_size=CHUNK)
    chunks = document.split(CHUNK)
    text = [[(int(index), None) for index in ids] for ids in (head, document[12:20], middle, answer)]
    row = [
        *text[0], *state_rows(embedder, chunks[0], 4)[:3], *text[1],
        *state_rows(embedder, chunks[1], 4, start=4), *state_rows(embedder, chunks[2], 4), *text[2], *text[3],
    ]  # fmt: skip
    logits = plain_logits(llm, 2, row)[-len(answer) - 1 : -1]
    slow = torch.nn.functional.cross_entropy(logits, answer)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    quick, plain = gradients(embedder, fast), gradients(embedder, slow)
    assert any(grad.abs().max() > 1e-3 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(quick[name], grad, atol=1e-5, rtol=1e-3, msg=name)
    assert all(p.grad is None for p in llm.model.parameters())


def test_a_reading_reads_what_is_served():
    llm, embedder = entering()
    head, document, answer = samples_of([5, 40, 6], len(llm.tokenizer))
    reading = Reading(((head, "text"), (document, "document"), (answer, "answer")))
    for ratio in (1, 2, 8):
        served = embedder.compress_ids([document.numpy()], ratio=ratio)[0].part
        prompt = Prompt((head.numpy(), served)).inputs(llm)
        trained = reading_loss(llm, [reading], embedder=embedder, ratios=[[ratio]])
        assert trained.item() == pytest.approx(-llm.score(prompt, answer.numpy()).mean().item(), abs=1e-5)


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


def rows_of(ids):
    return [(int(index), None) for index in ids]


def stream_logits(embedder, sample, ratio):
    """Logits of every token after the first chunk, each in a row of its own chunk and the states of those before it."""
    chunks = sample.split(CHUNK)
    states = [state_rows(embedder, chunk, ratio) for chunk in chunks]
    found = []
    for number, chunk in enumerate(chunks[1:], start=1):
        row = [*(each for own in states[:number] for each in own), *rows_of(chunk)]
        found.append(plain_logits(embedder.llm, 2, row)[-len(chunk) - 1 : -1])
    return torch.cat(found)


@pytest.mark.parametrize("distillation", [0.0, 0.4])
def test_two_streams_above_layer_0_have_the_gradients_of_one_row_per_chunk(distillation):
    llm, embedder = entering()
    (sample,) = samples_of([40], len(llm.tokenizer))
    fast = two_stream_loss(embedder, [sample], [[4]], CHUNK, window=26, distillation=distillation)
    logits = stream_logits(embedder, sample, 4)
    teacher = plain_logits(llm, 2, rows_of(sample))[CHUNK - 1 : -1].log_softmax(-1).detach()
    slow = mixed(logits, sample[CHUNK:], teacher, distillation)
    assert fast.item() == pytest.approx(slow.item(), abs=1e-5)
    quick, plain = gradients(embedder, fast), gradients(embedder, slow)
    assert any(grad.abs().max() > 1e-3 for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(quick[name], grad, atol=1e-5, rtol=1e-3, msg=name)


def mixed(logits, targets, teacher, distillation):
    divergence = (teacher.exp() * (teacher - logits.log_softmax(-1))).sum(-1).mean()
    return (1 - distillation) * torch.nn.functional.cross_entropy(logits, targets) + distillation * divergence


@pytest.mark.parametrize("distillation", [0.0, 0.4])
@pytest.mark.parametrize("size", [8, CHUNK])
def test_a_reconstruction_above_layer_0_reads_every_chunk(size, distillation):
    """In chunks of any size, whatever that of the embedder is."""
    llm, embedder = entering()
    (ids,) = samples_of([21], len(llm.tokenizer))
    reading = reconstruction(llm, ids.numpy())
    fast = reading_loss(llm, [reading], embedder=embedder, ratios=[[4]], chunk_size=size, distillation=distillation)
    states = [each for chunk in ids.split(size) for each in state_rows(embedder, chunk, 4)]
    asked = rows_of(reading.parts[1][0])
    logits = plain_logits(llm, 2, [*states, *asked, *rows_of(ids)])[-len(ids) - 1 : -1]
    teacher = plain_logits(llm, 2, [*rows_of(ids), *asked, *rows_of(ids)])[-len(ids) - 1 : -1].log_softmax(-1)
    assert fast.item() == pytest.approx(mixed(logits, ids, teacher, distillation).item(), abs=1e-5)


def test_what_the_llm_would_have_computed_itself_diverges_in_nothing():
    llm = tiny_llm()
    embedder = ExtensibleEmbedder.untrained(llm, 2, chunk_size=CHUNK, ratios=(1, 2, 4))
    document, text = samples_of([14, 9], len(llm.tokenizer))
    reading = Reading(((document, "document"), (text, "answer")))
    divergence = {
        ratio: reading_loss(llm, [reading], embedder=embedder, ratios=[[ratio]], distillation=1.0).item()
        for ratio in (1, 4)
    }
    assert divergence[1] == pytest.approx(0, abs=1e-5)
    assert divergence[4] > 1e-2


def test_a_span_of_a_document_needs_an_entry_layer_above_0(llm):
    (document, answer) = samples_of([20, 3], len(llm.tokenizer))
    reading = Reading(((Span(document, 4, 20), "document"), (answer, "answer")))
    with pytest.raises(ConfigError, match="tokens 4 to 20 of a document of 20 .* entry layer 0"):
        reading_loss(llm, [reading], embedder=random_embedder(llm), ratios=[[2]], chunk_size=CHUNK)
