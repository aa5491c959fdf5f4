"""`SlabStore` beside a dict of the records that were put, in one process, many threads and two processes."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.arena import PAGE, whole_pages
from kvcomm.store.base import TOO_LARGE, Kept
from kvcomm.store.eviction import IN_USE, OVER_QUOTA, Quotas
from kvcomm.store.record import DAMAGED, OTHER_KEY, OTHER_VERSION, Draft, Record, Unreadable
from kvcomm.store.slabs import NOT_RESERVED, SlabStore, Slot


def made(seed: int, pages: int = 1, tenant: str = "", cost_ms: float | None = None) -> Record:
    """A record that takes exactly so many pages. Others of the same seed and pages are equal to it."""
    tokens = pages * PAGE // 64 - 16
    ids = np.random.default_rng(seed).integers(1, 1000, tokens).astype(np.int32)
    kv = torch.full((1, tokens, 7), float(seed))
    record = Record.of(Segment(ids, ids[:0], "f", tenant, cost_ms=cost_ms), SegmentKV((kv,), (kv[:, :, :7] + 0.5,), 0, tokens))
    assert record.nbytes <= pages * PAGE < record.nbytes + PAGE, record.nbytes
    return record


def same(a: Record, b: Record) -> bool:
    return bool(np.array_equal(a.data, b.data))


def slot_of(found: Slot | Kept | None) -> Slot:
    assert isinstance(found, Slot), found
    return found


def filled(store: SlabStore, record: Record) -> Slot:
    """Reserved and written, as a client does; not committed."""
    slot = slot_of(store.reserve(record.key, record.nbytes, record.tenant))
    store.arena.view(slot.offset, slot.nbytes)[:] = record.data
    return slot


def test_contract() -> None:
    store, record = SlabStore(100 * PAGE), made(1, 3)
    kv, s = record.kv(), record.segment
    assert store.get(s.key) is None
    assert store.put(s, kv) == Kept(stored=True)
    assert store.put_record(record) == Kept(stored=True), "kept already"
    assert s.key in store
    assert 5 not in store
    assert store.has([s.key, "x"]) == {s.key}
    assert store.nbytes == whole_pages(record.nbytes)
    found = store.get_records([s.key, "x", s.key])
    assert found.keys() == {s.key}
    assert same(found[s.key], record)
    assert [a.key for a in store.segments()] == [s.key]
    again = store.get(s.key)
    assert again is not None
    assert torch.equal(again.keys[0], kv.keys[0])
    assert store.remove(s.key)
    assert not store.remove(s.key)
    assert (store.nbytes, store.segments(), s.key in store) == (0, [], False)
    stats = store.stats()
    assert (stats.objects, stats.hits, stats.misses, stats.evicted) == (0, 2, 2, 0)
    store.check_integrity()
    store.close()


def test_unusable_kv_and_limits_are_refused() -> None:
    store, record = SlabStore(PAGE), made(1)
    kv = SegmentKV((record.kv().keys[0] * float("nan"),), record.kv().values, 0, record.kv().length)
    with pytest.raises(CacheFault, match="NaN"):
        store.put(record.segment, kv)
    damaged = Record(record.data.copy())
    damaged.data[40] ^= 1
    with pytest.raises(Unreadable, match=DAMAGED):
        store.put_record(damaged)
    assert store.stats().objects == 0
    store.check_integrity()
    with pytest.raises(InputError, match="-1"):
        SlabStore(-1)


@pytest.mark.parametrize("limit", [0, PAGE - 1])
def test_a_limit_below_one_page_keeps_nothing(limit: int) -> None:
    store = SlabStore(limit)
    assert store.put_record(made(1)) == Kept(stored=False, reason=TOO_LARGE)
    assert store.stats().refused == {TOO_LARGE: 1}
    store.check_integrity()


def test_a_page_is_in_the_order_of_keys_and_of_one_tenant() -> None:
    """Whatever was used; what cannot be read is left out, and counts for nothing."""
    store = SlabStore(100 * PAGE)
    records = sorted((made(i) for i in range(9)), key=lambda r: r.key)
    for record in (*records, *(made(i, tenant="t") for i in range(9, 12))):
        assert store.put_record(record)
    slot = store.pin(records[4].key)
    assert slot is not None
    store.arena.view(slot.offset, slot.nbytes)[40] ^= 1
    store.unpin(slot.generation)
    sound = [(r.key, r.nbytes) for r in (*records[:4], *records[5:])]
    assert [(row.key, row.nbytes) for row in store.page("", "", 3)] == sound[:3]
    assert [(row.key, row.nbytes) for row in store.page("", sound[2][0], 3)] == sound[3:6]
    assert [(row.key, row.nbytes) for row in store.page("", sound[5][0], 3)] == sound[6:]
    assert store.page("", sound[-1][0], 3) == store.page("", "", 0) == []
    assert store.stats().faults == {DAMAGED: 1}


def test_what_is_worth_least_leaves_and_is_named() -> None:
    store = SlabStore(3 * PAGE)
    dear, cheap, other = (made(i, cost_ms=ms) for i, ms in ((1, 9.0), (2, 1.0), (3, 2.0)))
    for record in (dear, cheap, other):
        assert store.put_record(record) == Kept(stored=True)
    assert [s.key for s in store.segments()] == [cheap.key, other.key, dear.key]
    assert store.put_record(made(4, cost_ms=5.0)) == Kept(stored=True, evicted=(cheap.key,))
    slot = slot_of(store.reserve("new", 2 * PAGE))
    assert len(slot.evicted) >= 2
    assert set(slot.evicted) <= {dear.key, other.key, made(4, cost_ms=5.0).key}
    assert store.stats().evicted == 1 + len(slot.evicted)
    store.check_integrity()


def test_quotas() -> None:
    store = SlabStore(10 * PAGE, Quotas(tenants={"me": 2 * PAGE}))
    mine, theirs = ([made(i, tenant=tenant) for i in range(3)] for tenant in ("me", "them"))
    for record in (*theirs, *mine[:2]):
        assert store.put_record(record) == Kept(stored=True)
    assert store.put_record(mine[2]) == Kept(stored=True, evicted=(mine[0].key,))
    assert store.put_record(made(9, 3, "me")) == Kept(stored=False, reason=OVER_QUOTA)
    held = store.get_records([mine[1].key, mine[2].key])
    assert store.put_record(mine[0]) == Kept(stored=False, reason=IN_USE)
    reserved = slot_of(store.reserve("theirs", PAGE, "them"))
    del held
    assert store.put_record(mine[0]).evicted == (mine[1].key,)
    store.abort(reserved.generation)
    assert store.has(r.key for r in theirs) == {r.key for r in theirs}
    store.check_integrity()


# -- what a server does ------------------------------------------------------------------------------------------------


def test_reserve_write_commit_pin() -> None:
    store, record = SlabStore(10 * PAGE), made(1, 2, "t")
    slot = filled(store, record)
    assert store.pin(record.key) is None, "not before it is committed"
    assert (store.nbytes, store.stats().objects) == (0, 0)
    store.unpin(slot.generation)
    store.check_integrity()
    assert store.commit(slot.generation) == Kept(stored=True)
    assert store.commit(slot.generation) == Kept(stored=False, reason=NOT_RESERVED)
    store.abort(slot.generation)
    assert store.reserve(record.key, record.nbytes, "t") == Kept(stored=True)
    assert store.pin(record.key) == slot
    found = store.record(record.key)
    assert found is not None
    assert same(found, record)
    store.check_integrity()


def test_generations_are_never_used_again() -> None:
    store = SlabStore(2 * PAGE)
    seen = []
    for i in range(6):
        slot = filled(store, made(i))
        seen.append(slot.generation)
        if i % 2:
            store.commit(slot.generation)
        else:
            store.abort(slot.generation)
    assert len(set(seen)) == len(seen)


def test_reservations_count_and_are_not_evicted() -> None:
    store = SlabStore(3 * PAGE)
    first, second = (slot_of(store.reserve(key, PAGE)) for key in "ab")
    store.put_record(made(1))
    assert store.reserve("c", 2 * PAGE) == Kept(stored=False, reason=IN_USE)
    assert store.has([made(1).key]), "nothing left for what cannot be"
    store.abort(first.generation)
    store.abort(first.generation)
    assert slot_of(store.reserve("c", PAGE)).evicted == ()
    store.abort(second.generation)
    store.check_integrity()


def test_of_two_writers_of_a_key_one_is_kept() -> None:
    store, record = SlabStore(4 * PAGE), made(1)
    a, b = filled(store, record), filled(store, record)
    assert store.commit(b.generation) == Kept(stored=True)
    assert store.commit(a.generation) == Kept(stored=True)
    assert slot_of(store.pin(record.key)).generation == b.generation
    assert store.arena.used == PAGE
    store.check_integrity()


def test_the_second_of_two_writers_counts_as_a_use() -> None:
    store, record = SlabStore(4 * PAGE), made(1)
    a, b = filled(store, record), filled(store, record)
    store.commit(a.generation)
    store.put_record(made(2))
    assert [s.key for s in store.segments()] == [record.key, made(2).key]
    store.commit(b.generation)
    assert [s.key for s in store.segments()] == [made(2).key, record.key]


def test_a_slot_is_committed_once_though_two_do_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the header is checked, which is done without the lock, others come with the same generation."""
    store, record = SlabStore(4 * PAGE), made(1)
    slot = filled(store, record)
    check = store._flaw

    def meanwhile(found: Any) -> str | None:
        store.abort(slot.generation)
        store.unpin(slot.generation)
        assert store.commit(slot.generation) == Kept(stored=False, reason=NOT_RESERVED)
        assert store.pin(record.key) is None
        return check(found)

    monkeypatch.setattr(store, "_flaw", meanwhile)
    assert store.commit(slot.generation) == Kept(stored=True)
    monkeypatch.undo()
    assert slot_of(store.pin(record.key)) == slot
    store.check_integrity()


