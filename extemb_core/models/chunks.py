"""Count the chunks of a text and their extensible embeddings. Needs no torch."""

from __future__ import annotations


def n_embeddings(n_tokens: int, ratio: int) -> int:
    """Count the extensible embeddings of a chunk of `n_tokens` tokens: ceil(n_tokens / ratio)."""
    return -(-n_tokens // ratio)


def chunk_lengths(n_tokens: int, chunk_size: int) -> list[int]:
    """List the lengths of a document's chunks: full ones, then the tail."""
    full, tail = divmod(n_tokens, chunk_size)
    return [chunk_size] * full + ([tail] if tail else [])


def compressed_positions(n_tokens: int, ratio: int, chunk_size: int = 512) -> int:
    """Count the embeddings of n_tokens tokens: ceil(length / ratio) for each chunk, of which the last may be shorter.

    >>> compressed_positions(600, ratio=8, chunk_size=512)
    75
    """
    full, tail = divmod(n_tokens, chunk_size)
    return full * n_embeddings(chunk_size, ratio) + n_embeddings(tail, ratio)


def span_positions(start: int, stop: int, ratio: int, chunk_size: int) -> int:
    """Count the embeddings of tokens `start` to `stop`: groups are counted from `start`, and end where a chunk does.

    >>> span_positions(6, 12, ratio=4, chunk_size=8)
    2
    """
    first = min(stop, (start // chunk_size + 1) * chunk_size) - start  # tokens in the chunk where the span begins
    return n_embeddings(first, ratio) + compressed_positions(stop - start - first, ratio, chunk_size)


def embeddings_of(n_tokens: int, ratio: int, chunk_size: int) -> int | None:
    """Count the embeddings of a text described by a file's numbers; None if they cannot describe a text."""
    possible = n_tokens >= 0 and 0 < ratio <= chunk_size
    return compressed_positions(n_tokens, ratio, chunk_size) if possible else None
