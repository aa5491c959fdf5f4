"""Which anchor leaves when a bound is reached: one class per rule. Knows nothing of bounds, slots or bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from kvcomm.anchors.anchor import Anchor
from kvcomm.errors import InputError

__all__ = ["Eviction", "Held", "LeastRecentlyUsed", "LeastUsedOfOldest"]


@dataclass(frozen=True, eq=False)
class Held:
    """An anchor in a pool, and how it has been used."""

    anchor: Anchor
    uses: int  # since it was added
    used_at: int  # when it was last used, or added: the number of the pool's event, not a time


class Eviction(Protocol):
    """A rule of eviction. Stateless: may be shared by pools and called from any thread."""

    def victim(self, held: Iterable[Held]) -> Held:
        """The one to leave, of `held`: at least one, oldest first, made as they are read. Called under the pool's lock."""
        ...


class LeastUsedOfOldest:
    """The least used of the `n` oldest, the oldest of them if several are (the paper's section 3.4 has n = 5).

    Reads n candidates, however many there are; what is new is safe, and old popularity does not protect for ever.
    """

    def __init__(self, n: int = 5) -> None:
        if n < 1:
            raise InputError(f"n is {n}; it must be at least 1")
        self.n = n

    def victim(self, held: Iterable[Held]) -> Held:
        return min(islice(held, self.n), key=lambda h: h.uses)


class LeastRecentlyUsed:
    """The one not used for longest, a new one counting as used. Reads every candidate."""

    def victim(self, held: Iterable[Held]) -> Held:
        return min(held, key=lambda h: h.used_at)
