"""Text encoders: unit vectors, near for texts about the same, and clear errors."""

from __future__ import annotations

import os

import numpy as np
import pytest
from retrieval_encoder import by_words

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsNotFoundError
from extemb_core.library import encoders
from extemb_core.library.encoders import CallableEncoder, StaticEncoder, as_encoder


def test_a_function_is_an_encoder():
    encoder = as_encoder(by_words)
    assert encoder.width == 64
    assert encoder.name == "callable:by_words"
    vectors = encoder.encode(["the old mill", "", "the mill"])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 1])
    assert vectors[0] @ vectors[2] > 0.8
    assert as_encoder(encoder) is encoder


@pytest.mark.parametrize("made", [[1.0, 2.0], [[1.0]], [[np.nan], [1.0]]])
def test_what_an_encoder_returns_is_checked(made):
    encoder = CallableEncoder(lambda texts: [[1.0]] * len(texts), "mine")
    encoder._function = lambda texts: made
    with pytest.raises(ConfigError, match="mine returned shape"):
        encoder.encode(["a", "b"])
    with pytest.raises(ConfigError, match="encoder=3 is not a text encoder"):
        as_encoder(3)


def test_a_folder_is_a_model_of_sentence_transformers(monkeypatch, tmp_path):
    monkeypatch.setattr(encoders, "SentenceTransformerEncoder", lambda model: model)
    assert as_encoder(tmp_path) == as_encoder(str(tmp_path)) == str(tmp_path)


def test_the_default_needs_its_wheel(monkeypatch):
    monkeypatch.setattr(encoders, "installed_file", lambda part: None)
    with pytest.raises(WeightsNotFoundError, match="pip install --no-deps wordllama=="):
        StaticEncoder()


def test_the_default_reads_only_the_pinned_file(monkeypatch, tmp_path):
    (tmp_path / "other").write_bytes(b"words")
    monkeypatch.setattr(encoders, "installed_file", lambda part: tmp_path / "other")
    with pytest.raises(WeightsCorruptError, match="is not the file that is pinned"):
        StaticEncoder()


@pytest.mark.real_model
@pytest.mark.skipif(
    not os.environ.get("CI") and encoders.installed_file(encoders._WEIGHTS) is None, reason="needs the wordllama wheel"
)
def test_the_default_knows_what_words_mean():
    encoder = as_encoder(None)
    texts = ["The cat slept on the sofa.", "A kitten was lying on the couch.", "Interest rates rose by half a point."]
    cat, kitten, rates = encoder.encode(texts)
    assert cat @ kitten > cat @ rates + 0.2
    assert encoder.encode([""]).any() == np.False_
