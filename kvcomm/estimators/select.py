"""Which tokens a new context changes in a way that cannot be foreseen; they are to be computed again, and none is corrected.

What a regression on anchors can foresee of a deviation is mostly what does not matter (a shift that all tokens share, the first
tokens of a run). What it cannot foresee is where the text depends on its context: values of facts whose owner stands elsewhere.
That is a matter of the model and its language, not of a slot: one regression serves all, learned in a few requests anywhere.
"""

from __future__ import annotations

from collections import OrderedDict

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.ridge import Glimpse, Ridge
from kvcomm.plain import PlainKV

__all__ = ["Select"]

PLACES = 6  # position features: where a segment begins; with more, what short texts taught would be worthless in long ones


class Select:
    """The doubt of a ridge regression over the anchors of all slots, without its estimate. None below `min_anchors`.

    What the last 2 * `min_anchors` taught stays although they are forgotten, until later ones come: a pool with room for few,
    or with many tenants, would else be learned from for ever.

    What follows from a base alone is kept (68 bytes per token and layer, `keep_bytes` in all), so that a base seen before costs
    next to nothing behind a new context.
    """

    name = "select"

    def __init__(self, min_anchors: int = 20, width: int = 64, keep_bytes: int = 128 << 20) -> None:
        self._ridge = Ridge(width=width, context_width=width, places=PLACES, min_anchors=min_anchors, one=True)
        self._least = 2 * min_anchors
        self._left: OrderedDict[str, Anchor] = OrderedDict()  # by key: to be forgotten, the first one first
        self._keep_bytes, self._bytes = keep_bytes, 0
        self._kept: OrderedDict[str, Glimpse] = OrderedDict()  # by key of a place, the one not used for longest first

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        self._left.pop(anchor.key, None)
        self._ridge.learn(anchor, base, deviation)
        self._forget_left()

    def forget(self, anchor: Anchor) -> None:
        self._left[anchor.key] = anchor
        self._forget_left()

    def _forget_left(self) -> None:
        while self._left and self._ridge.anchors > self._least:
            self._ridge.forget(self._left.popitem(last=False)[1])

    def estimate(self, place: Place) -> Estimate | None:
        glimpse = self._glimpse(place)
        doubt = None if glimpse is None else self._ridge.doubt(glimpse, place.context)
        return None if doubt is None else Estimate(None, doubt)

    def _glimpse(self, place: Place) -> Glimpse | None:
        glimpse = self._kept.pop(place.key, None)
        self._bytes -= glimpse.nbytes if glimpse else 0
        if glimpse is None or not self._ridge.fresh(glimpse, place.slot):
            glimpse = self._ridge.glimpse(place)
        if glimpse is not None and place.key:
            self._kept[place.key] = glimpse
            self._bytes += glimpse.nbytes
            while self._bytes > self._keep_bytes:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return glimpse
