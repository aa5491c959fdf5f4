"""A tier on another machine that cannot hold anybody up: deadlines and a breaker. Knows no service."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from kvcomm.errors import InputError
from kvcomm.segments import Segment
from kvcomm.store.base import Kept, StoreStats
from kvcomm.store.breaker import ENOUGH, Breaker, Open
from kvcomm.store.deadline import DEADLINE, SLOWEST, Late, Workers
from kvcomm.store.notices import check_names, check_notes
from kvcomm.store.record import Record
from kvcomm.store.records import Counts
from kvcomm.store.remote import Census, RemoteFault, RemoteStore

__all__ = ["BREAKER_OPEN", "BUSY", "DEADLINE", "UNEXPECTED", "Guarded"]

BREAKER_OPEN = "breaker-open"  # it failed several times in a row and is left alone for a while
BUSY = "busy"  # calls that hang leave no thread for this one
UNEXPECTED = "unexpected"  # raised what a tier should not raise

THREADS = 8  # calls at once, those that hang included
LISTING = 10  # deadlines that a listing is waited for

T = TypeVar("T")


class Guarded(RemoteStore):
    """`inner`, with every call finished after `deadline_s` seconds: what it brought, or a RemoteFault counted by its reason.

    Puts have the time that their bytes take at 32 MiB/s besides, listings ten times as long. A call given up goes on in its
    thread, and what it brings is dropped: a put may still be stored.
    """

    def __init__(
        self,
        inner: RemoteStore,
        *,
        deadline_s: float = 2.0,
        breaker: Breaker | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: seconds, for a breaker of its own."""
        if not deadline_s > 0:
            raise InputError(f"deadline_s is {deadline_s}; it must be above 0")
        super().__init__()
        self.inner, self.deadline_s = inner, deadline_s
        vars(self)["name"] = inner.name  # of the class in other stores
        self._breaker = breaker or Breaker(clock, lost_s=ENOUGH * deadline_s)
        self._workers = Workers(THREADS, f"kvcomm-{inner.name}")
        self._census = Census()  # when it was last known

    def put_record(self, record: Record) -> Kept:
        _ = record.key  # a damaged header is no fault of the service
        return self._call(lambda: self.inner.put_record(record), self.deadline_s + record.nbytes / SLOWEST)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        keys = list(dict.fromkeys(keys))
        return self._call(lambda: self.inner.get_records(keys)) if keys else {}

    def has(self, keys: Iterable[str]) -> set[str]:
        keys = list(dict.fromkeys(keys))
        return self._call(lambda: self.inner.has(keys)) if keys else set()

    def remove(self, key: str) -> bool:
        return self._call(lambda: self.inner.remove(key))

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        check_notes(notes)
        notes = dict(notes)
        if notes:
            self._call(lambda: self.inner.put_notes(notes), self.deadline_s + sum(map(len, notes.values())) / SLOWEST)

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        check_names(names)
        names = list(dict.fromkeys(names))
        return self._call(lambda: self.inner.get_notes(names)) if names else {}

    def segments(self) -> list[Segment]:
        return self._call(self.inner.segments, LISTING * self.deadline_s)

    def census(self) -> Census:
        """As it was when the service last answered: never raises."""
        with suppress(RemoteFault):
            self._census = self._call(self.inner.census, LISTING * self.deadline_s)
        return self._census

    def stats(self) -> StoreStats:
        """Of the store within, and the faults of both."""
        census = self.census()
        stats = self.inner.counts.stats(census.objects, census.nbytes, census.limit_bytes)
        return replace(stats, faults=dict(Counter(stats.faults) + Counter(_faults(self.counts))))

    def check_integrity(self) -> None:
        self.inner.check_integrity()

    def close(self) -> None:
        self._workers.close()
        self.inner.close()

    def _call(self, work: Callable[[], T], seconds: float | None = None) -> T:
        seconds = self.deadline_s if seconds is None else seconds
        try:
            with self._breaker.attempt():
                return self._timed(work, seconds)
        except Open as still:
            fault = RemoteFault(self.name, BREAKER_OPEN, f"it failed lately; tried again in {still.seconds:.1f} s")
            self.counts.fault(fault.reason)
            raise fault from None
        except RemoteFault as fault:
            self.counts.fault(fault.reason)
            raise

    def _timed(self, work: Callable[[], T], seconds: float) -> T:
        try:
            return self._workers.run(work, seconds)
        except Late as late:
            reason = DEADLINE if late.began else BUSY
            raise RemoteFault(self.name, reason, f"no answer within {seconds:.3g} s") from None
        except RemoteFault:
            raise
        except Exception as e:  # a cache fault never breaks a request, whatever a client makes of its service
            raise RemoteFault(self.name, UNEXPECTED, f"{type(e).__name__}: {e}") from e


def _faults(counts: Counts) -> Mapping[str, int]:
    return counts.stats(0, 0, 0).faults
