"""What guards tiers on other machines: deadlines of a store that hangs on an event, the breaker by a model, notes' seals."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import Segment
from kvcomm.store.base import Kept
from kvcomm.store.breaker import Breaker, Open
from kvcomm.store.deadline import DEADLINE, Late, Workers
from kvcomm.store.guarded import BREAKER_OPEN, BUSY, THREADS, UNEXPECTED, Guarded
from kvcomm.store.notices import MAX_NOTE, MAX_NOTES, seal, unseal
from kvcomm.store.record import Record, Unreadable
from kvcomm.store.remote import Census, RemoteFault, RemoteStore

Made = Callable[..., Record]


class Service(RemoteStore):
    """A dict; `fault` is raised by every call while it is set, and calls wait for `gate`."""

    name = "service"

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Record] = {}
        self.notes: dict[str, bytes] = {}
        self.fault: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls = 0
        self.closed = False

    def _answer(self) -> None:
        self.calls += 1
        self.gate.wait()
        if self.fault is not None:
            raise self.fault

    def put_record(self, record: Record) -> Kept:
        self._answer()
        self.records[record.key] = record
        return Kept(stored=True)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        self._answer()
        found = {key: self.records[key] for key in keys if key in self.records}
        self.counts.looked_up(len(found), len(list(keys)))
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        self._answer()
        return set(keys) & set(self.records)

    def remove(self, key: str) -> bool:
        self._answer()
        return self.records.pop(key, None) is not None

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        self._answer()
        self.notes |= notes

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        self._answer()
        return {name: self.notes[name] for name in names if name in self.notes}

    def segments(self) -> list[Segment]:
        self._answer()
        return [record.segment for record in self.records.values()]

    def census(self) -> Census:
        self._answer()
        return Census(len(self.records), sum(r.nbytes for r in self.records.values()), 1 << 30)

    def close(self) -> None:
        self.closed = True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def never_open() -> Breaker:
    return Breaker(time.monotonic, after=1000, lost_s=1000)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service()
    yield made
    made.gate.set()  # whatever still hangs


@pytest.fixture
def clock() -> Clock:
    return Clock()


def calls(store: RemoteStore, r: Record) -> list[Callable[[], object]]:
    return [
        lambda: store.put_record(r),
        lambda: store.get_records([r.key]),
        lambda: store.has([r.key]),
        lambda: store.remove(r.key),
        lambda: store.put_notes({"ab": b"1"}),
        lambda: store.get_notes(["ab"]),
        store.segments,
    ]


def test_passes_everything_through(service: Service, record: Made) -> None:
    store = Guarded(service)
    a, b = record(0), record(1)
    assert store.name == "service"
    assert store.put_record(a) == Kept(stored=True)
    assert store.get_records(iter([a.key, a.key, b.key])) == {a.key: a}
    assert store.has(iter([a.key, b.key])) == {a.key}
    store.put_notes({"ab": b"1"})
    assert store.get_notes(["ab", "cd", "ab"]) == {"ab": b"1"}
    assert [s.key for s in store.segments()] == [a.key]
    stats = store.stats()
    assert (stats.objects, stats.nbytes, stats.limit_bytes) == (1, a.nbytes, 1 << 30)
    assert (stats.hits, stats.misses, stats.faults) == (1, 1, {})
    store.check_integrity()
    assert store.remove(a.key)
    assert not store.remove(a.key)
    store.close()
    assert service.closed


def test_nothing_is_asked_for_nothing(service: Service) -> None:
    store = Guarded(service)
    assert (store.get_records([]), store.has([]), store.get_notes([])) == ({}, set(), {})
    store.put_notes({})
    assert service.calls == 0
    store.close()


def test_every_call_meets_its_deadline(service: Service, record: Made) -> None:
    a = record(0)
    store = Guarded(service, deadline_s=0.02, breaker=never_open())
    service.gate.clear()
    for call in calls(store, a):
        began = time.monotonic()
        with pytest.raises(RemoteFault, match=f"service: {DEADLINE}: no answer within") as caught:
            call()
        assert caught.value.reason == DEADLINE
        assert isinstance(caught.value, CacheFault)
        assert time.monotonic() - began < 5
    assert len(calls(store, a)) == THREADS - 1
    assert store.counts.stats(0, 0, 0).faults == {DEADLINE: 7}
    service.gate.set()
    store.close()


def test_hanging_calls_leave_others_waiting_and_are_bounded(service: Service, record: Made) -> None:
    a = record(0)
    store = Guarded(service, deadline_s=0.02, breaker=never_open())
    service.gate.clear()
    reasons = []
    for _ in range(THREADS + 3):
        with pytest.raises(RemoteFault) as caught:
            store.has([a.key])
        reasons.append(caught.value.reason)
    assert reasons == [DEADLINE] * THREADS + [BUSY] * 3
    assert service.calls == THREADS
    service.gate.set()
    generous = Guarded(service, deadline_s=30)
    generous._workers = store._workers
    assert generous.has([a.key]) == set()
    assert service.calls == THREADS + 1  # what was busy is not made up for
    store.close()


def test_large_puts_have_longer(service: Service, record: Made) -> None:
    """At 32 MiB/s: one MiB adds about 31 ms to a deadline of 1 ms."""
    a = record(0, tokens=1024, dim=32)
    assert a.nbytes > 1 << 20
    store = Guarded(service, deadline_s=0.001, breaker=never_open())
    service.gate.clear()
    began = time.monotonic()
    with pytest.raises(RemoteFault):
        store.put_record(a)
    assert time.monotonic() - began > 0.03
    service.gate.set()
    store.close()


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("odd"), TimeoutError("its own"), KeyError(1), MemoryError()])
def test_whatever_a_tier_raises_is_a_fault(service: Service, record: Made, error: Exception) -> None:
    store = Guarded(service, breaker=never_open())
    service.fault = error
    for call in calls(store, record(0)):
        with pytest.raises(RemoteFault, match=f"service: {UNEXPECTED}: {type(error).__name__}"):
            call()
    assert store.stats().faults == {UNEXPECTED: 8}
    store.close()


def test_faults_of_the_caller_are_none_of_the_service(service: Service, record: Made) -> None:
    store = Guarded(service, breaker=Breaker(time.monotonic, after=1))
    damaged = record(0).data.copy()
    damaged[40] ^= 1
    with pytest.raises(Unreadable):
        store.put_record(Record(damaged))
    wrong: tuple[Any, ...] = ({"AB": b""}, {"": b""}, {"a" * 129: b""}, {"a/b": b""}, {"ab": bytes(MAX_NOTE + 1)})
    for notes in wrong:
        with pytest.raises(InputError):
            store.put_notes(notes)
    for names in (["g"], ["0" * 200], [f"{i:x}" for i in range(MAX_NOTES + 1)]):
        with pytest.raises(InputError):
            store.get_notes(names)
    assert service.calls == 0
    assert store.stats().faults == {}
    store.close()


def test_the_breaker_spares_the_service_and_the_caller(service: Service, clock: Clock, record: Made) -> None:
    a = record(0)
    store = Guarded(service, clock=clock)
    service.fault = RemoteFault("service", "unreachable", "gone")
    for _ in range(3):
        with pytest.raises(RemoteFault, match="unreachable"):
            store.has([a.key])
    for call in calls(store, a):
        with pytest.raises(RemoteFault, match=f"{BREAKER_OPEN}: it failed lately; tried again in 1.0 s"):
            call()
    assert service.calls == 3
    clock.now += 1
    with pytest.raises(RemoteFault, match="unreachable"):
        store.has([a.key])
    clock.now += 1.9
    with pytest.raises(RemoteFault, match=r"tried again in 0.1 s"):
        store.has([a.key])
    clock.now += 0.2
    service.fault = None
    assert store.has([a.key]) == set()
    assert store.put_record(a)
    assert store.stats().faults == {"unreachable": 4, BREAKER_OPEN: 8}
    assert store.stats().objects == 1
    store.close()


def test_one_missed_deadline_opens_the_breaker(service: Service, record: Made) -> None:
    """What hangs costs a request one deadline, not one for each of its calls."""
    a = record(0)
    store = Guarded(service, deadline_s=0.1)
    service.gate.clear()
    reasons = []
    for call in calls(store, a):
        with pytest.raises(RemoteFault) as caught:
            call()
        reasons.append(caught.value.reason)
    assert reasons == [DEADLINE] + [BREAKER_OPEN] * 6
    service.gate.set()
    store.close()


def test_stats_never_raise(service: Service, clock: Clock, record: Made) -> None:
    """Where the service cannot be asked, what it said last."""
    store = Guarded(service, clock=clock)
    a = record(0)
    store.put_record(a)
    assert store.stats().objects == 1
    service.fault = OSError("gone")
    for _ in range(5):
        assert (store.stats().objects, store.nbytes) == (1, a.nbytes)
    assert store.stats().faults[BREAKER_OPEN] > 0
    store.close()


def test_unusable_deadline(service: Service) -> None:
    for seconds in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="deadline_s"):
            Guarded(service, deadline_s=seconds)


Call = tuple[bool, float]  # does it succeed, and the seconds that it takes


@settings(max_examples=300)
@given(st.lists(st.one_of(st.tuples(st.booleans(), st.sampled_from((0, 0.25, 2, 12))), st.floats(0, 20))), st.integers(1, 4))
def test_breaker_is_its_model(steps: list[Call | float], after: int) -> None:
    """Successes, failures and time that passes, against a plain description in variables."""
    clock = Clock()
    breaker = Breaker(clock, after=after, lost_s=0.7, first_s=1.0, longest_s=8.0)
    failures, until, wait = list[float](), 0.0, 1.0
    for step in steps:
        if not isinstance(step, tuple):
            clock.now += step
            continue
        succeeds, took = step
        is_open = len(failures) >= after or sum(failures) >= 0.7
        if is_open and clock.now < until:
            with pytest.raises(Open) as still, breaker.attempt():
                pytest.fail("it was let through")
            assert still.value.seconds == pytest.approx(until - clock.now)
            continue
        if succeeds:
            with breaker.attempt():
                clock.now += took
            failures, wait = [], 1.0
        else:
            with suppress(KeyError), breaker.attempt():
                clock.now += took
                raise KeyError
            failures.append(took)
            if len(failures) >= after or sum(failures) >= 0.7:
                until, wait = clock.now + max(wait, took), min(2 * wait, 8.0)
        assert breaker.closed == (len(failures) < after and sum(failures) < 0.7)


def test_one_trial_at_a_time() -> None:
    clock = Clock()
    breaker = Breaker(clock, after=1)
    with pytest.raises(KeyError), breaker.attempt():
        raise KeyError
    clock.now += 1
    with breaker.attempt(), pytest.raises(Open), breaker.attempt():
        pytest.fail("a second trial")
    with breaker.attempt(), breaker.attempt():
        assert breaker.closed


def test_calls_that_began_before_it_opened_change_nothing() -> None:
    clock = Clock()
    breaker = Breaker(clock, after=1)
    early = breaker.attempt()
    early.__enter__()
    with pytest.raises(KeyError), breaker.attempt():
        raise KeyError
    clock.now += 0.75
    assert not early.__exit__(ValueError, ValueError("early"), None)
    with pytest.raises(Open) as still, breaker.attempt():
        pytest.fail("open")
    assert still.value.seconds == 0.25


@pytest.mark.parametrize(
    "given", [{"after": 0}, {"lost_s": 0}, {"lost_s": float("nan")}, {"first_s": 0}, {"first_s": 90}, {"first_s": float("nan")}]
)
def test_unusable_breakers(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a breaker after"):
        Breaker(Clock(), **given)


def test_workers_give_results_and_errors_back() -> None:
    workers = Workers(4, "test")
    results: list[int] = []

    def ask(n: int) -> None:
        for i in range(50):
            results.append(workers.run(lambda i=i: n * 1000 + i, 30))  # type: ignore[misc]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [n * 1000 + i for n in range(8) for i in range(50)]
    for error in (TimeoutError("its own"), KeyError("k"), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            workers.run(lambda error=error: (_ for _ in ()).throw(error), 30)  # type: ignore[misc]
        assert caught.value is error
    workers.close()


def test_workers_keep_nothing_alive() -> None:
    class Large:
        pass

    workers = Workers(1, "test")
    thing = Large()
    gone = weakref.ref(thing)
    assert workers.run(lambda thing=thing: thing, 30) is thing  # type: ignore[misc]
    del thing
    workers.run(lambda: None, 30)
    gc.collect()
    assert gone() is None
    workers.close()


def test_closed_workers_end() -> None:
    workers = Workers(3, "kvcomm-test-closed")
    workers.run(lambda: None, 30)
    workers.close()
    for thread in threading.enumerate():
        if thread.name == "kvcomm-test-closed":
            thread.join(30)
            assert not thread.is_alive()
    with pytest.raises(Late):
        workers.run(lambda: None, 0.01)


names = st.text("0123456789abcdef", min_size=1, max_size=128)


@given(names, st.binary(max_size=300), names, st.data())
def test_seals(name: str, value: bytes, other: str, data: st.DataObject) -> None:
    """Any changed byte, a cut, and another name are noticed."""
    sealed = seal(name, value)
    assert unseal(name, sealed) == value
    assert name == other or unseal(other, sealed) is None
    at = data.draw(st.integers(0, len(sealed) - 1))
    flipped = bytearray(sealed)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    assert unseal(name, bytes(flipped)) is None
    assert unseal(name, sealed[:at]) is None
    assert unseal(name, None) is None


def test_a_get_is_read_while_a_put_hangs(service: Service, record: Made) -> None:
    """Calls do not wait for each other."""
    a, b = record(0), record(1)
    service.records[b.key] = b
    store = Guarded(service, deadline_s=30)
    put = threading.Thread(target=lambda: store.put_record(a))
    service.gate.clear()
    put.start()
    while service.calls < 1:
        time.sleep(0.001)  # until the put is there
    get = threading.Thread(target=lambda: store.get_records([b.key]))
    get.start()
    while service.calls < 2:
        time.sleep(0.001)
    service.gate.set()
    put.join(30)
    get.join(30)
    assert np.array_equal(store.get_records([b.key])[b.key].data, b.data)
    store.close()
