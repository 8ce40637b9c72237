"""What is known of the models: their parts add up to the pinned files."""

from __future__ import annotations

from extemb_core.weights import registry as known


def test_the_pinned_parts_add_up() -> None:
    for name, model in known.KNOWN_MODELS.items():
        assert name == model.name
        assert model.licence
        assert sum(part.size_bytes for part in model.parts) == model.size_bytes
        assert {len(digest) for digest in (model.sha256, *(part.sha256 for part in model.parts))} == {64}
