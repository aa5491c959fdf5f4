"""The contract of tiers on other machines: records, notes, and faults with a name. Knows no client of any service."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcomm.errors import CacheFault
from kvcomm.segments import Segment
from kvcomm.store.base import StoreStats
from kvcomm.store.record import Record, Unreadable
from kvcomm.store.records import Counts, RecordStore

__all__ = ["FULL", "INCOMPLETE", "PEER_LOST", "Census", "RemoteFault", "RemoteStore", "peek", "without_password"]

FULL = "store-full"  # why put kept nothing: the service has no memory for it
INCOMPLETE = "incomplete"  # why get found nothing: a part of the record left on its own
PEER_LOST = "peer-lost"  # why get found nothing: the host that holds it is gone


class RemoteFault(CacheFault):
    """The service failed, not one object of it; `reason` is a word: timeout, unreachable, deadline, breaker-open, ..."""

    def __init__(self, tier: str, reason: str, text: str) -> None:
        super().__init__(f"{tier}: {reason}: {text}")
        self.reason = reason


@dataclass(frozen=True)
class Census:
    """What a service holds, at one moment, of what this store can see."""

    objects: int = 0
    nbytes: int = 0
    limit_bytes: int = 0


class RemoteStore(RecordStore):
    """Records and notes at a service. Whatever its client raises arrives as RemoteFault; nothing is tried twice.

    `put_notes` and `get_notes` are those of `Noticeboard`. Calls may take as long as the service likes: see `Guarded`.
    """

    def __init__(self) -> None:
        self.counts = Counts()

    @abstractmethod
    def put_notes(self, notes: Mapping[str, bytes]) -> None: ...

    @abstractmethod
    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]: ...

    @abstractmethod
    def census(self) -> Census:
        """Asks the service. Bounded: of a very large one a part is counted. Raises RemoteFault."""

    def stats(self) -> StoreStats:
        """Counts since the store was made. Raises RemoteFault."""
        census = self.census()
        return self.counts.stats(census.objects, census.nbytes, census.limit_bytes)

    def check_integrity(self) -> None:
        """Every object listed is read, and is what its key says. Raises RemoteFault where the service cannot be asked."""
        for segment in self.segments():
            for key, record in self.get_records([segment.key]).items():
                assert record.segment.key == key == segment.key


def peek(beginning: bytes, nbytes: int) -> Segment | None:
    """The segment of a record of `nbytes`, from its first bytes; None where they do not hold all of a sound header."""
    try:
        return Record.begun(beginning, nbytes).segment
    except Unreadable:
        return None


def without_password(url: str) -> str:
    """The URL as it may be shown: no user, no password, no options. What is no URL is shown as it is."""
    scheme, found, rest = url.partition("://")
    return f"{scheme}://{rest.partition('?')[0].rpartition('@')[2]}" if found else url
