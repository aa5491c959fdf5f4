"""KV in this process's memory (or its accelerator's: tensors stay where they are), least recently used leaves first."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from threading import Lock

import torch
from torch import Tensor

from kvcomm.errors import InputError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.base import ALTERED, TOO_LARGE, Kept, StoreStats, check_kv

__all__ = ["MemoryStore"]


@dataclass(frozen=True, eq=False)
class _Object:
    segment: Segment
    kv: SegmentKV
    versions: tuple[int, ...]  # of keys and values when they were put


class MemoryStore:
    """A `Store` bounded to `limit_bytes` of KV.

    Reading does not copy: `get` returns the kept tensors, and one that was written to since it was put (torch counts writes)
    is dropped and reported as a miss. Tensors that are views into larger memory are copied once, when put, so that the bound
    holds.
    """

    def __init__(self, limit_bytes: int) -> None:
        if limit_bytes < 0:
            raise InputError(f"limit_bytes is {limit_bytes}; it must be at least 0")
        self.limit_bytes = limit_bytes
        self._objects: OrderedDict[str, _Object] = OrderedDict()  # the least recently used first
        self._nbytes = 0
        self._hits = self._misses = self._evicted = 0
        self._refused: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._lock = Lock()

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        with self._lock:
            if segment.key in self._objects:
                self._objects.move_to_end(segment.key)
                return Kept(stored=True)
        check_kv(segment, kv)
        if kv.nbytes > self.limit_bytes:
            with self._lock:
                self._refused[TOO_LARGE] += 1
            return Kept(stored=False, reason=TOO_LARGE)
        kv = replace(kv, keys=tuple(_compact(t) for t in kv.keys), values=tuple(_compact(t) for t in kv.values))
        evicted: list[str] = []
        with self._lock:
            if segment.key not in self._objects:  # another thread may have put it meanwhile
                while self._nbytes + kv.nbytes > self.limit_bytes:
                    evicted.append(next(iter(self._objects)))
                    self._drop(evicted[-1])
                self._evicted += len(evicted)
                self._objects[segment.key] = _Object(segment, kv, _versions(kv))
                self._nbytes += kv.nbytes
        return Kept(stored=True, evicted=tuple(evicted))

    def get(self, key: str) -> SegmentKV | None:
        with self._lock:
            found = self._objects.get(key)
            if found is not None and _versions(found.kv) == found.versions:
                self._hits += 1
                self._objects.move_to_end(key)
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

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._nbytes

    def segments(self) -> list[Segment]:
        with self._lock:
            return [o.segment for o in self._objects.values()]

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                objects=len(self._objects),
                nbytes=self._nbytes,
                limit_bytes=self.limit_bytes,
                hits=self._hits,
                misses=self._misses,
                evicted=self._evicted,
                refused=dict(self._refused),
                faults=dict(self._faults),
            )

    def check_integrity(self) -> None:
        with self._lock:
            assert self._nbytes == sum(o.kv.nbytes for o in self._objects.values()) <= self.limit_bytes
            for key, found in self._objects.items():
                assert key == found.segment.key
                assert all(t.untyped_storage().nbytes() == t.nbytes for t in (*found.kv.keys, *found.kv.values))
                check_kv(found.segment, found.kv)

    def _drop(self, key: str) -> None:
        self._nbytes -= self._objects.pop(key).kv.nbytes


def _compact(t: Tensor) -> Tensor:
    """`t` without gradient and without memory beyond its own elements; a copy only where that needs one."""
    t = t.detach()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone(memory_format=torch.contiguous_format)


def _versions(kv: SegmentKV) -> tuple[int, ...]:
    """How often each tensor was written to; tensors made under inference mode are not counted by torch."""
    return tuple(0 if t.is_inference() else t._version for t in (*kv.keys, *kv.values))
