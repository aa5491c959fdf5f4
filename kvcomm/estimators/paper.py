"""The paper's estimator as published (KVCOMM, NeurIPS 2025, sections 3.3 and 3.4), to compare with and be compatible to.

Two differences that are not improvements. It works in pre-RoPE space: the published code adds key deviations in the rotated
space of the anchor's own offset, which is right only where the new request has the same offset. And it has no separate rule
for the fixed text behind a slot: here a run is whatever span is served, so that text is a Place of a slot of its own.

A run that no anchor covers gets None; so does one whose weights the entropy gate finds too even, or that has a single anchor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimate, Place
from kvcomm.plain import PlainKV

__all__ = ["Distance", "Paper"]

Distance = Literal["norm", "mean"]
"""Between one token's KV of all layers: L2 norm, as in the paper's equation, or mean absolute difference, as in its code."""


_Layers = tuple[Tensor, ...]  # keys or values: per layer [tokens, channels]


@dataclass(eq=False)
class _Kept:
    """One anchor. Mutable: `uses` counts."""

    anchor: Anchor
    base: PlainKV
    deviation: PlainKV
    uses: int = 0


class Paper:
    """At most `limit` anchors per slot: the least used of the `oldest` leaves. `gamma=None` switches the gate off."""

    name = "paper"

    def __init__(self, gamma: float | None = 0.3, limit: int = 20, oldest: int = 5, distance: Distance = "norm") -> None:
        if limit < 1 or oldest < 1:
            raise InputError(f"limit is {limit} and oldest {oldest}; both must be at least 1")
        self.gamma, self.limit, self.oldest, self.distance = gamma, limit, oldest, distance
        self._slots: dict[str, dict[str, _Kept]] = {}  # by slot and key, the oldest first

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        slot = self._slots.setdefault(anchor.slot, {})
        if anchor.key in slot or not (base.finite() and deviation.finite()):
            return
        if len(slot) >= self.limit:
            del slot[min(islice(slot, self.oldest), key=lambda key: slot[key].uses)]
        slot[anchor.key] = _Kept(anchor, base, deviation)

    def forget(self, anchor: Anchor) -> None:
        self._slots.get(anchor.slot, {}).pop(anchor.key, None)

    def estimate(self, place: Place) -> Estimate | None:
        """Section 3.3, token by token; counts a use of the anchor nearest to the run."""
        end = place.first + place.base.tokens
        usable = [kept for kept in self._slots.get(place.slot, {}).values() if kept.base.tokens >= end]
        if not usable or not place.base.finite():
            return None
        bases = [kept.base.part(place.first, end) for kept in usable]
        whole = torch.stack([_norm(place.base.values, base.values).norm() for base in bases])  # [n]
        if self.gamma is not None and _evenness(whole) > self.gamma:
            return None
        usable[int(whole.argmin())].uses += 1
        deviations = [kept.deviation.part(place.first, end) for kept in usable]
        keys, key_spread = self._blend(place.base.keys, [b.keys for b in bases], [d.keys for d in deviations])
        values, value_spread = self._blend(place.base.values, [b.values for b in bases], [d.values for d in deviations])
        return Estimate(PlainKV(keys, values), (key_spread + value_spread).sqrt())

    def _blend(self, base: _Layers, bases: list[_Layers], deviations: list[_Layers]) -> tuple[_Layers, Tensor]:
        """Deviations weighted by softmax(-distance) over the anchors, and their variance [tokens] under the same weights."""
        measure = _norm if self.distance == "norm" else _mean
        distances = torch.stack([measure(base, other) for other in bases])  # [n, tokens]
        weights = torch.softmax(-distances, dim=0)[..., None]
        layers = [torch.stack(same) for same in zip(*deviations, strict=True)]  # per layer [n, tokens, channels]
        out = tuple((weights * layer).sum(0) for layer in layers)
        spread = [(weights * (layer - mean).square()).sum((0, 2)) for layer, mean in zip(layers, out, strict=True)]
        return out, torch.stack(spread).sum(0)


def _norm(a: _Layers, b: _Layers) -> Tensor:
    """[tokens]: L2 distance over all layers and channels."""
    return torch.stack([(x - y).square().sum(1) for x, y in zip(a, b, strict=True)]).sum(0).sqrt()


def _mean(a: _Layers, b: _Layers) -> Tensor:
    """[tokens]: mean absolute difference over all layers and channels."""
    total = torch.stack([(x - y).abs().sum(1) for x, y in zip(a, b, strict=True)]).sum(0)
    return total / sum(x.shape[1] for x in a)


def _evenness(distances: Tensor) -> float:
    """Section 3.4: entropy of softmax(-distance) over the n anchors of a slot, divided by its maximum, log2(n)."""
    if len(distances) < 2:
        return math.inf
    weights = torch.softmax(-distances.double(), dim=0)
    return float(torch.special.entr(weights).sum()) / math.log(len(distances))
