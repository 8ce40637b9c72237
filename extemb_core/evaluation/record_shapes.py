"""What must stand in a record for the results page to show it; see `runs` for who writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class ShapeError(ValueError):
    """Where something is not as it should be, in words that follow the name of a file."""


def check_record(record: Mapping[str, Any]) -> None:
    """Check everything that the page and the plots read.

    Raises:
        ShapeError: The first thing that is missing or of another type.
    """
    _check(record, _HEAD, "")
    _check(record["summary"], _SUMMARIES[record["kind"]], "summary")
    if not record["summary"]:
        raise ShapeError("summary is empty")
    if len(record["samples"]) != record["n"]:
        raise ShapeError(f"n is {record['n']} and it holds {len(record['samples'])} samples")


class _Is(NamedTuple):
    """A value without parts."""

    words: str
    test: Callable[[Any], bool]


class _Each(NamedTuple):
    """Every value of an object, or every item of a list; `numbered`: its keys are whole numbers."""

    shape: Any
    numbered: bool = False
    items: bool = False


class _Optional(NamedTuple):
    """The value of a key that may be missing."""

    shape: Any


_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)))


def _is_share(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    if "refused" in value:
        return isinstance(value["refused"], str)
    return _is_number(value.get("mean")) and _is_interval(value.get("interval", 0))


_TEXT = _Is("text", lambda value: isinstance(value, str))
_MAYBE_TEXT = _Is("text or null", lambda value: value is None or isinstance(value, str))
_COUNT = _Is("a whole number", lambda value: _is_number(value) and isinstance(value, int) and value >= 0)
_NUMBER = _Is("a number", _is_number)
_MAYBE_NUMBER = _Is("a number or null", lambda value: value is None or _is_number(value))
_INTERVAL = _Is("[low, high] or null", _is_interval)
_SHARE = _Is('a mean with its interval, or why it is "refused"', _is_share)
_OBJECT = _Is("an object", lambda value: isinstance(value, dict))
_MAYBE_OBJECT = _Is("an object or null", lambda value: value is None or isinstance(value, dict))
_LIST = _Is("a list", lambda value: isinstance(value, list))
_WORD = _Is(
    "a word of letters, digits, - and _", lambda value: isinstance(value, str) and bool(_PLAIN.fullmatch(value))
)
_NAMES = _Is(
    "a list of names", lambda value: isinstance(value, list) and value != [] and set(map(type, value)) == {str}
)
_MEAN = {"mean": _NUMBER, "interval": _INTERVAL}

_SUMMARIES: dict[str, Any] = {
    "ppl": _Each(
        {
            "n": _COUNT,
            "arms": _Each({"positions": _NUMBER, "loss": _NUMBER, "interval": _INTERVAL, "perplexity": _NUMBER}),
            "ratios": _Each({"minus": _Each(_MEAN), "gap_share": _SHARE}, numbered=True),
        },
        numbered=True,
    ),
    "qa": {
        "metrics": _NAMES,
        "arms": _Each({"n": _COUNT, "positions": _NUMBER}),
        "minus": _Optional(_Each(_Each(_Each(_MEAN)), numbered=True)),
        "retained": _Optional(_Each(_SHARE, numbered=True)),
        "retained_loss": _Optional(_Each(_SHARE, numbered=True)),
        "by_rank": _Optional(_Each(_Each(_Each(_NUMBER)), numbered=True)),
    },
    "needle": {
        "cells": _Each(
            {
                "task": _WORD,
                "arm": _TEXT,
                "tokens": _COUNT,
                "depth": _NUMBER,
                "n": _COUNT,
                "correct": _NUMBER,
            },
            items=True,
        ),
        "arms": _Each(_Each({"n": _COUNT, "correct": _MEAN})),
        "minus": _Optional(_Each(_Each(_Each(_MEAN), numbered=True))),
    },
    "speed": _Each(
        _Each(
            {
                "n": _COUNT,
                "first_token_s": _MAYBE_NUMBER,
                "decode_tokens_per_s": _MAYBE_NUMBER,
                "peak_mib": _MAYBE_NUMBER,
                "positions": _MAYBE_NUMBER,
                "first_token_over_full": _MAYBE_NUMBER,
                "compress_tokens_per_s": _Optional(_NUMBER),
            }
        ),
        numbered=True,
    ),
}
_HEAD: dict[str, Any] = {
    "kind": _Is(f"one of {', '.join(_SUMMARIES)}", lambda value: isinstance(value, str) and value in _SUMMARIES),
    "config": {"llm": _TEXT, "embedder": _MAYBE_TEXT, "seed": _NUMBER},
    "data": _Each({"file": _TEXT}, items=True),
    "fingerprint": _MAYBE_TEXT,
    "embedder": _Optional(_MAYBE_OBJECT),  # records of 0.1.0 have none, nor the loss of a reference answer
    "provenance": {"command": _TEXT, "date": _TEXT, "git": _OBJECT, "hardware": _OBJECT},
    "n": _COUNT,
    "samples": _LIST,
    "summary": _OBJECT,
}


def _check(value: Any, shape: Any, where: str) -> None:
    if isinstance(shape, _Is):
        _require(shape, value, where)
    elif isinstance(shape, _Each):
        _require(_LIST if shape.items else _OBJECT, value, where)
        for key, inner in enumerate(value) if shape.items else value.items():
            if shape.numbered and not (str(key).isascii() and str(key).isdecimal()):
                raise ShapeError(f"{where} has the key {key!r:.40}, not a whole number")
            _check(inner, shape.shape, f"{where}[{key}]" if shape.items else f"{where}.{key}")
    else:
        _require(_OBJECT, value, where)
        for key, inner in shape.items():
            name = f"{where}.{key}".lstrip(".")
            if key in value:
                _check(value[key], inner.shape if isinstance(inner, _Optional) else inner, name)
            elif not isinstance(inner, _Optional):
                raise ShapeError(f"{name} is missing")
    if where == "summary" and isinstance(shape, dict) and "metrics" in shape:
        for arm, own in value["arms"].items():  # the keys depend on another value
            _check(own, dict.fromkeys(value["metrics"], _MEAN), f"summary.arms.{arm}")


def _require(shape: _Is, value: Any, where: str) -> None:
    if not shape.test(value):
        raise ShapeError(f"{where} is {value!r:.60}, not {shape.words}")
