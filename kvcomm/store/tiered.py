"""One store over another: fast and small in front, large and slow behind. `Tiered(memory, Tiered(disk, remote))` stacks three.

A tier that fails costs nothing but what it alone kept: its CacheFault is counted as "<tier>-<reason>" and the other goes on.

Evicted is what no tier keeps any more. That is known without asking the back: it keeps what it took or brought, until it
reports an eviction or misses the key (`Ledger`); the front, which is near, is asked. What left in between (by a
promotion, or in the thread that writes) is told with the next put.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Literal

from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import Segment
from kvcomm.store.base import Kept, StoreStats
from kvcomm.store.behind import Behind
from kvcomm.store.ledger import LIMIT, Ledger
from kvcomm.store.priced import Priced
from kvcomm.store.record import Record
from kvcomm.store.records import Counts, RecordStore
from kvcomm.store.tolerant import Tolerant

__all__ = ["NOT_WRITTEN", "QUEUE_FULL", "Tiered"]

QUEUE_FULL = "write-queue-full"  # why a record was not written down
NOT_WRITTEN = "closed-before-written"  # as well: the queue could not be drained in time

Loaded = tuple[dict[str, Record], dict[str, str]]  # records, and why others were not loaded


class Tiered(RecordStore):
    """`front` over `back`; both belong to it. Each put goes to both: to the back in the same call ("through"), or by a thread
    whose queue holds at most `queue_bytes` ("back"; what does not fit is not written down). What only the back has is put into
    the front as well, where `promote`. Nothing but damaged records that are put raises CacheFault.
    """

    name = "tiered"

    def __init__(
        self,
        front: RecordStore,
        back: RecordStore,
        *,
        write: Literal["through", "back"] = "through",
        promote: bool = True,
        queue_bytes: int = 1 << 30,
        drain_s: float = 5.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`drain_s`: how long `close` may take to write what is queued. `clock`: seconds, for the speed of tiers."""
        if write not in ("through", "back"):
            raise InputError(f"write is {write!r}; it must be 'through' or 'back'")
        self.front, self.back, self.promote, self.drain_s = front, back, promote, drain_s
        self._front, self._back = (t if isinstance(t, Tiered) else Priced(t, clock) for t in (front, back))
        self._ledger = Ledger()
        self._left: deque[str] = deque(maxlen=LIMIT)  # keys that left a tier and of which nobody was told
        self._counts = Counts()
        self._above, self._below = Tolerant(front, self._counts), Tolerant(back, self._counts)
        self._queue = Behind(self._write_later, self._take_back, queue_bytes) if write == "back" else None

    # -- put -------------------------------------------------------------------------------------------------------------

    def put_record(self, record: Record) -> Kept:
        """Stored when any tier keeps it, or is going to."""
        _ = record.key  # raises Unreadable before a tier is asked
        above = self._above.put(record)
        below = self._down(record)
        evicted = self.lost([*above.evicted, *below.evicted])
        if above or below:
            return Kept(stored=True, evicted=evicted)
        return Kept(stored=False, evicted=evicted, reason=below.reason or above.reason)

    def write_down(self, record: Record) -> Kept:
        """Into the back only: the front has it, or got it by other means."""
        _ = record.key
        below = self._down(record)
        return Kept(below.stored, self.lost(below.evicted), below.reason)

    def is_below(self, key: str) -> bool:
        """Has the back taken it, as far as is known without asking it, or is it queued for that?"""
        return self._ledger.is_below(key) or self._queued(key) is not None

    def lost(self, keys: Iterable[str] = ()) -> tuple[str, ...]:
        """Of these keys, which the front evicted in a put past this store, and of those that left since the last call:
        what no tier keeps any more. Whoever indexes them must forget them.
        """
        asked = dict.fromkeys([*self._pending(), *keys])
        absent = [key for key in asked if not self._ledger.is_below(key)]
        gone = [key for key in absent if self._queued(key) is None]
        self._left.extend(key for key in absent if key not in gone)  # whether they will be kept is not known yet
        if not gone:
            return ()
        if isinstance(self.front, Tiered):  # it can tell what it lost from what a tier of its own that failed may keep
            told = self.front.lost(gone)
            self._left.extend(key for key in told if key not in asked)
            return tuple(key for key in gone if key in told)
        here = self._above.has(gone)
        if here is None:
            self._left.extend(gone)
            return ()
        return tuple(key for key in gone if key not in here)

    def _pending(self) -> list[str]:
        """What left since the last call, in the tiers as well."""
        keys = []
        with suppress(IndexError):  # empty: others may take from it at the same time
            while True:
                keys.append(self._left.popleft())
        for tier in (self.front, self.back):
            if isinstance(tier, Tiered) and (lost := tier.lost()):
                keys += lost
                if tier is self.back:
                    self._ledger.mark(lost, below=False)
        return keys

    # -- get -------------------------------------------------------------------------------------------------------------

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        return self.get_worth(dict.fromkeys(keys, math.inf))[0]

    def get_worth(
        self, prices: Mapping[str, float], sizes: Mapping[str, int] | None = None
    ) -> tuple[dict[str, Record], dict[str, str]]:
        """As `get_records`, where loading is faster than computing. `prices`: ms that computing takes what a record would be
        used for; `sizes`: bytes of records, where the caller knows them. The second result says of records that may be kept why
        they were not loaded: "<tier>-slower-than-computing", or "<tier>-<reason>" of a fault. A key in neither is kept nowhere.

        A tier is measured before it is judged, and one in 20 declined records is asked for nevertheless.
        """
        return self._gather(prices, sizes or {}, free=True)

    def _gather(self, prices: Mapping[str, float], sizes: Mapping[str, int], *, free: bool) -> Loaded:
        """`free`: the foremost tier is not judged."""
        sizes = {key: size for key in prices if (size := sizes.get(key) or self._ledger.size(key))}
        found, declined = self._ask(self._front, prices, sizes, free=free)
        for key in prices:
            queued = None if key in found else self._queued(key)
            if queued is not None and self._counts.sound(queued, key):
                found[key] = queued
        rest = {key: price for key, price in prices.items() if key not in found}
        if rest:
            below, why = self._ask(self._back, rest, sizes, free=False)
            for key, record in below.items():
                self._ledger.saw(key, record.nbytes)
            self._ledger.mark(below, below=True)
            self._ledger.mark([key for key in rest if key not in below and key not in why], below=False)
            found.update(self._promoted(below) if self.promote else below)
            declined = {**why, **declined}
        self._counts.looked_up(len(found), len(prices))
        return found, {key: reason for key, reason in declined.items() if key not in found}

    def _ask(self, tier: Priced | Tiered, prices: Mapping[str, float], sizes: Mapping[str, int], *, free: bool) -> Loaded:
        if isinstance(tier, Tiered):
            return tier._gather(prices, sizes, free=free)
        keys, declined = (list(prices), {}) if free else tier.worth(prices, sizes)
        if not keys:
            return {}, declined
        try:
            return tier.get(keys, sizes), declined
        except CacheFault as fault:
            reason = (self._above if tier is self._front else self._below).fault(fault)
            return {}, {**declined, **dict.fromkeys(keys, reason)}

    def _promoted(self, records: dict[str, Record]) -> dict[str, Record]:
        """These, as the front keeps them now where it does."""
        kept = []
        for key, record in records.items():
            put = self._above.put(record)
            self._left.extend(put.evicted)
            if put:
                kept.append(key)
        above, _ = self._ask(self._front, dict.fromkeys(kept, math.inf), {}, free=True) if kept else ({}, {})
        return {**records, **above}

    # -- the rest of the contract ----------------------------------------------------------------------------------------

    def has(self, keys: Iterable[str]) -> set[str]:
        """Asks the back only for what is not in front of it."""
        asked = list(keys)
        here = {key for key in asked if self._queued(key) is not None}
        for tier in (self._above, self._below):
            if missing := [key for key in asked if key not in here]:
                here |= tier.has(missing) or set()
        return here

    def wants(self, key: str) -> bool:
        """What is below alone was perhaps too slow to load: who has computed it again puts it again."""
        try:
            return self.front.wants(key)
        except CacheFault as fault:
            self._above.fault(fault)
            return True

    def remove(self, key: str) -> bool:
        """From all tiers; from one that fails it may not be gone."""
        gone = self._queue is not None and self._queue.discard(key)
        for tier in (self._above, self._below):
            gone = tier.remove(key) or gone
        self._ledger.forget(key)
        return gone

    def segments(self) -> list[Segment]:
        """What only the back keeps comes first."""
        front = {s.key: s for s in self._above.segments()}
        back = [s for s in self._below.segments() if s.key not in front]
        return [*back, *front.values()]

    def stats(self) -> StoreStats:
        """Sums over the tiers, where a record that two keep counts twice; hits and misses are those of the stack."""
        parts = [self.front.stats(), self.back.stats()]
        own = self._counts.stats(0, 0, 0)
        refused: Counter[str] = Counter()
        faults: Counter[str] = Counter()
        for part in (*parts, own):
            refused.update(part.refused)
            faults.update(part.faults)
        return StoreStats(
            sum(part.objects for part in parts),
            sum(part.nbytes for part in parts),
            sum(part.limit_bytes for part in parts),
            own.hits,
            own.misses,
            sum(part.evicted for part in parts),
            dict(refused),
            dict(faults),
        )

    def tiers(self) -> list[RecordStore]:
        """The stores that keep something, from front to back."""
        return [leaf for t in (self.front, self.back) for leaf in (t.tiers() if isinstance(t, Tiered) else [t])]

    def size(self, key: str) -> int | None:
        """Bytes of a record that passed through lately; None where it is not remembered. Asks no tier."""
        return self._ledger.size(key)

    def flush(self, seconds: float) -> bool:
        """Wait until everything queued is written down, in the tiers as well; False when it takes longer."""
        until = time.monotonic() + seconds
        done = self._queue is None or self._queue.drain(seconds)
        for tier in (self.front, self.back):
            if isinstance(tier, Tiered):
                done = tier.flush(max(until - time.monotonic(), 0.0)) and done
        return done

    def close(self) -> None:
        """Writes what is queued for `drain_s` at most, then closes the tiers."""
        if self._queue is not None:
            for _ in self._queue.close(self.drain_s):
                self._counts.refused(NOT_WRITTEN)
        for tier in (self._above, self._below):
            tier.close()

    def check_integrity(self) -> None:
        for tier in (self.front, self.back):
            tier.check_integrity()
        if self._queue is not None:
            self._queue.check_integrity()

    # -- writing down ----------------------------------------------------------------------------------------------------

    def _queued(self, key: str) -> Record | None:
        return None if self._queue is None else self._queue.get(key)

    def _down(self, record: Record) -> Kept:
        self._ledger.saw(record.key, record.nbytes)
        if self._queue is None:
            return self._write(record)
        return Kept(stored=True) if self._queue.add(record) else self._counts.refused(QUEUE_FULL)

    def _write(self, record: Record) -> Kept:
        kept = self._below.put(record)
        self._ledger.mark(kept.evicted, below=False)
        if kept:
            self._ledger.saw(record.key, record.nbytes)
            self._ledger.mark([record.key], below=True)
        return kept

    def _write_later(self, record: Record) -> None:
        try:
            kept = self._write(record)
        except Exception as fault:  # noqa: BLE001  # the thread must outlive whatever a tier does
            self._counts.fault(f"{self.back.name}-{type(fault).__name__}")
            kept = Kept(stored=False)
        self._left.extend([*kept.evicted, *([] if kept else [record.key])])

    def _take_back(self, key: str) -> None:
        self._below.remove(key)
        self._ledger.forget(key)
