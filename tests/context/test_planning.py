"""A plan fits the budget, keeps the ranking, and says why."""

from __future__ import annotations

import itertools
import time
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extemb_core.context.planning import DocumentPlan, Fidelity, Plan, Span, plan_context
from extemb_core.errors import BudgetError, ConfigError, RatioError

RATIOS = (2, 4, 8, 16, 32)


def fidelities(plan: Plan) -> list[Fidelity]:
    return [document.fidelity for document in plan.documents]


def coarseness(fidelity: Fidelity) -> float:
    """Larger is coarser."""
    return fidelity if isinstance(fidelity, int) else {"raw": 1, "dropped": float("inf")}[fidelity]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    n_tokens = draw(st.lists(st.integers(0, 100) | st.integers(0, 3000), max_size=12))
    each = st.lists(st.integers(0, 9), min_size=len(n_tokens), max_size=len(n_tokens))
    return {
        "n_tokens": n_tokens,
        "budget": draw(st.integers(0, 400) | st.integers(0, sum(n_tokens) + 200)),
        "ratio": draw(st.sampled_from(["auto", "auto", "raw", *RATIOS])),
        "chunk_size": draw(st.sampled_from([1, 7, 100, 512])),
        "raw_below": draw(st.sampled_from([0, 10, 64, 1000])),
        "overhead": draw(st.integers(0, 9) | each),
    }