def test_a_write_that_fails_gives_the_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    store, record = SlabStore(4 * PAGE), made(1)

    def fail(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Draft, "write", fail)
    with pytest.raises(MemoryError):
        store.put(record.segment, record.kv())
    assert store.arena.used == 0
    store.check_integrity()


@pytest.mark.parametrize(
    ("reason", "key", "tenant", "nbytes", "change"),
    [
        (OTHER_KEY, "another", "", 0, None),
        (OTHER_KEY, None, "another", 0, None),
        (DAMAGED, None, "", 64, None),
        (DAMAGED, None, "", -64, None),
        (DAMAGED, None, "", 0, 0),  # magic
        (OTHER_VERSION, None, "", 0, 6),
        (DAMAGED, None, "", 0, 24),  # digest
        (DAMAGED, None, "", 0, 60),  # header
    ],
)
def test_a_wrong_header_is_refused(reason: str, key: str | None, tenant: str, nbytes: int, change: int | None) -> None:
    store, record = SlabStore(4 * PAGE), made(1)
    slot = slot_of(store.reserve(key or record.key, record.nbytes + nbytes, tenant))
    data = np.concatenate([record.data, np.zeros(64, np.uint8)])
    if change is not None:
        data[change] ^= 1
    store.arena.view(slot.offset, slot.nbytes)[:] = data[: slot.nbytes]
    assert store.commit(slot.generation) == Kept(stored=False, reason=reason)
    assert store.stats().refused == {reason: 1}
    assert (store.arena.used, store.stats().objects) == (0, 0)
    store.check_integrity()


