"""How near a place is to what was learned: to whole anchors (the paper's entropy rule), to their tokens, and in context."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.features import Projection
from kvcomm.estimators.rows import to_rows
from kvcomm.plain import PlainKV

__all__ = ["Nearby", "Nearness"]


@dataclass(frozen=True, eq=False)
class Nearness:
    """Larger is farther."""

    evenness: float  # of the paper's weights over the anchors that cover the place: entropy over its maximum; inf below two
    tokens: Tensor  # [tokens]: distance of every token's base KV from the nearest anchor token's at any position
    novelty: float  # distance of the nearest context, in units of that between an anchor's context and the next one's


class Nearby:
    """Follows what estimators learn and estimates nothing. Keeps the newest `limit` anchors of a slot, as many as the paper."""

    name = "nearby"

    def __init__(self, limit: int = 20, dim: int = 64) -> None:
        self._limit, self._project = limit, Projection(dim)
        self._slots: dict[str, deque[tuple[Tensor, PlainKV, Tensor]]] = {}  # context, base, projected base [tokens, dim]

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        kept = self._slots.setdefault(anchor.slot, deque(maxlen=self._limit))
        kept.append((anchor.context, base, self._project(to_rows(base))))

    def forget(self, anchor: Anchor) -> None:
        raise NotImplementedError("a benchmark's anchors stay")

    def estimate(self, place: Place) -> Estimate | None:
        return None

    def look(self, place: Place) -> Nearness:
        """Raises KeyError for a slot that nothing is known of."""
        contexts, bases, rows = zip(*self._slots[place.slot], strict=True)
        tokens = torch.cdist(self._project(to_rows(place.base)), torch.cat(rows)).amin(1)
        around, here = torch.stack(contexts), place.context
        between = torch.cdist(around, around).fill_diagonal_(math.inf).amin(1)
        usual = float(between[between.isfinite()].median()) if len(around) > 1 else 1.0
        return Nearness(_evenness(place.base, bases), tokens, float((around - here).norm(dim=1).min()) / (usual or 1.0))


def _evenness(base: PlainKV, bases: tuple[PlainKV, ...]) -> float:
    """KVCOMM, section 3.4: entropy of softmax(-|values - anchor's values|) over log2(n)."""
    end = base.tokens
    whole = [torch.cat([a - b[:end] for a, b in zip(base.values, x.values, strict=True)]) for x in bases if x.tokens >= end]
    if len(whole) < 2:
        return math.inf
    weights = torch.softmax(-torch.stack([x.double().norm() for x in whole]), dim=0)
    return float(torch.special.entr(weights).sum()) / math.log(len(whole))
