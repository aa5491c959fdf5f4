"""The pool of anchors: bounded, read by many, changed by one at a time, told to whoever learns from it.

Knows nothing of estimators or indexes, which listen, nor of files. Nothing of one model or tenant is ever shown to another.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Literal

from kvcomm.anchors.admission import Admission, Everything, flaw
from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.base import DUPLICATE, OTHER_CODEC, TOO_LARGE, Admitted, Listener, PoolStats, SlotKey, slot_of
from kvcomm.anchors.eviction import Eviction, LeastUsedOfOldest
from kvcomm.anchors.parts import owned
from kvcomm.anchors.shelf import Shelf
from kvcomm.codecs.base import Codec
from kvcomm.errors import InputError

__all__ = ["AnchorPool"]

log = logging.getLogger(__name__)


class AnchorPool:
    """Anchors by `Anchor.key`, at most `per_slot` of a slot and `limit_bytes` together.

    Every method may be called from any thread. `match`, `in` and `len` wait for nobody; `use` and `stats` wait for no listener.
    Slots, models and tenants share the bytes: when they run out, the rule of eviction chooses among all anchors.
    """

    def __init__(
        self,
        limit_bytes: int,
        per_slot: int = 50,
        codec: Codec | None = None,  # the one that base and deviation must be packed by; None takes any
        admission: Admission | None = None,  # Everything()
        eviction: Eviction | None = None,  # LeastUsedOfOldest(5)
    ) -> None:
        if limit_bytes < 0:
            raise InputError(f"limit_bytes is {limit_bytes}; it must be at least 0")
        if per_slot < 1:
            raise InputError(f"per_slot is {per_slot}; it must be at least 1")
        self.limit_bytes, self.per_slot, self.codec = limit_bytes, per_slot, codec
        self.admission, self.eviction = admission or Everything(), eviction or LeastUsedOfOldest()
        self._shelf = Shelf(limit_bytes, per_slot)
        self._admitted = self._evicted = self._removed = self._uses = 0
        self._refused: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._listeners: tuple[Listener, ...] = ()
        self._busy = False
        self._writer = RLock()  # held for a whole change, listeners included; taken before _state
        self._state = Lock()  # held for moments, whenever one of the fields above is changed

    def add(self, anchor: Anchor) -> Admitted:
        """Take `anchor` in, evicting others if need be; what is refused evicts nothing.

        Its tensors and arrays belong to the pool from here on, and must not be written to; views into larger memory are copied.
        """
        reason = flaw(anchor)
        with self._writing():
            reason = reason or self._refusal(anchor)
            if reason:
                with self._state:
                    self._refused[reason] += 1
                return Admitted(kept=False, reason=reason)
            anchor = owned(anchor)
            with self._state:
                gone = self._shelf.victims(anchor, self.eviction)
                self._shelf.change(gone, (anchor,))
                self._admitted += 1
                self._evicted += len(gone)
            self._tell(self._listeners, "forget", gone)
            self._tell(self._listeners, "learn", (anchor,))
        return Admitted(kept=True, evicted=tuple(each.key for each in gone))

    def match(self, slot: str, fingerprint: str, tenant: str = "") -> tuple[Anchor, ...]:
        """What is kept of a slot, newest last: all of one moment, valid for as long as the caller holds it. Not a use."""
        return self._shelf.slots.get(SlotKey(slot, fingerprint, tenant), ())

    def use(self, keys: Iterable[str]) -> None:
        """Count one use of each; those that have left meanwhile are passed over."""
        with self._state:
            self._uses += sum(map(self._shelf.use, keys))

    def remove(self, key: str) -> bool:
        """Forget one anchor; False when it was not here."""
        with self._writing():
            held = self._shelf.held.get(key)
            if held is None:
                return False
            with self._state:
                self._shelf.change((held.anchor,))
                self._removed += 1
            self._tell(self._listeners, "forget", (held.anchor,))
        return True

    def subscribe(self, listener: Listener) -> None:
        """Tell `listener` of every change from here on, and first of what is kept, the oldest first."""
        with self._writing():
            self._listeners += (listener,)
            self._tell((listener,), "learn", self.anchors())

    def anchors(self) -> tuple[Anchor, ...]:
        """Everything kept at one moment, the oldest first."""
        with self._state:
            return tuple(held.anchor for held in self._shelf.held.values())

    def slots(self) -> tuple[SlotKey, ...]:
        """The slots that have anchors."""
        with self._state:
            return tuple(self._shelf.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of anchors kept now, at most `limit_bytes`."""
        with self._state:
            return self._shelf.nbytes

    def __len__(self) -> int:
        return len(self._shelf.held)

    def __contains__(self, key: object) -> bool:
        return key in self._shelf.held

    def stats(self) -> PoolStats:
        """Counts since the pool was made."""
        with self._state:
            return PoolStats(
                anchors=len(self._shelf.held),
                nbytes=self._shelf.nbytes,
                limit_bytes=self.limit_bytes,
                per_slot={slot: len(anchors) for slot, anchors in self._shelf.slots.items()},
                admitted=self._admitted,
                evicted=self._evicted,
                removed=self._removed,
                uses=self._uses,
                refused=dict(self._refused),
                faults=dict(self._faults),
            )

    def check_integrity(self) -> None:
        """Raise AssertionError when bounds, counts and anchors contradict each other. Slow; for tests and tools."""
        with self._writer, self._state:
            self._shelf.check_integrity()
            assert len(self) == self._admitted - self._evicted - self._removed
            assert sum(held.uses for held in self._shelf.held.values()) <= self._uses

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._writer:
            if self._busy:
                raise InputError("a listener must not change the pool that tells it; do so after the pool's call has returned")
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def _refusal(self, anchor: Anchor) -> str | None:
        if anchor.key in self:
            return DUPLICATE
        if self.codec is not None and {anchor.base.codec, anchor.deviation.codec} != {self.codec.name}:
            return OTHER_CODEC
        if anchor.nbytes > self.limit_bytes:
            return TOO_LARGE
        return self.admission.refusal(anchor, self.match(*slot_of(anchor)))

    def _tell(self, listeners: Iterable[Listener], event: Literal["learn", "forget"], anchors: Iterable[Anchor]) -> None:
        for anchor in anchors:
            for listener in listeners:
                try:
                    (listener.learn if event == "learn" else listener.forget)(anchor)
                except Exception as fault:  # whatever a listener does wrong, the pool is right
                    log.warning("a listener failed to %s an anchor", event, exc_info=True)
                    with self._state:
                        self._faults[f"{event}: {type(fault).__name__}"] += 1
