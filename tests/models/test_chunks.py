"""How many chunks a text has, and how many embeddings these."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extemb_core.models.chunks import chunk_lengths, compressed_positions, embeddings_of


@given(length=st.integers(0, 10_000), size=st.integers(1, 600))
def test_chunks_cover_the_text_with_one_tail_at_the_end(length, size):
    lengths = chunk_lengths(length, size)
    assert sum(lengths) == length
    assert all(chunk == size for chunk in lengths[:-1])
    assert all(0 < chunk <= size for chunk in lengths)


@given(st.integers(0, 5000), st.integers(1, 64), st.integers(1, 600))
def test_positions_are_counted_chunk_by_chunk(n_tokens, ratio, chunk_size):
    chunks = [min(chunk_size, n_tokens - start) for start in range(0, n_tokens, chunk_size)]
    positions = compressed_positions(n_tokens, ratio, chunk_size)
    assert positions == sum((chunk + ratio - 1) // ratio for chunk in chunks) <= n_tokens
    assert (positions == 0) == (n_tokens == 0)
    assert embeddings_of(n_tokens, ratio, chunk_size) == (positions if ratio <= chunk_size else None)


@pytest.mark.parametrize(("n_tokens", "ratio", "chunk_size"), [(-1, 4, 16), (8, 0, 16), (8, -2, 16), (8, 4, 0)])
def test_a_text_that_cannot_be_has_no_embeddings(n_tokens, ratio, chunk_size):
    assert embeddings_of(n_tokens, ratio, chunk_size) is None
