"""From a budget of positions to the fidelity of each document: raw, a trained ratio, or dropped.

The documents' order is their rank. All of them start at the coarsest ratio; then, one rung of fidelity at a
time, they climb in rank order as far as the budget allows. So the top ranks are never coarser than the ranks
below them, except that short documents stay raw wherever they stand.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeAlias

from extemb_core.errors import BudgetError, ConfigError, RatioError
from extemb_core.models.chunks import compressed_positions, span_positions
from extemb_core.utils.text import excerpt
from extemb_core.utils.validation import whole_number

Fidelity: TypeAlias = Literal["raw", "dropped", "mixed"] | int

_MAX_EXPLAINED_SPANS = 12  # shown for each document


class Span(NamedTuple):
    """A run of one document's tokens that a plan treats alike.

    Attributes:
        start, stop: First token, and the one after the last.
        fidelity: "raw", a ratio, or "dropped".
    """

    start: int
    stop: int
    fidelity: Fidelity

    def positions(self, chunk_size: int) -> int:
        """Count the positions that it takes in a text compressed in chunks of this size."""
        if isinstance(self.fidelity, int):
            return span_positions(self.start, self.stop, self.fidelity, chunk_size)
        return self.stop - self.start if self.fidelity == "raw" else 0


def fidelity_of(spans: Sequence[Span]) -> Fidelity:
    """Return the one fidelity of a document's spans, or "mixed"."""
    fidelities = {span.fidelity for span in spans}
    return fidelities.pop() if len(fidelities) == 1 else "mixed" if fidelities else "dropped"


@dataclass(frozen=True, kw_only=True)
class DocumentPlan:
    """What becomes of one document.

    Attributes:
        index: Its place in the input, which is its rank, from 0.
        n_tokens: Its length as raw tokens.
        fidelity: "raw", a ratio, "dropped", or "mixed": see `spans`.
        positions: Positions of the budget that it takes, its overhead included; 0 when dropped.
        reason: Why, in a few words.
        spans: Fidelities of runs of its tokens, if it was planned by sentence; see `plan_focus`.
        chunk_size: Tokens that are compressed together; a span's positions are counted with it.
        excerpts: The first characters of each span, if the document is "mixed".
    """

    index: int
    n_tokens: int
    fidelity: Fidelity
    positions: int
    reason: str
    spans: tuple[Span, ...] = ()
    chunk_size: int = field(default=512, repr=False, compare=False)
    excerpts: tuple[str, ...] = field(default=(), repr=False, compare=False)


