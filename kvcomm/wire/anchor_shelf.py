"""What a log of anchors holds in memory: by number, key and slot, who leaves for another, and what came and left when.

Knows nothing of locks, disks or versions: whoever changes it must do so alone.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile

__all__ = ["MOST", "PAGE", "REMEMBERED", "Kept", "News", "Room", "Shelf"]

MOST = 1 << 16  # anchors
PAGE = 2 << 20  # bytes of anchors told of at once; a larger one is told of alone
REMEMBERED = 1 << 14  # removals that are remembered

Room = tuple[str, str]
"""Tenant and fingerprint: what a replica asks for."""


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    number: int  # of the event that it came with
    key: str
    room: Room
    slot: str
    entry: bytes
    document: bytes

    @property
    def tenant(self) -> str:
        return self.room[0]

    @property
    def nbytes(self) -> int:
        return len(self.entry) + len(self.document)


@dataclass(frozen=True)
class News:
    """What leads from one event to a later one: first what left, then what came."""

    upto: int  # number of the later event
    came: list[Kept]  # and has not left since, the oldest first
    left: list[str] | None  # keys; None: not remembered any more
    more: bool  # there are later events


class Shelf:
    """At most `limit_bytes` of anchors and `per_slot` of each slot, as long as `victims` leave first. Numbers only grow."""

    def __init__(self, limit_bytes: int, per_slot: int) -> None:
        self.limit_bytes, self.per_slot = limit_bytes, per_slot
        self.kept: dict[int, Kept] = {}  # by number, the oldest first; so are all below
        self.rooms: dict[Room, dict[str, Kept]] = {}  # by key
        self.slots: dict[tuple[Room, str], dict[int, Kept]] = {}
        self.nbytes: Counter[str] = Counter()  # by tenant
        self.number = 0  # of the last event
        self._left: deque[tuple[int, Room, str]] = deque()  # events that removed one
        self._remembered_since = 0  # number of the last event that `_left` does not know

    def summed_up(self, number: int) -> None:
        """What left up to this event is not known; what came is."""
        self.number = max(self.number, number)
        self._remembered_since = max(self._remembered_since, number)

    def get(self, room: Room, key: str) -> Kept | None:
        return self.rooms.get(room, {}).get(key)

    def come(self, kept: Kept) -> None:
        assert kept.number > next(reversed(self.kept), 0) and self.get(kept.room, kept.key) is None
        self.number = max(self.number, kept.number)
        self.kept[kept.number] = kept
        self.rooms.setdefault(kept.room, {})[kept.key] = kept
        self.slots.setdefault((kept.room, kept.slot), {})[kept.number] = kept
        self.nbytes[kept.tenant] += kept.nbytes

    def leave(self, kept: Kept, number: int) -> None:
        """With event `number`."""
        self.number = max(self.number, number)
        del self.kept[kept.number]
        slot = (kept.room, kept.slot)
        del self.rooms[kept.room][kept.key], self.slots[slot][kept.number]
        if not self.rooms[kept.room]:
            del self.rooms[kept.room]
        if not self.slots[slot]:
            del self.slots[slot]
        self.nbytes[kept.tenant] -= kept.nbytes
        if not self.nbytes[kept.tenant]:
            del self.nbytes[kept.tenant]
        self._left.append((number, kept.room, kept.key))
        if len(self._left) > REMEMBERED:
            self._remembered_since = self._left.popleft()[0]

    def victims(self, room: Room, slot: str, nbytes: int) -> list[Kept]:
        """Who leaves for another one of `nbytes`, at most `limit_bytes`: the oldest of a full slot, then the oldest of the
        tenant that has the most. Changes nothing.
        """
        here = self.slots.get((room, slot), {})
        gone = {kept.number: kept for kept in islice(here.values(), max(0, len(here) + 1 - self.per_slot))}
        taken = Counter(self.nbytes)
        taken[room[0]] += nbytes
        for kept in gone.values():
            taken[kept.tenant] -= kept.nbytes
        while taken.total() > self.limit_bytes or len(self.kept) - len(gone) >= MOST:
            left = [kept for number, kept in self.kept.items() if number not in gone]
            most = max(taken[kept.tenant] for kept in left)
            victim = next(kept for kept in left if taken[kept.tenant] == most)
            gone[victim.number] = victim
            taken[victim.tenant] -= victim.nbytes
        return list(gone.values())

    def since(self, room: Room, number: int) -> News:
        """What happened in a room after this event; -1: nothing is known, not even that it was empty at first."""
        newer = list(_after(number, self.rooms.get(room, {})))
        came, upto = _page(newer), self.number
        if len(came) < len(newer):
            upto = came[-1].number
        left = None
        if number >= self._remembered_since:
            recent = takewhile(lambda event: event[0] > number, reversed(self._left))
            left = [key for at, where, key in recent if where == room and at <= upto]
        return News(upto, came, left, more=len(came) < len(newer))

    def check_integrity(self) -> None:
        assert list(self.kept) == sorted(self.kept) and self.number >= max(self.kept, default=0)
        assert len(self.kept) <= MOST and len(self._left) <= REMEMBERED
        assert self.nbytes.total() <= self.limit_bytes
        assert all(len(slot) <= self.per_slot for slot in self.slots.values())
        nbytes: Counter[str] = Counter()
        rooms: dict[Room, dict[str, Kept]] = {}
        slots: dict[tuple[Room, str], dict[int, Kept]] = {}
        for number, kept in self.kept.items():
            assert number == kept.number
            nbytes[kept.tenant] += kept.nbytes
            rooms.setdefault(kept.room, {})[kept.key] = kept
            slots.setdefault((kept.room, kept.slot), {})[number] = kept
        assert (nbytes, rooms, slots) == (self.nbytes, self.rooms, self.slots), "numbers, rooms, slots and bytes disagree"


def _after(number: int, room: dict[str, Kept]) -> Iterator[Kept]:
    """Those that came later, the oldest first."""
    return reversed(list(takewhile(lambda kept: kept.number > number, reversed(room.values()))))


def _page(newer: list[Kept]) -> list[Kept]:
    """As many of these as are told of at once: at least one, where there is one."""
    nbytes = 0
    for at, kept in enumerate(newer):
        nbytes += kept.nbytes
        if at and nbytes > PAGE:
            return newer[:at]
    return newer
