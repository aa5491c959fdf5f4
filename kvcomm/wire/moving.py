"""Moves what is kept from one place to another: records, and anchors. Knows no files and no sockets.

A place that can be read yields items, each verified; one that can be written to takes them, each at most once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kvcomm.anchors.record import Entry, checksum
from kvcomm.errors import CacheFault
from kvcomm.store.base import check_kv
from kvcomm.store.record import DAMAGED, Record, Unreadable
from kvcomm.wire.anchor_entry import unpack_entry
from kvcomm.wire.listing import Wanted

__all__ = ["HERE", "Item", "Moved", "PackedAnchor", "Source", "Target", "move", "reason_of", "sound", "sound_anchor"]

HERE = "here-already"  # why nothing was put


@dataclass(frozen=True)
class PackedAnchor:
    """An anchor as it travels."""

    entry: bytes
    document: bytes

    @property
    def told(self) -> Entry:
        """Raises CacheFault for what is no entry."""
        return unpack_entry(self.entry)

    @property
    def nbytes(self) -> int:
        return len(self.entry) + len(self.document)


Item = Record | PackedAnchor


class Source(Protocol):
    """Where items come from."""

    @property
    def faults(self) -> Mapping[str, int]:
        """Why others could not be read -> how many, until now."""

    def items(self, wanted: Wanted) -> Iterator[Item]:
        """One in memory at a time. Raises CacheFault where the place itself fails."""


class Target(Protocol):
    """Where items go to."""

    def put(self, item: Item) -> str | None:
        """Why it was not put, `HERE` for one; None where it was. Raises CacheFault where the place itself fails."""


@dataclass(frozen=True)
class Moved:
    """What `move` did."""

    objects: int
    anchors: int
    nbytes: int  # of both
    here_already: int
    faults: Mapping[str, int] = field(default_factory=dict)  # why some were skipped -> how many
    refused: Mapping[str, int] = field(default_factory=dict)  # why the target did not take some -> how many


def move(items: Iterable[Item], source: Source, target: Target) -> Moved:
    """All of these items of the source."""
    count, refused = Counter[str](), Counter[str]()
    for item in items:
        reason = target.put(item)
        if reason == HERE:
            count["here"] += 1
        elif reason is not None:
            refused[reason] += 1
        else:
            count["objects" if isinstance(item, Record) else "anchors"] += 1
            count["nbytes"] += item.nbytes
    return Moved(count["objects"], count["anchors"], count["nbytes"], count["here"], dict(source.faults), dict(refused))


def sound(record: Record, key: str) -> Record:
    """Itself, when it is the record of `key`, every byte of it, and of a kind that stores keep. Raises CacheFault."""
    record.verify(key)
    check_kv(record.segment, record.kv())
    return record


def sound_anchor(anchor: PackedAnchor) -> PackedAnchor:
    """Itself, when its document is the one that its entry describes. Raises CacheFault."""
    told = anchor.told
    if (told.nbytes, told.checksum) != (len(anchor.document), checksum(anchor.document)):
        raise Unreadable(DAMAGED, f"the document of anchor {told.key} is another one")
    return anchor


def reason_of(fault: CacheFault) -> str:
    """A word for a report."""
    return str(getattr(fault, "reason", "unusable"))
