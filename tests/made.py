"""Compressed texts without a model: random embeddings of the right shapes."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from extemb_core.documents import text_ref
from extemb_core.models.chunks import compressed_positions
from extemb_core.models.compressed import Compressed
from extemb_core.models.pooling import Groups, pool

FINGERPRINT = "5e" * 16
VERSION_1_FINGERPRINT = "6b93a14b70f1799b530c3dc3a58ac4e6"


def version_1(folder):
    """Unpack what extemb 0.1.0 wrote with smollm2-135m-instruct at ratio 8: library (two documents), store, shards."""
    with zipfile.ZipFile(Path(__file__).with_name("version-1.zip")) as archive:
        archive.extractall(folder)
    return folder


def compressed(name, *, n_tokens=50, ratio=4, width=24, fingerprint=FINGERPRINT, chunk_size=32, scale=1.0, seed=0):
    count = compressed_positions(n_tokens, ratio, chunk_size)
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


def anchored(name, *, n_tokens=50, ratio=4, width=24, fingerprint=FINGERPRINT, chunk_size=32, scale=1.0, seed=0):
    """The same for entry layer 3: groups of random states, the first of them far longer than the others."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, str(name))))
    states = scale * torch.randn(n_tokens, width, generator=generator)
    states[:1] *= 3e4
    weights = 0.5 + torch.rand(n_tokens, generator=generator)
    chunks = zip(states.split(chunk_size), weights.split(chunk_size), strict=True) if n_tokens else ()
    pooled = [Groups(torch.zeros(0, width), torch.zeros(0), torch.zeros(0)), *(pool(*chunk, ratio) for chunk in chunks)]
    groups = Groups(*map(torch.cat, zip(*pooled, strict=True)))
    plain = compressed(name, n_tokens=n_tokens, ratio=ratio, fingerprint=fingerprint, chunk_size=chunk_size)
    return replace(
        plain,
        embeddings=groups.states,
        downscaling="mean",
        entry_layer=3,
        anchors=np.arange(len(groups.norms), dtype=np.int32),
        mean_norms=groups.means.norm(dim=-1),
        norms=groups.norms,
        weights=groups.weights,
    )


def same(one, other):
    assert torch.equal(one.embeddings, other.embeddings)
    assert one.entry_layer == other.entry_layer
    if one.entry_layer:
        assert np.array_equal(one.anchors, other.anchors)
        for name in ("mean_norms", "norms", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name))