def test_nothing_written_is_refused() -> None:
    store = SlabStore(4 * PAGE)
    for nbytes in (1, 40, PAGE):
        assert store.commit(slot_of(store.reserve("k", nbytes)).generation) == Kept(stored=False, reason=DAMAGED)
    assert store.reserve("k", 0) == store.reserve("k", -1) == Kept(stored=False, reason=DAMAGED)
    store.check_integrity()


def test_damaged_tensors_are_a_miss() -> None:
    store, record = SlabStore(4 * PAGE), made(1)
    slot = filled(store, record)
    store.arena.view(slot.offset, slot.nbytes)[-100] ^= 1
    assert store.commit(slot.generation)
    assert store.get_records([record.key]) == {}
    assert record.key not in store
    stats = store.stats()
    assert (stats.faults, stats.hits, stats.misses) == ({DAMAGED: 1}, 0, 1)
    gc.collect()
    store.check_integrity()
    assert store.arena.used == 0


def test_who_found_it_damaged_removes_no_later_one() -> None:
    store, record = SlabStore(4 * PAGE), made(1)
    store.put_record(record)
    old = slot_of(store.pin(record.key)).generation
    store.remove(record.key)
    store.put_record(record)
    assert not store.remove(record.key, old)
    assert store.remove(record.key, slot_of(store.pin(record.key)).generation)


