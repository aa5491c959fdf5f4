"""One tier, with what its gets take and whether they are worth it. Knows nothing of the tiers beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from threading import Lock

from kvcomm.errors import CacheFault
from kvcomm.store.deadline import DEADLINE
from kvcomm.store.record import Record
from kvcomm.store.records import RecordStore
from kvcomm.store.speed import Speed

__all__ = ["RETRY", "Priced"]

RETRY = 20  # the one of so many declined records that is asked for nevertheless: a tier may have become fast


class Priced:
    """Measures every get of `store`, and declines records that it would take longer to bring than to compute. Thread safe."""

    def __init__(self, store: RecordStore, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock`: seconds."""
        self.store, self.speed = store, Speed()
        self.too_slow = f"{store.name}-slower-than-computing"
        self._clock = clock
        self._declined = 0
        self._typical: float | None = None  # bytes of a record
        self._lock = Lock()

    def get(self, keys: Collection[str], sizes: Mapping[str, int]) -> dict[str, Record]:
        """As the store's `get_records`, measured where it brings something, and where it takes too long for that: then `sizes`,
        as in `worth`, say how much it was.
        """
        began = self._clock()
        try:
            found = self.store.get_records(keys)
        except CacheFault as fault:
            with self._lock:
                missed = int(sum(sizes.get(key) or self._typical or 0 for key in keys))
            if missed and getattr(fault, "reason", None) in (DEADLINE, "timeout"):
                self.speed.observe(missed, (self._clock() - began) * 1e3)
            raise
        ms = (self._clock() - began) * 1e3
        nbytes = sum(record.nbytes for record in found.values())
        if nbytes:
            self.speed.observe(nbytes, ms)
            mean = nbytes / len(found)
            with self._lock:
                self._typical = mean if self._typical is None else 0.75 * self._typical + 0.25 * mean
        return found

    def worth(self, prices: Mapping[str, float], sizes: Mapping[str, int]) -> tuple[list[str], dict[str, str]]:
        """The keys to ask for, and why not for the others. `prices`: ms; `sizes`: bytes of those records whose size is known.
        Each is judged as if it came alone, so that together they are no slower than their prices together.
        """
        keys: list[str] = []
        declined: dict[str, str] = {}
        with self._lock:
            typical = self._typical
        for key, price in prices.items():
            size = sizes.get(key) or typical
            ms = None if size is None else self.speed.predicted_ms(int(size))
            if ms is None or ms <= price or self._try_again():
                keys.append(key)
            else:
                declined[key] = self.too_slow
        return keys, declined

    def _try_again(self) -> bool:
        """Every 20th time that it is asked."""
        with self._lock:
            self._declined += 1
            return self._declined % RETRY == 0
