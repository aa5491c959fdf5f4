"""Whose moved text waits for anchors, and which requests are computed for their sake."""

from __future__ import annotations

from typing import Any

import numpy as np

from kvcomm.config import Config
from kvcomm.segments import Plan, Segment, Span
from kvcomm.waiting import Waiting, longest


def span(start: int, tokens: int, **segment: Any) -> Span:
    ids = np.arange(start, start + tokens, dtype=np.int32)
    return Span(start, start + tokens, "boundary", Segment(ids, ids[:0], "model", **segment), 0)


def test_who_waits() -> None:
    waiting, shared = Waiting(Config()), [span(0, 20)]
    assert not waiting.waits("a", shared)
    assert waiting.waits("a", [span(0, 20, alone=True)])
    assert waiting.waits("a", shared), "from the first text alone on, all moved text of the tenant waits"
    assert not waiting.waits("b", shared)
    waiting.expect_alone("b")
    assert waiting.waits("b", shared)
    assert Waiting(Config(anchors="all")).waits("a", shared)


def test_when_to_look() -> None:
    waiting = Waiting(Config(explore=0.25))
    assert [waiting.due("a") for _ in range(5)] == [False, False, False, True, False]
    assert not waiting.due("b")
    assert not any(Waiting(Config(explore=0.0)).due("a") for _ in range(60))


def test_lessons() -> None:
    waiting = Waiting(Config(anchors="all"))
    known = [span(100 * i, 20 + i) for i in range(12)]
    kept = {s.segment.key for s in known}
    plan = Plan.dense(1300, "learning")
    assert waiting.lessons(plan, known, "", kept) == known
    assert waiting.lessons(plan, known, "", kept - {known[3].segment.key}) == [*known[:3], *known[4:]]
    exact = Span(0, 20, "exact", known[0].segment, 0)
    assert waiting.lessons(Plan(1300, (exact,), np.arange(20, 1300)), known, "", kept) == known[1:]
    moved = Plan(1300, (known[5],), np.asarray([1299]))
    assert waiting.lessons(moved, known, "", kept) == [], "what stands behind approximate text says nothing"
    assert Waiting(Config()).lessons(plan, known, "", kept) == []
    assert longest(known) == known[:3:-1]
