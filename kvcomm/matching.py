"""Finds known text in a prompt: runs of token ids that stand in a known segment, at any offset, without any annotation.

A window of 8 tokens is indexed at every 8th offset of a segment and the prompt is hashed at every position, so every common
run of at least 15 tokens holds a window that is seen. A seen window is verified on the token ids and extended to the maximal
run. A second table holds hashes of whole prefixes: it answers what an exact prefix cache would, whatever the number of
contexts that a text was seen in. Knows nothing of KV, models or plans.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from kvcomm.errors import InputError
from kvcomm.segments import Ids, Segment

__all__ = ["WINDOW", "Found", "Index", "Match", "TextIndex", "tokens_by_key"]

WINDOW = 8  # tokens hashed together, and the stride at which a segment's windows are indexed
NEAR = 128  # tokens in front of a run that decide which of several contexts is the nearest
WORK = 1024  # token comparisons allowed per prompt token; a search that needs more ends with what it has

_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2**64
_INVERSE = pow(_MULTIPLIER, -1, 1 << 64)

_Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Match:
    """Prompt tokens [start, end) are `segment.ids[offset : offset + end - start]`.

    `exact`: the run also stands at the position where it was computed, behind the same tokens and under the same rotary
    tables, and nothing in front of it was approximate then. Its stored KV is what a dense prefill of this prompt would give.
    """

    start: int
    end: int
    segment: Segment
    offset: int
    exact: bool

    @property
    def tokens(self) -> int:
        return self.end - self.start


def tokens_by_key(matches: Iterable[Match]) -> Counter[str]:
    """How many tokens of a prompt each segment has, by its key."""
    tokens = Counter[str]()
    for match in matches:
        tokens[match.segment.key] += match.tokens
    return tokens


@dataclass(frozen=True)
class Found:
    """What an index says of one prompt."""

    matches: list[Match]
    declined: dict[str, int] = field(default_factory=dict)  # why known text is left out -> its tokens
    waited_ms: float | None = None  # for others who were computing the same text; None: nobody was
    flight: int | None = None  # names this prompt to those who wait for what it computes


class Index(Protocol):
    """Where known text is found. A store that many processes share brings its own, which knows what all of them keep."""

    def look(
        self,
        ids: Ids,
        *,
        fingerprint: str,
        tenant: str = "",
        same_tables: Callable[[int], bool] = lambda length: True,
        ms_per_token: float | None = None,
    ) -> Found:
        """As `TextIndex.find`. `ms_per_token`: what computing one costs the caller; what takes longer to get is left out."""
        ...

    def add(self, segment: Segment) -> tuple[str, ...]:
        """Know `segment`, which the store keeps; returns the keys that can no longer be found."""
        ...

    def remove(self, key: str) -> bool:
        """Forget a segment; False when it was not known."""
        ...

    def awaited(self, flight: int, tenant: str) -> bool:
        """Does anybody wait for what this prompt (`Found.flight`) computes?"""
        ...

    def land(self, flight: int, tenant: str) -> None:
        """What this prompt computed is kept now, or never will be."""
        ...

    def __contains__(self, key: object) -> bool: ...


@dataclass(eq=False)
class _Record:
    """A segment in the index. Mutable: `live` follows the tables of hashes."""

    segment: Segment
    number: int  # the newer, the larger
    data: bytes  # segment.ids
    context_hash: int
    live: int = 0  # entries of this segment in both tables

    @property
    def windows(self) -> int:
        return len(self.segment.ids) // WINDOW

    @property
    def nbytes(self) -> int:
        return self.segment.ids.nbytes + self.segment.context.nbytes


@dataclass
class _Space:
    """The tables of one fingerprint and tenant: hash -> places (record, offset), oldest first."""

    windows: dict[int, list[tuple[_Record, int]]] = field(default_factory=dict)  # of 8 tokens, wherever they stand
    prefixes: dict[int, list[tuple[_Record, int]]] = field(default_factory=dict)  # of context + ids up to a window's end


@dataclass
class _Share:
    """What one tenant has in the index."""

    records: OrderedDict[str, _Record] = field(default_factory=OrderedDict)  # by key, oldest first
    windows: int = 0
    nbytes: int = 0


class _Run(NamedTuple):
    """A common run: prompt [start, end) from `offset` on in the record's segment."""

    start: int
    end: int
    record: _Record
    offset: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


