"""One estimator where it knows enough, another where it does not. Knows nothing of either."""

from __future__ import annotations

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators.base import Estimate, Estimator, Place
from kvcomm.plain import PlainKV

__all__ = ["Fallback"]


class Fallback:
    """Both learn; `then` is asked where `first` gives None. Wrap again for more: `Fallback(ridge, Fallback(knn, mean))`."""

    def __init__(self, first: Estimator, then: Estimator) -> None:
        self.first, self.then = first, then

    @property
    def name(self) -> str:
        return f"{self.first.name}>{self.then.name}"

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        for each in (self.first, self.then):
            each.learn(anchor, base, deviation)

    def forget(self, anchor: Anchor) -> None:
        for each in (self.first, self.then):
            each.forget(anchor)

    def estimate(self, place: Place) -> Estimate | None:
        found = self.first.estimate(place)
        return self.then.estimate(place) if found is None else found