# -- pins --------------------------------------------------------------------------------------------------------------


def test_what_is_pinned_stays_while_others_come_and_go() -> None:
    store = SlabStore(4 * PAGE)
    held = made(0)
    store.put_record(held)
    slot = slot_of(store.pin(held.key))
    assert store.pin(held.key) == slot
    for i in range(1, 10):
        assert store.put_record(made(i))
    assert store.has([held.key])
    store.unpin(slot.generation)
    assert store.put_record(made(11, 4)) == Kept(stored=False, reason=IN_USE), "pinned twice"
    store.unpin(slot.generation)
    store.unpin(slot.generation)
    store.unpin(12345)
    assert held.key in store.put_record(made(11, 4)).evicted
    store.check_integrity()


def test_removed_and_pinned_is_forgotten_at_once_and_freed_later() -> None:
    store, record = SlabStore(4 * PAGE), made(0, 2)
    store.put_record(record)
    slot = slot_of(store.pin(record.key))
    assert store.remove(record.key)
    assert store.pin(record.key) is None
    assert (store.nbytes, store.arena.used) == (0, 2 * PAGE)
    store.check_integrity()
    assert store.put_record(record)
    newer = slot_of(store.pin(record.key))
    assert newer.generation != slot.generation
    assert newer.offset != slot.offset
    assert store.put_record(made(3)) == Kept(stored=False, reason=IN_USE)
    store.unpin(slot.generation)
    assert store.put_record(made(3))
    store.unpin(slot.generation)
    assert store.pin(record.key) == newer, "an old pin's end is nothing to the new object"
    store.check_integrity()


def test_whatever_looks_into_a_record_pins_it() -> None:
    """The record, a slice of its array, its tensors and a slice of one: the memory is reused after the last of them."""
    store, record = SlabStore(PAGE), made(0)
    store.put_record(record)
    expected = record.kv().values[0]
    last: list[object] = [store.get_records([record.key])[record.key]]
    for step in ("slice", "tensor", "view of it", "none"):
        assert store.put_record(made(1)) == Kept(stored=False, reason=IN_USE), step
        gc.collect()
        match last[0]:
            case Record() as found:
                last[0] = found.data[64:][8:]
                del found
            case np.ndarray():
                last[0] = store.get(record.key)
            case SegmentKV() as kv:
                last[0] = kv.values[0][:, 3:5]
                del kv
            case torch.Tensor() as t:
                assert torch.equal(t, expected[:, 3:5])
                del t
                last.clear()
                break
    gc.collect()
    assert store.put_record(made(1)) == Kept(stored=True, evicted=(record.key,))
    store.check_integrity()


def test_memory_is_free_with_the_last_look_at_it() -> None:
    store, record = SlabStore(PAGE), made(0)
    store.put_record(record)
    held = store.get_records([record.key])
    store.remove(record.key)
    assert store.arena.used == PAGE
    held.clear()
    assert store.arena.used == 0


