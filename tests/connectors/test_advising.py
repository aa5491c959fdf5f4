"""The worker's side of anchors: what is learned beside the engine's steps, and in which order. What estimates and anchors are
is replaced by something that takes notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event
from typing import Any, cast

import numpy as np
import pytest
import torch

from kvcomm.config import Config
from kvcomm.connectors import advising
from kvcomm.connectors.advising import Adviser, Lens
from kvcomm.connectors.capture import Keeper
from kvcomm.connectors.messages import Answer, Ask, Lesson
from kvcomm.correcting import Corrected
from kvcomm.errors import CacheFault
from kvcomm.plain import PlainKV
from kvcomm.segments import Ids, Plan, Segment, SegmentKV, Span
from kvcomm.store.memory import MemoryStore
from kvcomm.who import Who

IDS: Ids = np.arange(100, dtype=np.int32)
PLAN = Plan(100, (Span(10, 40, "boundary", Segment(IDS[:30], IDS[:0], "model"), 0),), np.asarray([99]))
ASK = Ask("one", IDS, PLAN, Who("critic"))


class Pages:
    """In place of the cache's reader."""

    def read(self, blocks: object, start: int, end: int) -> SegmentKV:
        x = torch.zeros(1, end - start, 4)
        return SegmentKV((x,), (x,), start, end)


class Notes:
    """In place of a `Corrector`. Whatever it does waits for `go`."""

    def __init__(self) -> None:
        self.go, self.did, self.found, self.wrong = Event(), list[str](), cast("Corrected | None", Corrected(PLAN)), False
        self.go.set()

    def learn(self, ids: Ids, lessons: Any, who: Who) -> None:
        assert self.go.wait(60)
        self.did += [f"learn {span.start}" for span, _ in lessons]
        if self.wrong:
            raise RuntimeError("no idea")

    def foreseen(self, ids: Ids, plan: Plan, who: Who) -> Corrected | None:
        self.did.append("look")
        if self.wrong:
            raise RuntimeError("no idea")
        return self.found


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def adviser(notes: Notes) -> Iterator[Adviser]:
    made = Adviser(Lens("model", cast(Any, None), cast(Any, None)), MemoryStore(0), cast(Keeper, Pages()), Config())
    made._corrector = cast(Any, notes)
    yield made
    notes.go.set()
    made.wait()


def lesson(*starts: int) -> Lesson:
    spans = [Span(start, start + 20, "boundary", Segment(IDS[:20], IDS[:0], "model"), 0) for start in starts]
    return Lesson(IDS, tuple(spans), Who("clerk", tenant="a"))


def answer(adviser: Adviser, name: str = "one") -> Answer | Exception:
    while True:
        for request_id, said in adviser.answers():
            assert request_id == name
            return said


def test_questions_come_between_texts(adviser: Adviser, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step does not wait for what is being learned, and an answer for no more than one text."""
    monkeypatch.setattr(advising, "WAIT", 0.0)
    notes.go.clear()
    adviser.learn(lesson(0, 20, 40), [])
    adviser.ask(ASK)
    assert not list(adviser.answers())
    notes.go.set()
    said = answer(adviser)
    assert isinstance(said, Answer)
    assert (said.recompute is PLAN.recompute, said.adds) == (True, False)
    adviser.wait()
    assert notes.did == ["learn 40", "look", "learn 20", "learn 0", "look"]
    assert list(adviser.learned()) == [("a", "clerk")]
    assert not list(adviser.learned())


def test_who_can_be_served_is_said_once_and_again_where_they_could_not(adviser: Adviser, notes: Notes) -> None:
    for found, said in ((None, []), (Corrected(PLAN), [("a", "clerk")]), (Corrected(PLAN), [])):
        notes.found = found
        adviser.learn(lesson(0), [])
        adviser.wait()
        assert list(adviser.learned()) == said
    notes.found = None
    adviser.ask(Ask("one", IDS, PLAN, Who("clerk", tenant="a")))
    said_now = answer(adviser)
    assert isinstance(said_now, Answer)
    assert said_now.recompute is None
    notes.found = Corrected(PLAN)
    adviser.learn(lesson(0), [])
    adviser.wait()
    assert list(adviser.learned()) == [("a", "clerk")]


def test_what_fails_is_told_and_nothing_else_is_hurt(adviser: Adviser, notes: Notes) -> None:
    notes.wrong = True
    adviser.learn(lesson(0, 20), [])
    adviser.ask(ASK)
    assert isinstance(answer(adviser), RuntimeError)
    adviser.wait()
    assert [repr(fault) for fault in adviser.learned()] == ["RuntimeError('no idea')"]
    notes.wrong = False
    adviser.learn(lesson(0), [])
    adviser.wait()
    assert list(adviser.learned()) == [("a", "clerk")]


def test_backlog(adviser: Adviser, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at least, whatever it holds; more as long as there is room."""
    for room, learned in ((1, 1), (1000, 2)):
        monkeypatch.setattr(advising, "BACKLOG", room)
        notes.go.clear()
        for _ in range(3):
            adviser.learn(lesson(0), [])  # 640 bytes
        notes.go.set()
        adviser.wait()
        assert notes.did.count("learn 0") == learned
        notes.did.clear()


def test_reset(adviser: Adviser, notes: Notes) -> None:
    """What was being learned goes nowhere."""
    notes.go.clear()
    adviser.learn(lesson(0, 20), [])
    adviser.reset()
    notes.go.set()
    adviser._thread.submit(lambda: None).result()
    assert "look" not in notes.did
    assert not list(adviser.learned())
    assert not len(adviser._corrector.pool)


def test_deviations_stay_until_they_are_loaded(adviser: Adviser, notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for; the others are asked for again, and may be gone."""
    monkeypatch.setattr(advising, "KEPT", 1)
    first, second = (((10, PlainKV((), ())),) for _ in range(2))
    for name, deviations in (("one", first), ("two", second)):
        notes.found = Corrected(PLAN, deviations)
        adviser.ask(Ask(name, IDS, PLAN, Who()))
        said = answer(adviser, name)
        assert isinstance(said, Answer)
        assert said.adds
    notes.found = None
    assert adviser.deviations(Ask("two", IDS, PLAN, Who())) is second
    with pytest.raises(CacheFault, match="forgotten"):
        adviser.deviations(ASK)
