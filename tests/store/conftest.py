"""A store in a folder of its own."""

from __future__ import annotations

import pytest

from extemb_core.store.store import EmbeddingStore


@pytest.fixture
def store(tmp_path):
    with EmbeddingStore.open(tmp_path / "docs.extemb") as opened:
        yield opened