def test_records_cannot_be_written_and_outlive_the_store() -> None:
    store, record = SlabStore(PAGE), made(0)
    store.put_record(record)
    found = store.get_records([record.key])[record.key]
    with pytest.raises(ValueError, match="read-only"):
        found.data[0] = 1
    store.close()
    del store
    gc.collect()
    assert same(found, record)
    found.verify(record.key)


def test_an_array_that_dies_in_a_thread_that_has_the_lock() -> None:
    """As a garbage collection may have it, in the middle of an operation: no deadlock, and the pin is gone at the next one."""
    store, record = SlabStore(PAGE), made(0)
    store.put_record(record)
    held = store.get_records([record.key])
    with store._lock:
        held.clear()
    assert store.put_record(made(1)) == Kept(stored=True, evicted=(record.key,))
    store.check_integrity()


# -- room in one piece -------------------------------------------------------------------------------------------------


def test_scattered_room_is_joined_at_the_least_loss() -> None:
    """Eight objects of a page; b and g leave for two pages, which lie apart: of their neighbours the cheapest follows."""
    store = SlabStore(8 * PAGE)
    costs = dict(zip("abcdefgh", (9.0, 1.0, 8.0, 9.0, 9.0, 7.0, 1.0, 9.0), strict=True))
    records = {name: made(i, cost_ms=ms) for i, (name, ms) in enumerate(costs.items())}
    for record in records.values():
        store.put_record(record)
    kept = store.put_record(made(9, 2, cost_ms=50.0))
    names = {record.key: name for name, record in records.items()}
    assert kept.stored
    assert [names[key] for key in kept.evicted] in (["b", "g", "f"], ["b", "g", "c"])
    store.check_integrity()


