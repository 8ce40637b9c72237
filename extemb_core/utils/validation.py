"""Check settings, without torch: the command line makes its options from configurations that use these checks."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from extemb_core.errors import ConfigError, ExtembError

_MAX_SEED = 2**32 - 1
ENGINES = ("transformers", "vllm")


def is_count(value: Any) -> bool:
    """Return whether a setting is a positive whole number (True is not)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def whole_number(
    value: Any, name: str, at_least: int = 1, *, remedy: str = "", error: type[ExtembError] = ConfigError
) -> int:
    """Return a setting as an int.

    Args:
        value: Value passed; numpy's integers are accepted, True and False are not.
        name: Name of the setting.
        at_least: The smallest legal value.
        remedy: What to pass instead, e.g. "steps, or None".
        error: Type of the error.

    Raises:
        ConfigError: The value is not a whole number, or below `at_least`.
    """
    try:
        number = at_least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = at_least - 1
    if number < at_least:
        remedy = remedy or f"an int from {at_least} up"
        raise error(f"{name}={value!r} is not a whole number of at least {at_least}; pass {remedy}")
    return number


def check_seed(seed: Any) -> None:
    """Raise `ConfigError` for a seed that numpy, which takes 32 bits, torch or transformers would refuse."""
    whole_number(seed, "seed", 0, remedy=(remedy := f"an int from 0 to {_MAX_SEED}"))
    if seed > _MAX_SEED:
        raise ConfigError(f"seed={seed!r:.80} is more than 32 bits; pass {remedy}")


def require_text(value: Any, name: str, *, may_be_empty: bool = False) -> None:
    """Raise `ConfigError` for a value that is not a text, or is empty; `name` is its name in the message."""
    if not isinstance(value, str):
        raise ConfigError(f"the {name} is a {type(value).__name__}, {value!r:.80}; pass a str")
    if not (may_be_empty or value.strip()):
        raise ConfigError(f"the {name} is empty; say something")


def require_number(value: Any, name: str, is_legal: Callable[[Any], bool], rule: str) -> None:
    """Raise `ConfigError` for a setting that is not a number (nor is True), or breaks the rule in the message."""
    if isinstance(value, bool) or not isinstance(value, Real) or not is_legal(value):
        raise ConfigError(f"{name}={value!r:.80} is not {rule}")


def require_one_of(value: Any, name: str, legal: Iterable[str]) -> None:
    """Raise `ConfigError` for a setting that is not one of its legal values."""
    if value not in (legal := tuple(legal)):
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(legal)}; pass one of them")


def name_or_path(value: str | os.PathLike[str]) -> str:
    """Return a name as it is, and a path as text that cannot be taken for a hub id.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(value, str):
        return value
    try:
        path = os.path.expanduser(os.fsdecode(value))
    except TypeError:
        raise ConfigError(f"{value!r:.80} is neither a name nor a path; pass a str or an os.PathLike") from None
    return path if os.path.exists(path) else os.path.join(os.curdir, path)


def path_of(value: str | os.PathLike[str]) -> Path:
    """Return a path with a "~" at its start expanded, as it is where there is no such user."""
    return Path(os.path.expanduser(value))


def check_engine(engine: str, base_url: str | None, api_key: str | None = None) -> None:
    """Raise `ConfigError` for an unknown engine, a server address or key that it does not use, or a missing address."""
    require_one_of(engine, "engine", ENGINES)
    if (engine == "vllm") != bool(base_url) or (api_key and engine != "vllm"):
        raise ConfigError(
            f"engine={engine!r} came with base_url={base_url!r}; pass engine='vllm' and the address of a server "
            "together, such as base_url='http://localhost:8000/v1'"
        )


def paths_as_text(config: Any, *names: str, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """Convert paths in the fields of a frozen dataclass to text, single or in tuples.

    Args:
        config: The dataclass.
        *names: Fields that may also hold a name.
        files: Fields that are tuples of files; in these a "~" is expanded, as in `folders`.
        folders: Fields that are a folder, or None.

    Raises:
        ConfigError: One of `files` is a single text, whose letters would be taken for files.
    """
    for name in files:
        if isinstance(getattr(config, name), str):
            raise ConfigError(f"{name}={getattr(config, name)!r} is one str; pass a tuple of files")
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, os.PathLike):
            text = name_or_path(value) if field.name in names else os.fspath(value)
            object.__setattr__(config, field.name, text)
        elif isinstance(value, tuple | list) and any(isinstance(one, os.PathLike) for one in value):
            object.__setattr__(config, field.name, tuple(map(os.fspath, value)))
    for name in (*files, *folders):
        value = getattr(config, name)
        if isinstance(value, str):
            object.__setattr__(config, name, os.path.expanduser(value))
        elif any(isinstance(one, str) and one.startswith("~") for one in value or ()):
            object.__setattr__(config, name, tuple(map(os.path.expanduser, value)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # numpy's too


def _is_texts(value: Any) -> bool:
    return all(isinstance(text, str) and text for text in ((value,) if isinstance(value, str) else value))


_SAMPLING_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda n: _is_whole(n) and n >= 1, "a whole number of at least 1"),
    "temperature": (lambda t: 0 <= t < math.inf, "0 (greedy) or above"),
    "top_p": (lambda p: 0 < p <= 1, "above 0 and at most 1"),
    "top_k": (lambda k: _is_whole(k) and k >= 0, "0 (off) or a positive whole number"),
    "repetition_penalty": (lambda r: 0 < r < math.inf, "above 0 (1 is off)"),
    "seed": (lambda s: s is None or (_is_whole(s) and -(2**63) <= s < 2**64), "a whole number of 64 bits or None"),
    "stop": (_is_texts, "texts that are not empty"),
}


def check_sampling(name: str, value: Any, *, alias: str | None = None) -> Any:
    """Check a field of `Sampling`, and return its value, whole numbers as int.

    `alias` is the caller's name for the field.

    Raises:
        ConfigError: The value is not legal.
    """
    is_legal, rule = _SAMPLING_RULES[name]
    try:
        legal = is_legal(value)
    except TypeError:  # of a wrong type
        legal = False
    if not legal:
        raise ConfigError(f"{alias or name}={value!r:.80} must be {rule}; pass such a value")
    return int(value) if _is_whole(value) else value


def refuse_unknown(settings: Mapping[str, Any], known: Collection[str], also: Collection[str] = ()) -> None:
    """Raise `ConfigError` for an unknown setting, and suggest the nearest known names.

    Args:
        settings: Values by name.
        known: Names of the known settings.
        also: Names that are accepted, and never suggested.
    """
    for name in sorted(settings.keys() - {*known, *also}):
        nearest = " or ".join(get_close_matches(name, known)) or f"one of {', '.join(sorted(known))}"
        raise ConfigError(f"unknown setting {name}={settings[name]!r:.80}; pass {nearest}, or leave it out")
