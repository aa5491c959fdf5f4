"""Who leaves first where room is bounded: what saves least computing per byte, was used least, and longest ago.

GreedyDual-Size-Frequency (L. Cherkasova, HP Labs technical report HPL-98-69R1, 1998). Knows keys, bytes, tenants and
milliseconds; not what is kept, nor where.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvcomm.errors import InputError
from kvcomm.store.base import TOO_LARGE

__all__ = ["IN_USE", "OVER_QUOTA", "Book", "Quotas"]

IN_USE = "in-use"  # why put kept nothing: too much of what would have to leave is pinned
OVER_QUOTA = "larger-than-quota"  # why put kept nothing: the object alone exceeds its tenant's quota

MS_PER_BYTE = 2.0**-20  # cost of an object where none was measured: about what models of 8B take on an H100
MOST_MS = 3_600_000.0  # no prefill takes an hour; a wrong cost must not use up the precision of the clock

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Quotas:
    """Bytes that each tenant may keep; None: as much as there is."""

    default: int | None = None
    tenants: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for tenant, quota in (("the default", self.default), *self.tenants.items()):
            if quota is not None and quota < 0:
                raise InputError(f"the quota of {tenant!r} is {quota} bytes; it must be at least 0")

    def of(self, tenant: str) -> int | None:
        return self.tenants.get(tenant, self.default)


@dataclass(slots=True, eq=False)
class _Entry(Generic[K]):
    key: K
    nbytes: int
    tenant: str
    value: float  # ms saved per byte and use
    uses: int = 1
    priority: float = 0.0
    used: int = 0  # when, in uses of the book: no two are the same
    pins: int = 0
    ticket: int = 0  # of its items in the queues; 0: it is in none

    @property
    def rank(self) -> tuple[float, int]:
        return self.priority, self.used


class _Queue(Generic[K]):
    """A heap of entries. An item may rank its entry too low (it was used since), never too high; and it may be stale."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, int, _Entry[K]]] = []
        self._live = 0

    def push(self, entry: _Entry[K]) -> None:
        heapq.heappush(self._heap, (*entry.rank, entry.ticket, entry))
        self._live += 1

    def forget(self) -> None:
        """One entry gave its ticket back: its item is stale."""
        self._live -= 1
        if len(self._heap) > 2 * self._live + 64:
            self._heap = [(*e.rank, ticket, e) for _, _, ticket, e in self._heap if e.ticket == ticket]
            heapq.heapify(self._heap)

    def first(self, nbytes: float, skip: Collection[int] = (), *, most: float = math.inf) -> list[_Entry[K]]:
        """The lowest, without the tickets of `skip`, until they are so many bytes, `most`, or all."""
        heap = self._heap
        found: list[_Entry[K]] = []
        back: list[tuple[float, int, int, _Entry[K]]] = []
        while heap and nbytes > 0 and len(found) < most:
            priority, used, ticket, entry = heap[0]
            if entry.ticket != ticket:
                heapq.heappop(heap)
            elif (priority, used) != entry.rank:
                heapq.heapreplace(heap, (*entry.rank, ticket, entry))
            else:
                back.append(heapq.heappop(heap))
                if ticket not in skip:
                    found.append(entry)
                    nbytes -= entry.nbytes
        for item in back:
            heapq.heappush(heap, item)
        return found

    def check_integrity(self, entries: Iterable[_Entry[K]]) -> None:
        """It holds exactly `entries`, each once and none ranked too high, and little else."""
        valid = [item for item in self._heap if item[3].ticket == item[2]]
        assert sorted(ticket for _, _, ticket, _ in valid) == sorted(e.ticket for e in entries)
        assert self._live == len(valid)
        assert len(self._heap) <= 2 * self._live + 64
        assert all((priority, used) <= e.rank for priority, used, _, e in valid)


@dataclass(slots=True, eq=False)
class _Tenant(Generic[K]):
    nbytes: int = 0
    objects: int = 0
    queue: _Queue[K] = field(default_factory=_Queue)