def test_between_pins_a_piece_is_found_or_nothing_leaves() -> None:
    store = SlabStore(16 * PAGE)
    records = [made(i) for i in range(16)]
    slots = {}
    for record in records:
        store.put_record(record)
        slot = slot_of(store.pin(record.key))
        slots[slot.offset // PAGE] = slot
    for page in (0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 14):  # pinned are 3, 7, 13, 15
        store.unpin(slots[page].generation)
    assert store.put_record(made(20, 6)) == Kept(stored=False, reason=IN_USE)
    assert store.stats().objects == 16
    assert store.put_record(made(20, 5))
    assert slot_of(store.pin(made(20, 5).key)).offset == 8 * PAGE
    assert store.has(slots[page].key for page in (3, 7, 13, 15)) == {slots[page].key for page in (3, 7, 13, 15)}
    store.check_integrity()


# -- a model -----------------------------------------------------------------------------------------------------------

PAGES = 12
QUOTA = 7


class SlabModel(RuleBasedStateMachine):
    """`SlabStore` beside what must be there. Each page has an owner by the offsets the store gave out; from that map follow
    what may leave, whether there is room, and when the store may refuse for `IN_USE`.
    """

    records = [made(i, 1 + i % 5, "ab"[i % 2], (None, 1.0, 5.0)[i % 3]) for i in range(14)]  # noqa: RUF012  # never written

    def __init__(self) -> None:
        super().__init__()
        self.store = SlabStore(PAGES * PAGE + 77, Quotas(tenants={"b": QUOTA * PAGE}))
        self.base = self.store.arena.view(0, 1).ctypes.data
        self.kept: dict[str, tuple[Record, int]] = {}  # key -> what was put, where it lies
        self.reserved: list[tuple[Slot, Record]] = []
        self.pins: list[tuple[Slot, Record]] = []
        self.held: list[tuple[Record, Record]] = []  # from the store, and what was put

    def pages(self, offset: int, record: Record) -> set[int]:
        return set(range(offset // PAGE, offset // PAGE + whole_pages(record.nbytes) // PAGE))

    def pinned(self) -> list[tuple[int, Record]]:
        """Where, and what was put there."""
        slots = [(slot.offset, record) for slot, record in (*self.reserved, *self.pins)]
        return slots + [(found.data.ctypes.data - self.base, record) for found, record in self.held]

    def longest(self, taken: list[tuple[int, Record]]) -> int:
        """Pages in one piece beside these."""
        busy: set[int] = set().union(*(self.pages(offset, record) for offset, record in taken))
        return max(map(len, "".join(".#"[page in busy] for page in range(PAGES)).split("#")))

    def of_b(self, taken: list[tuple[int, Record]]) -> int:
        """Pages of tenant b among these."""
        return len(set().union(*(self.pages(offset, record) for offset, record in taken if record.tenant == "b")))

    def made_room(self, record: Record, made: Slot | Kept) -> bool:
        """Follows what left; True where there is room now. Asks whether both had to be."""
        size, tenant, pinned = len(self.pages(0, record)), record.tenant, self.pinned()
        everything = pinned + [(offset, kept) for kept, offset in self.kept.values()]
        fits = self.longest(pinned) >= size and (tenant != "b" or self.of_b(pinned) + size <= QUOTA)
        free = self.longest(everything) >= size and (tenant != "b" or self.of_b(everything) + size <= QUOTA)
        if isinstance(made, Kept) and not made.stored:
            assert made == Kept(stored=False, reason=IN_USE)
            assert not fits
            return False
        assert fits
        assert bool(made.evicted) == (not free)
        for key in made.evicted:
            left, offset = self.kept.pop(key)
            assert all(self.pages(offset, left).isdisjoint(self.pages(*other)) for other in pinned), "pinned, and evicted"
        return True

    def keep(self, record: Record) -> None:
        found = self.store.record(record.key)
        assert found is not None
        self.kept[record.key] = record, found.data.ctypes.data - self.base

    @rule(record=st.sampled_from(records))
    def put(self, record: Record) -> None:
        kept = self.store.put_record(record)
        if record.key in self.kept:
            assert kept == Kept(stored=True)
        elif self.made_room(record, kept):
            self.keep(record)

    @rule(record=st.sampled_from(records))
    def reserve(self, record: Record) -> None:
        slot = self.store.reserve(record.key, record.nbytes, record.tenant, 2.0)
        if record.key in self.kept:
            assert slot == Kept(stored=True)
        elif self.made_room(record, slot):
            assert isinstance(slot, Slot)
            self.store.arena.view(slot.offset, slot.nbytes)[:] = record.data
            self.reserved.append((slot, record))

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), commit=st.booleans())
    def finish(self, data: st.DataObject, commit: bool) -> None:
        slot, record = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        if not commit:
            self.store.abort(slot.generation)
            return
        assert self.store.commit(slot.generation) == Kept(stored=True)
        if record.key not in self.kept:
            self.keep(record)
            assert self.kept[record.key][1] == slot.offset

    @rule(record=st.sampled_from(records))
    def pin(self, record: Record) -> None:
        slot = self.store.pin(record.key)
        assert (slot is not None) == (record.key in self.kept)
        if slot is not None:
            assert slot.offset == self.kept[record.key][1]
            self.pins.append((slot, record))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        slot, _ = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        self.store.unpin(slot.generation)

    @rule(generation=st.integers(0, 60))
    def confused(self, generation: int) -> None:
        """A client that ends what it does not have."""
        if generation not in [slot.generation for slot, _ in (*self.reserved, *self.pins)] and not self.held:
            self.store.unpin(generation)
            self.store.abort(generation)
            assert self.store.commit(generation) == Kept(stored=False, reason=NOT_RESERVED)

    @rule(some=st.lists(st.sampled_from(records), max_size=4))
    def get(self, some: list[Record]) -> None:
        found = self.store.get_records([record.key for record in some])
        assert found.keys() == {record.key for record in some} & self.kept.keys()
        self.held += [(record, self.kept[key][0]) for key, record in found.items()]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        del self.held[data.draw(st.integers(0, len(self.held) - 1))]

    @rule(record=st.sampled_from(records))
    def remove(self, record: Record) -> None:
        assert self.store.remove(record.key) == (self.kept.pop(record.key, None) is not None)

    @invariant()
    def agrees(self) -> None:
        self.store.check_integrity()
        keys = [record.key for record in self.records]
        assert self.store.has([*keys, "none"]) == self.kept.keys()
        assert {s.key for s in self.store.segments()} == self.kept.keys()
        assert self.store.nbytes == PAGE * sum(len(self.pages(0, kept)) for kept, _ in self.kept.values())
        where = dict(self.pinned()) | {offset: kept for kept, offset in self.kept.values()}
        assert self.store.arena.used == PAGE * sum(len(self.pages(offset, record)) for offset, record in where.items())
        for offset, record in where.items():
            assert np.array_equal(self.store.arena.view(offset, record.nbytes), record.data), "what was put"

    def teardown(self) -> None:
        self.held.clear()
        for slot, _ in self.reserved:
            self.store.abort(slot.generation)
        for slot, _ in self.pins:
            self.store.unpin(slot.generation)
        for key in self.kept:
            assert self.store.remove(key)
        self.store.check_integrity()
        assert self.store.arena.largest == PAGES * PAGE, "all free, in one piece"


TestSlabModel = SlabModel.TestCase
TestSlabModel.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# -- threads, processes, many objects ----------------------------------------------------------------------------------


def test_threads_see_whole_records() -> None:
    """Four threads put, read, pin and remove twelve records where five have room: what is read is what was put."""
    records = [made(i, 1 + i % 3) for i in range(12)]
    by_key = {record.key: record for record in records}
    store = SlabStore(10 * PAGE)
    wrong: list[object] = []

    def work(seed: int) -> None:
        chance = np.random.default_rng(seed)
        try:
            for i in chance.integers(0, 12, 300):
                store.put_record(records[i])
                for key, found in store.get_records([records[j].key for j in chance.integers(0, 12, 2)]).items():
                    if not same(found, by_key[key]):
                        wrong.append(key)
                slot = store.pin(records[chance.integers(0, 12)].key)
                if slot is not None:
                    if chance.random() < 0.2:
                        store.remove(slot.key)
                    if not np.array_equal(store.arena.view(slot.offset, slot.nbytes), by_key[slot.key].data):
                        wrong.append(slot)
                    store.unpin(slot.generation)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.check_integrity()
    assert store.stats().faults == {}
    assert store.stats().hits > 0
    assert store.stats().evicted > 0
    assert store.arena.used == store.nbytes, "no pin is left"


OTHER = """
import socket, sys
from kvcomm.store.arena import Window
from kvcomm.store.record import Record
peer = socket.socket(fileno=int(sys.argv[1]))
said, fds, _, _ = socket.recv_fds(peer, 1000, 1)
capacity, key, offset, nbytes, to, room = said.decode().split()
window = Window(fds[0], int(capacity))
record = Record(window.read(int(offset), int(nbytes))).verify(key)
copy = window.write(int(to), int(room))
copy[:] = record.data
peer.sendall(str(float(record.kv().values[0].double().sum())).encode())
peer.recv(100)
"""


def test_another_process_reads_a_record_and_writes_one() -> None:
    """It maps the descriptor that comes over the socket, verifies the record, and writes the same into a reserved slot."""
    store, record = SlabStore(1 << 30), made(5, 12)
    store.put_record(record)
    slot = slot_of(store.pin(record.key))
    store.remove(record.key)
    to = slot_of(store.reserve(record.key, record.nbytes))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        args = [sys.executable, "-c", OTHER, str(theirs.fileno())]
        with subprocess.Popen(args, pass_fds=[theirs.fileno()], cwd=Path(__file__).parents[2]) as process:
            theirs.close()
            said = f"{store.arena.capacity} {slot.key} {slot.offset} {slot.nbytes} {to.offset} {to.nbytes}"
            socket.send_fds(ours, [said.encode()], [store.arena.fd])
            assert float(ours.recv(100)) == record.kv().values[0].double().sum()
            process.kill()
    store.unpin(slot.generation)
    assert store.commit(to.generation)
    assert same(store.get_records([record.key])[record.key], record)
    store.check_integrity()
