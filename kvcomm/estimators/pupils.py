"""Estimators that learn from a pool of anchors, one per tenant, all of one model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators.base import Estimate, Estimator, Place
from kvcomm.estimators.observed import observed

__all__ = ["Pupils"]


class Pupils:
    """A `Listener` of pools. Safe to call from several threads: whoever learns, forgets or asks waits for the others.

    At most `tenants` estimators; the one that was not needed for longest leaves, and its tenant learns anew.
    """

    def __init__(self, fingerprint: Callable[[], str], make: Callable[[], Estimator], tenants: int = 64) -> None:
        """`fingerprint`: the model whose anchors are learned; it may cost time, and is asked for with the first anchor."""
        self._fingerprint, self._make, self._tenants = fingerprint, make, tenants
        self._of: OrderedDict[str, Estimator] = OrderedDict()  # by tenant, the one not needed for longest first
        self._lock = Lock()

    def learn(self, anchor: Anchor) -> None:
        """Anchors of other models are passed over."""
        if anchor.fingerprint == self._fingerprint():
            base, deviation = observed(anchor)
            with self._lock:
                if anchor.tenant not in self._of:
                    self._of[anchor.tenant] = self._make()
                self._of.move_to_end(anchor.tenant)
                self._of[anchor.tenant].learn(anchor, base, deviation)
                if len(self._of) > self._tenants:
                    self._of.popitem(last=False)

    def forget(self, anchor: Anchor) -> None:
        with self._lock:
            if anchor.fingerprint == self._fingerprint() and anchor.tenant in self._of:
                self._of[anchor.tenant].forget(anchor)

    def estimate(self, tenant: str, place: Place) -> Estimate | None:
        """What this tenant's anchors say; None where they say too little."""
        with self._lock:
            if tenant not in self._of:
                return None
            self._of.move_to_end(tenant)
            return self._of[tenant].estimate(place)
