"""Single flight, against a model that compares tokens one by one; and two clients of one server, one of which waits."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import Callable
from time import monotonic

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcomm.matching import Found, Match
from kvcomm.segments import Ids, Segment
from kvcomm.wire import flights as flights_module
from kvcomm.wire.client import ServerStore
from kvcomm.wire.flights import LIMIT_S, LONGEST, Flights
from tests.wire.conftest import Running, Start, kv_of, segment
from tests.wire.test_client import line, process, until

TEXTS = [np.random.default_rng(seed).integers(1, 1000, 40).astype(np.int32) for seed in range(4)]  # nothing in common


class FlightsModel(RuleBasedStateMachine):
    """Prompts are made of whole texts; two prompts share those that they have in common, and nothing else.

    The model: a flight computes the texts of its prompt that were not known, and that no flight computed behind the same text;
    a prompt waits for another owner's flight that computes one which it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.flights = Flights(clock=lambda: self.now)
        self.model: dict[int, tuple[str, float, set[int]]] = {}  # number -> owner, since, texts
        self.waits: dict[int, int] = {}  # who would wait for whom

    owners = st.sampled_from("abc")
    prompts = st.lists(st.sampled_from(range(4)), min_size=1, max_size=3, unique=True)

    def expire(self) -> None:
        self.model = {n: row for n, row in self.model.items() if self.now - row[1] < LIMIT_S}

    @rule(owner=owners, texts=prompts, known=st.sets(st.sampled_from(range(4))))
    def take_off(self, owner: str, texts: list[int], known: set[int]) -> None:
        ids = np.concatenate([TEXTS[t] for t in texts])
        matches = [
            Match(40 * i, 40 * i + 40, Segment(TEXTS[t], TEXTS[t][:0], "f"), 0, exact=False)
            for i, t in enumerate(texts)
            if t in known
        ]
        wanted = set(texts) - known
        self.expire()
        ahead = self.flights.ahead(owner, ids, matches, "f", "")
        others = {n for n, (whose, _, computes) in self.model.items() if whose != owner and computes & wanted}
        if ahead is None:  # of equal text the last flight's is seen: one's own hides others'
            mine = {n for n, (whose, _, computes) in self.model.items() if whose == owner and computes & wanted}
            assert not others or mine
        number = self.flights.take_off(owner, ids, matches, "f", "")
        if ahead is not None:
            (first,) = (n for n, flight in self.flights._flights.items() if flight.landed is ahead.landed)
            assert first in others
            assert first < number
            assert 40 * len(self.model[first][2] & wanted) >= ahead.tokens >= 40
            assert not ahead.landed.is_set()
            self.waits[number] = first
        again = self.flights.ahead(owner, ids, matches, "f", "", number)
        assert again is None or again.landed is not self.flights._flights[number].landed, "it waits for itself"
        assert self.flights.ahead(owner, ids, matches, "another", "") is None
        assert self.flights.ahead(owner, ids, matches, "f", "another") is None
        self.model[number] = (owner, self.now, self.entered(number))

    def entered(self, number: int) -> set[int]:
        """The texts that the flight has in the index, told apart by their tokens."""
        held = [
            s.ids
            for s in self.flights._flights[number].segments
            if self.flights._of.get(s.key) is self.flights._flights[number]
        ]
        return {t for t, text in enumerate(TEXTS) if any(text.tobytes() in ids.tobytes() for ids in held)}

    @rule(number=st.integers(1, 20), owner=owners)
    def land(self, number: int, owner: str) -> None:
        self.flights.land(number, owner)
        if number in self.model and self.model[number][0] == owner:
            del self.model[number]

    @rule(owner=owners)
    def leave(self, owner: str) -> None:
        self.flights.leave(owner)
        self.model = {n: row for n, row in self.model.items() if row[0] != owner}

    @rule(seconds=st.sampled_from([1.0, 50.0, LIMIT_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def agrees(self) -> None:
        live = {n for n, row in self.model.items() if self.now - row[1] < LIMIT_S}
        assert live <= self.flights._flights.keys()
        assert {n for n, f in self.flights._flights.items() if self.now - f.since < LIMIT_S} == live
        for number in self.waits:  # follow who waits for whom: it ends
            seen = {number}
            while number in self.waits:
                number = self.waits[number]
                assert number not in seen, "they wait in a circle"
                seen.add(number)
        in_flight = {s.key for f in self.flights._flights.values() for s in f.segments}
        assert self.flights._of.keys() == in_flight
        assert len(self.flights) == len(self.flights._flights)
        assert self.flights._nbytes == sum(f.nbytes for f in self.flights._flights.values())


TestFlightsModel = FlightsModel.TestCase
TestFlightsModel.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def test_who_waits_is_woken_by_landing_and_by_time() -> None:
    async def run() -> None:
        flights = Flights()
        first = flights.take_off("a", TEXTS[0], [], "f", "")
        assert not flights.awaited(first)
        ahead = flights.ahead("b", TEXTS[0], [], "f", "")
        assert ahead is not None
        assert ahead.tokens == 40
        waiting = asyncio.create_task(flights.wait(ahead, 30.0))
        await asyncio.sleep(0)
        assert flights.awaited(first) is True
        flights.land(first, "b")  # not its own
        await asyncio.sleep(0)
        assert not waiting.done()
        flights.land(first, "a")
        await asyncio.wait_for(waiting, 1.0)
        assert not flights.awaited(first)
        await asyncio.wait_for(flights.wait(ahead, 30.0), 1.0)  # landed meanwhile
        flights.take_off("a", TEXTS[0], [], "f", "")
        again = flights.ahead("b", TEXTS[0], [], "f", "")
        assert again is not None
        began = monotonic()
        await flights.wait(again, 0.05)
        assert 0.04 < monotonic() - began < 1.0

    asyncio.run(run())


def test_text_behind_what_is_known_is_waited_for_alone() -> None:
    flights = Flights()
    flights.take_off("a", np.concatenate([TEXTS[0], TEXTS[1]]), [], "f", "")
    known = [Match(0, 40, Segment(TEXTS[0], TEXTS[0][:0], "f"), 0, exact=True)]
    ahead = flights.ahead("b", np.concatenate([TEXTS[0], TEXTS[1]]), known, "f", "")
    assert ahead is not None
    assert ahead.tokens == 40
    assert flights.ahead("b", np.concatenate([TEXTS[0], TEXTS[2]]), known, "f", "") is None
    assert flights.ahead("b", TEXTS[0][:15], [], "f", "") is None, "shorter than what is worth waiting for"


def test_long_prompts_neither_wait_nor_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is kept from the loop for them: they are not searched, nor are their ids kept."""
    flights, text = Flights(), np.random.default_rng(0).integers(1, 1000, LONGEST + 1).astype(np.int32)
    first = flights.take_off("a", text, [], "f", "")
    assert flights.ahead("b", text[:LONGEST], [], "f", "") is None
    assert flights._nbytes == 0
    short = flights.take_off("b", text[:LONGEST], [], "f", "")
    assert first < short
    assert flights._nbytes == 4 * LONGEST
    assert flights.ahead("c", text[1:], [], "f", "") is not None
    monkeypatch.setattr(flights._index, "find", None)
    assert flights.ahead("c", text, [], "f", "") is None
    flights.land(first, "a")
    assert len(flights) == 1


@pytest.mark.parametrize("bound", ["number", "bytes"])
def test_of_too_many_flights_the_oldest_land(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """Who never says that it has landed keeps no more than so much; who waits for the oldest goes on."""
    if bound == "number":
        monkeypatch.setattr(flights_module, "MOST", 3)
    else:
        monkeypatch.setattr(flights_module, "MOST_BYTES", 3 * TEXTS[0].nbytes)
    flights = Flights()
    first = flights.take_off("a", TEXTS[0], [], "f", "")
    ahead = flights.ahead("b", TEXTS[0], [], "f", "")
    assert ahead is not None
    numbers = [first, *(flights.take_off("a", text, [], "f", "") for text in TEXTS[1:3])]
    assert not ahead.landed.is_set()
    for text in (*TEXTS, *TEXTS):
        numbers.append(flights.take_off("a", text, [], "f", ""))
        assert [*flights._flights] == numbers[-3:]
        assert flights.ahead("b", text, [], "f", "") is not None
    assert ahead.landed.is_set()
    assert flights.ahead("b", TEXTS[0], [], "f", "") is None, "it landed"
    flights.leave("a")
    assert (len(flights), flights._nbytes, flights._of) == (0, 0, {})


# -- over a server ----------------------------------------------------------------------------------------------------------


class Looking(threading.Thread):
    """A prompt that is looked for while the test goes on."""

    def __init__(self, store: ServerStore, ids: Ids, ms_per_token: float | None = None) -> None:
        super().__init__()
        self.store, self.ids, self.price = store, ids, ms_per_token
        self.found: Found | None = None
        self.took = 0.0
        self.start()

    def run(self) -> None:
        began = monotonic()
        self.found = self.store.index.look(self.ids, fingerprint="f", ms_per_token=self.price)
        self.took = monotonic() - began

    def ended(self) -> Found:
        self.join(20)
        assert self.found is not None
        return self.found


def waits(running: Running, first: int) -> Callable[[], bool]:
    return lambda: running.server.flights.awaited(first)


def test_the_second_gets_what_the_first_computes(start: Start) -> None:
    running, s = start(), segment(64)
    one, two = running.store(wait_ms=20_000.0), running.store(wait_ms=20_000.0)
    first = one.index.look(s.ids, fingerprint="f")
    assert (first.matches, first.waited_ms) == ([], None)
    assert first.flight is not None
    assert not one.index.awaited(first.flight)
    second = Looking(two, s.ids)
    assert until(waits(running, first.flight))
    assert one.index.awaited(first.flight) is True
    one.put(s, kv_of(s))
    one.index.land(first.flight)
    found = second.ended()
    assert [(m.start, m.end, m.segment.key) for m in found.matches] == [(0, 64, s.key)]
    assert found.waited_ms is not None
    assert 0 < found.waited_ms <= second.took * 1e3
    assert running.server.counters.waited == 1
    one.close()
    two.close()


def test_waiting_is_bounded_by_what_it_saves(start: Start) -> None:
    """By `wait_ms`, and by the price of the tokens that are waited for."""
    running, s = start(), segment(64)
    one, patient, short = running.store(), running.store(wait_ms=20_000.0), running.store(wait_ms=100.0)
    assert one.index.look(s.ids, fingerprint="f").flight is not None
    for store, price, bound in ((short, None, 0.1), (patient, 2.0, 0.128), (patient, 0.0, 0.0)):
        looking = Looking(store, s.ids, price)
        found = looking.ended()
        assert found.matches == []
        assert bound * 0.9 <= looking.took < bound + 1.0
        assert (found.waited_ms is None) == (bound == 0.0)
        assert found.flight is not None
        store.index.land(found.flight)
    for store in (one, patient, short):
        store.close()


def test_nobody_waits_for_itself(start: Start) -> None:
    """A prompt that was never landed is no reason to wait for its own client."""
    running, s = start(), segment(64)
    store = running.store(wait_ms=20_000.0)
    for _ in range(3):
        found = store.index.look(s.ids, fingerprint="f")
        assert found.waited_ms is None
    store.close()


def test_when_the_first_is_killed_the_others_go_on_at_once(start: Start) -> None:
    running = start()
    code = "print(store.index.look(s.ids, fingerprint='f').flight, flush=True); sys.stdin.read()"
    with process(running, code) as made:
        first = int(line(made))
        stores = [running.store(wait_ms=60_000.0) for _ in range(3)]
        looking = [Looking(store, segment(50).ids) for store in stores]
        assert until(waits(running, first))
        killed(made)
        for _ in looking:  # they wait for each other, in turn
            assert until(lambda: any(not one.is_alive() and one.store in stores for one in looking))
            (one, *_) = (one for one in looking if not one.is_alive() and one.store in stores)
            assert one.took < 20
            stores.remove(one.store)
            one.store.close()


def killed(made: subprocess.Popen[str]) -> None:
    made.kill()
    made.wait()
