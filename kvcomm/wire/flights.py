"""Single flight: who is computing which text now, so that others who need it can wait instead of computing it once more.

A flight is a prompt that is being served, with the runs of it that nobody knew. It lands when its client has kept them, or is
gone, or after a bound. Knows token ids and clocks, nothing of KV or sockets. Belongs to one thread, which serves others too: so
prompts longer than LONGEST neither wait nor are waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic

from kvcomm.matching import Match, TextIndex
from kvcomm.segments import Ids, Segment

__all__ = ["LONGEST", "Ahead", "Flights"]

LONGEST = 1 << 17  # tokens: some 15 ms to search for, 35 to index
LIMIT_S = 120.0  # a flight lands after this time whatever its client does
MOST = 1 << 12  # flights; of more the oldest land
MOST_BYTES = 64 << 20  # of their token ids, as well


@dataclass(frozen=True)
class Ahead:
    """Somebody computes text of a prompt already."""

    landed: asyncio.Event
    tokens: int  # of the prompt, that nobody has kept yet


@dataclass(eq=False)
class _Flight:
    number: int
    owner: object
    since: float
    segments: tuple[Segment, ...]  # that it computes; once it is indexed, those that no earlier one does
    nbytes: int  # of the ids that it holds on to
    landed: asyncio.Event = field(default_factory=asyncio.Event)
    awaited: int = 0


class Flights:
    """All flights of a server. `least`: tokens of the shortest run worth waiting for."""

    def __init__(self, least: int = 16, clock: Callable[[], float] = monotonic) -> None:
        self._least, self._clock = least, clock
        self._index = TextIndex(min_run=least, variants=64)
        self._flights: dict[int, _Flight] = {}
        self._fresh: dict[int, _Flight] = {}  # not indexed: most have landed before anybody asks
        self._of: dict[str, _Flight] = {}  # by a segment's key
        self._numbers = 0
        self._nbytes = 0  # of all flights' ids

    def __len__(self) -> int:
        return len(self._flights)

    def take_off(self, owner: object, ids: Ids, known: Sequence[Match], fingerprint: str, tenant: str) -> int:
        """A prompt is being served for `owner`; what `known` does not cover of it will be computed. Its flight's number."""
        self._numbers += 1
        gaps = _gaps(len(ids), known, self._least) if len(ids) <= LONGEST else []
        runs = tuple(Segment(ids[start:end], ids[:start], fingerprint, tenant) for start, end in gaps)
        flight = _Flight(self._numbers, owner, self._clock(), runs, ids.nbytes if runs else 0)
        self._flights[flight.number] = self._fresh[flight.number] = flight
        self._nbytes += flight.nbytes
        while len(self._flights) > MOST or self._nbytes > MOST_BYTES:
            self._end(next(iter(self._flights.values())))
        return flight.number

    def ahead(
        self, owner: object, ids: Ids, known: Sequence[Match], fingerprint: str, tenant: str, before: int | None = None
    ) -> Ahead | None:
        """The first flight of another owner that computes text of this prompt which `known` does not cover; of those that took
        off earlier than `before`, so that nobody waits in a circle. An owner cannot land while it waits.
        """
        self._expire()
        if len(ids) > LONGEST:
            return None
        self._index_fresh()
        if not self._of:
            return None
        gaps = _gaps(len(ids), known, self._least)
        tokens: dict[int, int] = {}
        for match in self._index.find(ids, fingerprint=fingerprint, tenant=tenant):
            flight = self._of[match.segment.key]
            shared = sum(max(0, min(b, match.end) - max(a, match.start)) for a, b in gaps)
            if shared >= self._least and flight.owner is not owner and (before is None or flight.number < before):
                tokens[flight.number] = tokens.get(flight.number, 0) + shared
        if not tokens:
            return None
        first = self._flights[min(tokens)]
        return Ahead(first.landed, tokens[first.number])

    def awaited(self, number: int) -> bool:
        """Does anybody wait for it?"""
        return number in self._flights and self._flights[number].awaited > 0

    async def wait(self, ahead: Ahead, seconds: float) -> None:
        """Until it has landed, or so long."""
        flight = next((f for f in self._flights.values() if f.landed is ahead.landed), None)
        if flight is None:
            return
        flight.awaited += 1
        try:
            await asyncio.wait_for(flight.landed.wait(), seconds)
        except TimeoutError:
            pass
        finally:
            flight.awaited -= 1

    def land(self, number: int, owner: object) -> None:
        """What it computed is kept now, or never will be. Only its owner's word counts."""
        flight = self._flights.get(number)
        if flight is not None and flight.owner is owner:
            self._end(flight)

    def leave(self, owner: object) -> None:
        """The owner is gone."""
        for flight in [f for f in self._flights.values() if f.owner is owner]:
            self._end(flight)

    def _index_fresh(self) -> None:
        for flight in self._fresh.values():
            new = [s for s in flight.segments if s.key not in self._of and s.key not in self._index.add(s)]
            flight.segments = tuple(new)
            self._of |= {segment.key: flight for segment in new}
        self._fresh.clear()

    def _end(self, flight: _Flight) -> None:
        del self._flights[flight.number]
        self._nbytes -= flight.nbytes
        if self._fresh.pop(flight.number, None) is not None:
            flight.landed.set()
            return
        for segment in flight.segments:
            self._index.remove(segment.key)
            self._of.pop(segment.key, None)
        flight.landed.set()

    def _expire(self) -> None:
        for flight in list(self._flights.values()):  # the oldest first
            if self._clock() - flight.since < LIMIT_S:
                break
            self._end(flight)


def _gaps(length: int, known: Sequence[Match], least: int) -> list[tuple[int, int]]:
    """Runs of at least `least` tokens that no match covers; matches are disjoint and in order."""
    edges = [0, *(edge for match in known for edge in (match.start, match.end)), length]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= least]
