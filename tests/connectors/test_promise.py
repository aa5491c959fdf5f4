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
    assert promise.end == 15
    assert promise.holes == ((0, 4), (10, 12))
    assert [(p.start, p.end, p.offset) for p in promise.pieces] == [(4, 10, 9), (12, 15, 0)]
    assert promise.hole_tokens == 6
    assert promise.holes_from(11) == ((11, 12),)
    assert [(p.start, p.end, p.offset) for p in promise.pieces_from(5)] == [(5, 10, 10), (12, 15, 0)]
    assert {p.key for p in promise.pieces} == {SEGMENT.key}


def test_nothing_reused_is_nothing_promised() -> None:
    promise = Promise(Plan.dense(9, "nothing-known"))
    assert (promise.end, promise.pieces, promise.holes) == (0, (), ())


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 20), st.integers(0, 60))
def test_every_token_before_the_end_is_in_one_place(reused: list[bool], budget: int, start: int) -> None:
    """Whatever the plan: pieces and holes tile [start, end), holes stay within the budget, and no shorter prefix was needed."""
    plan = plan_of(reused)
    promise = Promise.of(plan, budget)
    whole = Promise(plan)
    assert promise.end <= whole.end < plan.length
    if not promise.plan.spans:
        assert promise.end == 0
    places = np.zeros(promise.end, dtype=int)
    for piece in promise.pieces:
        places[piece.start : piece.end] += 1
        assert piece.offset == piece.start + 5
        assert all(reused[piece.start : piece.end])
    for a, b in promise.holes:
        places[a:b] += 1
        assert not any(reused[a:b])
    assert (places == 1).all()
    assert promise.hole_tokens <= budget
    if promise.end < whole.end:  # the next reused token is behind too many holes
        following = next(i for i in range(promise.end, whole.end) if reused[i])
        assert sum(not r for r in reused[:following]) > budget
    left = [x for a, b in promise.holes_from(start) for x in range(a, b)]
    left += [x for p in promise.pieces_from(start) for x in range(p.start, p.end)]
    assert sorted(left) == list(range(start, promise.end))
    assert promise.plan.reused == sum(p.end - p.start for p in promise.pieces)


@pytest.mark.parametrize("budget", [0, 3])
def test_too_many_holes_before_the_first_span(budget: int) -> None:
    promise = Promise.of(plan_of([False] * 4 + [True] * 20), budget)
    assert promise.end == 0
    assert promise.plan.fallback == "too-many-holes"
