"""Finds known text that other hosts computed, through a store that can only get and put by name.

Whoever adds a segment leaves notes on a noticeboard, named for windows of its text (`winnowing`, `sighting`). Whoever has a
prompt with unknown text fetches the notes of that text's windows, loads the segments that they name, and looks again. A note
is a hint: what is loaded is a verified record of its own model and tenant, and a match is decided on the token ids.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Protocol

import numpy as np

from kvcomm.errors import CacheFault, InputError
from kvcomm.matching import Found, Index
from kvcomm.segments import Ids, Segment
from kvcomm.store.leads import Leads
from kvcomm.store.notices import MAX_NOTES, Noticeboard
from kvcomm.store.quiet import Quiet
from kvcomm.store.record import Record
from kvcomm.store.sighting import SIGHTINGS, Sighting, note_names, pack, unpack
from kvcomm.store.winnowing import TOKENS, minima

__all__ = ["SignpostStats", "Signposts", "Stack"]

LATEST = 1 << 12  # keys that are remembered until somebody is told
ROUNDS = 2  # of loading for one prompt: what is missing may be had under another key


class Stack(Protocol):
    """What is asked of the store; `Tiered` does it."""

    def get_worth(
        self, prices: Mapping[str, float], sizes: Mapping[str, int] | None = None
    ) -> tuple[dict[str, Record], dict[str, str]]: ...

    def size(self, key: str) -> int | None: ...


@dataclass(frozen=True)
class SignpostStats:
    """Counts since it was made."""

    asked: int = 0  # prompts for which notes were fetched
    notes: int = 0  # fetched
    loaded: int = 0  # segments of others, now known here
    missing: int = 0  # named by a note, kept nowhere
    useless: int = 0  # loaded, and then not a part of the prompt's matches
    foreign: int = 0  # named by a note of another tenant or model than its own: never used
    announced: int = 0  # segments of our own
    faults: Mapping[str, int] = field(default_factory=dict)  # what failed -> times; the local answer was given


class Signposts:
    """An `Index`: `local`, and what the notes on `board` lead to in `stack`. Thread safe where these are.

    Every common run of `reach` tokens or more is found as long as its notes and record are kept, up to some 70,000 unknown
    tokens of a prompt (4,096 notes). At most `most` segments are loaded for one prompt; what was asked for in vain is not asked
    for again for `quiet_s`.
    """

    def __init__(
        self,
        local: Index,
        board: Noticeboard,
        stack: Stack,
        *,
        reach: int = 40,
        most: int = 8,
        quiet_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if reach < 2 * TOKENS or most < 1:
            raise InputError(f"reach is {reach} and most {most}; they must be at least {2 * TOKENS} and 1")
        self.local, self.board, self.stack, self.reach, self.most = local, board, stack, reach, most
        self._quiet = Quiet(quiet_s, clock=clock)  # names of notes, and keys
        self._lost: deque[str] = deque(maxlen=LATEST)  # what the local index dropped for a segment of others
        self._counts: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._lock = Lock()

    def look(
        self,
        ids: Ids,
        *,
        fingerprint: str,
        tenant: str = "",
        same_tables: Callable[[int], bool] = lambda length: True,
        ms_per_token: float | None = None,
    ) -> Found:
        """As the local index; where `reach` tokens or more are unknown to it, others are asked in one call for notes and at
        most two for segments.
        """

        def local() -> Found:
            return self.local.look(
                ids, fingerprint=fingerprint, tenant=tenant, same_tables=same_tables, ms_per_token=ms_per_token
            )

        found = local()
        weights = self._windows(ids, found, fingerprint, tenant)
        if not weights:
            return found
        try:
            notes = self.board.get_notes(list(weights))
        except CacheFault as fault:
            self._fault("notes", fault)
            return found
        sightings, known = self._sightings(notes)
        leads = Leads(ids, weights, sightings)
        self._count(asked=1, notes=len(notes))
        loaded = self._load(leads, fingerprint, tenant, math.inf if ms_per_token is None else ms_per_token)
        self._quiet.add(leads.settled())
        if loaded or known:
            found = local()
            self._count(useless=len(loaded - {match.segment.key for match in found.matches}))
        declined = Counter(found.declined) + leads.declined()
        return replace(found, declined=dict(declined)) if declined else found

    def add(self, segment: Segment) -> tuple[str, ...]:
        """As the local index's, which then holds it; others are told of what it did not hold yet."""
        known = segment.key in self.local
        lost = [*self.local.add(segment)]
        while self._lost:
            if (key := self._lost.popleft()) not in self.local:
                lost.append(key)
        if not known and segment.key in self.local:
            self._announce(segment)
        return tuple(dict.fromkeys(lost))

    def remove(self, key: str) -> bool:
        """From the local index; notes of it lead others nowhere until newer ones replace them."""
        return self.local.remove(key)

    def awaited(self, flight: int, tenant: str) -> bool:
        return self.local.awaited(flight, tenant)

    def land(self, flight: int, tenant: str) -> None:
        self.local.land(flight, tenant)

    def __contains__(self, key: object) -> bool:
        return key in self.local

    def stats(self) -> SignpostStats:
        with self._lock:
            return SignpostStats(**self._counts, faults=dict(self._faults))

    def _windows(self, ids: Ids, found: Found, fingerprint: str, tenant: str) -> dict[str, int]:
        """Names of the notes to ask for -> tokens of the prompt that they stand for."""
        edges = [0, *(edge for match in found.matches for edge in (match.start, match.end)), len(ids)]
        gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= self.reach]
        if not gaps:
            return {}
        hashes, counts = np.unique(np.concatenate([minima(ids[a:b], self.reach) for a, b in gaps]), return_counts=True)
        names = note_names(fingerprint, tenant, hashes[:MAX_NOTES].tolist())
        return {name: count for name, count in zip(names, counts.tolist(), strict=False) if name not in self._quiet}

    def _sightings(self, notes: Mapping[str, bytes]) -> tuple[dict[str, list[Sighting]], bool]:
        """By name; of segments that are not known here and were not missed lately. And is one known, by now?"""
        out, known = {}, False
        for name, note in notes.items():
            try:
                seen = unpack(note)
            except CacheFault as fault:
                self._fault("note", fault)
                continue
            out[name] = [s for s in seen if s.key not in self._quiet and s.key not in self.local]
            known = known or any(s.key in self.local for s in seen)
        return out, known

    def _load(self, leads: Leads, fingerprint: str, tenant: str, ms_per_token: float) -> set[str]:
        """Keys of the segments that the local index knows now."""
        loaded: set[str] = set()
        for _ in range(ROUNDS):
            picked = leads.pick(self.most - len(loaded))
            if not picked:
                break
            prices = {key: ms_per_token * tokens for key, tokens in picked.items()}
            sizes = {key: size for key in picked if (size := leads.size(key))}
            try:
                records, why = self.stack.get_worth(prices, sizes)
            except CacheFault as fault:
                self._fault("records", fault)
                records, why = {}, dict.fromkeys(prices, "fault")
            known = {key for key, record in records.items() if self._know(key, record, fingerprint, tenant)}
            missing = prices.keys() - records.keys() - why.keys()
            self._count(loaded=len(known), missing=len(missing))
            self._quiet.add(prices.keys() - known - why.keys())
            leads.tried(known, why)
            loaded |= known
        return loaded

    def _know(self, key: str, record: Record, fingerprint: str, tenant: str) -> bool:
        """Enter a loaded record into the local index; False where it may not or cannot be used."""
        try:
            segment = record.segment
        except CacheFault as fault:
            self._fault("record", fault)
            return False
        if (segment.key, segment.fingerprint, segment.tenant) != (key, fingerprint, tenant):
            self._count(foreign=1)
            return False
        self._lost.extend(self.local.add(segment))
        return key in self.local

    def _announce(self, segment: Segment) -> None:
        names = list(note_names(segment.fingerprint, segment.tenant, np.unique(minima(segment.ids, self.reach)).tolist()))
        if not names:
            return
        ours = Sighting.of(segment, self.stack.size(segment.key) or 0)
        try:
            for some in (names[i : i + MAX_NOTES] for i in range(0, len(names), MAX_NOTES)):
                old = self.board.get_notes(some)
                self.board.put_notes({name: pack(self._first(ours, old.get(name))) for name in some})
        except CacheFault as fault:
            self._fault("announcing", fault)
        else:
            self._count(announced=1)

    def _first(self, ours: Sighting, note: bytes | None) -> list[Sighting]:
        """With what the note says already; a note that cannot be read is replaced."""
        try:
            others = [] if note is None else [s for s in unpack(note) if s.key != ours.key]
        except CacheFault as fault:
            self._fault("note", fault)
            others = []
        return [ours, *others][:SIGHTINGS]

    def _count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def _fault(self, what: str, fault: CacheFault) -> None:
        with self._lock:
            self._faults[f"{what}-{getattr(fault, 'reason', 'fault')}"] += 1
