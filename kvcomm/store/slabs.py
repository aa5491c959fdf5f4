"""Records in shared memory: a tier of one process, and what a server lends to others by offset. Knows nothing of sockets.

What is lent is pinned: it is neither moved, evicted nor used for anything else until every pin of it is gone. Every byte that
is taken (kept, reserved, or forgotten and still pinned) counts towards the limit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from threading import Lock
from typing import Literal
from weakref import finalize

import numpy as np

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.arena import Arena, Bytes, whole_pages
from kvcomm.store.base import Kept, StoreStats, check_kv
from kvcomm.store.eviction import IN_USE, Book, Quotas
from kvcomm.store.record import DAMAGED, OTHER_KEY, Draft, Record, Unreadable
from kvcomm.store.records import Counts, Listed, RecordStore

__all__ = ["NOT_RESERVED", "SlabStore", "Slot"]

NOT_RESERVED = "not-reserved"  # why commit kept nothing: aborted, committed before, or never reserved

CANDIDATES = 32  # places that are compared where what is free lies scattered
NEIGHBOURS = 20_000  # looked at before no further place is compared


@dataclass(frozen=True, slots=True)
class Slot:
    """A part of the arena, and who has it."""

    key: str
    offset: int
    nbytes: int  # of the record; the extent is of whole pages
    generation: int  # of this use of the memory: no two slots of a store have the same
    evicted: tuple[str, ...] = ()  # keys that left to make room for it


@dataclass(slots=True, eq=False)
class _Object:
    slot: Slot
    tenant: str
    state: Literal["reserved", "checked", "kept", "left"] = "reserved"  # pinned once by itself in the first two


class SlabStore(RecordStore):
    """A tier of `limit_bytes` of shared memory, in whole pages, and of each tenant's quota. Thread safe.

    A record from it is pinned until its array, and whatever looks into that, is garbage.
    """

    name = "memory"

    def __init__(self, limit_bytes: int, quotas: Quotas | None = None) -> None:
        self._book: Book[int] = Book(limit_bytes, quotas)  # of generations
        self.limit_bytes, self.arena = limit_bytes, Arena(limit_bytes)
        self._objects: dict[int, _Object] = {}  # generation -> all that takes memory
        self._owners: dict[int, int] = {}  # offset -> generation
        self._kept: dict[str, int] = {}  # key -> generation
        self._nbytes = 0  # of what is kept
        self._generation = 0
        self._counts = Counts()
        self._released: deque[int] = deque()  # pins of arrays that are garbage
        self._lock = Lock()  # never taken by a finalizer: one may run while this thread has it

    # -- writing -------------------------------------------------------------------------------------------------------

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        check_kv(segment, kv)
        draft = Draft(segment, kv)
        return self._put(segment, draft.nbytes, draft.write)

    def put_record(self, record: Record) -> Kept:
        return self._put(record.segment, record.nbytes, lambda target: np.copyto(target, record.data))

    def _put(self, segment: Segment, nbytes: int, write: Callable[[Bytes], object]) -> Kept:
        slot = self.reserve(segment.key, nbytes, segment.tenant, segment.cost_ms)
        if isinstance(slot, Kept):
            return slot
        try:
            write(self.arena.view(slot.offset, slot.nbytes))
        except BaseException:
            self.abort(slot.generation)
            raise
        return replace(self.commit(slot.generation), evicted=slot.evicted)

    def reserve(self, key: str, nbytes: int, tenant: str = "", cost_ms: float | None = None) -> Slot | Kept:
        """Memory to write a record into, in any process, until `commit` or `abort`; evicts for it. `Kept` where `key` is here
        already (a use) or there can be no room: then nothing is evicted.
        """
        size = whole_pages(nbytes)
        with self._lock:
            self._settle()
            if nbytes < 1:
                return self._counts.refused(DAMAGED)
            if key in self._kept:
                self._book.use(self._kept[key])
                return Kept(stored=True)
            if reason := self._book.refusal(size, tenant):
                return self._counts.refused(reason)
            victims = self._book.victims(size, tenant)
            if victims is None or not self._can_hold(size, victims):
                return self._counts.refused(IN_USE)
            evicted = [self._evict(generation) for generation in victims]
            offset = self.arena.allocate(size)
            if offset is None:
                evicted += [self._evict(generation) for generation in self._cheapest(size)]
                offset = self.arena.allocate(size)
                assert offset is not None, f"{size} bytes were freed and are not there"
            self._counts.left(len(evicted))
            self._generation += 1
            slot = Slot(key, offset, nbytes, self._generation)
            self._objects[slot.generation] = _Object(slot, tenant)
            self._owners[offset] = slot.generation
            self._book.add(slot.generation, size, tenant, cost_ms, pinned=True)
            return replace(slot, evicted=tuple(evicted))

    def commit(self, generation: int) -> Kept:
        """What was reserved is written, and kept from now on. Its header is checked; its tensors, when they are read. Refused
        for `NOT_RESERVED`, and for what is wrong with the header: the memory is free again then, as it is where another
        record of this key was committed meanwhile (which is stored).
        """
        with self._lock:
            found = self._objects.get(generation)
            if found is None or found.state != "reserved":
                return self._counts.refused(NOT_RESERVED)
            found.state = "checked"
        reason: str | None = DAMAGED
        try:
            reason = self._flaw(found)
        finally:
            with self._lock:
                self._book.unpin(generation)
                other = self._kept.get(found.slot.key)
                if reason is None and other is None:
                    found.state = "kept"
                    self._kept[found.slot.key] = generation
                    self._nbytes += whole_pages(found.slot.nbytes)
                else:
                    self._free(generation)
                if reason is None and other is not None:
                    self._book.use(other)
        return self._counts.refused(reason) if reason else Kept(stored=True)

    def abort(self, generation: int) -> None:
        """Nothing will be written. Ignored for what is not reserved."""
        with self._lock:
            found = self._objects.get(generation)
            if found is not None and found.state == "reserved":
                self._free(generation)

    # -- reading -------------------------------------------------------------------------------------------------------

    def pin(self, key: str) -> Slot | None:
        """Where the record lies, which stays there as it is until as many calls of `unpin`. A use, and a hit or a miss."""
        with self._lock:
            slot = self._pin(key)
            if slot is not None:
                self._book.use(slot.generation)
        self._counts.looked_up(slot is not None, 1)
        return slot

    def unpin(self, generation: int) -> None:
        """One pin is gone. Ignored for what is not pinned, and for what is not here any more."""
        with self._lock:
            self._settle()
            self._unpin(generation)

    def tenant_of(self, key: str) -> str | None:
        """Whose it is, as was checked when it was committed; None for what is not here."""
        with self._lock:
            generation = self._kept.get(key)
            return None if generation is None else self._objects[generation].tenant

    def of_tenant(self, tenant: str, keys: Iterable[str]) -> set[str]:
        """Those of these that are here and the tenant's. No use."""
        with self._lock:
            known = {key: self._kept[key] for key in keys if key in self._kept}
            return {key for key, generation in known.items() if self._objects[generation].tenant == tenant}

    def record(self, key: str) -> Record | None:
        """The record as it lies, pinned while its array lives. Not verified, and no use."""
        with self._lock:
            slot = self._pin(key)
        return None if slot is None else self._record(slot)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        asked = list(dict.fromkeys(keys))
        found: dict[str, Record] = {}
        for key in asked:
            with self._lock:
                slot = self._pin(key)
                if slot is not None:
                    self._book.use(slot.generation)
            if slot is None:
                continue
            record = self._record(slot)
            if self._counts.sound(record, key):
                found[key] = record
            else:
                self.remove(key, slot.generation)
        self._counts.looked_up(len(found), len(asked))
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        with self._lock:
            return {key for key in keys if key in self._kept}

    def remove(self, key: str, generation: int | None = None) -> bool:
        """With `generation`: only if it is that one still, as who found it damaged must say."""
        with self._lock:
            known = self._kept.get(key)
            if known is None or generation not in (None, known):
                return False
            self._forget(known)
            if not self._book.pins(known):
                self._free(known)
            return True

    # -- looking -------------------------------------------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        with self._lock:
            objects = [self._objects[generation] for generation in self._book.order()]
            keys = [o.slot.key for o in objects if o.state == "kept"]
        return [record.segment for record in self._readable(keys)]

    def page(self, tenant: str, after: str, count: int) -> list[Listed]:
        """As promised; reads the headers of these alone."""
        with self._lock:
            keys = [key for key, g in self._kept.items() if key > after and self._objects[g].tenant == tenant]
        return [Listed.of(record.segment, record.nbytes) for record in islice(self._readable(sorted(keys)), count)]

    def _readable(self, keys: Iterable[str]) -> Iterator[Record]:
        """Those that are here, with a sound header."""
        for key in keys:
            record = self.record(key)
            if record is None:
                continue
            try:
                _ = record.segment
            except Unreadable as fault:
                self._counts.fault(fault.reason)
                self.remove(key)
            else:
                yield record

    def stats(self) -> StoreStats:
        """Bytes: of whole pages."""
        with self._lock:
            return self._counts.stats(len(self._kept), self._nbytes, self.limit_bytes)

    def check_integrity(self) -> None:
        with self._lock:
            self._settle()
            self._book.check_integrity()
            self.arena.check_integrity()
            kept = {found.slot.key: g for g, found in self._objects.items() if found.state == "kept"}
            assert kept == self._kept
            assert self._nbytes == sum(whole_pages(self._objects[g].slot.nbytes) for g in kept.values())
            assert self._book.nbytes == self.arena.used <= self.limit_bytes
            assert set(self._book.order()) == self._objects.keys()
            assert self._owners == {found.slot.offset: g for g, found in self._objects.items()}
            for generation, found in self._objects.items():
                assert found.state == "kept" or self._book.pins(generation), f"{found} takes memory and nobody has it"
                if found.state == "kept":
                    assert self._flaw(found) is None, found

    def close(self) -> None:
        self.arena.close()

    # -- under the lock, but for `_record` and `_flaw` -----------------------------------------------------------------

    def _pin(self, key: str) -> Slot | None:
        generation = self._kept.get(key)
        if generation is None:
            return None
        self._book.pin(generation)
        return self._objects[generation].slot

    def _unpin(self, generation: int) -> None:
        found = self._objects.get(generation)
        if found is None or found.state not in ("kept", "left") or not self._book.pins(generation):
            return
        self._book.unpin(generation)
        if found.state == "left" and not self._book.pins(generation):
            self._free(generation)

    def _settle(self) -> None:
        """Pins of arrays that are garbage are gone."""
        while self._released:
            self._unpin(self._released.popleft())

    def _release(self, generation: int) -> None:
        """An array is garbage, as it may become at any time: in a thread that has the lock, for one."""
        self._released.append(generation)
        if self._lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._lock.release()

    def _record(self, slot: Slot) -> Record:
        data = self.arena.view(slot.offset, slot.nbytes)
        data.flags.writeable = False
        finalize(data, self._release, slot.generation).atexit = False
        return Record(data)

    def _flaw(self, found: _Object) -> str | None:
        """Why the header is not what was reserved for."""
        slot = found.slot
        record = Record(self.arena.view(slot.offset, slot.nbytes))
        try:
            return None if (record.segment.key, record.tenant) == (slot.key, found.tenant) else OTHER_KEY
        except Unreadable as fault:
            return fault.reason
        except (AttributeError, LookupError, TypeError, ValueError):  # a header of sound bytes that says something else
            return DAMAGED

    def _forget(self, generation: int) -> str:
        """Its key. Nobody finds it any more; it still takes its memory."""
        found = self._objects[generation]
        found.state = "left"
        del self._kept[found.slot.key]
        self._nbytes -= whole_pages(found.slot.nbytes)
        return found.slot.key

    def _evict(self, generation: int) -> str:
        """Its key."""
        key = self._forget(generation)
        self._book.evict(generation)
        self._vacate(generation)
        return key

    def _free(self, generation: int) -> None:
        self._book.remove(generation)
        self._vacate(generation)

    def _vacate(self, generation: int) -> None:
        offset = self._objects.pop(generation).slot.offset
        del self._owners[offset]
        self.arena.free(offset)

    def _can_hold(self, size: int, victims: list[int]) -> bool:
        """Can there be one piece of `size` bytes, if not by these victims then by all that may leave?"""
        if self.arena.largest >= size or any(whole_pages(self._objects[g].slot.nbytes) >= size for g in victims):
            return True
        return self._gap(size) is not None

    def _gap(self, size: int) -> int | None:
        """Where `size` bytes without anything pinned begin."""
        at = 0
        for slot in sorted((self._objects[g].slot for g in self._book.pinned()), key=lambda slot: slot.offset):
            if slot.offset - at >= size:
                return at
            at = slot.offset + whole_pages(slot.nbytes)
        return at if self.arena.capacity - at >= size else None

    def _cheapest(self, size: int) -> list[int]:
        """Neighbours whose leaving makes one piece of `size` bytes, at the least loss of some places compared: those where the
        next to leave lie. Where something is pinned in each, wherever nothing is.
        """
        best: tuple[float, list[int]] = (math.inf, [])
        looked = 0
        for generation in self._book.first(CANDIDATES):
            window = self.arena.window(self._objects[generation].slot.offset, size)
            if window is not None and looked < NEIGHBOURS:
                looked += len(window)
                neighbours = [self._owners[offset] for offset in window]
                best = min(best, (sum(map(self._book.loss, neighbours)), neighbours), key=lambda place: place[0])
        if best[0] < math.inf:
            return best[1]
        gap = self._gap(size)
        assert gap is not None, "reserve asked whether there is one"
        return [self._owners[offset] for offset in self.arena.window(gap, size) or []]