def price(case: dict[str, Any], index: int, fidelity: Fidelity) -> int:
    if fidelity == "dropped":
        return 0
    overhead = case["overhead"] if isinstance(case["overhead"], int) else case["overhead"][index]
    n_tokens = case["n_tokens"][index]
    if isinstance(fidelity, int):
        chunk_size = case["chunk_size"]
        chunks = [min(chunk_size, n_tokens - start) for start in range(0, n_tokens, chunk_size)]
        n_tokens = sum((chunk + fidelity - 1) // fidelity for chunk in chunks)
    return int(n_tokens + overhead)


def too_large(case: dict[str, Any]) -> set[int]:
    """The documents that alone are larger than the budget, at the coarsest that the case allows."""
    coarsest: Fidelity = 32 if case["ratio"] == "auto" else case["ratio"]
    return {i for i, n in enumerate(case["n_tokens"]) if n and price(case, i, coarsest) > case["budget"]}


@given(cases())
def test_every_document_is_reported_at_its_price_within_the_budget(case: dict[str, Any]) -> None:
    plan = plan_context(**case)
    assert [document.index for document in plan.documents] == list(range(len(case["n_tokens"])))
    assert [document.n_tokens for document in plan.documents] == case["n_tokens"]
    for document in plan.documents:
        assert document.positions == price(case, document.index, document.fidelity)
        assert document.reason
        if document.fidelity != "dropped":
            assert document.positions <= price(case, document.index, "raw")
    assert plan.positions == sum(document.positions for document in plan.documents) <= plan.budget
    assert plan == plan_context(**case)


@given(cases())
def test_only_the_last_ranks_are_dropped_and_only_when_the_coarsest_does_not_fit(
    case: dict[str, Any],
) -> None:
    plan = plan_context(**case)
    for index in too_large(case):
        assert plan.documents[index].fidelity == "dropped"
        assert plan.documents[index].reason.startswith("larger than the budget")
    filled = [d for d in plan.documents if d.n_tokens and d.index not in too_large(case)]
    kept = [document for document in filled if document.fidelity != "dropped"]
    assert kept == filled[: len(kept)]
    assert [document.reason for document in plan.dropped if not document.n_tokens] == (
        ["empty"] * case["n_tokens"].count(0)
    )
    coarsest: Fidelity = 32 if case["ratio"] == "auto" else case["ratio"]
    needed = [price(case, document.index, coarsest) for document in filled]
    assert sum(needed[: len(kept)]) <= case["budget"]
    if len(kept) < len(filled):
        assert sum(needed[: len(kept) + 1]) > case["budget"]


@given(cases())
def test_one_fidelity_is_kept_when_asked_for(case: dict[str, Any]) -> None:
    if case["ratio"] == "auto":
        case["ratio"] = 8
    for document in plan_context(**case).documents:
        raw = price(case, document.index, "raw")
        if document.fidelity == "raw":
            assert raw == price(case, document.index, case["ratio"])
        else:
            assert document.fidelity in (case["ratio"], "dropped")


@given(cases())
def test_auto_never_ranks_a_coarser_document_above_a_finer_one(case: dict[str, Any]) -> None:
    plan = plan_context(**{**case, "ratio": "auto"})
    ranked = [
        coarseness(document.fidelity)
        for document in plan.documents
        if document.n_tokens
        and document.index not in too_large({**case, "ratio": "auto"})
        and not (document.fidelity == "raw" and document.n_tokens <= case["raw_below"])
        and price(case, document.index, 32) != price(case, document.index, "raw")
    ]
    assert ranked == sorted(ranked)


@given(cases())
def test_auto_uses_the_budget_as_far_as_the_ranking_allows(case: dict[str, Any]) -> None:
    plan = plan_context(**{**case, "ratio": "auto"})
    left = plan.budget - plan.positions
    ladder: list[Fidelity] = ["raw", *RATIOS]
    above = 0
    for document in plan.documents:
        if isinstance(document.fidelity, int):
            rung = ladder.index(document.fidelity)
            if document.n_tokens <= case["raw_below"]:
                assert price(case, document.index, "raw") - document.positions > left
            elif rung > above:
                assert price(case, document.index, ladder[rung - 1]) - document.positions > left
            above = rung


@given(cases())
def test_auto_keeps_everything_raw_when_that_fits(case: dict[str, Any]) -> None:
    case["ratio"] = "auto"
    case["budget"] = sum(price(case, index, "raw") for index, n in enumerate(case["n_tokens"]) if n)
    plan = plan_context(**case)
    assert all(document.fidelity == "raw" for document in plan.documents if document.n_tokens)
    assert plan.positions == case["budget"]


@given(cases(), st.integers(1, 500))
def test_a_larger_budget_keeps_no_fewer_documents(case: dict[str, Any], more: int) -> None:
    more_room = {**case, "budget": case["budget"] + more}
    hypothesis.assume(too_large(more_room) == too_large(case))  # else a large document of high rank comes in first
    richer = plan_context(**more_room)
    assert len(richer.dropped) <= len(plan_context(**case).dropped)


@pytest.mark.parametrize(
    ("n_tokens", "budget", "expected"),
    [
        ([700, 700, 700], 2100, ["raw", "raw", "raw"]),
        ([700, 700, 700], 2099, ["raw", "raw", 2]),
        ([700, 700, 700], 1050, [2, 2, 2]),
        ([700, 700, 700], 1049, [2, 2, 4]),
        ([700, 700, 700], 66, [32, 32, 32]),
        ([700, 700, 700], 65, [32, 32, "dropped"]),
        ([700, 700, 700], 21, ["dropped"] * 3),
        ([40, 700, 700], 200, ["raw", 8, 16]),
        ([700, 40, 700], 200, [8, "raw", 16]),
        ([0, 700, 0], 350, ["dropped", 2, "dropped"]),
        ([1, 1], 2, ["raw", "raw"]),
        ([10_000, 60, 60], 400, [32, "raw", 32]),
        ([10_000, 60], 100, ["dropped", "raw"]),
        ([], 100, []),
        ([0, 0], 0, ["dropped", "dropped"]),
        ([5], 0, ["dropped"]),
        ([10**12, 10**12], 10**15, ["raw", "raw"]),
        ([10**12], 10**11, [16]),
    ],
)
def test_auto_reads_all_that_fits_as_finely_as_the_budget_allows(
    n_tokens: list[int], budget: int, expected: list[Fidelity]
) -> None:
    assert fidelities(plan_context(n_tokens, budget)) == expected


def test_a_ratio_drops_from_the_end_and_leaves_alone_what_it_would_not_shorten() -> None:
    plan = plan_context([1, 800, 800, 8], 201, ratio=8)
    assert fidelities(plan) == ["raw", 8, 8, "dropped"]
    assert [document.reason for document in plan.documents] == [
        "ratio 8 would save nothing",
        "ratio 8 as asked",
        "ratio 8 as asked",
        "over budget at ratio 8: needs 1 positions, 0 left",
    ]


def test_raw_is_never_cut() -> None:
    plan = plan_context([100, 200, 50], 299, ratio="raw")
    assert fidelities(plan) == ["raw", "dropped", "dropped"]
    assert [document.reason for document in plan.dropped] == [
        "over budget raw: needs 200 positions, 199 left",
        "ranked below a document that does not fit",
    ]


def test_overhead_is_counted_inside_the_budget() -> None:
    assert fidelities(plan_context([100, 100], 210, overhead=5)) == ["raw", "raw"]
    assert fidelities(plan_context([100, 100], 209, overhead=5)) == ["raw", 2]
    assert fidelities(plan_context([100, 100], 209, overhead=[4, 5])) == ["raw", "raw"]
    assert plan_context([0], 10, overhead=5).positions == 0


def test_the_order_of_the_documents_is_their_rank() -> None:
    assert fidelities(plan_context([600, 900], 525)) == [2, 4]
    assert fidelities(plan_context([900, 600], 525)) == [4, 4]


def test_explain() -> None:
    plan = plan_context([30, 600, 0, 640_000, 5], 200)
    assert plan.explain().split("\n") == [
        " rank  tokens  fidelity  positions  reason",
        "    1      30       raw         30  short, stays raw",
        "    2     600   ratio 4        150  ratio 4 fits the budget",
        "    3       0   dropped          0  empty",
        "    4  640000   dropped          0  larger than the budget even at ratio 32: needs 20000 positions",
        "    5       5       raw          5  short, stays raw",
        "total  640635                  185  of a budget of 200",
    ]
    assert "of a budget of 7" in plan_context([], 7).explain()


def mixed(*parts: tuple[int, Fidelity, str], chunk_size: int = 512) -> Plan:
    """Plan one document of parts of so many tokens."""
    stops = list(itertools.accumulate(n_tokens for n_tokens, _, _ in parts))
    spans = tuple(Span(stop - n, stop, fidelity) for stop, (n, fidelity, _) in zip(stops, parts, strict=True))
    document = DocumentPlan(
        index=0,
        n_tokens=stops[-1],
        fidelity="mixed",
        positions=sum(span.positions(chunk_size) for span in spans),
        reason="as made",
        spans=spans,
        chunk_size=chunk_size,
        excerpts=tuple(text for _, _, text in parts),
    )
    return Plan(documents=(document,), budget=99, note="a note")


def test_explain_says_what_becomes_of_each_span() -> None:
    long = "Copper wires ran from the cellar to the roof, where a small dish turned."
    plan = mixed(
        (40, 8, long), (12, "raw", "\n\n In 1987\tit \x1b[2Jclosed.\u202e"), (20, "dropped", "Rivers"), chunk_size=20
    )
    assert plan.explain().split("\n") == [
        " rank  tokens  fidelity  positions  reason",
        "    1      72     mixed         18  as made",
        "           40   ratio 8          6    Copper wires ran from the cellar to the roof,...",
        "           12       raw         12    In 1987 it [2Jclosed.",
        "           20   dropped          0    Rivers",
        "total      72                   18  of a budget of 99",
        "a note",
    ]


@pytest.mark.parametrize(("n_raw", "last"), [(12, "8    1    and 1 more span"), (49, "156  149    and 38 more spans")])
def test_of_many_spans_explain_shows_those_in_most_detail(n_raw: int, last: str) -> None:
    lines = mixed((8, 8, "coarse"), *[(4, "raw", "fine")] * n_raw).explain().split("\n")
    assert [line.split()[-1] for line in lines[2:-3]] == ["fine"] * 12
    assert lines[-3].split() == last.split()


def test_what_is_said_of_a_span_is_no_part_of_a_plan_as_a_value() -> None:
    plan, other = mixed((4, "raw", "one"), (4, 2, "two")), mixed((4, "raw", ""), (4, 2, ""))
    assert plan == other
    assert "one" not in repr(plan)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (3, "pass one of them, 'auto' or 'raw', or train with other ratios, each a multiple"),
        (0, "ratio=0 is not one of the ratios [2, 4, 8, 16, 32]; pass one of them, 'auto' or 'raw'"),
        (-8, "ratio=-8 is not"),
        (8.0, "ratio=8.0 is not"),
        ("8", "ratio='8' is not"),
        ("dropped", "ratio='dropped' is not"),
        (None, "ratio=None is not"),
    ],
)
def test_a_ratio_that_was_not_trained(ratio: Any, said: str) -> None:
    with pytest.raises(RatioError) as caught:
        plan_context([100], 50, ratio=ratio)
    assert said in str(caught.value)


