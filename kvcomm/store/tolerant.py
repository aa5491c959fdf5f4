"""One tier of several, whose faults are counted and stop nobody. Knows nothing of the tiers beside it."""

from __future__ import annotations

from collections.abc import Collection

from kvcomm.errors import CacheFault
from kvcomm.segments import Segment
from kvcomm.store.base import Kept
from kvcomm.store.record import Record
from kvcomm.store.records import Counts, RecordStore

__all__ = ["Tolerant"]


class Tolerant:
    """`store`, whose CacheFaults are counted as "<tier>-<reason>" and become what a store without the object says."""

    def __init__(self, store: RecordStore, counts: Counts) -> None:
        self.store, self._counts = store, counts

    def fault(self, fault: Exception) -> str:
        """Counts it; as what."""
        reason = f"{self.store.name}-{getattr(fault, 'reason', 'fault')}"
        self._counts.fault(reason)
        return reason

    def put(self, record: Record) -> Kept:
        try:
            return self.store.put_record(record)
        except CacheFault as fault:
            return Kept(stored=False, reason=self.fault(fault))

    def has(self, keys: Collection[str]) -> set[str] | None:
        """None where it cannot tell."""
        try:
            return self.store.has(keys)
        except CacheFault as fault:
            self.fault(fault)
            return None

    def remove(self, key: str) -> bool:
        try:
            return self.store.remove(key)
        except CacheFault as fault:
            self.fault(fault)
            return False

    def segments(self) -> list[Segment]:
        try:
            return self.store.segments()
        except CacheFault as fault:
            self.fault(fault)
            return []

    def close(self) -> None:
        try:
            self.store.close()
        except CacheFault as fault:
            self.fault(fault)
