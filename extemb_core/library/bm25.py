"""Search passages by their words (BM25), which finds names and numbers, and fuse the ranking with that of vectors."""

from __future__ import annotations

import itertools
import operator
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from extemb_core.errors import StoreError
from extemb_core.utils.files import atomic_write
from extemb_core.utils.imports import hidden

with hidden("jax"):  # bm25s would start jax, which would take most of a GPU's memory
    import bm25s

# Scripts without spaces: Thai, Lao, Burmese, Khmer, and those of Chinese and Japanese.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Each of their characters is a word. So is a single letter or digit, but not what follows an apostrophe.
_WORD = rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}|(?<!['\u2019])[^\W{_UNSPACED}]"
RANK_OFFSET = 60  # the constant of reciprocal rank fusion, as its authors set it (Cormack et al., 2009)
MAX_REMOVED = 0.2  # share of removed passages beyond which an index is made anew

_K1, _B = 1.5, 0.75
_REMOVED = -1  # stands for the id of a passage that was removed
_VERSION = "2"  # of the file, and of the rules that split text into words


class WordIndex:
    """BM25 index (Lucene's form) over passages; adding or removing some does not touch the others.

    Args:
        ids: (n,) ids of the first passages.
        texts: Texts of these passages.
    """

    def __init__(self, ids: Sequence[int] = (), texts: Sequence[str] = ()) -> None:
        # For each row, that is each passage ever added: its id, or _REMOVED, and its number of words.
        self._ids, self._lengths = np.zeros(0, np.int64), np.zeros(0, np.int64)
        # Word -> the rows that contain it, and how often.
        self._postings: defaultdict[str, tuple[array[int], array[int]]] = defaultdict(lambda: (array("I"), array("I")))
        self.add(ids, texts)

    @property
    def ids(self) -> set[int]:
        """Ids of the passages."""
        return set(self._ids[self._ids != _REMOVED].tolist())

    def add(self, ids: Sequence[int], texts: Sequence[str]) -> None:
        """Add passages that are not in the index. ids, texts: (n,) each."""
        words_of_each, first = self._words(texts), len(self._ids)
        lengths = np.array([*map(len, words_of_each)], np.int64)
        unknown = np.full_like(lengths, _REMOVED)
        self._ids, self._lengths = np.append(self._ids, unknown), np.append(self._lengths, lengths)
        for row, words in enumerate(words_of_each, first):
            for word, count in Counter(words).items():
                rows, counts = self._postings[word]
                rows.append(row)
                counts.append(count)
        self._ids[first:] = ids  # last, so that after an interruption they can be added again

    def remove(self, ids: Iterable[int]) -> None:
        """Remove passages."""
        self._ids[np.isin(self._ids, [*ids])] = _REMOVED

    def should_be_made_anew(self) -> bool:
        """Return whether it holds too much that was removed."""
        n_removed = np.count_nonzero(self._ids == _REMOVED)
        return bool(n_removed > MAX_REMOVED * max(1, len(self._ids) - n_removed))

    def search(self, question: str, k: int) -> list[tuple[int, float]]:
        """Return (id, score) of the passages with the question's words, best first; equal scores by id.

        More than `k` if others score the same as the last one, as their order of ids means nothing.
        """
        ids, lengths, scores = self._ids, self._lengths, np.zeros(len(self._ids))
        mean_length = lengths[ids != _REMOVED].mean() if (ids != _REMOVED).any() else 0
        for rarity, rows, counts in map(self._look_up, self._words([question])[0]):
            scores[rows] += rarity * counts / (counts + _K1 * (1 - _B + _B * lengths[rows] / mean_length))
        matching = scores.nonzero()[0]
        best = matching[np.lexsort((ids[matching], -scores[matching]))]
        best = best[scores[best] >= scores[best[:k]][-1:]]
        return list(zip(ids[best].tolist(), scores[best].tolist(), strict=True))

    def words(self, question: str) -> list[tuple[float, set[int]]]:
        """Return, for each word of a question, its rarity among the passages (idf), and the ids of those with it."""
        found = map(self._look_up, dict.fromkeys(self._words([question])[0]))
        return [(rarity, set(self._ids[rows].tolist())) for rarity, rows, _ in found]

    def _look_up(self, word: str) -> tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return a word's idf, the rows that contain it, and how often."""
        rows, counts = (np.array(part, np.int64) for part in self._postings.get(word, ((), ())))
        here = self._ids != _REMOVED
        rows, counts = rows[here[rows]], counts[here[rows]]
        return float(np.log1p((np.count_nonzero(here) - len(rows) + 0.5) / (len(rows) + 0.5))), rows, counts

    def save(self, file: Path, mark: str | None = None) -> None:
        """Write the index atomically, with a checksum.

        Args:
            file: File to write.
            mark: Value that `load` must be given to accept the file.

        Raises:
            StoreError: The disk refuses.
        """
        postings = [*self._postings.values()]
        tensors: dict[str, np.ndarray[Any, Any]] = {
            "ids": self._ids,
            "lengths": self._lengths,
            "words": np.frombuffer("\n".join(self._postings).encode(), np.uint8),
            "ends": np.cumsum([len(rows) for rows, _ in postings], dtype=np.int64),
            "rows": np.frombuffer(b"".join(rows for rows, _ in postings), np.uint32),
            "counts": np.frombuffer(b"".join(counts for _, counts in postings), np.uint32),
        }
        try:
            with atomic_write(file) as temporary:
                save_file(tensors, temporary, _metadata_of(tensors, mark))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} could not be written ({error}); it is rebuilt when next needed") from error

    @classmethod
    def load(cls, file: Path, mark: str | None = None) -> WordIndex | None:
        """Load an index, or None if it is missing, damaged or of another version or mark and has to be made anew."""
        if not file.is_file():  # devices and pipes would never end
            return None
        try:
            with safe_open(file, "numpy") as stream:
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a mapping
                if stream.metadata() != _metadata_of(tensors, mark):
                    return None
            return cls._of(tensors)
        except (OSError, SafetensorError, KeyError, ValueError, IndexError, TypeError):  # a checksum can be forged
            return None

    @classmethod
    def _of(cls, tensors: Mapping[str, np.ndarray[Any, Any]]) -> WordIndex:
        index = cls()
        index._ids, index._lengths = (
            tensors[name].astype(np.int64, casting="safe").ravel() for name in ("ids", "lengths")
        )
        if len(index._ids) != len(index._lengths) or (tensors["rows"] >= len(index._ids)).any():
            raise ValueError("rows of passages that are not there")
        start = 0
        for word, end in zip(tensors["words"].tobytes().decode().split("\n"), tensors["ends"].tolist(), strict=False):
            rows, counts = (array("I", tensors[name][start:end].tobytes()) for name in ("rows", "counts"))
            if len(rows) != len(counts):
                raise ValueError(f"{len(rows)} rows with {len(counts)} counts")
            index._postings[word] = rows, counts
            start = end
        return index

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        settings = {"token_pattern": _WORD, "stopwords": "en", "return_ids": False, "show_progress": False}
        # Ligatures, separate accents and soft hyphens do not make a different word.
        plain = [unicodedata.normalize("NFKC", text).replace("\xad", "") for text in texts]
        return [list(words) for words in bm25s.tokenize(plain, **settings)]


def _metadata_of(tensors: Mapping[str, np.ndarray[Any, Any]], mark: str | None) -> dict[str, str]:
    """Return the metadata that stands beside the tensors in a file."""
    metadata = {"version": _VERSION, "checksum": _checksum_of(tensors)}
    return metadata if mark is None else metadata | {"mark": mark}


def _checksum_of(tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
    return digest.hexdigest()


def fuse(rankings: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Fuse rankings by reciprocal rank: an item's score is the sum of 1 / (60 + rank), ranks from 1.

    Items of equal score all have the rank of the last of them.

    Args:
        rankings: Rankings, each of (item, score), best first.

    Returns:
        (item, score), best first; equal scores in the order of the items.
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        rank = 0
        for _, equals in itertools.groupby(ranking, operator.itemgetter(1)):
            items = [item for item, _ in equals]
            rank += len(items)
            for item in items:
                scores[item] = scores.get(item, 0.0) + 1 / (RANK_OFFSET + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))
