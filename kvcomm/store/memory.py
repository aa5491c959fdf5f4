"""KV in this process's memory (or its accelerator's: tensors stay where they are); `Book` says what leaves first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.base import ALTERED, Kept, StoreStats, check_kv
from kvcomm.store.eviction import Book, Quotas

__all__ = ["MemoryStore"]


@dataclass(frozen=True, eq=False)
class _Object:
    segment: Segment
    kv: SegmentKV
    versions: tuple[int, ...]  # of keys and values when they were put


class MemoryStore:
    """A `Store` bounded to `limit_bytes` of KV, and each tenant to its quota.

    Reading does not copy: `get` returns the kept tensors, and one that was written to since it was put (torch counts writes)
    is dropped and reported as a miss. Tensors that are views into larger memory are copied once, when put, so that the bound
    holds.
    """

    def __init__(self, limit_bytes: int, quotas: Quotas | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._book: Book[str] = Book(limit_bytes, quotas)
        self._objects: dict[str, _Object] = {}
        self._hits = self._misses = self._evicted = 0
        self._refused: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._lock = Lock()

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        with self._lock:
            if segment.key in self._objects:
                self._book.use(segment.key)
                return Kept(stored=True)
        check_kv(segment, kv)
        if reason := self._book.refusal(kv.nbytes, segment.tenant):
            with self._lock:
                self._refused[reason] += 1
            return Kept(stored=False, reason=reason)
        kv = replace(kv, keys=tuple(_compact(t) for t in kv.keys), values=tuple(_compact(t) for t in kv.values))
        evicted: list[str] = []
        with self._lock:
            if segment.key not in self._objects:  # another thread may have put it meanwhile
                victims = self._book.victims(kv.nbytes, segment.tenant)
                assert victims is not None, "it fits, and nothing is pinned"
                for key in victims:
                    del self._objects[key]
                    self._book.evict(key)
                evicted += victims
                self._evicted += len(evicted)
                self._objects[segment.key] = _Object(segment, kv, _versions(kv))
                self._book.add(segment.key, kv.nbytes, segment.tenant, segment.cost_ms)
        return Kept(stored=True, evicted=tuple(evicted))

    def get(self, key: str) -> SegmentKV | None:
        with self._lock:
            found = self._objects.get(key)
            if found is not None and _versions(found.kv) == found.versions:
                self._hits += 1
                self._book.use(key)
                return found.kv
            self._misses += 1
            if found is None:
                return None
            self._faults[ALTERED] += 1
            self._drop(key)
            return None

    def get_many(self, keys: Iterable[str]) -> dict[str, SegmentKV]:
        return {key: kv for key in keys if (kv := self.get(key)) is not None}

    def remove(self, key: str) -> bool:
        with self._lock:
            if key not in self._objects:
                return False
            self._drop(key)
            return True

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._objects

    def wants(self, key: str) -> bool:
        return key not in self

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._book.nbytes

    def segments(self) -> list[Segment]:
        with self._lock:
            return [self._objects[key].segment for key in self._book.order()]

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                objects=len(self._objects),
                nbytes=self._book.nbytes,
                limit_bytes=self.limit_bytes,
                hits=self._hits,
                misses=self._misses,
                evicted=self._evicted,
                refused=dict(self._refused),
                faults=dict(self._faults),
            )

    def check_integrity(self) -> None:
        with self._lock:
            self._book.check_integrity()
            assert self._book.nbytes == sum(o.kv.nbytes for o in self._objects.values()) <= self.limit_bytes
            assert set(self._book.order()) == self._objects.keys()
            for key, found in self._objects.items():
                assert key == found.segment.key
                assert all(t.untyped_storage().nbytes() == t.nbytes for t in (*found.kv.keys, *found.kv.values))
                check_kv(found.segment, found.kv)

    def _drop(self, key: str) -> None:
        del self._objects[key]
        self._book.remove(key)


def _compact(t: Tensor) -> Tensor:
    """`t` without gradient and without memory beyond its own elements; a copy only where that needs one."""
    t = t.detach()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


def _versions(kv: SegmentKV) -> tuple[int, ...]:
    """How often each tensor was written to; tensors made under inference mode are not counted by torch."""
    return tuple(0 if t.is_inference() else t._version for t in (*kv.keys, *kv.values))
