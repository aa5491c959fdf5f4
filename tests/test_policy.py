"""Plans: properties that hold for any matches, and the rules position by position against a slow reading of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.config import Config
from kvcomm.errors import InputError
from kvcomm.matching import Match
from kvcomm.policy import FALLBACKS, MIN_REUSED, Rule, plan
from kvcomm.segments import Plan, Segment

ANY = Config(max_recompute=1.0)


def match(start: int, end: int, *, exact: bool = False, moved: int = 0) -> Match:
    """Prompt [start, end), computed `moved` tokens further left."""
    base = start - moved
    return Match(start, end, Segment(np.ones(end - start, dtype=np.int32), np.ones(base, dtype=np.int32), "f"), 0, exact)


def spans_of(p: Plan) -> list[tuple[int, int, str]]:
    return [(s.start, s.end, s.rung) for s in p.spans]


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, list[Match], Config, Rule]:
    length = draw(st.integers(1, 150))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=10, unique=True)))
    touching = draw(st.booleans())  # each cut ends one match and begins the next; else every other run is unknown text
    edges = list(pairwise(cuts)) if touching else list(zip(cuts[::2], cuts[1::2], strict=False))
    matches = [match(a, b, exact=draw(st.booleans())) for a, b in edges]
    if draw(st.booleans()):
        matches = [match(0, length, exact=True)]
    config = Config(
        rung=draw(st.sampled_from(["boundary", "rotate", "naive"])),
        boundary=draw(st.integers(0, 20)),
        closing=draw(st.integers(1, 30)),
        max_recompute=draw(st.sampled_from([0.0, 0.5, 0.8, 1.0])),
    )
    return length, matches, config, draw(st.sampled_from(["auto", "exact"]))


@settings(max_examples=400, deadline=None)
@given(requests())
def test_any_plan_is_sound(request: tuple[int, list[Match], Config, Rule]) -> None:
    length, matches, config, rule = request
    p = plan(length, matches, config, rule)
    assert p.length == length
    assert p.recompute.dtype == np.int64
    assert np.all(np.diff(p.recompute) > 0)
    assert p.recompute[-1] == length - 1
    assert p.recompute[0] >= 0
    assert all(a.end <= b.start for a, b in pairwise(p.spans))
    covered = {i for s in p.spans for i in range(s.start, s.end)}
    assert covered | set(p.recompute.tolist()) == set(range(length))
    for s in p.spans:
        assert any((s.start, s.end, s.segment, s.offset) == (m.start, m.end, m.segment, m.offset) for m in matches)
        assert len(set(range(s.start, s.end)) - set(p.recompute.tolist())) >= MIN_REUSED
    assert (p.fallback is None) == bool(p.spans)
    if p.fallback is not None:
        assert p.fallback in FALLBACKS
        assert len(p.recompute) == length
    else:
        assert len(p.recompute) <= config.max_recompute * length or {s.rung for s in p.spans} == {"exact"}


def expected(length: int, matches: list[Match], config: Config, rule: Rule) -> tuple[list[tuple[int, int, str]], list[int]]:
    """Spans and recomputed positions by the rules, one position at a time; without max_recompute."""
    rungs: list[tuple[Match, str]] = []
    for m in matches:
        reusable = len(range(m.start, m.end)) - (m.end == length)
        if m.exact and {rung for _, rung in rungs} <= {"exact"} and reusable >= 8:
            rungs.append((m, "exact"))
        elif rule == "auto":
            rungs.append((m, {"boundary": "boundary", "rotate": "rotate", "naive": "rotate"}[config.rung]))

    def reused(i: int, m: Match, rung: str) -> bool:
        if i == length - 1:
            return False
        if rung == "boundary":
            return i >= m.start + config.boundary and i < length - config.closing
        return True

    good = [(m, rung) for m, rung in rungs if sum(reused(i, m, rung) for i in range(m.start, m.end)) >= 8]
    free = {i for m, rung in good for i in range(m.start, m.end) if reused(i, m, rung)}
    return [(m.start, m.end, rung) for m, rung in good], [i for i in range(length) if i not in free]


@settings(max_examples=400, deadline=None)
@given(requests())
def test_rules_position_by_position(request: tuple[int, list[Match], Config, Rule]) -> None:
    """`plan` against `expected`; what max_recompute refuses is compared in `test_limit_of_recompute`."""
    length, matches, config, rule = request
    p = plan(length, matches, replace(config, max_recompute=1.0), rule)
    spans, recompute = expected(length, matches, config, rule)
    assert spans_of(p) == spans
    assert p.recompute.tolist() == recompute


def test_exact_spans_need_no_boundary_and_no_closing() -> None:
    p = plan(100, [match(0, 40, exact=True), match(40, 100, exact=True)], ANY)
    assert spans_of(p) == [(0, 40, "exact"), (40, 100, "exact")]
    assert p.recompute.tolist() == [99]


def test_a_moved_span_recomputes_boundary_seam_and_closing() -> None:
    p = plan(100, [match(0, 30, exact=True), match(40, 70), match(75, 95)], replace(ANY, boundary=2, closing=10))
    assert spans_of(p) == [(0, 30, "exact"), (40, 70, "boundary"), (75, 95, "boundary")]
    assert p.recompute.tolist() == [*range(30, 42), *range(70, 77), *range(90, 100)]


@pytest.mark.parametrize("rung", ["rotate", "naive"])
def test_rotation_alone_recomputes_only_what_is_unknown_and_the_last_token(rung: Any) -> None:
    p = plan(100, [match(10, 100)], replace(ANY, rung=rung))
    assert spans_of(p) == [(10, 100, "rotate")]
    assert p.recompute.tolist() == [*range(10), 99]


def test_an_exact_match_behind_a_computed_gap_is_exact_and_behind_a_moved_span_is_not() -> None:
    matches = [match(0, 20, exact=True), match(21, 50, exact=True), match(50, 90, exact=True)]
    p = plan(100, matches, ANY)
    assert [s.rung for s in p.spans] == ["exact"] * 3
    assert 20 in p.recompute
    assert [s.rung for s in plan(100, [match(0, 20), match(20, 60, exact=True)], ANY).spans] == ["boundary", "boundary"]


def test_every_fallback_has_its_reason() -> None:
    known = [match(10, 60)]
    given = {
        "mode-off": plan(100, known, Config(mode="off")),
        "nothing-known": plan(100, [], Config()),
        "nothing-exact": plan(100, known, Config(), "exact"),
        "nothing-left": plan(100, [match(80, 100)], Config()),
        "too-much-recomputed": plan(100, [match(10, 30)], Config()),
    }
    assert {name: p.fallback for name, p in given.items()} == {
        name: name for name in FALLBACKS if name not in ("learning", "draft-check")
    }
    assert all(p.reused == 0 and not p.spans for p in given.values())


@pytest.mark.parametrize(("limit", "reused"), [(0.5, 50), (0.49, 0)])
def test_limit_of_recompute(limit: float, reused: int) -> None:
    p = plan(100, [match(0, 50)], Config(max_recompute=limit, boundary=0))
    assert p.reused == reused
    assert p.fallback == (None if reused else "too-much-recomputed")


def test_above_the_limit_an_exact_prefix_stays_and_moved_spans_go() -> None:
    matches = [match(0, 10, exact=True), match(30, 60)]
    assert spans_of(plan(100, matches, Config(max_recompute=0.9))) == [(0, 10, "exact"), (30, 60, "boundary")]
    p = plan(100, matches, Config(max_recompute=0.3))
    assert spans_of(p) == [(0, 10, "exact")]
    assert p.recompute.tolist() == list(range(10, 100))


def test_a_prompt_of_one_token_and_an_empty_one() -> None:
    assert plan(1, [match(0, 1, exact=True)], ANY).recompute.tolist() == [0]
    with pytest.raises(InputError, match="0 tokens"):
        plan(0, [], ANY)
