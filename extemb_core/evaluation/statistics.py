"""Compute means, and shares of means, with intervals over documents.

Measurements of one document are not independent, so whole groups are resampled: a bootstrap draws as many groups as
there are, with replacement, and gives the 2.5% and 97.5% quantiles of what is computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from extemb_core.errors import ConfigError

_RESAMPLES = 10_000
_DRAWS_AT_ONCE = 2_000_000  # keeps memory from growing with the number of groups

Values = np.ndarray[Any, Any]
Arms = Mapping[str, Mapping[str, Any]]


def bootstrap_interval(
    values: Values, groups: Values, seed: int = 0, weights: Values | None = None
) -> list[float] | None:
    """Compute the 95% interval of the mean by resampling whole groups.

    Args:
        values: (W,).
        groups: (W,) the document of each value.
        seed: Random seed of the resampling; the same seed and groups give the same resamples for any values.
        weights: (W,) weight of each value, such as its tokens; all equal when not given.

    Returns:
        The 2.5% and the 97.5% quantile; None with fewer than two groups.
    """
    weights = np.ones(len(values)) if weights is None else weights
    resampled = _resampled_sums([values * weights, weights], groups, seed)
    return _quantiles(resampled[0] / resampled[1]) if resampled is not None else None


def mean_with_interval(values: Values, groups: Values, seed: int = 0, weights: Values | None = None) -> dict[str, Any]:
    """Compute the mean of all values, its 95% interval over groups as a list or None, and their number `n`.

    Args:
        values: (W,), at least one.
        groups: (W,) the document of each value.
        seed: Random seed of the resampling.
        weights: (W,) weight of each value; all equal when not given.
    """
    _require_values(values)
    interval = bootstrap_interval(values, groups, seed, weights)
    return {"mean": float(np.average(values, weights=weights)), "interval": interval, "n": len(values)}


def paired(rows: Sequence[Arms], groups: Values, field: str, *arms: str) -> tuple[list[Values], Values]:
    """Return a field of several arms from the rows that have all these arms, (N,) each, and the groups of these rows.

    Args:
        rows: W rows, arm -> fields.
        groups: (W,) the document of each row.
        field: Name of the field.
        arms: Names of the arms.
    """
    having = [at for at, row in enumerate(rows) if all(arm in row for arm in arms)]
    return [np.array([rows[at][arm][field] for at in having], dtype=float) for arm in arms], groups[having]


def differences(
    rows: Sequence[Arms], groups: Values, field: str, arm: str, others: Mapping[str, str], seed: int = 0
) -> dict[str, Any]:
    """Compute, by name, the mean of an arm minus each of the `others`, on the rows that have both, if there are any."""
    means = {}
    for name, other in others.items():
        (values, other_values), documents = paired(rows, groups, field, arm, other)
        if len(documents):
            means[name] = mean_with_interval(values - other_values, documents, seed)
    return means


def share(numerator: Values, denominator: Values, groups: Values, seed: int = 0) -> dict[str, Any]:
    """Compute the ratio of two means, such as the part of a gain that is retained, or the reason for not giving one.

    Args:
        numerator: (W,), at least one: what was gained.
        denominator: (W,): what there was to gain, paired with it.
        groups: (W,) the document of each pair.
        seed: Random seed of the resampling.

    Returns:
        `mean`, the ratio, and `interval`, its 95% interval over groups as a list, or None with fewer than two groups.
        If the mean of the denominator is not clearly above 0 (its interval, or with one group the mean itself, reaches
        0 or below), a ratio to it says nothing: then only `refused`, a sentence.
    """
    _require_values(numerator)
    part, whole = float(np.mean(numerator)), float(np.mean(denominator))
    bounds = bootstrap_interval(denominator, groups, seed)
    least = bounds[0] if bounds is not None else whole
    if not least > 0:  # written so that NaN is refused too
        noise = f" (95% interval {bounds[0]:.4g} to {bounds[1]:.4g})" if bounds is not None else ""
        return {"refused": f"what there was to gain, {whole:.4g}{noise}, is not clearly above 0"}
    resampled = _resampled_sums([numerator, denominator], groups, seed)
    if resampled is None:
        return {"mean": part / whole, "interval": None}
    parts, wholes = resampled
    positive = wholes > 0  # more than 97.5%, or it had been refused; in the others a share has no meaning
    return {"mean": part / whole, "interval": _quantiles(parts[positive] / wholes[positive])}


def _resampled_sums(columns: list[Values], groups: Values, seed: int) -> list[Values] | None:
    """Sum each column over every resample of the groups, (R,) each; None with fewer than two groups."""
    _, index = np.unique(groups, return_inverse=True)
    sums = [np.bincount(index, weights=column) for column in columns]
    count = len(sums[0])
    if count < 2:
        return None
    draw = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // count)
    blocks = []
    for at in range(0, _RESAMPLES, rows):
        drawn = draw.integers(0, count, (min(rows, _RESAMPLES - at), count))
        blocks.append([column[drawn].sum(1) for column in sums])
    return [np.concatenate(column) for column in zip(*blocks, strict=True)]


def _quantiles(values: Values) -> list[float]:
    return list(np.quantile(values, [0.025, 0.975]).tolist())


def _require_values(values: Values) -> None:
    if not len(values):
        raise ConfigError("there are 0 values, which have no mean; pass at least one")
