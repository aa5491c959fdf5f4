"""The mean deviation of a slot, and of a token in it where that token was seen: running sums, no fitting."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.observed import observed
from kvcomm.estimators.rows import from_rows, to_rows
from kvcomm.plain import PlainKV

__all__ = ["Mean"]


@dataclass(eq=False)
class _Sums:
    """Of deviation rows. Mutable."""

    total: Tensor  # float64 [channels of all layers]
    energy: float = 0.0  # of squared norms
    tokens: int = 0

    def add(self, rows: Tensor, sign: int) -> None:
        """Add float64 rows [n, channels], or take them back."""
        self.total = self.total + sign * rows.sum(0)
        self.energy += sign * float(rows.square().sum())
        self.tokens += sign * len(rows)

    def variance(self) -> float:
        """Mean squared distance of a row from the mean of all."""
        return max(0.0, self.energy / self.tokens - float((self.total / self.tokens).square().sum()))


@dataclass(eq=False)
class _Slot:
    """Mutable."""

    every: _Sums
    by_id: dict[int, _Sums] = field(default_factory=dict)


class Mean:
    """A token's mean is shrunk towards its slot's mean as if `shrink` tokens more had shown that, and the slot's towards 0.

    Keeps one row of all layers per token id and slot. Doubt: the standard deviation around the mean.
    """

    name = "mean"

    def __init__(self, shrink: float = 1.0) -> None:
        if not shrink > 0:
            raise InputError(f"shrink is {shrink}; it must be more than 0 (tokens)")
        self.shrink = shrink
        self._slots: dict[str, _Slot] = {}
        self._learned: set[str] = set()  # keys

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        if anchor.key not in self._learned and deviation.finite():
            self._learned.add(anchor.key)
            self._change(anchor, deviation, 1)

    def forget(self, anchor: Anchor) -> None:
        if anchor.key in self._learned:
            self._learned.remove(anchor.key)
            self._change(anchor, observed(anchor)[1], -1)

    def estimate(self, place: Place) -> Estimate | None:
        slot = self._slots.get(place.slot)
        if slot is None:
            return None
        mean, variance = slot.every.total / (slot.every.tokens + self.shrink), slot.every.variance()
        ids, where = np.unique(place.ids, return_inverse=True)
        found = [self._of_token(slot.by_id.get(token), mean, variance) for token in ids.tolist()]
        rows = torch.stack([each for each, _ in found])[torch.from_numpy(where)].float()
        return Estimate(from_rows(rows, place.base), rows.new_tensor([v for _, v in found])[torch.from_numpy(where)].sqrt())

    def _of_token(self, seen: _Sums | None, mean: Tensor, variance: float) -> tuple[Tensor, float]:
        """Mean deviation [channels of all layers] and variance, given the slot's."""
        if seen is None:
            return mean, variance
        n = seen.tokens + self.shrink
        return (seen.total + self.shrink * mean) / n, (seen.tokens * seen.variance() + self.shrink * variance) / n

    def _change(self, anchor: Anchor, deviation: PlainKV, sign: int) -> None:
        rows = to_rows(deviation).double()
        slot = self._slots.setdefault(anchor.slot, _Slot(_Sums(torch.zeros_like(rows[0]))))
        slot.every.add(rows, sign)
        for token in set(anchor.ids.tolist()):
            sums = slot.by_id.setdefault(token, _Sums(torch.zeros_like(rows[0])))
            sums.add(rows[torch.from_numpy(anchor.ids == token)], sign)
            if not sums.tokens:
                del slot.by_id[token]
        if not slot.every.tokens:
            del self._slots[anchor.slot]