def plan_of_spans(
    index: int, spans: Sequence[Span], reason: str, excerpt: Callable[[Span], str], overhead: int, chunk_size: int
) -> DocumentPlan:
    """Plan a document by its spans.

    Args:
        index, reason, chunk_size: See `DocumentPlan`.
        spans: Spans that cover all of its tokens, in order.
        excerpt: Returns the first characters of a span; called if the document is "mixed".
        overhead: Positions that it costs besides its content, if any of it is read.
    """
    fidelity, content = fidelity_of(spans), sum(span.positions(chunk_size) for span in spans)
    return DocumentPlan(
        index=index,
        n_tokens=spans[-1].stop if spans else 0,
        fidelity=fidelity,
        positions=content + overhead if content else 0,
        reason=reason,
        spans=tuple(spans),
        chunk_size=chunk_size,
        excerpts=tuple(map(excerpt, spans)) if fidelity == "mixed" else (),
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The fidelity of every document, in the order given; `positions` never exceeds `budget`.

    Attributes:
        documents: Plan of each document.
        budget: Positions that they may take.
        note: Basis of the plan, in a few words.
    """

    documents: tuple[DocumentPlan, ...]
    budget: int
    note: str = ""

    @property
    def positions(self) -> int:
        """Positions that all documents take together."""
        return sum(document.positions for document in self.documents)

    @property
    def dropped(self) -> tuple[DocumentPlan, ...]:
        """The documents that the LLM will not see, the empty ones among them."""
        return tuple(document for document in self.documents if document.fidelity == "dropped")

    def explain(self) -> str:
        """Draw the plan as a plain-text table; below each mixed document, the spans that are read in most detail.

        >>> print(plan_context([30, 600, 0], budget=200).explain())
         rank  tokens  fidelity  positions  reason
            1      30       raw         30  short, stays raw
            2     600   ratio 4        150  ratio 4 fits the budget
            3       0   dropped          0  empty
        total     630                  180  of a budget of 200
        """
        rows = [("rank", "tokens", "fidelity", "positions", "reason")]
        for plan in self.documents:
            numbers = str(plan.index + 1), str(plan.n_tokens), _name(plan.fidelity), str(plan.positions)
            rows.append((*numbers, plan.reason))
            rows += _span_rows(plan) if plan.fidelity == "mixed" else []
        tokens = sum(plan.n_tokens for plan in self.documents)
        rows.append(("total", str(tokens), "", str(self.positions), f"of a budget of {self.budget}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join([*map(str.rjust, row[:4], widths), row[4]]).rstrip() for row in rows]
        return "\n".join([*lines, self.note] if self.note else lines)


def plan_context(
    n_tokens: Sequence[int],
    budget: int,
    *,
    ratio: Literal["auto", "raw"] | int = "auto",
    ratios: Sequence[int] = (2, 4, 8, 16, 32),
    chunk_size: int = 512,
    raw_below: int = 64,
    overhead: Sequence[int] | int = 0,
    finest: Sequence[int | None] | None = None,
    auto_ratios: Sequence[int] | None = None,
    keep_raw: Sequence[bool] | None = None,
) -> Plan:
    """Choose the fidelity of each document so that the whole fits the budget.

    "auto": the longest run of top ranks that fits at the coarsest ratio is kept. Documents of at most
    raw_below tokens stay raw if the kept ones still fit then. The others climb from the coarsest ratio to the
    finest, and on to raw, one rung at a time and in rank order, each rung up to the first document that no
    longer fits: when all fit raw, all are raw. What is left then makes short documents raw, in rank order.
    A ratio, or "raw": every document at that fidelity. A document that the ratio would not shorten is raw.
    What does not fit is dropped from the end of the ranking, never cut. An empty document, and one that alone is
    larger than the budget, is dropped as such and does not count.

    Args:
        n_tokens: Tokens of each document, best document first.
        budget: Positions that the documents may take.
        ratio: "auto", "raw" or one of `ratios`.
        ratios: The ratios that may be asked for.
        chunk_size: Tokens that are compressed together.
        raw_below: The longest document, in tokens, that counts as short.
        overhead: Positions that a kept document costs besides its content (title line, separators), for each
            document or one number for all.
        finest: For each document, the finest ratio that it may have, or None for no limit. Ignored when "raw" is asked
            for.
        auto_ratios: The ratios that "auto" chooses from, all when not given. A document's own `finest` is always one of
            its choices.
        keep_raw: For each document, whether it should be raw. Such wishes drop no other document: they are granted
            before anything else climbs, best first, up to the first whose text no longer fits. The wish of a document
            with a `finest` ratio is ignored.

    Raises:
        RatioError: ratio, or one of finest or auto_ratios, is not one of ratios.
        BudgetError: budget is negative or not a whole number.
        ConfigError: another number outside its legal values.
    """
    lengths = [whole_number(length, "n_tokens", 0) for length in n_tokens]
    budget = check_budget(budget)
    chunk_size = whole_number(chunk_size, "chunk_size")
    raw_below = whole_number(raw_below, "raw_below", 0)
    count = len(lengths)
    for name, values, other in (
        ("finest", finest, "None"), ("keep_raw", keep_raw, "None"), ("overhead", overhead, "one number for all")
    ):  # fmt: skip
        if isinstance(values, Sequence) and len(values) != count:
            raise ConfigError(f"{name} has {len(values)} entries for {count} documents; pass one for each, or {other}")
    limits = [None] * count if finest is None else finest
    wished = {index for index, wish in enumerate(keep_raw or ()) if wish and limits[index] is None}
    ladders = _ladders(ratio, ratios, limits, auto_ratios)
    for index in wished:
        if ladders[index][-1] != "raw":
            ladders[index] = [*ladders[index], "raw"]
    overheads = overhead if isinstance(overhead, Sequence) else [overhead] * count
    extra = [whole_number(positions, "overhead", 0) for positions in overheads]

    def cost(index: int, fidelity: Fidelity) -> int:
        length = lengths[index]
        content = compressed_positions(length, fidelity, chunk_size) if isinstance(fidelity, int) else length
        return content + extra[index]

    # A document larger than the whole budget is set aside, so that the others are not dropped because of it.
    too_large = {index for index, length in enumerate(lengths) if length and cost(index, ladders[index][0]) > budget}
    documents = [index for index, length in enumerate(lengths) if length and index not in too_large]
    kept, left = [], budget
    for index in documents:
        if cost(index, ladders[index][0]) > left:
            break
        kept.append(index)
        left -= cost(index, ladders[index][0])
    may_be_raw = {index for index in kept if len(ladders[index]) > 1 and ladders[index][-1] == "raw"}
    short = {index for index in may_be_raw if lengths[index] <= raw_below}
    chosen = _climb(kept, short, wished - short, ladders, left, cost)

    def plan(index: int, length: int) -> DocumentPlan:
        fidelity: Fidelity = chosen.get(index, "dropped")
        if fidelity == "dropped":
            reason = "ranked below a document that does not fit" if length else "empty"
            coarsest = ladders[index][0]
            at = f"at {_name(coarsest)}" if isinstance(coarsest, int) else coarsest
            at = f"even {at}" if len(ladders[index]) > 1 else at
            if index in too_large:
                reason = f"larger than the budget {at}: needs {cost(index, coarsest)} positions"
            elif documents[len(kept) : len(kept) + 1] == [index]:  # the first that did not fit
                reason = f"over budget {at}: needs {cost(index, coarsest)} positions, {left} left"
        elif isinstance(fidelity, int) and cost(index, fidelity) == cost(index, "raw"):
            fidelity, reason = "raw", f"{_name(fidelity)} would save nothing"
        elif ratio != "auto" or (fidelity == "raw" and index in wished):
            reason = f"{_name(fidelity)} as asked"
        elif fidelity == "raw":
            reason = "short, stays raw" if index in short else "fits raw"
        else:
            reason = f"{_name(fidelity)} fits the budget"
        positions = 0 if fidelity == "dropped" else cost(index, fidelity)
        return DocumentPlan(index=index, n_tokens=length, fidelity=fidelity, positions=positions, reason=reason)

    return Plan(documents=tuple(plan(*item) for item in enumerate(lengths)), budget=budget)


def _climb(
    kept: list[int],
    short: set[int],
    wished: set[int],
    ladders: Sequence[Sequence[Fidelity]],
    left: int,
    cost: Callable[[int, Fidelity], int],
) -> dict[int, Fidelity]:
    """Raise the fidelity of the kept documents, from their coarsest on, with the positions that are left."""
    chosen = {index: ladders[index][0] for index in kept}

    def rise(index: int, fidelity: Fidelity) -> bool:
        nonlocal left
        price = cost(index, fidelity) - cost(index, chosen[index])
        if price > left:
            return False
        left -= price
        chosen[index] = fidelity
        return True

    for index in kept:
        if index in wished and not rise(index, "raw"):
            break
    if sum(cost(index, "raw") - cost(index, chosen[index]) for index in short) <= left:
        for index in short:
            rise(index, "raw")
    ranked = [index for index in kept if chosen[index] != "raw"]
    rungs = {rung for index in ranked for rung in ladders[index]}
    for fidelity in sorted(rungs, key=lambda rung: -rung if isinstance(rung, int) else 0):
        for index in ranked:
            if fidelity in ladders[index] and not rise(index, fidelity):
                break  # not past it: that would lift lower ranks above it
    for index in kept:
        if index in short:
            rise(index, "raw")
    return chosen


def _ladders(
    ratio: object, ratios: Sequence[int], limits: Sequence[int | None], auto_ratios: Sequence[int] | None
) -> list[list[Fidelity]]:
    """List the fidelities that each document may have, coarsest first."""
    ladder = _ladder(ratio, ratios)
    if ratio == "auto" and auto_ratios is not None:
        for auto_ratio in auto_ratios:
            _ladder(auto_ratio, ratios)  # raises if it is not one of the ratios
        ladder = _ladder(ratio, auto_ratios)
    rungs = [rung for rung in ladder if isinstance(rung, int)]
    limited = {}
    for limit in {limit for limit in limits if limit is not None and ratio != "raw"}:
        finest = _ladder(limit, ratios) if ratio == "auto" or limit > max(rungs, default=0) else []
        limited[limit] = sorted({*finest, *(rung for rung in rungs if rung >= limit)}, reverse=True)
    return [ladder if limit is None else limited.get(limit, ladder) for limit in limits]


def _ladder(ratio: object, ratios: Sequence[int]) -> list[Fidelity]:
    """List the fidelities that a plan may use, coarsest first."""
    trained = sorted({whole_number(value, "ratios") for value in ratios})
    if ratio == "raw":
        return ["raw"]
    if not trained:
        raise RatioError("ratios=() names no trained ratio; pass at least one, or ratio='raw'")
    if ratio == "auto":
        return [*reversed(trained), "raw"]
    if isinstance(ratio, SupportsIndex) and operator.index(ratio) in trained:
        return [operator.index(ratio)]
    remedy = "pass one of them, 'auto' or 'raw'"
    if isinstance(ratio, int) and ratio > 0:
        remedy += ", or train with other ratios, each a multiple of the one before"
    raise RatioError(f"ratio={ratio!r} is not one of the ratios {trained}; {remedy}")


def check_budget(budget: Any) -> int:
    """Return a budget as an int, or raise `BudgetError` if it is no whole number or below 0."""
    return whole_number(budget, "budget", 0, error=BudgetError)


def _span_rows(plan: DocumentPlan) -> list[tuple[str, str, str, str, str]]:
    """Describe, in order, the spans of a document that are read in most detail."""
    spans = list(zip(plan.spans, plan.excerpts or [""] * len(plan.spans), strict=True))
    ranked = sorted(range(len(spans)), key=lambda at: tokens_per_position(spans[at][0].fidelity))
    rows = []
    for span, text in (spans[at] for at in sorted(ranked[:_MAX_EXPLAINED_SPANS])):
        numbers = str(span.stop - span.start), _name(span.fidelity), str(span.positions(plan.chunk_size))
        rows.append(("", *numbers, f"  {excerpt(text)}"))
    if others := [spans[at][0] for at in ranked[_MAX_EXPLAINED_SPANS:]]:
        tokens = sum(span.stop - span.start for span in others)
        positions = sum(span.positions(plan.chunk_size) for span in others)
        rows.append(("", str(tokens), "", str(positions), f"  and {len(others)} more span{'s' * (len(others) > 1)}"))
    return rows


def count_fidelities(fidelities: Iterable[Fidelity]) -> str:
    """Say how many there are of each fidelity, in falling detail.

    >>> count_fidelities(["dropped", 8, "raw", 8])
    '1 raw, 2 at ratio 8, 1 dropped'
    """
    counts = sorted(Counter(fidelities).items(), key=lambda item: tokens_per_position(item[0]))
    return ", ".join(
        f"{count} at ratio {fidelity}" if isinstance(fidelity, int) else f"{count} {fidelity}"
        for fidelity, count in counts
    )


def tokens_per_position(fidelity: Fidelity) -> float:
    """Return the tokens that one position stands for; infinite for "dropped"."""
    return float(fidelity) if isinstance(fidelity, int) else 1.0 if fidelity == "raw" else math.inf


def _name(fidelity: Fidelity) -> str:
    return f"ratio {fidelity}" if isinstance(fidelity, int) else fidelity
