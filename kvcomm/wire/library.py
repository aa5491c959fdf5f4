"""What a server knows: the KV of a host in shared memory, the tiers below it, and where its text is found.

Plain calls from any thread, which may wait for a disk or a network where they say so. Knows nothing of sockets or clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from kvcomm.errors import CacheFault
from kvcomm.matching import Index, Match, TextIndex, tokens_by_key
from kvcomm.segments import Ids, Segment
from kvcomm.store.base import Kept, StoreStats
from kvcomm.store.notices import Noticeboard
from kvcomm.store.record import Record, Unreadable
from kvcomm.store.records import Listed, RecordStore
from kvcomm.store.remote import RemoteStore
from kvcomm.store.signposts import Signposts
from kvcomm.store.slabs import SlabStore, Slot
from kvcomm.store.tiered import Tiered

__all__ = ["NOT_FOUND_AGAIN", "OTHER_TENANT", "QUICK", "Library", "Shelved", "queue_bytes"]

OTHER_TENANT = "other-tenant"  # the record is not of the tenant that its client is bound to
NOT_FOUND_AGAIN = "too-short-to-find"  # no prompt would ever find it
SLOW_NETWORK = "network-slower-than-computing"  # known, and not worth sending to another host
MEMORY_FULL = "memory-full"  # known, but there is no memory to lease it in
MIB = 1 << 20
QUICK = 1 << 13  # tokens that are searched for in a moment
QUEUE = 1 << 30  # bytes that wait to be written down, at most
BRINGINGS = 2  # more, of what was evicted before it could be pinned
ATTEMPTS = 8  # searches of one prompt, while others remove what was found


@dataclass(frozen=True)
class Shelved:
    """Known runs of a prompt, and where their KV lies: pinned once per slot, for the caller to unpin."""

    matches: list[Match]
    slots: list[Slot]
    declined: dict[str, int] = field(default_factory=dict)  # why known text is left out -> tokens


class Library:
    """Owns the tiers. `lower`: what is below the memory; `write`: when it gets what clients put (see `Tiered`); `board`: where
    hosts that share a tier tell each other of their texts.
    """

    def __init__(
        self,
        slabs: SlabStore,
        lower: RecordStore | None = None,
        texts: TextIndex | None = None,
        write: Literal["through", "back"] = "through",
        board: Noticeboard | None = None,
    ) -> None:
        self.slabs, self.lower = slabs, lower
        self.texts = TextIndex() if texts is None else texts
        self.stack: RecordStore = slabs
        self.index: Index = self.texts
        if lower is not None:
            self.stack = Tiered(slabs, lower, write=write, queue_bytes=queue_bytes(slabs))
            if board is not None:
                self.index = Signposts(self.texts, board, self.stack)
        self._remote = self.index is not self.texts

    @property
    def slow(self) -> bool:
        """May calls take longer than a moment, as they reach below the memory?"""
        return self.lower is not None

    def find_now(self, tenant: str, fingerprint: str, ids: Ids) -> Shelved | None:
        """As `find`, in a moment; None where that cannot be."""
        if self._remote or len(ids) > QUICK:
            return None
        found = self.index.look(ids, fingerprint=fingerprint, tenant=tenant)
        slots, missing = self._pinned(dict.fromkeys(match.segment.key for match in found.matches))
        if not missing:
            return Shelved(found.matches, list(slots.values()))
        self.unpin(slots.values())
        return None

    def find(self, tenant: str, fingerprint: str, ids: Ids, ms_per_token: float | None) -> Shelved:
        """Known runs whose KV is in memory now, or can be brought there in less time than computing them takes. What no tier
        holds any more is forgotten on the way.
        """
        for _ in range(ATTEMPTS):
            found = self.index.look(ids, fingerprint=fingerprint, tenant=tenant, ms_per_token=ms_per_token)
            tokens = tokens_by_key(found.matches)
            slots, missing = self._pinned(tokens)
            price = float("inf") if ms_per_token is None else ms_per_token
            loaded, reasons = self._loaded({key: price * tokens[key] for key in missing})
            slots |= loaded
            gone = [key for key in missing if key not in slots and key not in reasons]
            if not gone:
                matches = [m for m in found.matches if m.segment.key in slots]
                if reasons:  # the same text may be in memory in another segment
                    known = self.texts.find(ids, fingerprint=fingerprint, tenant=tenant, without=reasons)
                    slots |= self._pinned(dict.fromkeys(key for m in known if (key := m.segment.key) not in slots))[0]
                    matches = [m for m in known if m.segment.key in slots]
                declined = Counter(found.declined)
                for m in found.matches:
                    if m.segment.key in reasons:
                        declined[reasons[m.segment.key]] += m.tokens - _shared(m, matches)
                return Shelved(matches, list(slots.values()), {reason: count for reason, count in declined.items() if count})
            self._forget(gone)
            self.unpin(slots.values())
        return Shelved([], [])

    def worth_sending(self, found: Shelved, ms_per_token: float, ms_per_mib: float) -> Shelved:
        """Without what takes longer to send to another host than to compute there, unpinned."""
        tokens = tokens_by_key(found.matches)
        slow = {s.key: s for s in found.slots if s.nbytes / MIB * ms_per_mib > tokens[s.key] * ms_per_token}
        if not slow:
            return found
        self.unpin(slow.values())
        return Shelved(
            [match for match in found.matches if match.segment.key not in slow],
            [slot for slot in found.slots if slot.key not in slow],
            {**found.declined, SLOW_NETWORK: sum(tokens[key] for key in slow)},
        )

    def _loaded(self, prices: dict[str, float]) -> tuple[dict[str, Slot], dict[str, str]]:
        """What the tiers below have of these, in memory now; and why others, which they have too, are not."""
        if not prices or not isinstance(self.stack, Tiered):
            return {}, {}
        records, reasons = self.stack.get_worth(prices)
        slots, left = self._brought(records)
        return slots, reasons | dict.fromkeys(left, MEMORY_FULL)

    def _brought(self, records: Iterable[str]) -> tuple[dict[str, Slot], list[str]]:
        """What was brought into memory just now, pinned; brought again where others evicted it before. What has no room."""
        slots, left = self._pinned(records)
        for _ in range(BRINGINGS):
            if not left:
                break
            more, left = self._pinned(self.stack.get_records(left))
            slots |= more
        return slots, [key for key in records if key not in slots]

    def get(self, tenant: str, keys: Sequence[str]) -> list[Slot]:
        """Those of these that the tenant has, in memory now; each pinned for the caller to unpin."""
        slots, missing = self._pinned(dict.fromkeys(keys))
        if missing and self.lower is not None:
            slots |= self._brought(self.stack.get_records(missing))[0]
        theirs = [slot for slot in slots.values() if self._tenant_of(slot.key) != tenant]
        self.unpin(theirs)
        return [slot for slot in slots.values() if slot not in theirs]

    def unpin(self, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.slabs.unpin(slot.generation)

    def has(self, tenant: str, keys: Sequence[str]) -> set[str]:
        """Those that the tenant has in memory: what is below alone was perhaps too slow to load, and is worth putting again."""
        return self.slabs.of_tenant(tenant, keys)

    def reserve(self, tenant: str, key: str, nbytes: int, cost_ms: float | None) -> Slot | Kept:
        """Memory to write a record to; or what is to be said instead: it is kept already, or cannot be."""
        reserved = self.slabs.reserve(key, nbytes, tenant, cost_ms)
        self._forget(self._lost(reserved.evicted))
        return reserved

    def settle(self, key: str) -> None:
        """What is kept already, and another client puts again, is written down where it is not below, as after a full disk: who
        is told that it is kept may count on that.
        """
        if isinstance(self.stack, Tiered) and not self.stack.is_below(key) and (record := self.slabs.record(key)) is not None:
            self._forget(self.stack.write_down(record).evicted)

    def commit(self, tenant: str, key: str, generation: int) -> Kept:
        """A reserved record is written. May take as long as the tiers below take to write it."""
        kept = self.slabs.commit(generation)
        record = self.slabs.record(key) if kept else None
        if record is None:  # refused, or evicted already
            return kept
        try:
            segment, reason = record.segment, OTHER_TENANT if record.tenant != tenant else None
        except Unreadable as fault:
            reason = fault.reason
        if reason is not None:
            self.slabs.remove(key, generation)
            return Kept(stored=False, reason=reason)
        if isinstance(self.stack, Tiered):
            self._forget(self.stack.write_down(record).evicted)
        return self._indexed(segment, kept)

    def put(self, tenant: str, record: Record) -> Kept:
        """A record as bytes, from a client that shares no memory with us."""
        if record.tenant != tenant:
            return Kept(stored=False, reason=OTHER_TENANT)
        record.verify(record.segment.key)
        kept = self.stack.put_record(record)
        self._forget(kept.evicted)
        return self._indexed(record.segment, kept) if kept else kept

    def remove(self, tenant: str, keys: Iterable[str]) -> int:
        """Forget what the tenant has of these; how many there were."""
        count = 0
        for key in keys:
            if self._tenant_of(key) == tenant:
                self.index.remove(key)
                count += self.stack.remove(key)
        return count

    def damaged(self, tenant: str, keys: Iterable[str]) -> int:
        """A client found these altered in memory: there they are forgotten. A tier below verifies what it has by itself."""
        count = 0
        for key in keys:
            if self._tenant_of(key) in (tenant, None):
                count += self.slabs.remove(key)
                if self.lower is None:
                    self.index.remove(key)
        return count

    def page(self, tenant: str, after: str, count: int) -> list[Listed]:
        """The tenant's, in memory or below, as `RecordStore.page`; without those of a tier that fails."""
        found: dict[str, Listed] = {}
        for tier in reversed(self._tiers()):  # of one that several have, the nearest says the most
            with suppress(CacheFault):  # counted
                found |= {row.key: row for row in tier.page(tenant, after, count)}
        return [found[key] for key in sorted(found)[:count]]

    def stats(self) -> dict[str, StoreStats]:
        """By tier, from the front."""
        return {tier.name: tier.stats() for tier in self._tiers()}

    def close(self) -> None:
        self.stack.close()

    def _tiers(self) -> list[RecordStore]:
        return self.stack.tiers() if isinstance(self.stack, Tiered) else [self.stack]

    def _pinned(self, keys: Iterable[str]) -> tuple[dict[str, Slot], list[str]]:
        slots: dict[str, Slot] = {}
        missing: list[str] = []
        for key in keys:
            slot = self.slabs.pin(key)
            if slot is None:
                missing.append(key)
            else:
                slots[key] = slot
        return slots, missing

    def _tenant_of(self, key: str) -> str | None:
        """None for what is not here."""
        tenant = self.slabs.tenant_of(key)
        if tenant is None and self.lower is not None:
            record = self.stack.get_records([key]).get(key)
            tenant = None if record is None else record.tenant
        return tenant

    def _indexed(self, segment: Segment, kept: Kept) -> Kept:
        """Makes the text of what is kept known, last of all: other hosts hear of it. What nobody finds any more on this host is
        removed from it; what a service keeps for all hosts is not ours to remove.
        """
        lost = self.index.add(segment)
        for key in lost:
            if self._remote and isinstance(self.stack, Tiered):
                for tier in self.stack.tiers():
                    if not isinstance(tier, RemoteStore):
                        tier.remove(key)
            else:
                self.stack.remove(key)
        return Kept(stored=False, reason=NOT_FOUND_AGAIN) if segment.key in lost else kept

    def _lost(self, evicted: Iterable[str]) -> Iterable[str]:
        """Those that left the memory and are in no tier below."""
        return self.stack.lost(evicted) if isinstance(self.stack, Tiered) else evicted

    def _forget(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.index.remove(key)


def queue_bytes(slabs: SlabStore) -> int:
    """How much may wait to be written down: it lies in the memory until then, and cannot leave."""
    return min(QUEUE, slabs.limit_bytes // 4)


def _shared(match: Match, matches: Iterable[Match]) -> int:
    """Tokens of a match that these cover as well."""
    return sum(max(0, min(m.end, match.end) - max(m.start, match.start)) for m in matches)


def ids_of(data: bytes) -> Ids:
    """Token ids as they travel."""
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)
