"""The contract of `base` on records: what a tier does that keeps bytes. Such tiers can be stacked, and served to others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from threading import Lock
from typing import ClassVar, NamedTuple

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.base import Kept, StoreStats, check_kv
from kvcomm.store.record import OTHER_KEY, Record, Unreadable

__all__ = ["Counts", "Listed", "RecordStore"]


class Listed(NamedTuple):
    """One object as a list shows it: everything but its text."""

    key: str
    tokens: int
    producer: str
    fingerprint: str
    cost_ms: float | None
    nbytes: int | None  # None: who lists it does not know

    @classmethod
    def of(cls, segment: Segment, nbytes: int | None = None) -> Listed:
        return cls(segment.key, len(segment.ids), segment.producer, segment.fingerprint, segment.cost_ms, nbytes)


class RecordStore(ABC):
    """A `Store` whose objects are records. A subclass says where they lie; every method may be called from any thread.

    Faults of the place itself (a disk that cannot be read, a server that is gone) are raised as CacheFault by `put_record` and
    `get_records`, `remove` and `has`; a damaged record is a miss, is counted by its reason, and is removed.
    """

    name: ClassVar[str]  # what a person calls such a tier: memory, disk, redis, ...

    @abstractmethod
    def put_record(self, record: Record) -> Kept:
        """Keep a record as `Store.put` does. Its bytes are read in this call and not needed afterwards. Raises Unreadable where
        its header is damaged; its blocks are verified when it is read.
        """

    @abstractmethod
    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        """Those of these records that are here, every byte verified: what is damaged or of another version is left out. In one
        round trip. Counts as use, and as hits and misses.
        """

    @abstractmethod
    def has(self, keys: Iterable[str]) -> set[str]:
        """Those of these keys under which something is kept. Does not count as use."""

    @abstractmethod
    def remove(self, key: str) -> bool:
        """Forget one object; False when it was not here. Not counted as evicted."""

    @abstractmethod
    def segments(self) -> list[Segment]:
        """What is kept, the next to be evicted first where that is known. May take long where the tier is elsewhere."""

    def page(self, tenant: str, after: str, count: int) -> list[Listed]:
        """Of the tenant's in the order of keys, the first `count` behind `after`. As slow as `segments` in most tiers."""
        behind = sorted((s for s in self.segments() if s.tenant == tenant and s.key > after), key=lambda s: s.key)
        return [Listed.of(s) for s in behind[:count]]

    @abstractmethod
    def stats(self) -> StoreStats:
        """Counts since the store was made."""

    @abstractmethod
    def check_integrity(self) -> None:
        """Raise AssertionError when bounds, counts and objects contradict each other. Slow; for tests and tools."""

    def close(self) -> None:  # noqa: B027  # a tier may have nothing to close
        """Give back what the tier holds of the system: files, connections. Nothing may be called afterwards."""

    # -- the contract of `Store`, by these -------------------------------------------------------------------------------

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        check_kv(segment, kv)
        return self.put_record(Record.of(segment, kv))

    def get(self, key: str) -> SegmentKV | None:
        return self.get_many([key]).get(key)

    def get_many(self, keys: Iterable[str]) -> dict[str, SegmentKV]:
        return {key: record.kv() for key, record in self.get_records(keys).items()}

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bool(self.has([key]))

    def wants(self, key: str) -> bool:
        return key not in self

    @property
    def nbytes(self) -> int:
        return self.stats().nbytes


class Counts:
    """What a tier says in its `stats`. Thread safe."""

    def __init__(self) -> None:
        self.hits = self.misses = self.evicted = 0
        self._refused: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._lock = Lock()

    def looked_up(self, found: int, asked: int) -> None:
        with self._lock:
            self.hits += found
            self.misses += asked - found

    def left(self, count: int) -> None:
        with self._lock:
            self.evicted += count

    def refused(self, reason: str) -> Kept:
        """Counts it; what `put` then returns."""
        with self._lock:
            self._refused[reason] += 1
        return Kept(stored=False, reason=reason)

    def fault(self, reason: str) -> None:
        with self._lock:
            self._faults[reason] += 1

    def sound(self, record: Record, key: str, *, whole: bool = True) -> bool:
        """Is it the record of `key`, every byte of it, or at least its header? Counts why not."""
        try:
            if record.segment.key != key:
                raise Unreadable(OTHER_KEY, f"{record.segment.key} in place of {key}")
            if whole:
                record.verify()
        except Unreadable as fault:
            self.fault(fault.reason)
            return False
        return True

    def stats(self, objects: int, nbytes: int, limit_bytes: int) -> StoreStats:
        with self._lock:
            return StoreStats(
                objects,
                nbytes,
                limit_bytes,
                self.hits,
                self.misses,
                self.evicted,
                dict(self._refused),
                dict(self._faults),
            )
