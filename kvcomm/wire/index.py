"""Where known text is found, by asking the server that keeps it. Nothing is indexed here, and nothing is believed: what a reply
says of a prompt is compared with the prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kvcomm.matching import Found, Match
from kvcomm.segments import Ids, Segment
from kvcomm.wire import protocol as p

if TYPE_CHECKING:
    from kvcomm.wire.client import ServerStore

__all__ = ["ServerIndex"]


class ServerIndex:
    """An `Index` of what the server keeps. Nothing is indexed here."""

    def __init__(self, store: ServerStore) -> None:
        self._store = store
        self._added: OrderedDict[str, None] = OrderedDict()  # lately, by this process

    def look(
        self,
        ids: Ids,
        *,
        fingerprint: str,
        tenant: str = "",
        same_tables: Callable[[int], bool] = lambda length: True,
        ms_per_token: float | None = None,
    ) -> Found:
        """Waits for others who are computing the same text, if that is worth it. Raises CacheFault."""
        sent = np.ascontiguousarray(ids, dtype="<i4").tobytes()
        request = p.Find(fingerprint, sent, ms_per_token, self._store.wait_ms, self._store.reads_kv, self._store.ms_per_mib())
        reply, records = self._store.find(tenant, request)
        matches: list[Match] = []
        with self._store.understood():
            for start, end, key, offset, exact in reply["matches"]:
                record = records.get(key)
                if record is None:
                    continue
                segment, done = record.segment, matches[-1].end if matches else 0
                if not done <= start < end <= len(ids) or (segment.fingerprint, segment.tenant) != (fingerprint, tenant):
                    raise ValueError(f"a match of {fingerprint!r} at {start} to {end}, behind one to {done}")
                if offset < 0 or not np.array_equal(segment.ids[offset : offset + end - start], ids[start:end]):
                    raise ValueError(f"other text at {start} to {end}")
                exact = exact and same_tables(segment.length) and _stands_there(segment, ids, start, offset)
                matches.append(Match(start, end, segment, offset, bool(exact)))
            return Found(matches, dict(reply["declined"]), reply["waited_ms"], reply["flight"])

    def add(self, segment: Segment) -> tuple[str, ...]:
        """The server has indexed it, when it was put."""
        self._added[segment.key] = None
        while len(self._added) > 1 << 12:
            self._added.popitem(last=False)
        return ()

    def remove(self, key: str) -> bool:
        """What the store removes, the server's index forgets; here it is not known any more."""
        self._store.let_go(key)
        return self._added.pop(key, self) is not self

    def land(self, flight: int, tenant: str = "") -> None:
        """What a prompt computed is kept now, or never will be: nobody waits for it any more, and what it found is let go."""
        self._store.drop(flight)
        self._store.call(tenant, p.Land(flight))

    def awaited(self, flight: int, tenant: str = "") -> bool:
        """Does anybody wait for what this prompt computes?"""
        return bool(self._store.call(tenant, p.Awaited(flight))[0]["awaited"])

    def __contains__(self, key: object) -> bool:
        """Was it put by this process lately, or found for a prompt that has not landed? Asks nobody."""
        return key in self._added or (isinstance(key, str) and self._store.holds(key))


def _stands_there(segment: Segment, ids: Ids, start: int, offset: int) -> bool:
    """Does the run stand at its old place, behind the same tokens?"""
    return (
        segment.exact
        and segment.start + offset == start
        and np.array_equal(ids[:start], np.concatenate([segment.context, segment.ids[:offset]]))
    )
