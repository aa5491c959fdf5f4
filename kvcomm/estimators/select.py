"""Which tokens a new context changes in a way that cannot be foreseen; they are to be computed again, and none is corrected.

What a regression on anchors can foresee of a deviation is mostly what does not matter (a shift that all tokens share, the first
tokens of a run). What it cannot foresee is where the text depends on its context: values of facts whose owner stands elsewhere.
"""

from __future__ import annotations

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.ridge import Ridge
from kvcomm.plain import PlainKV

__all__ = ["Select"]


class Select:
    """The doubt of a ridge regression over all slots, without its estimate. None until that has anything to say."""

    name = "select"

    def __init__(self, ridge: Ridge | None = None) -> None:
        self._ridge = ridge or Ridge(share=True)

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        self._ridge.learn(anchor, base, deviation)

    def forget(self, anchor: Anchor) -> None:
        self._ridge.forget(anchor)

    def estimate(self, place: Place) -> Estimate | None:
        found = self._ridge.estimate(place)
        return None if found is None else Estimate(None, found.doubt)
