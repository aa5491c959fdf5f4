"""The content of a pool: anchors by key and by slot, their uses and bytes, and who must leave for another to fit.

Knows nothing of locks or listeners: whoever changes it must do so alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvcomm.anchors.admission import flaw
from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.base import SlotKey, slot_of
from kvcomm.anchors.eviction import Eviction, Held
from kvcomm.anchors.parts import tensors

__all__ = ["Shelf"]


class Shelf:
    """At most `per_slot` anchors of a slot and `limit_bytes` together, as long as `victims` are taken out first."""

    def __init__(self, limit_bytes: int, per_slot: int) -> None:
        self.limit_bytes, self.per_slot = limit_bytes, per_slot
        self.held: dict[str, Held] = {}  # the oldest first
        self.slots: dict[SlotKey, tuple[Anchor, ...]] = {}  # the same; tuples are replaced whole, for readers without a lock
        self.nbytes = 0
        self._events = 0

    def change(self, out: Sequence[Anchor], new: Sequence[Anchor] = ()) -> None:
        """Take `out` out and `new` in. A slot that has anchors before and after is never seen without."""
        for anchor in out:
            del self.held[anchor.key]
            self.nbytes -= anchor.nbytes
        for anchor in new:
            self._events += 1
            self.held[anchor.key] = Held(anchor, uses=0, used_at=self._events)
            self.nbytes += anchor.nbytes
        for slot in {slot_of(anchor) for anchor in (*out, *new)}:
            stay = (each for each in self.slots.get(slot, ()) if each.key in self.held)
            after = (*stay, *(each for each in new if slot_of(each) == slot))
            if after:
                self.slots[slot] = after
            else:
                del self.slots[slot]

    def use(self, key: str) -> bool:
        """Count one use; False when there is no such anchor."""
        held = self.held.get(key)
        if held is None:
            return False
        self._events += 1
        self.held[key] = replace(held, uses=held.uses + 1, used_at=self._events)  # keeps its place in the order
        return True

    def victims(self, anchor: Anchor, eviction: Eviction) -> list[Anchor]:
        """Who must leave for `anchor` to fit: one of its slot, then any. Changes nothing, so the rule may raise."""
        gone: dict[str, Anchor] = {}

        def choose(keys: Iterable[str]) -> Anchor:
            victim = eviction.victim(self.held[key] for key in keys if key not in gone).anchor
            assert victim.key in self.held and victim.key not in gone, "a rule of eviction chose what it was not offered"
            gone[victim.key] = victim
            return victim

        room = self.limit_bytes - self.nbytes
        kept = self.slots.get(slot_of(anchor), ())
        if len(kept) >= self.per_slot:
            room += choose(each.key for each in kept).nbytes
        while room < anchor.nbytes:
            room += choose(self.held).nbytes
        return list(gone.values())

    def check_integrity(self) -> None:
        assert self.nbytes == sum(held.anchor.nbytes for held in self.held.values()) <= self.limit_bytes
        by_slot: dict[SlotKey, tuple[Anchor, ...]] = {}
        for key, held in self.held.items():
            assert key == held.anchor.key and flaw(held.anchor) is None
            assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors(held.anchor).values())
            slot = slot_of(held.anchor)
            by_slot[slot] = (*by_slot.get(slot, ()), held.anchor)
        assert by_slot == self.slots, "keys and slots disagree"
        assert all(len(anchors) <= self.per_slot for anchors in self.slots.values())
        assert all(0 <= held.uses <= held.used_at <= self._events for held in self.held.values())