class TextIndex:
    """Known segments, and where a prompt repeats them. Thread safe: one lock, held for the length of a call.

    `min_run` is the shortest run reported (tokens, at least 15). `max_windows` and `max_bytes` bound the index: a window stands
    for 8 tokens of a segment, bytes are those of the ids of segments and their contexts; the oldest segments of the tenant that
    has most leave first.
    `variants` bounds the places kept per window (the oldest leave first; a text that repeats itself takes none from others).
    """

    def __init__(
        self, *, min_run: int = 2 * WINDOW, max_windows: int = 1 << 20, variants: int = 8, max_bytes: int = 256 << 20
    ) -> None:
        if min_run < 2 * WINDOW - 1:
            raise InputError(f"min_run is {min_run}; windows of {WINDOW} tokens find every run of {2 * WINDOW - 1} or more")
        if max_windows < 1 or variants < 1 or max_bytes < 1:
            raise InputError(
                f"max_windows is {max_windows}, variants {variants} and max_bytes {max_bytes}; all must be at least 1"
            )
        self.min_run, self.max_windows, self.variants, self.max_bytes = min_run, max_windows, variants, max_bytes
        self.compared = 0  # token comparisons of all searches so far: their cost without a clock
        self._records: dict[str, _Record] = {}
        self._shares: dict[str, _Share] = {}  # by tenant
        self._spaces: dict[tuple[str, str], _Space] = {}
        self._windows = self._nbytes = 0
        self._added = 0
        self._lock = Lock()

    def add(self, segment: Segment) -> tuple[str, ...]:
        """Know `segment` from now on; one that is known already becomes the newest.

        Returns the keys that can no longer be found after this call, for whoever keeps their KV: old segments, those whose
        every window newer ones displaced, and `segment` itself where it is too short or too large to be indexed.
        """
        with self._lock:
            if segment.key in self._records:
                self._shares[segment.tenant].records.move_to_end(segment.key)
                return ()
            record = _Record(segment, self._added, _bytes(segment.ids), 0)
            if len(segment.ids) < self.min_run or record.windows > self.max_windows or record.nbytes > self.max_bytes:
                return (segment.key,)
            lost = self._insert(record)
            while self._windows > self.max_windows or self._nbytes > self.max_bytes:
                measure = attrgetter("windows" if self._windows > self.max_windows else "nbytes")
                lost.append(next(iter(max(self._shares.values(), key=measure).records)))
                self._forget(lost[-1])
            return tuple(lost)

    def add_oldest(self, segment: Segment) -> bool:
        """Know `segment` as if it had been added before all others: none leaves for it, and it leaves first. False where it
        cannot be found: it is too short, there is no room, or others have displaced its every window.
        """
        with self._lock:
            if segment.key in self._records:
                return True
            if len(segment.ids) < self.min_run or not self._has_room(segment):
                return False
            record = _Record(segment, -self._added, _bytes(segment.ids), 0)
            self._insert(record, oldest=True)
            if not record.live:
                self._drop(segment.key)
            return record.live > 0

    def has_room(self, segment: Segment) -> bool:
        """Could it be added to all others within `max_windows` and `max_bytes`?"""
        with self._lock:
            return self._has_room(segment)

    def remove(self, key: str) -> bool:
        """Forget a segment; False when it was not known."""
        with self._lock:
            return self._forget(key)

    def find(
        self,
        ids: Ids,
        *,
        fingerprint: str,
        tenant: str = "",
        same_tables: Callable[[int], bool] = lambda length: True,
        without: Collection[str] = (),
    ) -> list[Match]:
        """Known runs of this fingerprint and tenant, disjoint and in order; never a run whose token ids differ. `same_tables`:
        whether a sequence of that length has the rotary tables of this prompt; no run is exact where it has not. `without`:
        keys of segments that are left out.

        First come exact runs, each from where the last one ended, as far as they reach without a gap (the longest first):
        they cost no quality. Behind them, from left to right, the longest of the runs that start within a window's length of
        the leftmost one; among equally long ones an exact one, then the one whose context is nearest (`_nearness`), then the
        newest. A run ends where its segment ends and starts where the run before it ended at the earliest.
        Time is linear in the prompt; `ids` is only read.
        """
        with self._lock:
            space = self._spaces.get((fingerprint, tenant))
            if space is None or len(ids) < self.min_run:
                return []
            search = _Search(space, np.ascontiguousarray(ids, dtype=np.int32), self.min_run, same_tables, without)
            matches = search.cover()
            self.compared += search.compared
            return matches

    def look(
        self,
        ids: Ids,
        *,
        fingerprint: str,
        tenant: str = "",
        same_tables: Callable[[int], bool] = lambda length: True,
        ms_per_token: float | None = None,
    ) -> Found:
        """As `find`; here nothing takes longer to get than to compute."""
        return Found(self.find(ids, fingerprint=fingerprint, tenant=tenant, same_tables=same_tables))

    def awaited(self, flight: int, tenant: str) -> bool:
        """Nobody: here prompts have no flights."""
        return False

    def land(self, flight: int, tenant: str) -> None:
        """Nothing: here prompts have no flights."""

    def __contains__(self, key: object) -> bool:
        with self._lock:
            return key in self._records

    def __len__(self) -> int:
        with self._lock:
            return len(self._records)

    @property
    def windows(self) -> int:
        """Windows of all known segments, at most `max_windows`."""
        with self._lock:
            return self._windows

    @property
    def nbytes(self) -> int:
        """Bytes of the token ids of all known segments and their contexts, at most `max_bytes`."""
        with self._lock:
            return self._nbytes

    def check_integrity(self) -> None:
        """Raise AssertionError when the tables, the records and the bounds contradict each other. Slow; for tests."""
        with self._lock:
            assert self._windows == sum(r.windows for r in self._records.values()) <= self.max_windows
            assert self._nbytes == sum(r.nbytes for r in self._records.values()) <= self.max_bytes
            for tenant, share in self._shares.items():
                mine = {key: r for key, r in self._records.items() if r.segment.tenant == tenant}
                assert mine == share.records != {}
                assert (share.windows, share.nbytes) == (
                    sum(r.windows for r in mine.values()),
                    sum(r.nbytes for r in mine.values()),
                )
            assert sum(len(share.records) for share in self._shares.values()) == len(self._records)
            live = dict.fromkeys((r.number for r in self._records.values()), 0)
            for name, space in self._spaces.items():
                assert space.windows, f"an empty space is kept: {name}"
                for column, table in enumerate((space.windows, space.prefixes)):
                    for hashed, places in table.items():
                        assert 0 < len(places) <= self.variants
                        for record, offset in places:
                            assert self._records.get(record.segment.key) is record
                            assert (record.segment.fingerprint, record.segment.tenant) == name
                            assert _keys(record.segment)[:2][column][offset // WINDOW] == hashed
                            assert offset % WINDOW == 0
                            live[record.number] += 1
            for record in self._records.values():
                assert record.live == live[record.number] > 0
                assert record.data == _bytes(record.segment.ids)

    def _has_room(self, segment: Segment) -> bool:
        windows, nbytes = len(segment.ids) // WINDOW, segment.ids.nbytes + segment.context.nbytes
        return self._windows + windows <= self.max_windows and self._nbytes + nbytes <= self.max_bytes

    def _insert(self, record: _Record, *, oldest: bool = False) -> list[str]:
        """Enter a record and its places into the tables; returns the keys of records that lost their last place to it: none to
        the `oldest`.
        """
        self._added += 1
        segment = record.segment
        share = self._shares.setdefault(segment.tenant, _Share())
        self._records[segment.key] = share.records[segment.key] = record
        if oldest:
            share.records.move_to_end(segment.key, last=False)
        self._count(share, record, 1)
        space = self._spaces.setdefault((segment.fingerprint, segment.tenant), _Space())
        windows, prefixes, record.context_hash = _keys(segment)
        lost = []
        for table, keys in ((space.windows, windows), (space.prefixes, prefixes if segment.exact else [])):
            for j, hashed in enumerate(keys):
                places = table.setdefault(hashed, [])
                if len(places) >= self.variants:
                    if oldest or any(r is record for r, _ in places):
                        continue
                    old, _ = places.pop(0)
                    old.live -= 1
                    if not old.live:
                        lost.append(old.segment.key)
                places.insert(0 if oldest else len(places), (record, j * WINDOW))
                record.live += 1
        for key in lost:
            self._drop(key)
        return lost

    def _drop(self, key: str) -> _Record:
        record = self._records.pop(key)
        share = self._shares[record.segment.tenant]
        del share.records[key]
        self._count(share, record, -1)
        if not share.records:
            del self._shares[record.segment.tenant]
        return record

    def _count(self, share: _Share, record: _Record, sign: int) -> None:
        """One more, or one less."""
        share.windows += sign * record.windows
        share.nbytes += sign * record.nbytes
        self._windows += sign * record.windows
        self._nbytes += sign * record.nbytes

    def _forget(self, key: str) -> bool:
        if key not in self._records:
            return False
        record = self._drop(key)
        name = (record.segment.fingerprint, record.segment.tenant)
        space = self._spaces[name]
        windows, prefixes, _ = _keys(record.segment)
        for table, keys in ((space.windows, windows), (space.prefixes, prefixes)):
            for hashed in keys:
                places = [place for place in table.get(hashed, ()) if place[0] is not record]
                if places:
                    table[hashed] = places
                else:
                    table.pop(hashed, None)
        if not space.windows:
            del self._spaces[name]
        return True


class _Search:
    """One prompt against one space."""

    def __init__(
        self, space: _Space, prompt: Ids, min_run: int, same_tables: Callable[[int], bool], without: Collection[str]
    ) -> None:
        self.space, self.prompt, self.min_run, self.same_tables = space, prompt, min_run, cache(same_tables)
        self.without = without
        self.data = prompt.tobytes()
        self.prefix = _prefix_hashes(prompt)
        self.windows: list[int] = _window_hashes(self.prefix, np.arange(len(prompt) - WINDOW + 1)).tolist()
        self.compared = 0
        self._seen: set[int] = set()  # windows of the prompt up to `_seen_to`, for `_nearness`
        self._seen_to = 0

    def cover(self) -> list[Match]:
        known = self.space.windows
        hits = [i for i, hashed in enumerate(self.windows) if hashed in known]
        matches: list[Match] = []
        end, unbroken = 0, True  # unbroken: [0, end) is covered by exact matches
        while self.compared <= WORK * len(self.prompt):
            match = (self._exact_from(end) if unbroken else None) or self._next(hits, end)
            if match is None:
                break
            matches.append(match)
            unbroken = unbroken and match.exact and match.start == end
            end = match.end
        return matches

    def _exact_from(self, start: int) -> Match | None:
        """The longest exact run that starts at `start`."""
        best: Match | None = None
        for i in range(start, min(start + WINDOW, len(self.windows))):
            for record, offset in self.space.prefixes.get(int(self.prefix[i + WINDOW]), ()):
                offset -= i - start
                if offset < 0 or record.segment.key in self.without or not self._is_exact(record, offset, start):
                    continue
                end = start + self._common(record, offset, start)
                if end - start >= self.min_run and (best is None or end > best.end):
                    best = Match(start, end, record.segment, offset, exact=True)
        return best

    def _next(self, hits: list[int], floor: int) -> Match | None:
        """The leftmost-longest run that starts at `floor` or later.

        floor   first                    every run that starts at s shows a window in [s, s + 7], so once a run that
          |       |<-- 7 -->|<-- 7 -->|  starts at `first` is known, windows up to first + 14 show all runs that
        --+-------[======]--[=====]------ start up to first + 7; those compete, and the longest wins

        """
        runs: list[_Run] = []
        done: dict[tuple[int, int], int] = {}  # (record, diagonal) -> end of what was compared on it
        first = len(self.prompt)
        for k in range(bisect_left(hits, floor), len(hits)):
            i = hits[k]
            if i > first + 2 * (WINDOW - 1) or self.compared > WORK * len(self.prompt):
                break
            for record, offset in self.space.windows[self.windows[i]]:
                diagonal = (record.number, i - offset)
                if i < done.get(diagonal, 0) or record.segment.key in self.without:
                    continue
                right = self._common(record, offset, i)
                left = self._common_before(record, offset, i, floor)
                done[diagonal] = i + right
                if left + right >= self.min_run:
                    runs.append(_Run(i - left, i + right, record, offset - left))
                    first = min(first, i - left)
        return self._choose([run for run in runs if run.start < first + WINDOW]) if runs else None

    def _choose(self, runs: list[_Run]) -> Match:
        longest = max(run.tokens for run in runs)
        runs = sorted((run for run in runs if run.tokens == longest), key=lambda run: -run.record.number)
        exact = [run for run in runs if self._is_exact(run.record, run.offset, run.start)]
        run = exact[0] if exact else runs[0] if len(runs) == 1 else runs[int(np.argmax(self._nearness(runs)))]
        return Match(run.start, run.end, run.record.segment, run.offset, bool(exact))

    def _is_exact(self, record: _Record, offset: int, start: int) -> bool:
        """Is `record`'s token at `offset` at its old position, behind the same tokens? Decided on the token ids."""
        segment = record.segment
        if not segment.exact or segment.start + offset != start or int(self.prefix[segment.start]) != record.context_hash:
            return False
        if not self.same_tables(segment.length):
            return False
        self.compared += start
        return self.data[4 * segment.start : 4 * start] == record.data[: 4 * offset] and np.array_equal(
            segment.context, self.prompt[: segment.start]
        )

    def _common(self, record: _Record, offset: int, at: int) -> int:
        """Tokens equal from prompt[at] and ids[offset] on."""
        length = min(len(self.prompt) - at, len(record.segment.ids) - offset)
        done, step = 0, 4 * WINDOW
        while done < length:
            step = min(step, length - done)
            a = self.data[4 * (at + done) : 4 * (at + done + step)]
            b = record.data[4 * (offset + done) : 4 * (offset + done + step)]
            self.compared += step
            if a != b:
                differ = int.from_bytes(a, "little") ^ int.from_bytes(b, "little")
                return done + ((differ & -differ).bit_length() - 1) // 32
            done += step
            step *= 2
        return length

    def _common_before(self, record: _Record, offset: int, at: int, floor: int) -> int:
        """Tokens equal in front of prompt[at] and ids[offset], not beyond prompt[floor]."""
        length = min(at - floor, offset)
        done, step = 0, WINDOW
        while done < length:
            step = min(step, length - done)
            a = self.data[4 * (at - done - step) : 4 * (at - done)]
            b = record.data[4 * (offset - done - step) : 4 * (offset - done)]
            self.compared += step
            if a != b:
                differ = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
                return done + ((differ & -differ).bit_length() - 1) // 32
            done += step
            step *= 2
        return length

    def _nearness(self, runs: list[_Run]) -> npt.NDArray[np.float64]:
        """[runs]; how much of what stood in front of a run when it was computed also stands in front of it here, 0 to 1.

        A token of the segment's last 128 before the run counts as common when it belongs to the common suffix of both texts or
        to a window of 8 tokens that stands anywhere before the run in the prompt (by hash: it ranks, it proves nothing). The
        token at distance d weighs 1 / (d + 8). The sum is divided by that of the longer of the two texts, so that foreign
        context and missing context both count against a segment.
        """
        there = np.full((len(runs), NEAR), -1, dtype=np.int32)  # right-aligned; two paddings that equal nothing
        here = np.full((len(runs), NEAR), -2, dtype=np.int32)
        longer = np.empty(len(runs), dtype=np.int64)
        for row, (start, _, record, offset) in enumerate(runs):
            segment = record.segment
            inside = segment.ids[max(offset - NEAR, 0) : offset]
            outside = segment.context[max(segment.start - NEAR + len(inside), 0) :][: NEAR - len(inside)]
            before = self.prompt[max(start - NEAR, 0) : start]
            there[row, NEAR - len(inside) :] = inside
            there[row, NEAR - len(inside) - len(outside) : NEAR - len(inside)] = outside
            here[row, NEAR - len(before) :] = before
            longer[row] = max(len(inside) + len(outside), len(before), 1)
        self.compared += there.size

        common = np.logical_and.accumulate((there == here)[:, ::-1], axis=1)[:, ::-1]
        to = max(min(run.start for run in runs) - WINDOW + 1, self._seen_to)
        self._seen.update(self.windows[self._seen_to : to])
        self._seen_to = to
        hashes = sliding_window_view(_mix(there), WINDOW, axis=1) @ _powers(_MULTIPLIER, WINDOW)
        known = np.array([hashed in self._seen for hashed in hashes.ravel().tolist()]).reshape(hashes.shape)
        for j in range(WINDOW):
            common[:, j : NEAR - WINDOW + 1 + j] |= known
        weights = 1.0 / (np.arange(NEAR) + 8.0)
        return np.asarray((common * weights[::-1]).sum(1) / np.cumsum(weights)[longer - 1])


def _bytes(ids: Ids) -> bytes:
    return np.ascontiguousarray(ids, dtype=np.int32).tobytes()


def _mix(ids: Ids) -> _Hashes:
    """splitmix64 of every id: small ids must not give small hashes."""
    mixed = ids.astype(np.uint64) + np.uint64(_MULTIPLIER)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _prefix_hashes(ids: Ids) -> _Hashes:
    """[tokens + 1]; entry i hashes the i first tokens: sum of mix(id_j) * multiplier**j, modulo 2**64."""
    out = np.zeros(len(ids) + 1, dtype=np.uint64)
    np.cumsum(_mix(ids) * _powers(_MULTIPLIER, len(ids)), out=out[1:])
    return out


def _window_hashes(prefix: _Hashes, at: npt.NDArray[np.int64]) -> _Hashes:
    """Hashes of the 8 tokens from each position of `at`: a difference of prefix hashes, moved to power 0."""
    inverse = _powers(_INVERSE, len(prefix))
    return (prefix[at + WINDOW] - prefix[at]) * inverse[at]


def _powers(base: int, count: int) -> _Hashes:
    powers = np.full(count, base, dtype=np.uint64)
    powers[:1] = 1
    return np.cumprod(powers, dtype=np.uint64)


def _keys(segment: Segment) -> tuple[list[int], list[int], int]:
    """Hashes of a segment's windows, of its prefixes up to each window's end, and of its context."""
    prefix = _prefix_hashes(np.concatenate([segment.context, segment.ids]))
    at = segment.start + np.arange(0, len(segment.ids) - WINDOW + 1, WINDOW)
    return _window_hashes(prefix, at).tolist(), prefix[at + WINDOW].tolist(), int(prefix[segment.start])
