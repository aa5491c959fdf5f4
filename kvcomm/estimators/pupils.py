"""Estimators that learn from a pool of anchors, one per tenant, all of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators.base import Estimate, Estimator, Place
from kvcomm.estimators.observed import observed

__all__ = ["Pupils"]


class Pupils:
    """A `Listener` of pools. Safe to call from several threads: whoever learns, forgets or asks waits for the others.

    A tenant without anchors has no estimator, so that there are never more of them than the pool has room for.
    """

    def __init__(self, fingerprint: Callable[[], str], make: Callable[[], Estimator]) -> None:
        """`fingerprint`: the model whose anchors are learned; it may cost time, and is asked for with the first anchor."""
        self._fingerprint, self._make = fingerprint, make
        self._of: dict[str, Estimator] = {}  # by tenant
        self._anchors: Counter[str] = Counter()  # by tenant: learned and not forgotten
        self._lock = Lock()

    def learn(self, anchor: Anchor) -> None:
        """Anchors of other models are passed over."""
        if anchor.fingerprint == self._fingerprint():
            base, deviation = observed(anchor)
            with self._lock:
                self._anchors[anchor.tenant] += 1
                self._of.setdefault(anchor.tenant, self._make()).learn(anchor, base, deviation)

    def forget(self, anchor: Anchor) -> None:
        with self._lock:
            if anchor.fingerprint == self._fingerprint() and anchor.tenant in self._of:
                self._of[anchor.tenant].forget(anchor)
                self._anchors[anchor.tenant] -= 1
                if not self._anchors[anchor.tenant]:
                    del self._of[anchor.tenant], self._anchors[anchor.tenant]

    def estimate(self, tenant: str, place: Place) -> Estimate | None:
        """What this tenant's anchors say; None where they say too little."""
        with self._lock:
            return self._of[tenant].estimate(place) if tenant in self._of else None
