"""What a context is worth: the loss of the tokens that follow it, by the form in which the LLM is given it.

A window of a document is a context of C tokens and the S target tokens after it. Every arm gives the LLM another
form of the context, then the target tokens raw:

    none           nothing
    nearest/k      the last ceil(C / k) tokens of the context: the same positions as ratio k, spent on raw text
    extensible/k   the context as extensible embeddings at ratio k
    full           all C tokens

The first target token is given and not scored, in every arm: with no context there is nothing to predict it from.
So every arm scores exactly the same S - 1 tokens. An LLM that starts texts with a BOS gets it first in every arm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extemb_core.errors import ConfigError
from extemb_core.models.embedder import ExtensibleEmbedder
from extemb_core.models.llm import LLM

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Window:
    """`start` is the first context token within document number `document`."""

    document: int
    start: int


def spread_windows(lengths: Sequence[int], per_document: int, span: int) -> list[Window]:
    """Windows of `span` tokens, evenly spread over each document and never overlapping.

    Args:
        lengths: Tokens of each document; one shorter than `span` gets no window.
        per_document: Windows per document; fewer where so many do not fit side by side.
        span: Tokens of a window, context and target together.
    """
    if per_document < 1:
        raise ConfigError(f"per_document={per_document} is below 1; pass a positive whole number")
    windows = []
    for document, length in enumerate(lengths):
        count = min(per_document, length // span)
        windows += [Window(document, (2 * i + 1) * length // (2 * count) - span // 2) for i in range(count)]
    return windows


def arm_names(ratios: Sequence[int], *, extensible: bool) -> list[str]:
    """The arms in the order in which they are shown."""
    names = ["none", *(f"nearest/{ratio}" for ratio in ratios)]
    return names + ([f"extensible/{ratio}" for ratio in ratios] if extensible else []) + ["full"]


@torch.no_grad()
def context_forms(
    llm: LLM, contexts: np.ndarray[Any, Any], ratios: Sequence[int], embedder: ExtensibleEmbedder | None = None
) -> dict[str, Tensor]:
    """What each arm puts before the target tokens.

    Args:
        llm: Reads them.
        contexts: (B, C) token ids.
        ratios: Of the nearest and the extensible arms.
        embedder: Makes the extensible arms, all from one pass; without it there are only the controls.

    Returns:
        Arm -> (B, P, D); P is its positions.

    Raises:
        RatioError: A ratio was not trained.
    """
    length = contexts.shape[1]
    raw = llm.embed(contexts)
    forms = {"none": raw[:, :0], "full": raw}
    for ratio in ratios:
        forms[f"nearest/{ratio}"] = raw[:, length - -(-length // ratio) :]
    if embedder is not None:
        finest = embedder.compress_ids(list(contexts), ratio=min(ratios), show_progress=False)
        for ratio in ratios:
            rows = torch.stack([compressed.at_ratio(ratio).embeddings for compressed in finest])
            forms[f"extensible/{ratio}"] = rows.to(raw.device, raw.dtype)
            forms[f"nearest/{ratio}"] = raw[:, length - rows.shape[1] :]
    if llm.bos_token_id is not None:
        bos = llm.embed([llm.bos_token_id]).expand(len(contexts), 1, -1)
        forms = {arm: torch.cat([bos, form], dim=1) for arm, form in forms.items()}
    return {arm: forms[arm] for arm in arm_names(ratios, extensible=embedder is not None)}


@torch.no_grad()
def target_losses(llm: LLM, form: Tensor, targets: np.ndarray[Any, Any]) -> Tensor:
    """Negative log-likelihood in nats of every target token but the first.

    Args:
        llm: Predicts them.
        form: (B, P, D), what stands before the target tokens; P may be 0.
        targets: (B, S) ids.

    Returns:
        (B, S - 1) in float32, on the CPU.
    """
    ids = torch.as_tensor(targets, dtype=torch.long, device=llm.device)
    hidden = llm.hidden(torch.cat([form, llm.embed(ids)], dim=1)[:, :-1])[:, form.shape[1] :]
    losses = [  # one row at a time: logits are wide
        torch.nn.functional.cross_entropy(llm.logits(row).float(), following, reduction="none")
        for row, following in zip(hidden, ids[:, 1:], strict=True)
    ]
    return torch.stack(losses).cpu()


def context_losses(
    llm: LLM,
    documents: Sequence[np.ndarray[Any, Any]],
    windows: Sequence[Window],
    *,
    context: int = 512,
    target: int = 256,
    ratios: Sequence[int] = (2, 4, 8, 16, 32),
    embedder: ExtensibleEmbedder | None = None,
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, int]]:
    """Measure every arm on every window.

    Args:
        llm: The frozen LLM.
        documents: (T,) token ids each.
        windows: Where to measure.
        context: C, tokens of context.
        target: S, tokens after it; all but the first are scored.
        ratios: Of the nearest and the extensible arms.
        embedder: Without it there are only the controls.
        batch_size: Windows per forward pass.
        advance: Called with the number of windows just done.

    Returns:
        Arm -> mean loss of each window in nats, (W,), in the order of `windows`; and arm -> positions.
    """
    if target < 2 or context < 1:
        raise ConfigError(f"context={context}, target={target}: pass at least 1 and 2 tokens")
    losses: dict[str, list[float]] = {arm: [] for arm in arm_names(ratios, extensible=embedder is not None)}
    positions: dict[str, int] = {}
    for at in range(0, len(windows), batch_size):
        batch = windows[at : at + batch_size]
        rows = np.stack([documents[w.document][w.start : w.start + context + target] for w in batch])
        forms = context_forms(llm, rows[:, :context].astype(np.int64), ratios, embedder)
        for arm, form in forms.items():
            losses[arm] += target_losses(llm, form, rows[:, context:].astype(np.int64)).mean(1).tolist()
            positions[arm] = form.shape[1]
        advance(len(batch))
    return {arm: np.array(values) for arm, values in losses.items()}, positions


def bootstrap_interval(
    values: np.ndarray[Any, Any], groups: np.ndarray[Any, Any], seed: int = 0
) -> tuple[float, float] | None:
    """95% interval of the mean by resampling whole groups: windows of one document are not independent.

    Args:
        values: (W,).
        groups: (W,) the document of each value.
        seed: Of the resampling.

    Returns:
        The 2.5% and the 97.5% quantile; None with fewer than two groups.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    if len(sums) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(sums), (_RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def summarise(
    losses: Mapping[str, np.ndarray[Any, Any]],
    positions: Mapping[str, int],
    windows: Sequence[Window],
    ratios: Sequence[int],
    seed: int = 0,
) -> dict[str, Any]:
    """Means with their intervals over documents, and for each ratio the paired difference to nearest raw tokens.

    `gap_share` is (none - extensible) / (none - full): 0 is worth nothing, 1 as much as the full text.
    """
    groups = np.array([window.document for window in windows])
    arms = {
        arm: {
            "positions": positions[arm],
            "mean": float(values.mean()),
            "interval": bootstrap_interval(values, groups, seed),
        }
        for arm, values in losses.items()
    }
    comparisons = {}
    for ratio in ratios:
        if f"extensible/{ratio}" not in losses:
            continue
        ours = losses[f"extensible/{ratio}"]
        difference = ours - losses[f"nearest/{ratio}"]
        gap = float((losses["none"] - losses["full"]).mean())
        comparisons[str(ratio)] = {
            "extensible_minus_nearest": float(difference.mean()),
            "interval": bootstrap_interval(difference, groups, seed),
            "gap_share": float((losses["none"] - ours).mean()) / gap if gap else None,
        }
    return {"arms": arms, "ratios": comparisons}
