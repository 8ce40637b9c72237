"""The in-memory store: finest ratio kept once, coarser ones derived, bounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import random_embedder

from extemb_core.errors import ConfigError, RatioError
from extemb_core.store.base import MemoryStore


@pytest.fixture
def compressed(llm):
    return random_embedder(llm).compress("Rivers carry sand to the sea. " * 20, ratio=4)


def test_coarser_ratios_come_from_the_finest(compressed):
    store = MemoryStore()
    store.put(compressed)
    found = store.get(compressed.ref, compressed.fingerprint, 8)
    assert torch.equal(found.embeddings, compressed.at_ratio(8).embeddings)
    assert store.get(compressed.ref, compressed.fingerprint, 2) is None


@pytest.mark.parametrize("ratio", ["8", None, 0, -4, 2.5, True])
def test_a_ratio_that_cannot_be_is_refused(compressed, ratio):
    store = MemoryStore()
    store.put(compressed)
    with pytest.raises(RatioError, match=r"^ratio=.*; pass one of the embedder's ratios"):
        store.get(compressed.ref, compressed.fingerprint, ratio)


def test_another_fingerprint_is_another_entry(compressed):
    store = MemoryStore()
    store.put(compressed)
    assert store.get(compressed.ref, "0" * 32, 4) is None


def test_a_finer_copy_replaces_a_coarser_one_and_not_the_other_way(compressed):
    store = MemoryStore()
    store.put(compressed.at_ratio(8))
    store.put(compressed)
    finest = store.n_bytes
    store.put(compressed.at_ratio(8))
    assert store.n_bytes == finest == compressed.embeddings.numel() * 4
    assert store.get(compressed.ref, compressed.fingerprint, 4) is not None


def test_an_equal_copy_does_not_replace_the_first(compressed):
    store = MemoryStore()
    store.put(compressed)
    store.put(replace(compressed, embeddings=2 * compressed.embeddings))
    assert torch.equal(store.get(compressed.ref, compressed.fingerprint, 4).embeddings, compressed.embeddings)


def test_a_copy_that_cannot_be_derived_from_a_finer_one_replaces_it(compressed):
    store = MemoryStore()
    store.put(compressed)  # at ratio 4
    other = replace(compressed.at_ratio(8), ratios=(6,), ratio=6)
    store.put(other)
    assert store.get(compressed.ref, compressed.fingerprint, 6) is not None
    assert store.n_bytes == other.embeddings.numel() * 4


def test_the_least_recently_used_goes_first(llm):
    embedder = random_embedder(llm)
    a, b, c = embedder.compress(["one text here", "two texts here", "six texts here"], ratio=2)
    store = MemoryStore(max_bytes=(a.embeddings.numel() + b.embeddings.numel() + c.embeddings.numel() - 1) * 4)
    store.put(a)
    store.put(b)
    store.get(a.ref, a.fingerprint, 2)
    store.put(c)
    assert [store.get(x.ref, x.fingerprint, 2) is not None for x in (a, b, c)] == [True, False, True]


def test_what_is_larger_than_the_store_is_not_kept(compressed):
    store = MemoryStore(max_bytes=10)
    store.put(compressed)
    assert store.n_bytes == 0
    with pytest.raises(ConfigError, match="max_bytes=-1 is not a whole number of at least 0; pass 0 to keep nothing"):
        MemoryStore(max_bytes=-1)