class Book(Generic[K]):
    """What is kept within `limit_bytes`, and in which order it leaves. Not thread safe: its owner has a lock.

    `cost_ms` is what an object took to compute. Where that was not measured (or is no number), the mean per byte of those
    that were is assumed: an object's tokens are proportional to its bytes. Every method but `order` and `check_integrity`
    takes O(log n) time per object that it names, amortised.
    """

    def __init__(self, limit_bytes: int, quotas: Quotas | None = None) -> None:
        if limit_bytes < 0:
            raise InputError(f"limit_bytes is {limit_bytes}; it must be at least 0")
        self.limit_bytes, self.quotas = limit_bytes, quotas or Quotas()
        self.nbytes = 0
        self._entries: dict[K, _Entry[K]] = {}
        self._pinned: set[K] = set()
        self._queue: _Queue[K] = _Queue()
        self._tenants: dict[str, _Tenant[K]] = {}  # those that have entries
        self._clock = 0.0  # the highest priority that was evicted
        self._uses = self._tickets = 0
        self._measured_ms = 0.0
        self._measured_bytes = 0

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def pins(self, key: K) -> int:
        """How often `key` is pinned; 0 where it is unknown."""
        found = self._entries.get(key)
        return found.pins if found else 0

    def pinned(self) -> list[K]:
        """What is pinned, in no order."""
        return list(self._pinned)

    def add(self, key: K, nbytes: int, tenant: str = "", cost_ms: float | None = None, *, pinned: bool = False) -> None:
        """A new object, for which there is room: `victims` were evicted. Counts as its first use."""
        assert key not in self._entries, f"{key} is here already"
        entry = _Entry(key, nbytes, tenant, self._value(nbytes, cost_ms), pins=int(pinned))
        self._entries[key] = entry
        owner = self._tenants.setdefault(tenant, _Tenant())
        owner.nbytes += nbytes
        owner.objects += 1
        self.nbytes += nbytes
        self._touch(entry)
        if pinned:
            self._pinned.add(key)
        else:
            self._enqueue(entry)

    def use(self, key: K) -> None:
        """It is worth more from now on."""
        entry = self._entries[key]
        entry.uses += 1
        self._touch(entry)

    def pin(self, key: K) -> None:
        """It does not leave before as many calls of `unpin`. Not a use."""
        entry = self._entries[key]
        entry.pins += 1
        if entry.pins == 1:
            self._pinned.add(key)
            self._dequeue(entry)

    def unpin(self, key: K) -> None:
        entry = self._entries[key]
        assert entry.pins, f"{key} is not pinned"
        entry.pins -= 1
        if not entry.pins:
            self._pinned.remove(key)
            self._enqueue(entry)

    def remove(self, key: K) -> None:
        """It left of itself, pinned or not."""
        entry = self._entries.pop(key)
        self._pinned.discard(key)
        if entry.ticket:
            self._dequeue(entry)
        self.nbytes -= entry.nbytes
        tenant = self._tenants[entry.tenant]
        tenant.nbytes -= entry.nbytes
        tenant.objects -= 1
        if not tenant.objects:
            del self._tenants[entry.tenant]

    def evict(self, key: K) -> None:
        """It left to make room: from here on others are compared with what it was worth."""
        self._clock = max(self._clock, self._entries[key].priority)
        self.remove(key)

    def refusal(self, nbytes: int, tenant: str = "") -> str | None:
        """Why an object of that size can never be here: `TOO_LARGE`, `OVER_QUOTA`; None where it can."""
        quota = self.quotas.of(tenant)
        if nbytes > self.limit_bytes:
            return TOO_LARGE
        return OVER_QUOTA if quota is not None and nbytes > quota else None

    def victims(self, nbytes: int, tenant: str = "") -> list[K] | None:
        """Who must leave, the first one first, for so many more bytes of `tenant` to fit: its own for its quota, then anyone
        for the limit. None where that is impossible: `refusal` says why, else too much is pinned. Changes nothing.
        """
        if self.refusal(nbytes, tenant):
            return None
        quota, known = self.quotas.of(tenant), self._tenants.get(tenant)
        own: list[_Entry[K]] = []
        if quota is not None and known is not None:
            excess = known.nbytes + nbytes - quota
            own = known.queue.first(excess)
            if sum(e.nbytes for e in own) < excess:
                return None
        excess = self.nbytes + nbytes - self.limit_bytes - sum(e.nbytes for e in own)
        others = self._queue.first(excess, {e.ticket for e in own})
        if sum(e.nbytes for e in others) < excess:
            return None
        return [e.key for e in (*own, *others)]

    def loss(self, key: K) -> float:
        """What its leaving would cost, in ms; comparable at one moment. `math.inf` where it is pinned."""
        entry = self._entries[key]
        return math.inf if entry.pins else (entry.priority - self._clock) * entry.nbytes

    def first(self, count: int) -> list[K]:
        """The next to leave, so many or all that can."""
        return [e.key for e in self._queue.first(math.inf, most=count)]

    def order(self) -> list[K]:
        """The next to leave first; what is pinned, last."""
        return [e.key for e in sorted(self._entries.values(), key=lambda e: (e.pins > 0, e.rank))]

    def check_integrity(self) -> None:
        """Raise AssertionError when bounds, sums and queues contradict each other. Slow; for tests and tools."""
        entries = list(self._entries.values())
        assert self.nbytes == sum(e.nbytes for e in entries) <= self.limit_bytes
        assert len({e.used for e in entries}) == len(entries)
        assert all(bool(e.ticket) == (not e.pins) == (e.key not in self._pinned) for e in entries)
        assert self._pinned <= self._entries.keys()
        assert self._tenants.keys() == {e.tenant for e in entries}
        self._queue.check_integrity(e for e in entries if e.ticket)
        for name, tenant in self._tenants.items():
            own = [e for e in entries if e.tenant == name]
            quota = self.quotas.of(name)
            assert tenant.nbytes == sum(e.nbytes for e in own)
            assert tenant.objects == len(own)
            assert quota is None or tenant.nbytes <= quota
            tenant.queue.check_integrity(e for e in own if e.ticket)

    def _value(self, nbytes: int, cost_ms: float | None) -> float:
        """Milliseconds per byte."""
        if cost_ms is None or not math.isfinite(cost_ms) or cost_ms < 0:
            return self._measured_ms / self._measured_bytes if self._measured_bytes else MS_PER_BYTE
        cost_ms, nbytes = min(cost_ms, MOST_MS), max(nbytes, 1)
        self._measured_ms += cost_ms
        self._measured_bytes += nbytes
        return cost_ms / nbytes

    def _touch(self, entry: _Entry[K]) -> None:
        self._uses += 1
        entry.used = self._uses
        entry.priority = self._clock + entry.uses * entry.value  # Cherkasova 1998: Clock + Fr * Cost / Size

    def _enqueue(self, entry: _Entry[K]) -> None:
        self._tickets += 1
        entry.ticket = self._tickets
        self._queue.push(entry)
        self._tenants[entry.tenant].queue.push(entry)

    def _dequeue(self, entry: _Entry[K]) -> None:
        entry.ticket = 0
        self._queue.forget()
        self._tenants[entry.tenant].queue.forget()
