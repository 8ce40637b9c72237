"""Convert text to token ids and back: as data, whose control tokens are not obeyed, or as a model's own prompt text."""

from __future__ import annotations

import hashlib
import re
import threading
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from extemb_core.documents import refuse_lone_surrogates
from extemb_core.errors import ConfigError

# Long texts are tokenised in pieces of at most this many characters, so that memory does not grow with the text.
# A space between two letters begins a new word in every byte-level BPE in use (a line break after a full stop does
# not), so a cut there does not change the ids; other tokenizers may encode the start of a piece differently.
_PIECE_CHARS = 32_768
_WORD_BREAK = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_TOKENIZER_PROBE = "The 3 quick brown foxes\n\n\tjumped over naïve 東京 dogs; x_1 += 42.5  # ok?"


class TextEncoder:
    """A model's tokenizer, safe for several threads.

    Args:
        tokenizer: Its fast tokenizer.
        name: Name of the model in messages.

    Raises:
        ConfigError: The tokenizer has no fast version.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"the tokenizer of {name!r} has no fast version; use a model that ships tokenizer.json")
        self.tokenizer = tokenizer
        self.name = name
        self._template_lock = threading.Lock()

    @cached_property
    def tokenizer_digest(self) -> str:
        """sha256 of the vocabulary and of how a fixed text is split."""
        digest = hashlib.sha256()
        for token, index in sorted(self.tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
            digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
        digest.update(repr(self.encode(_TOKENIZER_PROBE).tolist()).encode())
        return digest.hexdigest()

    @cached_property
    def bos_token_id(self) -> int | None:
        """The id that the tokenizer itself puts before a text, or None."""
        bos = self.tokenizer.bos_token_id
        ids = self.tokenizer("a").input_ids
        return int(bos) if bos is not None and len(ids) > 1 and ids[0] == bos else None

    @cached_property
    def control_tokens(self) -> dict[str, int]:
        """Added tokens that are not mere white space (some vocabularies add runs of spaces as ordinary tokens)."""
        added = self.tokenizer.added_tokens_decoder
        return {token.content: int(index) for index, token in sorted(added.items()) if token.content.strip()}

    @cached_property
    def control_ids(self) -> np.ndarray[Any, Any]:
        """Ids that text never becomes; the unknown token is not one: characters outside the vocabulary become it."""
        ids = (index for index in self.control_tokens.values() if index != self.tokenizer.unk_token_id)
        return np.array(list(ids), dtype=np.int64)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        """The same as a set, which is faster than numpy for short texts."""
        return frozenset(self.control_ids.tolist())

    @cached_property
    def _plain_encoder(self) -> Tokenizer:
        """A copy of the tokenizer that obeys no special token and truncates nothing.

        A copy, because these switches are state: the tokenizer itself is in use by other threads, and its other users
        may have set a truncation.
        """
        encoder = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        encoder.encode_special_tokens = True
        encoder.no_truncation()
        encoder.no_padding()
        return encoder

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Encode as data: control tokens inside `text` become the ids of their characters, never the control id.

        Returns:
            (T,) int32 ids, no BOS and no other token added.

        Raises:
            DocumentError: The text holds half of a surrogate pair, which is no character.
        """
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Encode as `encode`, and find where in the text each token ends.

        Returns:
            (T,) int32 ids, and (T,) int32 characters, ascending.
        """
        refuse_lone_surrogates(text)
        ids, ends = array("i"), array("i")  # grow in place: joining the pieces at the end would need twice the memory
        start = 0
        for piece in pieces_of(text, _PIECE_CHARS):
            piece_ids, piece_ends = self._encode_piece(piece)
            ids.frombytes(piece_ids.tobytes())
            ends.frombytes((piece_ends + np.int32(start)).tobytes())
            start += len(piece)
        if ends:  # the last token also covers what follows it, such as a combining accent
            ends[-1] = start
        # An empty array has no buffer.
        return tuple(np.frombuffer(values, np.int32) if values else np.empty(0, np.int32) for values in (ids, ends))  # type: ignore[return-value]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text."""
        return [len(self.encode(text)) for text in texts]

    def encode_pieces(self, text: str) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
        """Encode piece by piece, so that a long text's ids need not be in memory together.

        Returns:
            (T,) ids and the number of characters that they stand for, in the text's order.
        """
        refuse_lone_surrogates(text)
        return ((self._encode_piece(piece)[0], len(piece)) for piece in pieces_of(text, _PIECE_CHARS))

    def _encode_piece(self, text: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return (T,) int32 ids, and the (T,) characters at which they end."""
        encoding = self._plain_encoder.encode(text, add_special_tokens=False)
        if self._control_ids.isdisjoint(encoding.ids):
            ends = np.array([end for _, end in encoding.offsets], dtype=np.int32)
            return np.array(encoding.ids, dtype=np.int32), ends
        # Added tokens that the tokenizer does not flag as special are still recognised: split them by encoding their
        # first character on its own.
        parts: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            cuts = [start, start + 1, end] if index in self._control_ids and end - start > 1 else []
            if not cuts:
                parts.append((np.array([index], dtype=np.int32), np.array([end], dtype=np.int32)))
            for first, last in pairwise(cuts):
                piece_ids, piece_ends = self._encode_piece(text[first:last])
                parts.append((piece_ids, piece_ends + np.int32(first)))
        joined_ids, joined_ends = map(np.concatenate, zip(*parts, strict=True))
        return joined_ids, joined_ends

    def encode_template(self, text: str) -> list[int]:
        """Encode as the model's own prompt text: control tokens are obeyed. Only for chat templates."""
        refuse_lone_surrogates(text)
        with self._template_lock:  # calling a fast tokenizer sets its state
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids as text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def pieces_of(text: str, n_chars: int) -> Iterator[str]:
    """Yield a text in pieces of at most `n_chars` characters, cut between words if possible."""
    start = 0
    while len(text) - start > n_chars:
        middle, end = start + n_chars // 2, start + n_chars
        cut = end
        for match in _WORD_BREAK.finditer(text, middle, end):
            cut = match.start()
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]
