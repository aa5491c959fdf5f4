"""From plans to promises: arithmetic of intervals, against a count token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm.connectors.promise import Promise
from kvcomm.segments import Plan, Segment, Span

SEGMENT = Segment(np.arange(200, dtype=np.int32), np.zeros(30, dtype=np.int32), "model")


def plan_of(reused: list[bool]) -> Plan:
    """Token i is reused where it says so, from token i of SEGMENT; one span over all. The last token is computed."""
    reused = [*reused, False]
    computed = np.flatnonzero(~np.array(reused))
    return Plan(len(reused), (Span(0, len(reused), "boundary", SEGMENT, 5),), computed)


def test_pieces_and_holes_of_a_prompt() -> None:
    span, other = Span(2, 10, "boundary", SEGMENT, 7), Span(12, 16, "exact", SEGMENT, 0)
    promise = Promise(Plan(20, (span, other), np.array([0, 1, 2, 3, 10, 11, 15, 16, 17, 18, 19])))
    assert promise.end(0) == 20 - 11
    assert promise.end(11) == 20 - 6
    assert promise.holes(0, 20) == ((0, 4), (10, 12), (15, 20))
    assert promise.holes(11, 18) == ((11, 12), (15, 18))
    assert [(p.start, p.end, p.offset) for p in promise.pieces(0, 20)] == [(4, 10, 9), (12, 15, 0)]
    assert [(p.start, p.end, p.offset) for p in promise.pieces(5, 13)] == [(5, 10, 10), (12, 13, 0)]
    assert promise.keys == {SEGMENT.key}


def test_nothing_reused_is_nothing_promised() -> None:
    promise = Promise(Plan.dense(9, "nothing-known"))
    assert (promise.end(0), promise.pieces(0, 9), promise.holes(0, 9)) == (0, (), ((0, 9),))


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 20), st.integers(0, 60), st.booleans())
def test_every_token_is_in_one_place(reused: list[bool], budget: int, start: int, folded: bool) -> None:
    """Whatever the plan: pieces and holes tile what the engine does not compute by itself; as many tokens are in the holes of
    the whole prompt as the engine is scheduled with; holes before a reused token stay within the budget.
    """
    plan = plan_of(reused)
    promise = Promise.of(plan, budget)
    length, start = plan.length, min(start, plan.length - 1)
    end = promise.end(start)
    assert start <= end < length or end - start <= 0
    upto = length if folded else max(end, start)
    places = np.zeros(length, dtype=int)
    for piece in promise.pieces(start, upto):
        places[piece.start : piece.end] += 1
        assert piece.offset == piece.start + 5
        assert all(reused[piece.start : piece.end])
    for a, b in promise.holes(start, upto):
        places[a:b] += 1
    assert places.tolist() == [int(start <= i < upto) for i in range(length)]
    assert sum(b - a for a, b in promise.holes(start, length)) == length - end
    kept = [i for i in range(length) if i not in set(promise.plan.recompute.tolist())]
    if kept:
        assert sum(not r for r in reused[: kept[-1]]) <= budget
    dropped = [i for i, r in enumerate(reused) if r and i not in kept]
    if dropped:  # it is behind too many holes
        assert sum(not r for r in reused[: dropped[0]]) > budget


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(0, 40), st.booleans())
def test_what_was_served_is_what_was_loaded(reused: list[bool], start: int, folded: bool) -> None:
    """Token by token: reused where a piece was loaded, or where the engine had it."""
    plan = plan_of(reused)
    promise = Promise(plan)
    start = min(start, plan.length - 1)
    end = plan.length if folded else max(promise.end(start), start)
    ids = np.arange(plan.length, dtype=np.int32)
    served = promise.served(ids, start, end, "model", "tenant")
    loaded = {i for p in promise.pieces(start, end) for i in range(p.start, p.end)}
    assert set(range(plan.length)) - set(served.recompute.tolist()) == loaded | set(range(start))
    assert [s.rung for s in served.spans][:1] == (["exact"] if start else ["boundary"][: len(served.spans)])
    for span in served.spans[bool(start) :]:
        assert span.offset == span.start + 5


@pytest.mark.parametrize("budget", [0, 3])
def test_too_many_holes_before_the_first_span(budget: int) -> None:
    promise = Promise.of(plan_of([False] * 4 + [True] * 20), budget)
    assert promise.end(0) == 0
    assert promise.plan.fallback == "too-many-holes"