@pytest.mark.parametrize("budget", [-1, 1.5, None, "many"])
def test_a_budget_that_is_none(budget: Any) -> None:
    with pytest.raises(BudgetError, match=r"budget=.* is not a whole number of at least 0; pass an int"):
        plan_context([100], budget)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_tokens": [-1]},
        {"n_tokens": [1.5]},
        {"chunk_size": 0},
        {"raw_below": -1},
        {"overhead": -1},
        {"overhead": [1, 2]},
        {"overhead": [-1]},
        {"ratios": (0, 2)},
        {"ratios": ()},
    ],
)
def test_other_numbers_outside_their_legal_values(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan_context(**{"n_tokens": [100], "budget": 50, **wrong})


def test_the_trained_ratios_may_come_in_any_order() -> None:
    assert plan_context([900, 800], 300, ratios=[32, 2, 8, 2]) == plan_context([900, 800], 300, ratios=(2, 8, 32))
    assert plan_context([900], 10, ratio="raw", ratios=()).dropped


def test_a_plan_is_a_value() -> None:
    plan = plan_context([30], 30)
    document = DocumentPlan(index=0, n_tokens=30, fidelity="raw", positions=30, reason="short, stays raw")
    assert plan == Plan(documents=(document,), budget=30)


@pytest.mark.parametrize("ratio", ["auto", 8, "raw"])
def test_twenty_thousand_documents_take_less_than_a_second(ratio: Any) -> None:
    n_tokens = [(place * 7919) % 1500 for place in range(20_000)]
    started = time.process_time()
    plan = plan_context(n_tokens, 2_000_000, ratio=ratio)
    plan.explain()
    assert time.process_time() - started < 1
    assert len(plan.documents) == 20_000


@given(cases(), st.data())
def test_no_document_is_finer_than_it_may_be_and_the_budget_still_holds(
    case: dict[str, Any], data: st.DataObject
) -> None:
    count = len(case["n_tokens"])
    limits = data.draw(st.lists(st.sampled_from([None, *RATIOS]), min_size=count, max_size=count))
    plan = plan_context(**case, ratios=RATIOS, finest=limits)
    assert plan.positions <= plan.budget
    for document, limit in zip(plan.documents, limits, strict=True):
        if limit is None or case["ratio"] == "raw" or document.fidelity == "dropped":
            continue
        if document.fidelity == "raw":  # only where the limit saves nothing
            assert price(case, document.index, limit) == price(case, document.index, "raw")
        else:
            assert document.fidelity >= limit
    assert plan_context(**case, ratios=RATIOS, finest=[None] * count) == plan_context(**case, ratios=RATIOS)


def test_a_limited_document_does_not_stop_those_below_it_from_rising() -> None:
    plan = plan_context([800, 800], budget=1000, finest=[8, None])
    assert fidelities(plan) == [8, "raw"]
    assert fidelities(plan_context([800, 800], budget=1000, ratio=2, finest=[8, None])) == [8, 2]
    with pytest.raises(RatioError, match="ratio=3 is not one of the ratios"):
        plan_context([800], budget=100, finest=[3])
    with pytest.raises(ConfigError, match="finest has 1 entries for 2 documents"):
        plan_context([800, 800], budget=100, finest=[4])


def test_auto_goes_no_further_than_the_ratios_it_may_choose_from() -> None:
    asked = {"ratios": (1, 2, 4, 8, 16, 32), "auto_ratios": (2, 4, 8)}
    assert fidelities(plan_context([800, 800], budget=200, **asked)) == [8, 8]
    assert fidelities(plan_context([800, 800], budget=199, **asked)) == [8, "dropped"]
    assert fidelities(plan_context([800, 800], budget=100, ratio=16, **asked)) == [16, 16]
    assert fidelities(plan_context([800], budget=800, ratio=1, **asked)) == ["raw"]
    with pytest.raises(RatioError, match="ratio=64 is not one of the ratios"):
        plan_context([800], budget=100, ratios=(2, 4), auto_ratios=(2, 64))


def test_a_limit_outside_those_ratios_is_of_its_document_alone() -> None:
    asked = {"ratios": (1, 2, 4, 8, 16, 32), "auto_ratios": (2, 4, 8)}
    for limits, budget, expected in (
        ([16, None], 2000, [16, "raw"]),
        ([None, 16], 2000, ["raw", 16]),
        ([16, None], 149, [16, "dropped"]),  # ratio 16 would do for the second too, and it did not ask for that
        ([None, 16], 150, [8, 16]),
        ([1, None], 2000, ["raw", "raw"]),  # each climbs a ladder of its own to its end
        ([4, 1], 2000, [4, "raw"]),
        ([32, 16], 2000, [32, 16]),
    ):
        plan = plan_context([800, 800], budget=budget, finest=limits, **asked)
        assert fidelities(plan) == expected, (limits, budget)
    assert fidelities(plan_context([800, 800], budget=2000, ratio=2, finest=[16, None], **asked)) == [16, 2]


@given(cases(), st.data())
def test_limits_and_ratios_of_its_own_never_break_a_plan(case: dict[str, Any], data: st.DataObject) -> None:
    count = len(case["n_tokens"])
    limits = data.draw(st.lists(st.sampled_from([None, *RATIOS]), min_size=count, max_size=count))
    auto = data.draw(st.lists(st.sampled_from(RATIOS), min_size=1, max_size=3))
    plan = plan_context(**case, ratios=RATIOS, finest=limits, auto_ratios=auto)
    assert plan.positions <= plan.budget
    for document, limit in zip(plan.documents, limits, strict=True):
        if case["ratio"] == "auto" and isinstance(document.fidelity, int):
            assert document.fidelity in {*auto, limit}
            assert limit is None or document.fidelity >= limit


@given(cases(), st.data())
def test_wishes_for_raw_are_granted_best_first_and_drop_nothing(case: dict[str, Any], data: st.DataObject) -> None:
    count = len(case["n_tokens"])
    wished = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    plan, without = plan_context(**case, keep_raw=wished), plan_context(**case)
    assert plan.positions <= plan.budget
    assert [d.index for d in plan.dropped] == [d.index for d in without.dropped]
    for document in plan.documents:
        assert document.positions == price(case, document.index, document.fidelity)
    long = [d for d in plan.documents if wished[d.index] and d.n_tokens > case["raw_below"] and d.fidelity != "dropped"]
    granted = [d.fidelity == "raw" for d in long if price(case, d.index, "raw") != price(case, d.index, 32)]
    assert granted == sorted(granted, reverse=True)
    if case["ratio"] not in ("auto", "raw"):
        for document, same in zip(plan.documents, without.documents, strict=True):
            assert document.fidelity in (same.fidelity, "raw" if wished[document.index] else same.fidelity)


@pytest.mark.parametrize(
    ("n_tokens", "budget", "asked", "expected"),
    [
        ([800, 800, 800], 1100, {"ratio": 8}, ["raw", 8, 8]),
        ([800, 800, 800], 999, {"ratio": 8}, [8, 8, 8]),  # 800 and twice 100: one position is wanting
        ([800, 800, 800], 299, {"ratio": 8}, [8, 8, "dropped"]),
        ([800, 800, 800], 900, {}, ["raw", 16, 16]),  # where no wish is, all three climb together
        ([800, 800, 800], 600, {}, [4, 4, 4]),
        ([800, 800], 1600, {"ratio": 8, "finest": [8, None]}, [8, 8]),  # a limit is stronger than a wish
    ],
)
def test_the_best_document_kept_raw(
    n_tokens: list[int], budget: int, asked: dict[str, Any], expected: list[Fidelity]
) -> None:
    wishes = [True] + [False] * (len(n_tokens) - 1)
    plan = plan_context(n_tokens, budget, keep_raw=wishes, **asked)
    assert fidelities(plan) == expected
    if expected[0] == "raw":
        assert plan.documents[0].reason == "raw as asked"


def test_one_wish_for_each_document() -> None:
    with pytest.raises(ConfigError, match="keep_raw has 1 entries for 2 documents; pass one for each"):
        plan_context([800, 800], 100, keep_raw=[True])
