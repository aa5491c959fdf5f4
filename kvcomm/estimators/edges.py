"""Only the first tokens of a run are corrected: what boundary recompute does, for engines that cannot compute inside a prompt.

Knows nothing of the estimator whose deviations it keeps.
"""

from __future__ import annotations

from kvcomm.anchors.anchor import Anchor
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimate, Estimator, Place
from kvcomm.plain import PlainKV

__all__ = ["Edges"]


class Edges:
    """`inner` in the first `tokens` of a run; behind them nothing is added. Doubt is that of `inner`, for all tokens."""

    def __init__(self, inner: Estimator, tokens: int = 8) -> None:
        if tokens < 1:
            raise InputError(f"{tokens} tokens at the edge; at least 1 is needed")
        self.inner, self.tokens = inner, tokens

    @property
    def name(self) -> str:
        return f"edges:{self.inner.name}"

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        self.inner.learn(anchor, base, deviation)

    def forget(self, anchor: Anchor) -> None:
        self.inner.forget(anchor)

    def estimate(self, place: Place) -> Estimate | None:
        found = self.inner.estimate(place)
        if found is None or found.deviation is None:
            return found
        deviation = found.deviation.map(lambda x: x.clone())
        for x in (*deviation.keys, *deviation.values):
            x[self.tokens :] = 0
        return Estimate(deviation, found.doubt)
