"""Many texts at once: batches that follow the device, each handed over before the next is made."""

from __future__ import annotations

import gc
import threading
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch
from tiny import SENTENCES, shared_embedder, tiny_llm, tuned

from extemb_core import ExtensibleLM
from extemb_core.documents import text_ref
from extemb_core.errors import ConfigError, RatioError
from extemb_core.models.bulk import batch_with, compress_in_batches, default_batch_size, positions_at_once
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.store.base import MemoryStore

TEXTS = [f"{at}. {SENTENCES[at : at + 60 + 7 * at]}" for at in range(24)]


@pytest.fixture(params=[0, 1], ids=["entry 0", "entry 1"])
def embedder(request):
    return shared_embedder(tiny_llm(), request.param)


def pairs(embedder, texts=TEXTS):
    return [(text_ref(text), embedder.llm.encode(text)) for text in texts]


def test_batches_are_what_one_call_gives(embedder):
    texts = pairs(embedder)
    batches = list(compress_in_batches(embedder, texts, ratio=4, batch_size=1))
    assert len(batches) > 3
    made = [one for batch in batches for one in batch]
    whole = embedder.compress(TEXTS, ratio=4)
    assert [one.ref for one in made] == [ref for ref, _ in texts]
    for one, other in zip(made, whole, strict=True):
        assert (one.ratio, one.n_tokens, one.fingerprint) == (4, other.n_tokens, other.fingerprint)
        torch.testing.assert_close(one.embeddings, other.embeddings, atol=1e-5, rtol=1e-4)
    for batch in batches[:-1]:  # of 8 passes of one chunk of 16 tokens, and what the last text has over
        assert 8 * 16 <= sum(one.n_tokens for one in batch) < 8 * 16 + max(len(ids) for _, ids in texts)
    assert list(compress_in_batches(embedder, [])) == []
    assert {one.ratio for batch in compress_in_batches(embedder, texts[:3]) for one in batch} == {
        embedder.config.kept_ratio
    }


def test_one_batch_is_held_at_a_time(embedder):
    alive: list[weakref.ref] = []
    held = []
    for batch in compress_in_batches(embedder, pairs(embedder), batch_size=1):
        alive += map(weakref.ref, batch)
        del batch
        gc.collect()
        held.append(sum(one() is not None for one in alive))
    assert len(held) > 3
    assert max(held) == 0


def test_illegal_settings_are_refused(embedder):
    with pytest.raises(ConfigError, match="batch_size=0 is not a whole number of at least 1"):
        list(compress_in_batches(embedder, pairs(embedder), batch_size=0))
    with pytest.raises(RatioError, match="ratio=3"):
        list(compress_in_batches(embedder, pairs(embedder), ratio=3))


class Card:
    """An LLM on a CUDA device, with so much memory free and so much held by torch for what comes next."""

    def __init__(self, monkeypatch, width, free, held=0):
        self.device, self.hidden_size = torch.device("cuda", 0), width
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held + 2**30)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)


@pytest.mark.parametrize(
    ("width", "free", "expected"),
    [(576, 60 * 2**30, 128), (4096, 60 * 2**30, 60), (4096, 8 * 2**30, 8), (8192, 2**30, 4)],
)
def test_a_batch_follows_the_device(monkeypatch, width, free, expected):
    assert default_batch_size(Card(monkeypatch, width, free), 512) == expected
    assert default_batch_size(Card(monkeypatch, width, free - 2**29, held=2**29), 512) == expected
    assert default_batch_size(tiny_llm(), 512) == 4


@pytest.mark.parametrize(("width", "free", "expected"), [(4096, 60 * 2**30, 30720), (8192, 2**30, 4096)])
def test_positions_of_a_pass_follow_the_device(monkeypatch, width, free, expected):
    assert positions_at_once(Card(monkeypatch, width, free)) == expected
    assert positions_at_once(tiny_llm()) == 4096


def test_a_prompt_is_answered_with_those_that_fit_beside_it():
    lengths = {"a": 1000, "b": 4000, "c": 1200, "d": 2000}
    assert batch_with("a", lengths, tiny_llm()) == batch_with("c", lengths, tiny_llm()) == ["a", "c"]
    assert [batch_with(first, lengths, tiny_llm()) for first in "bd"] == [["b"], ["d"]]


@pytest.mark.parametrize(("given", "chunks"), [({}, 4), ({"batch_size": 2}, 2), ({"batch_size": 9}, 9)])
def test_chunks_of_a_forward_pass(embedder, monkeypatch, given, chunks):
    passes = []
    forward = ExtensibleEmbedder.forward

    def counting(self, ids):
        passes.append(len(ids))
        return forward(self, ids)

    monkeypatch.setattr(ExtensibleEmbedder, "forward", counting)
    lm = ExtensibleLM(embedder.llm, embedder)
    for compress in (lm.compress, embedder.compress):
        passes.clear()
        compress(TEXTS, ratio=4, **given)
        assert max(passes) == chunks
    monkeypatch.setattr("extemb_core.models.bulk._CPU_CHUNKS", 3)
    passes.clear()
    lm.compress([text + "!" for text in TEXTS])
    assert max(passes) == 3


