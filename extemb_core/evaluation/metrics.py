"""Score an answer by the rules of SQuAD v1.1 (Rajpurkar et al., arXiv 1606.05250), and by ROUGE-L.

Every score is between 0 and 1, the best over the reference answers. SQuAD's rules compare without case, ASCII
punctuation and English articles. They leave nothing of an answer such as "A" or "%", which an empty prediction would
equal and every prediction contain; so such an answer is compared raw instead, only split at white space. That is the
only departure from the rules.
"""

from __future__ import annotations

import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from extemb_core.errors import ConfigError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_WORD = re.compile(r"[^\W_]+")

Tokens = list[str]


def normalise_answer(text: str) -> str:
    """Lower the case, drop ASCII punctuation, then articles, and put one space between words, as SQuAD does."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is one of the answers, else 0.

    Raises:
        ConfigError: There is no answer to compare with. The other metrics raise it too.
    """
    return _best(operator.eq, prediction, answers, _answer_tokens)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the harmonic mean of the shares of the prediction's and the answer's tokens that both have in common."""
    return _best(_overlap, prediction, answers, _answer_tokens)


def contained(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction contains an answer's tokens in a row, else 0: long-winded answers count too."""
    return _best(_holds, prediction, answers, _answer_tokens)


def rouge_l(prediction: str, answers: Sequence[str]) -> float:
    """Return ROUGE-L (Lin, 2004): as `f1`, but with the longest common subsequence of lower-cased words.

    A word is a run of letters and digits; articles count, and nothing is stemmed.
    """
    return _best(_ordered_overlap, prediction, answers, lambda text: _WORD.findall(text.lower()))


METRICS = {"em": exact_match, "f1": f1, "contained": contained, "rouge_l": rouge_l}
"""Metrics by their names in `question_templates.json` and in a record."""


def _best(
    score: Callable[[Tokens, Tokens], float], prediction: str, answers: Sequence[str], split: Callable[[str], Tokens]
) -> float:
    """Score the prediction's tokens against each answer's, or raw words if an answer has no tokens; return the best."""
    if isinstance(answers, str) or not answers:  # a single text would be taken for its characters
        raise ConfigError(f"answers={answers!r} must be a sequence of at least one text; pass [answer]")
    scores = []
    for answer in answers:
        tokens_of = split if split(answer) else str.split
        scores.append(float(score(tokens_of(prediction), tokens_of(answer))))
    return max(scores)


def _answer_tokens(text: str) -> Tokens:
    return normalise_answer(text).split()


def _holds(predicted: Tokens, wanted: Tokens) -> bool:
    return f" {' '.join(wanted)} " in f" {' '.join(predicted)} "  # no token has white space in it


def _overlap(predicted: Tokens, wanted: Tokens) -> float:
    return _f_measure((Counter(predicted) & Counter(wanted)).total(), predicted, wanted)


def _ordered_overlap(predicted: Tokens, wanted: Tokens) -> float:
    return _f_measure(_longest_common_subsequence(predicted, wanted), predicted, wanted)


def _f_measure(common: int, predicted: Tokens, wanted: Tokens) -> float:
    """Return the harmonic mean of common / predicted and common / wanted; two empty texts are the same."""
    return 2 * common / (len(predicted) + len(wanted)) if predicted or wanted else 1.0


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    """Return its length, by rows of the usual table: entry j is the length for `a` so far and the first j of `b`."""
    numbers: dict[str, int] = {}
    a_ids, b_ids = (np.array([numbers.setdefault(token, len(numbers)) for token in tokens]) for tokens in (a, b))
    row = np.zeros(len(b) + 1, dtype=np.int64)
    for token in a_ids:
        longer = np.maximum(row[1:], row[:-1] + (b_ids == token))
        row[1:] = np.maximum.accumulate(longer)  # an entry is never below the one to its left
    return int(row[-1])
