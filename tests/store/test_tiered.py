"""Stacks of tiers against a plain model of which tier holds what, with tiers that fail on command and a clock that is moved."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.base import TOO_LARGE, Kept, StoreStats
from kvcomm.store.ledger import Ledger
from kvcomm.store.priced import RETRY
from kvcomm.store.record import DAMAGED, Record, Unreadable
from kvcomm.store.records import Counts, RecordStore
from kvcomm.store.remote import RemoteFault
from kvcomm.store.speed import Speed
from kvcomm.store.tiered import NOT_WRITTEN, QUEUE_FULL, Tiered

WAIT = 20.0  # seconds that a test waits for a thread at most


def record(seed: int, tokens: int = 8) -> Record:
    ids = np.random.default_rng(seed).integers(1, 1000, tokens).astype(np.int32)
    g = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, tokens, 4, generator=g), torch.randn(2, 2, tokens, 4, generator=g)
    return Record.of(Segment(ids, ids[:0], "f"), SegmentKV(tuple(keys), tuple(values), 0, tokens))


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class DictStore(RecordStore):
    """Records in a dict, the least recently used leaves first. `down`: all calls raise CacheFault; `gate`: puts wait for it."""

    name = "dict"

    def __init__(self, limit: int, name: str = "dict", clock: Clock | None = None) -> None:
        self.limit, self.down = limit, False
        self.name = name  # type: ignore[misc]  # several kinds of one class
        self.kept: OrderedDict[str, Record] = OrderedDict()
        self.counts = Counts()
        self.clock, self.latency_ms, self.ms_per_byte = clock, 0.0, 0.0
        self.asked: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)  # puts that began
        self.closed = False
        self.lock = threading.RLock()

    def check(self) -> None:
        if self.down:
            raise CacheFault(f"{self.name} is down")

    def put_record(self, record: Record) -> Kept:
        self.entered.release()
        assert self.gate.wait(WAIT)
        with self.lock:
            return self._put(record)

    def _put(self, record: Record) -> Kept:
        self.check()
        if record.key in self.kept:
            self.kept.move_to_end(record.key)
            return Kept(stored=True)
        if record.nbytes > self.limit:
            return self.counts.refused(TOO_LARGE)
        evicted = []
        while sum(r.nbytes for r in self.kept.values()) + record.nbytes > self.limit:
            evicted.append(self.kept.popitem(last=False)[0])
        self.counts.left(len(evicted))
        self.kept[record.key] = Record(record.data.copy())
        return Kept(stored=True, evicted=tuple(evicted))

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        with self.lock:
            return self._get(keys)

    def _get(self, keys: Iterable[str]) -> dict[str, Record]:
        self.check()
        asked = list(keys)
        self.asked.append(asked)
        found = {}
        for key in asked:
            if key in self.kept and self.counts.sound(self.kept[key], key):
                self.kept.move_to_end(key)
                found[key] = self.kept[key]
            else:
                self.kept.pop(key, None)
        self.counts.looked_up(len(found), len(asked))
        if self.clock is not None:
            self.clock.now += (self.latency_ms + self.ms_per_byte * sum(r.nbytes for r in found.values())) / 1e3
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        self.check()
        with self.lock:
            return {key for key in keys if key in self.kept}

    def remove(self, key: str) -> bool:
        self.check()
        with self.lock:
            return self.kept.pop(key, None) is not None

    def segments(self) -> list[Segment]:
        self.check()
        return [r.segment for r in self.kept.values()]

    def stats(self) -> StoreStats:
        return self.counts.stats(len(self.kept), sum(r.nbytes for r in self.kept.values()), self.limit)

    def check_integrity(self) -> None:
        with self.lock:
            assert sum(r.nbytes for r in self.kept.values()) <= self.limit

    def close(self) -> None:
        self.closed = True


SIZE = record(0).nbytes
RECORDS = [record(seed) for seed in range(8)]
LARGE = record(8, 60)
assert SIZE * 3 < LARGE.nbytes < SIZE * 7
assert {r.nbytes for r in RECORDS} == {SIZE}


def pair(front: int = 2, back: int = 4, **options: object) -> tuple[DictStore, DictStore, Tiered]:
    """Limits in small records."""
    a, b = DictStore(front * SIZE, "a"), DictStore(back * SIZE, "b")
    return a, b, Tiered(a, b, **options)  # type: ignore[arg-type]


# --- what a stack does ------------------------------------------------------------------------------------------------------


def test_put_goes_to_both_and_get_promotes() -> None:
    a, b, stack = pair()
    r = RECORDS[0]
    assert stack.put_record(r) == Kept(stored=True)
    assert a.kept.keys() == b.kept.keys() == {r.key}
    a.remove(r.key)
    found = stack.get_records([r.key, RECORDS[1].key])
    assert found.keys() == {r.key}
    assert found[r.key] is a.kept[r.key]  # the front's own, not the back's
    assert stack.get_records([r.key])[r.key] is found[r.key]
    assert b.asked == [[r.key, RECORDS[1].key]]
    stats = stack.stats()
    assert (stats.hits, stats.misses, stats.objects, stats.nbytes, stats.limit_bytes) == (2, 1, 2, 2 * SIZE, 6 * SIZE)


def test_without_promotion_the_front_stays_as_it_is() -> None:
    a, _, stack = pair(promote=False)
    stack.put_record(RECORDS[0])
    a.remove(RECORDS[0].key)
    assert stack.get_records([RECORDS[0].key]).keys() == {RECORDS[0].key}
    assert not a.kept


def test_a_failed_promotion_is_no_failure_of_the_get() -> None:
    a, b, stack = pair(front=1, back=8)
    assert stack.put_record(LARGE) == Kept(stored=True)
    assert stack.get_records([LARGE.key])[LARGE.key] is b.kept[LARGE.key]
    assert a.stats().refused == {TOO_LARGE: 2}
    a.down = True
    stack.put_record(RECORDS[0])
    assert stack.get_records([RECORDS[0].key])[RECORDS[0].key].data.tobytes() == RECORDS[0].data.tobytes()
    assert stack.stats().faults == {"a-fault": 3}  # put, get, promotion


def test_what_the_back_still_keeps_is_not_evicted_and_the_back_is_not_asked() -> None:
    _, b, stack = pair(front=1, back=3)
    b.has = None  # type: ignore[assignment,method-assign]  # calling it would raise
    for r in RECORDS[:3]:
        assert stack.put_record(r) == Kept(stored=True)
    assert stack.put_record(RECORDS[3]) == Kept(stored=True, evicted=(RECORDS[0].key,))
    b.down = True
    assert stack.put_record(RECORDS[4]) == Kept(stored=True)  # the front's 3 is below
    assert stack.put_record(RECORDS[5]) == Kept(stored=True, evicted=(RECORDS[4].key,))  # 4 never was


def test_a_back_that_forgets_silently_is_found_out_by_a_miss() -> None:
    a, b, stack = pair(front=1)
    stack.put_record(RECORDS[0])
    stack.put_record(RECORDS[1])  # 0 is below only
    b.kept.clear()
    assert stack.get_records([RECORDS[0].key, RECORDS[1].key]).keys() == {RECORDS[1].key}
    a.kept.clear()
    assert set(stack.lost([RECORDS[0].key, RECORDS[1].key])) == {RECORDS[0].key}  # of 1 the back said nothing yet
    assert stack.get_records([RECORDS[1].key]) == {}
    assert stack.lost([RECORDS[1].key]) == (RECORDS[1].key,)


def test_what_the_back_kept_from_earlier_is_not_evicted_from_it_by_the_front() -> None:
    """After a restart: found below and promoted, then it leaves the front."""
    _, b, stack = pair(front=1, back=8)
    b.put_record(RECORDS[0])
    assert stack.get_records([RECORDS[0].key])
    assert stack.put_record(RECORDS[1]) == Kept(stored=True)


def test_what_was_declined_or_could_not_be_reached_is_still_below() -> None:
    _, b, stack = pair(front=1, back=8)
    stack.put_record(RECORDS[0])
    stack.put_record(RECORDS[1])
    b.down = True
    assert stack.get_records([RECORDS[0].key]) == {}
    assert stack.lost([RECORDS[0].key]) == ()


def test_what_a_promotion_evicts_is_told_with_the_next_put() -> None:
    a, b, stack = pair(front=1, back=8)
    stack.put_record(RECORDS[0])
    b.down = True
    stack.put_record(RECORDS[1])  # in front only
    b.down = False
    stack.get_records([RECORDS[0].key])
    assert a.kept.keys() == {RECORDS[0].key}
    assert stack.put_record(RECORDS[2]).evicted == (RECORDS[1].key,)
    assert stack.lost() == ()


def test_refused_when_no_tier_keeps_it() -> None:
    a, b, stack = pair(front=1, back=1)
    assert stack.put_record(LARGE) == Kept(stored=False, reason=TOO_LARGE)
    a.down = b.down = True
    assert stack.put_record(RECORDS[0]) == Kept(stored=False, reason="b-fault")
    assert stack.get_worth({RECORDS[0].key: 1.0}) == ({}, {RECORDS[0].key: "a-fault"})
    assert stack.has([RECORDS[0].key]) == set()
    assert not stack.remove(RECORDS[0].key)
    assert stack.segments() == []


def test_a_damaged_header_is_refused_before_any_tier() -> None:
    a, b, stack = pair()
    data = RECORDS[0].data.copy()
    data[40] ^= 1
    with pytest.raises(Unreadable, match=DAMAGED):
        stack.put_record(Record(data))
    with pytest.raises(Unreadable, match=DAMAGED):
        stack.write_down(Record(data))
    assert not a.kept
    assert not b.kept
    assert not stack.stats().faults


def test_damaged_in_front_is_served_from_the_back() -> None:
    a, _, stack = pair()
    stack.put_record(RECORDS[0])
    a.kept[RECORDS[0].key].data[-1] ^= 1
    found = stack.get_records([RECORDS[0].key])
    assert found[RECORDS[0].key].data.tobytes() == RECORDS[0].data.tobytes()
    assert a.stats().faults == {DAMAGED: 1}


def test_written_down_past_the_front() -> None:
    a, b, stack = pair()
    a.put_record(RECORDS[0])
    assert stack.write_down(RECORDS[0]) == Kept(stored=True)
    assert b.kept.keys() == {RECORDS[0].key}
    assert stack.size(RECORDS[0].key) == SIZE
    assert stack.size(RECORDS[1].key) is None
    evicted = [key for r in RECORDS[1:3] for key in a.put_record(r).evicted]
    assert evicted == [RECORDS[0].key]
    assert stack.lost(evicted) == ()  # it is below
    evicted = list(a.put_record(RECORDS[3]).evicted)
    assert stack.lost(evicted) == (RECORDS[1].key,)


@pytest.mark.parametrize("nested", ["front", "back"])
def test_three_tiers(nested: str) -> None:
    a, b, c = DictStore(SIZE, "a"), DictStore(2 * SIZE, "b"), DictStore(3 * SIZE, "c")
    stack = Tiered(Tiered(a, b), c) if nested == "front" else Tiered(a, Tiered(b, c))
    assert stack.tiers() == [a, b, c]
    for r in RECORDS[:3]:
        assert stack.put_record(r) == Kept(stored=True)
    assert [len(t.kept) for t in (a, b, c)] == [1, 2, 3]
    assert stack.get_records([RECORDS[0].key]).keys() == {RECORDS[0].key}
    assert RECORDS[0].key in a.kept
    assert RECORDS[0].key in b.kept
    assert stack.put_record(RECORDS[3]).evicted == (RECORDS[1].key,)  # c's oldest: 0 was used when it was read
    assert {s.key for s in stack.segments()} == {key for t in (a, b, c) for key in t.kept}
    stack.check_integrity()
    stack.close()
    assert a.closed
    assert b.closed
    assert c.closed


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="'behind'"):
        pair(write="behind")
    with pytest.raises(InputError, match="-1"):
        pair(write="back", queue_bytes=-1)


# --- the stack as a model ---------------------------------------------------------------------------------------------------


class StackModel(RuleBasedStateMachine):
    """Whatever fails, every record that is read is the one that was put, and an index that follows puts and evictions knows
    exactly what the tiers hold: no more ever, and no less unless a failing tier could not be emptied.
    """

    def __init__(self) -> None:
        super().__init__()
        self.index: set[str] = set()
        self.stubborn: set[str] = set()  # removed while a tier was down

    @initialize(shape=st.sampled_from("ab a(bc) (ab)c".split()), promote=st.booleans(), back=st.booleans())
    def build(self, shape: str, promote: bool, back: bool) -> None:
        a, b, c = DictStore(2 * SIZE, "a"), DictStore(4 * SIZE, "b"), DictStore(5 * SIZE, "c")
        write = "back" if back else "through"

        def tiered(front: RecordStore, back: RecordStore) -> Tiered:
            return Tiered(front, back, promote=promote, write=write, queue_bytes=3 * SIZE)  # type: ignore[arg-type]

        self.leaves = [a, b] if shape == "ab" else [a, b, c]
        self.stack = {
            "ab": lambda: tiered(a, b),
            "a(bc)": lambda: tiered(a, tiered(b, c)),
            "(ab)c": lambda: tiered(tiered(a, b), c),
        }[shape]()

    @property
    def held(self) -> set[str]:
        return {key for leaf in self.leaves for key in leaf.kept}

    def follow(self, kept: Kept, key: str) -> None:
        self.index -= set(kept.evicted)
        if kept:
            self.index.add(key)

    @rule(i=st.integers(0, 8))
    def put(self, i: int) -> None:
        r = [*RECORDS, LARGE][i]
        self.follow(self.stack.put_record(r), r.key)

    @rule(i=st.integers(0, 8))
    def write_down(self, i: int) -> None:
        r = [*RECORDS, LARGE][i]
        self.follow(self.stack.write_down(r), r.key)

    @rule(some=st.sets(st.integers(0, 8), max_size=4))
    def get(self, some: set[int]) -> None:
        records = {r.key: r for r in ([*RECORDS, LARGE][i] for i in sorted(some))}
        assert self.stack.flush(WAIT)
        held, failing = self.held, any(leaf.down for leaf in self.leaves)
        found, why = self.stack.get_worth(dict.fromkeys(records, math.inf))
        for key, r in found.items():
            assert r.data.tobytes() == records[key].data.tobytes()
        assert not found.keys() & why.keys()
        assert found.keys() | why.keys() >= held & records.keys()
        assert found.keys() <= held
        if not failing:
            assert not why

    @rule(i=st.integers(0, 8))
    def remove(self, i: int) -> None:
        key = [*RECORDS, LARGE][i].key
        assert self.stack.flush(WAIT)
        down = [leaf for leaf in self.leaves if leaf.down]
        had = {leaf.name for leaf in self.leaves if key in leaf.kept and not leaf.down}
        assert self.stack.remove(key) == bool(had)
        self.index.discard(key)
        if any(key in leaf.kept for leaf in down):
            self.stubborn.add(key)

    @rule(leaf=st.integers(0, 2))
    def fail_or_recover(self, leaf: int) -> None:
        self.stack.flush(WAIT)
        self.leaves[leaf % len(self.leaves)].down ^= True

    @invariant()
    def the_index_is_right(self) -> None:
        assert self.stack.flush(WAIT)
        self.index -= set(self.stack.lost())
        self.stack.check_integrity()
        self.stubborn &= self.held
        assert self.held - self.index <= self.stubborn
        if not self.leaves[0].down and not self.leaves[1].down:  # who left a front that is down is told when it is back
            assert self.index <= self.held

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()


TestStackModel = StackModel.TestCase
TestStackModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- writing behind ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gated() -> Iterator[tuple[DictStore, DictStore, Tiered]]:
    """A stack whose back lets no put finish before its gate is opened; the queue holds three small records."""
    a, b, stack = pair(front=1, back=8, write="back", queue_bytes=3 * SIZE, drain_s=WAIT)
    b.gate.clear()
    yield a, b, stack
    b.gate.set()
    stack.close()


def test_the_queue_is_bounded_and_serves_what_waits(gated: tuple[DictStore, DictStore, Tiered]) -> None:
    _, b, stack = gated
    for r in RECORDS[:3]:
        assert stack.put_record(r) == Kept(stored=True)  # 0 and 1 left the front; they wait to be written
    assert stack.put_record(RECORDS[3]) == Kept(stored=True)  # kept in front, not written down
    assert stack.stats().refused == {QUEUE_FULL: 1}
    stack.check_integrity()
    keys = [r.key for r in RECORDS[:4]]
    found = stack.get_records(keys)
    assert found.keys() == set(keys)
    assert stack.has(keys) == set(keys)
    assert all(found[r.key].data.tobytes() == r.data.tobytes() for r in RECORDS[:4])
    assert stack.write_down(RECORDS[4]) == Kept(stored=False, reason=QUEUE_FULL)
    assert b.kept == {}
    b.gate.set()
    assert stack.flush(WAIT)
    assert list(b.kept) == keys[:3]  # in order
    assert stack.put_record(RECORDS[5]).evicted == (keys[3],)


def test_what_could_not_be_written_later_is_told(gated: tuple[DictStore, DictStore, Tiered]) -> None:
    _, b, stack = gated
    stack.put_record(RECORDS[0])
    assert stack.put_record(RECORDS[1]) == Kept(stored=True)
    b.down = True
    b.gate.set()
    assert stack.flush(WAIT)
    assert stack.put_record(RECORDS[2]).evicted == (RECORDS[0].key, RECORDS[1].key)
    assert stack.stats().faults["b-fault"] >= 2


def test_the_thread_outlives_a_tier_that_breaks_its_word() -> None:
    _, b, stack = pair(write="back")
    good = b.put_record

    def broken(record: Record) -> Kept:
        raise OSError("disk")

    b.put_record = broken  # type: ignore[method-assign]
    stack.put_record(RECORDS[0])
    assert stack.flush(WAIT)
    assert stack.stats().faults == {"b-OSError": 1}
    b.put_record = good  # type: ignore[method-assign]
    stack.put_record(RECORDS[1])
    assert stack.flush(WAIT)
    assert list(b.kept) == [RECORDS[1].key]
    stack.close()


def test_asking_between_a_failed_write_and_the_end_of_it_loses_no_key() -> None:
    """As another thread's put may; the thread's own call stands for it."""
    _, b, stack = pair(front=1, write="back")
    b.down = True
    queue = stack._queue
    assert queue is not None
    write = queue._write

    def and_ask(record: Record) -> None:
        write(record)
        told.extend(stack.lost())

    told: list[str] = []
    queue._write = and_ask
    b.gate.clear()
    stack.put_record(RECORDS[0])
    stack.put_record(RECORDS[1])
    b.gate.set()
    assert stack.flush(WAIT)
    assert [*told, *stack.lost()] == [RECORDS[0].key]  # 1 is in front
    stack.close()


@pytest.mark.parametrize("write", ["through", "back"])
def test_threads_read_what_was_put(write: str) -> None:
    """Four threads put, get and remove; every record read is its own, bounds hold, and in the end the stack knows
    what its tiers keep."""
    a, b, stack = pair(front=2, back=4, write=write, queue_bytes=3 * SIZE)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for i, what in zip(rng.integers(0, 8, 400), rng.integers(0, 6, 400), strict=True):
                if what < 2:
                    stack.put_record(RECORDS[i])
                elif what == 2:
                    stack.remove(RECORDS[i].key)
                else:
                    keys = [RECORDS[j % 8].key for j in range(i, i + 3)]
                    wrong.extend(key for key, r in stack.get_records(keys).items() if r.verify(key).key != key)
                stack.check_integrity()
        except Exception as error:  # noqa: BLE001  # shown by the main thread
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert stack.flush(WAIT)
    told = set(stack.lost([r.key for r in RECORDS]))
    assert told == {r.key for r in RECORDS} - a.kept.keys() - b.kept.keys()
    stack.close()


def test_removed_while_it_is_written_is_gone_afterwards(gated: tuple[DictStore, DictStore, Tiered]) -> None:
    _, b, stack = gated
    for r in RECORDS[:3]:
        stack.put_record(r)
    assert b.entered.acquire(timeout=WAIT)  # 0 is in hand
    assert stack.remove(RECORDS[0].key)
    assert stack.remove(RECORDS[1].key)
    assert not stack.remove(RECORDS[0].key)
    assert stack.get_records([r.key for r in RECORDS[:3]]).keys() == {RECORDS[2].key}
    b.gate.set()
    assert stack.flush(WAIT)
    assert list(b.kept) == [RECORDS[2].key]
    assert set(stack.lost([RECORDS[0].key])) == {RECORDS[0].key, RECORDS[1].key}  # both had left the front before


def test_removed_and_put_again_while_it_is_written_is_kept(gated: tuple[DictStore, DictStore, Tiered]) -> None:
    _, b, stack = gated
    stack.put_record(RECORDS[0])
    assert b.entered.acquire(timeout=WAIT)
    assert stack.remove(RECORDS[0].key)
    assert stack.put_record(RECORDS[0])
    b.gate.set()
    assert stack.flush(WAIT)
    assert list(b.kept) == [RECORDS[0].key]
    assert stack.put_record(RECORDS[1]) == Kept(stored=True)


def test_close_drains_within_a_bound() -> None:
    _, b, stack = pair(write="back", drain_s=WAIT)
    for r in RECORDS[:4]:
        stack.put_record(r)
    stack.close()
    assert len(b.kept) == 4
    assert b.closed

    _, b, stack = pair(write="back", drain_s=0.05)
    b.gate.clear()
    for r in RECORDS[:3]:
        stack.put_record(r)
    stack.close()  # returns though the back hangs
    assert stack.stats().refused == {NOT_WRITTEN: 3}
    b.gate.set()


# --- load or recompute ------------------------------------------------------------------------------------------------------


def slow_stack(ms_per_byte: float, latency_ms: float = 0.0) -> tuple[DictStore, Tiered, Clock]:
    clock = Clock()
    a, b = DictStore(SIZE, "a"), DictStore(100 * SIZE, "b", clock)
    b.ms_per_byte, b.latency_ms = ms_per_byte, latency_ms
    stack = Tiered(a, b, promote=False, clock=clock)
    for r in RECORDS:
        stack.put_record(r)
    return b, stack, clock


def test_what_takes_longer_to_load_than_to_compute_is_declined() -> None:
    b, stack, _ = slow_stack(10 / SIZE)
    keys = [r.key for r in RECORDS[:4]]
    for key in keys[:2]:  # measured before anything is declined
        assert stack.get_worth({key: 0.001})[0].keys() == {key}
    found, why = stack.get_worth({keys[0]: 9.0, keys[1]: 11.0, keys[2]: 9.0, RECORDS[7].key: 0.0})
    assert found.keys() == {keys[1], RECORDS[7].key}  # 7 is in front, which is not judged
    assert why == dict.fromkeys([keys[0], keys[2]], "b-slower-than-computing")
    assert b.asked[-1] == [keys[1]]
    assert stack.get_records(keys).keys() == set(keys)  # has no prices


def test_what_was_declined_and_computed_is_wanted_again() -> None:
    """So that it is found in front from then on."""
    _, stack, _ = slow_stack(10 / SIZE)
    record = RECORDS[0]
    stack.get_records([record.key])
    stack.get_records([record.key])
    assert stack.get_worth({record.key: 1.0}) == ({}, {record.key: "b-slower-than-computing"})
    assert record.key in stack
    assert stack.wants(record.key)
    stack.put_record(record)
    assert not stack.wants(record.key)
    assert stack.get_worth({record.key: 1.0})[0].keys() == {record.key}


def test_a_tier_that_misses_its_deadline_is_slow() -> None:
    """Each time: else it would be waited for in vain by every prompt."""
    b, stack, clock = slow_stack(0)
    key = RECORDS[0].key

    def late(keys: object) -> dict[str, Record]:
        clock.now += 2
        raise RemoteFault("b", "deadline", "no answer within 2 s")

    b.get_records = late  # type: ignore[method-assign]
    said = [stack.get_worth({key: 1000.0}) for _ in range(5)]
    assert [why for _, why in said] == [{key: "b-deadline"}] * 2 + [{key: "b-slower-than-computing"}] * 3
    assert stack.get_worth({key: 3000.0})[1] == {key: "b-deadline"}


def test_a_tier_that_became_fast_is_noticed() -> None:
    b, stack, _ = slow_stack(100 / SIZE)
    key = RECORDS[0].key
    for _ in range(5):
        stack.get_records([key])
    b.ms_per_byte = 1 / SIZE
    asked = len(b.asked)
    tries = [bool(stack.get_worth({key: 5.0})[0]) for _ in range(3 * RETRY)]
    assert tries == [False] * (RETRY - 1) + [True] * (2 * RETRY + 1)
    assert len(b.asked) - asked == 2 * RETRY + 1


def test_a_tier_that_became_slow_is_noticed() -> None:
    b, stack, _ = slow_stack(1 / SIZE)
    key = RECORDS[0].key
    for _ in range(50):
        stack.get_records([key])
    b.ms_per_byte = 1000 / SIZE
    assert [bool(stack.get_worth({key: 50.0})[0]) for _ in range(5)] == [True, False, False, False, False]


@pytest.mark.parametrize("nested", ["front", "back"])
def test_each_of_three_tiers_is_judged_by_its_own_speed(nested: str) -> None:
    clock = Clock()
    a, b, c = DictStore(SIZE, "a", clock), DictStore(9 * SIZE, "b", clock), DictStore(9 * SIZE, "c", clock)
    a.latency_ms, b.latency_ms, c.latency_ms = 1000, 20, 2  # the front is never judged; the middle is slower than the last

    def tiered(front: RecordStore, back: RecordStore) -> Tiered:
        return Tiered(front, back, promote=False, clock=clock)

    stack = tiered(tiered(a, b), c) if nested == "front" else tiered(a, tiered(b, c))
    for r in RECORDS[:4]:
        stack.put_record(r)
    one, two, three, four = (r.key for r in RECORDS[:4])
    b.remove(two)
    for _ in range(3):
        assert stack.get_records([one, two]).keys() == {one, two}
    c.remove(three)
    found, why = stack.get_worth({one: 10.0, two: 10.0, three: 10.0, four: 0.0})
    assert found.keys() == {one, two, four}  # one from c, though b has it too
    assert why == {three: "b-slower-than-computing"}
    found, why = stack.get_worth({one: 30.0, three: 30.0, two: 1.0})
    assert found.keys() == {one, three}
    assert why == {two: "b-slower-than-computing"}  # neither is worth it; the nearer one is named


def test_a_fault_is_told_apart_from_a_miss() -> None:
    b, stack, _ = slow_stack(0.0)
    b.down = True
    keys = [r.key for r in RECORDS[:2]]
    assert stack.get_worth(dict.fromkeys(keys, math.inf)) == ({}, dict.fromkeys(keys, "b-fault"))
    b.down = False
    assert stack.get_worth({"00": math.inf}) == ({}, {})


# --- speed ------------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    latency=st.floats(0.0, 50.0),
    per_mb=st.floats(0.01, 50.0),
    sizes=st.lists(st.integers(1 << 16, 1 << 26), min_size=4, max_size=30),
)
def test_speed_is_that_of_a_linear_tier(latency: float, per_mb: float, sizes: list[int]) -> None:
    """`predicted_ms` against latency + bytes / bandwidth: for the sizes seen it errs by a part that shrinks with their spread,
    and is never off by more than the latency's share."""
    speed = Speed()
    assert speed.predicted_ms(1) is None
    for n in sizes:
        speed.observe(n, latency + per_mb * n / 2**20)
    assert speed.predicted_ms(5 * max(sizes)) is None  # nothing like it was measured
    if max(sizes[-4:]) > 4 * min(sizes[-4:]):
        for n in sizes[-4:]:
            true = latency + per_mb * n / 2**20
            predicted = speed.predicted_ms(n)
            assert predicted is None or abs(predicted - true) <= 0.2 * true + 0.2 * latency + 1e-6


def test_the_first_get_alone_predicts_nothing() -> None:
    speed = Speed()
    speed.observe(1000, 500.0)  # opened a connection
    assert speed.predicted_ms(1000) is None
    speed.observe(1000, 1.0)
    predicted = speed.predicted_ms(1000)
    assert predicted is not None
    assert predicted < 300


def test_the_ledger_is_bounded() -> None:
    ledger = Ledger(limit=3)
    for key in "abcad":
        ledger.saw(key, ord(key))
        ledger.mark([key], below=True)
    assert [ledger.size(key) for key in "abcd"] == [97, None, 99, 100]
    assert [ledger.is_below(key) for key in "abcd"] == [True, False, True, True]
    ledger.mark("bc", below=False)
    assert [ledger.is_below(key) for key in "abcd"] == [True, False, False, True]
