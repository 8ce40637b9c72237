"""Compressed texts without a model: random embeddings of the right shapes."""

from __future__ import annotations

import torch

from extemb_core.documents import text_ref
from extemb_core.models.compressed import Compressed
from extemb_core.models.downscaling import chunk_lengths, n_embeddings

FINGERPRINT = "5e" * 16


def compressed(name, *, n_tokens=50, ratio=4, width=24, fingerprint=FINGERPRINT, chunk_size=32, scale=1.0, seed=0):
    count = sum(n_embeddings(length, ratio) for length in chunk_lengths(n_tokens, chunk_size))
    generator = torch.Generator().manual_seed(seed + sum(map(ord, str(name))))
    return Compressed(
        embeddings=scale * torch.randn(count, width, generator=generator),
        ratio=ratio,
        n_tokens=n_tokens,
        ref=text_ref(str(name)),
        fingerprint=fingerprint,
        chunk_size=chunk_size,
        ratios=(2, 4, 8, 16),
        downscaling="strided",
    )
