"""Of the segments that the notes for one prompt name: which to load, and what became of the text that they would cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from heapq import heapify, heappop, heappush

from kvcomm.segments import Ids
from kvcomm.store.sighting import Sighting, digest
from kvcomm.store.winnowing import TOKENS

__all__ = ["TOO_MANY", "Leads"]

TOO_MANY = "too-many-to-load"  # why known text is left out


class Leads:
    """`weights`: by note, the runs of the prompt whose smallest hash it is. A segment that holds a run of n prompt tokens is
    named by notes of about n - 7 such runs: those inside it, and half of those that reach over its ends.
    """

    def __init__(self, ids: Ids, weights: Mapping[str, int], notes: Mapping[str, Iterable[Sighting]]) -> None:
        self._weights = weights
        self._names: dict[str, set[str]] = {}  # key -> notes that name it; of segments that were not picked yet
        self._sightings: dict[str, Sighting] = {}
        for name in weights:
            for s in notes.get(name, ()):
                self._names.setdefault(s.key, set()).add(name)
                self._sightings.setdefault(s.key, s)
        self._picked: dict[str, set[str]] = {}
        self._open = {name for names in self._names.values() for name in names}  # notes whose text may yet be loaded
        self._why: dict[str, str] = {}  # note -> why its text is not
        self._fitting = _behind(ids, self._sightings)

    def pick(self, most: int) -> dict[str, int]:
        """At most so many segments to load next -> tokens of the prompt that each is likely to cover. First those that begin
        behind the same text here, then those that cover most; what another one covers is not picked as well.
        """
        left, picked = set(self._open), dict[str, int]()
        best = [self._rank(key, left) for key in self._names]
        heapify(best)
        while best and len(picked) < most:
            key = heappop(best)[-1]
            _, less, _ = rank = self._rank(key, left)  # what was picked since then took from it
            if not less:
                continue
            if best and best[0] < rank:
                heappush(best, rank)
                continue
            left -= self._names[key]
            self._picked[key] = self._names.pop(key)
            picked[key] = min(TOKENS - 1 - less, self._sightings[key].tokens)
        return picked

    def size(self, key: str) -> int:
        """Bytes of a segment's record; 0: not known."""
        return self._sightings[key].nbytes

    def tried(self, known: Collection[str], why: Mapping[str, str]) -> None:
        """What became of picked segments: those that are known now, and why others were not loaded. The rest is nowhere."""
        for key in known:
            self._open -= self._picked[key]
            for name in self._picked[key]:
                self._why.pop(name, None)
        for key, reason in why.items():
            for name in self._picked[key] & self._open:
                self._why[name] = reason
            self._open -= self._picked[key]

    def declined(self) -> Counter[str]:
        """Why text that others keep is left out -> its tokens, roughly."""
        out: Counter[str] = Counter()
        for name in self._weights:
            if reason := self._why.get(name) or (TOO_MANY if self._is_left(name) else None):
                out[reason] += self._weights[name]
        return out

    def settled(self) -> list[str]:
        """The notes that need not be asked for again soon: their text is known now, or nowhere."""
        return [name for name in self._weights if name not in self._why and not self._is_left(name)]

    def _is_left(self, name: str) -> bool:
        return name in self._open and any(name in names for names in self._names.values())

    def _rank(self, key: str, left: set[str]) -> tuple[bool, int, str]:
        """Smaller is better: does it not fit, minus the runs that it would still account for, key."""
        return key not in self._fitting, -sum(self._weights[name] for name in self._names[key] if name in left), key


def _behind(ids: Ids, sightings: Mapping[str, Sighting]) -> set[str]:
    """The segments that began where this prompt has the same tokens, from its first one on."""
    ends = {s.start + TOKENS for s in sightings.values() if s.opening is not None and s.start + TOKENS <= len(ids)}
    digests = {end: digest(ids[:end]) for end in ends}
    return {key for key, s in sightings.items() if s.opening is not None and digests.get(s.start + TOKENS) == s.opening}
