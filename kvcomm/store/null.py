"""Keeps nothing: the baseline without sharing, and a double for tests."""

from __future__ import annotations

from collections.abc import Iterable

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.base import TOO_LARGE, Kept, StoreStats, check_kv

__all__ = ["NullStore"]


class NullStore:
    """A `Store` with a limit of 0 bytes."""

    def __init__(self) -> None:
        self._refused = 0
        self._misses = 0

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        check_kv(segment, kv)
        self._refused += 1
        return Kept(stored=False, reason=TOO_LARGE)

    def get(self, key: str) -> SegmentKV | None:
        self._misses += 1
        return None

    def get_many(self, keys: Iterable[str]) -> dict[str, SegmentKV]:
        return {key: kv for key in keys if (kv := self.get(key)) is not None}

    def remove(self, key: str) -> bool:
        return False

    def __contains__(self, key: object) -> bool:
        return False

    def wants(self, key: str) -> bool:
        return True

    @property
    def nbytes(self) -> int:
        return 0

    def segments(self) -> list[Segment]:
        return []

    def stats(self) -> StoreStats:
        refused = {TOO_LARGE: self._refused} if self._refused else {}
        return StoreStats(objects=0, nbytes=0, limit_bytes=0, misses=self._misses, refused=refused)

    def check_integrity(self) -> None:
        """Nothing is kept, so nothing can be wrong."""
