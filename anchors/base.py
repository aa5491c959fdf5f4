"""What a pool of anchors says about itself, and what it asks of those that learn from it. Knows nothing of how it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvcomm.anchors.anchor import Anchor

__all__ = ["DUPLICATE", "OTHER_CODEC", "TOO_LARGE", "Admitted", "Listener", "PoolStats", "SlotKey", "slot_of"]

DUPLICATE = "duplicate"  # the same observation is kept already
OTHER_CODEC = "other-codec"  # packed by another codec than the pool's
TOO_LARGE = "larger-than-pool"  # the anchor alone exceeds the pool's limit


class SlotKey(NamedTuple):
    """What separates anchors: they are matched, and bounded in number, within one of these."""

    slot: str
    fingerprint: str
    tenant: str = ""


@dataclass(frozen=True)
class Admitted:
    """What `AnchorPool.add` did. True as a condition when the anchor was taken in."""

    kept: bool
    evicted: tuple[str, ...] = ()  # keys that left to make room, in order
    reason: str | None = None  # why it was not taken in: a constant of this module or of `admission`

    def __bool__(self) -> bool:
        return self.kept


@dataclass(frozen=True)
class PoolStats:
    """A pool's state and history, at one moment."""

    anchors: int
    nbytes: int
    limit_bytes: int
    per_slot: Mapping[SlotKey, int]  # anchors of each slot
    admitted: int = 0
    evicted: int = 0
    removed: int = 0  # by `remove`; not counted as evicted
    uses: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # reason -> times that add took nothing in
    faults: Mapping[str, int] = field(default_factory=dict)  # "learn: ValueError" -> times that a listener raised it


class Listener(Protocol):
    """Learns from a pool. Called under its writer's lock, by one thread at a time: must not change the pool, may read it.

    What it raises is logged and counted, and changes nothing else: whoever fails to learn an anchor is still told to forget it.
    """

    def learn(self, anchor: Anchor) -> None:
        """`anchor` has come into the pool."""
        ...

    def forget(self, anchor: Anchor) -> None:
        """`anchor`, told to `learn` before, has left the pool."""
        ...


def slot_of(anchor: Anchor) -> SlotKey:
    return SlotKey(anchor.slot, anchor.fingerprint, anchor.tenant)