class PowerCutError(Exception):
    """Nothing more is done."""


@pytest.mark.parametrize("documents", [TEXTS, TEXTS + TEXTS])
def test_what_was_compressed_before_a_kill_is_kept(embedder, monkeypatch, documents):
    writes = []

    class Watched(MemoryStore):
        def put(self, *texts):
            writes.append(len(texts))
            super().put(*texts)

    store = Watched()
    lm = ExtensibleLM(embedder.llm, embedder, store)
    whole = type(embedder).compress_ids

    def cut(self, ids, **settings):
        if len(writes) == 2:
            raise PowerCutError
        return whole(self, ids, **settings)

    monkeypatch.setattr(type(embedder), "compress_ids", cut)
    with pytest.raises(PowerCutError):
        lm.compress(documents, ratio=4, batch_size=1)
    kept = [text for text in TEXTS if store.get(text_ref(text), embedder.fingerprint, 4) is not None]
    assert kept == TEXTS[: sum(writes)] != []
    monkeypatch.setattr(type(embedder), "compress_ids", whole)
    lm.compress(documents, ratio=4, batch_size=1)
    assert sum(writes) == len(TEXTS)  # each once
    assert len(writes) > 4


def test_an_answer_is_prepared_batch_by_batch_too(embedder, monkeypatch):
    monkeypatch.setattr("extemb_core.models.bulk._CPU_CHUNKS", 1)
    puts = []
    lm = ExtensibleLM(embedder.llm, embedder)
    put = lm.store.put
    monkeypatch.setattr(lm.store, "put", lambda *texts: puts.append(len(texts)) or put(*texts))
    long = [SENTENCES[at : at + 250] for at in range(4)]
    answer = lm.ask("What?", [*long, long[0]], ratio=8, max_new_tokens=2)
    assert [entry.fidelity for entry in answer.context if entry.fidelity != "dropped"] != []
    assert len(puts) > 1


def test_a_store_that_is_read_is_left_as_it_is(embedder, monkeypatch):
    store = MemoryStore()
    monkeypatch.setattr(store, "readonly", True, raising=False)
    monkeypatch.setattr(type(embedder), "compress_ids", lambda *args, **settings: pytest.fail("compressed"))
    ExtensibleLM(embedder.llm, embedder, store).compress(TEXTS)


def test_one_bar_for_all_batches_moves_with_every_pass(embedder, monkeypatch):
    told: list[float] = []
    bars = []

    from contextlib import contextmanager

    @contextmanager
    def bar(description, total, show):
        if callable(show):  # of a batch, which moves the bar of all
            yield show
            return
        bars.append((description, total, show))
        yield told.append

    monkeypatch.setattr("extemb_core.models.bulk.progress", bar)
    ExtensibleLM(embedder.llm, embedder).compress(TEXTS, ratio=4, batch_size=1, show_progress=True)
    n_tokens = sum(len(ids) for _, ids in pairs(embedder))
    assert bars == [("compress", n_tokens, True)]
    assert sum(told) == pytest.approx(n_tokens)
    assert len(told) == sum(-(-len(ids) // 16) for _, ids in pairs(embedder))


def modes(embedder):
    return {name: module.training for name, module in embedder.named_modules()}


@pytest.mark.parametrize("ends", [True, False])
def test_an_embedder_in_training_stays_in_it(ends, monkeypatch):
    embedder = tuned(tiny_llm(), 2)
    embedder.train()
    embedder.stack.eval()  # as a trainer leaves layers of the LLM, whose dropout stays off
    before = modes(embedder)
    assert set(before.values()) == {True, False}
    if not ends:
        monkeypatch.setattr(type(embedder), "forward", lambda *_: 1 / 0)
    with suppress(ZeroDivisionError):
        embedder.compress(TEXTS, ratio=2)
    assert modes(embedder) == before


def test_an_embedder_in_training_compresses_without_dropout_until_the_last_thread_is_done(monkeypatch):
    embedder = tuned(tiny_llm(), 2)
    embedder.train()
    forward, first, second = type(embedder).forward, threading.Event(), threading.Event()
    seen = []

    def slow(self, ids):
        if threading.current_thread().name == "second":
            second.set()
            assert first.wait(60)  # the first is done, and this one goes on
        else:
            assert second.wait(60)
        seen.append({module.training for module in embedder.modules()})
        return forward(self, ids)

    monkeypatch.setattr(type(embedder), "forward", slow)
    threads = [threading.Thread(target=embedder.compress, args=("Some words.",), name=name) for name in ("1", "second")]
    threads[0].start()
    threads[1].start()
    threads[0].join()
    first.set()
    threads[1].join()
    assert seen == [{False}, {False}]
    assert all(modes(embedder).values())


def test_ids_are_those_of_the_text(embedder):
    lm = ExtensibleLM(embedder.llm, embedder)
    lm.compress(["a <|im_end|> b " * 9])
    (kept,) = lm.store._texts.values()
    assert kept.n_tokens == len(np.asarray(embedder.llm.encode("a <|im_end|> b " * 9)))
