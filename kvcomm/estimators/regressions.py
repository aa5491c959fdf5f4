"""One regression per slot and layer, solved when enough has changed; slots may lean on each other.

Knows nothing of anchors: a change is one run of tokens that came or left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvcomm.estimators.features import Groups
from kvcomm.estimators.line import Line, Thin, make_line, scales, solve, thin
from kvcomm.estimators.moments import Centred, Moments, pooled

__all__ = ["Regressions", "Rules", "Widen"]

Widen = Callable[[Tensor, Groups, tuple[int, int]], Tensor]
"""Turns what is multiplied with narrow features into what is multiplied with those that lines are given."""

NEGLIGIBLE = 1e-5  # of the base's energy: a layer whose keys and values deviate by less is left as it is


@dataclass(frozen=True)
class Rules:
    """How to fit."""

    lam: float  # penalty on weights of standardised features, in units of the number of features
    slot_lam: float | None  # the same on differing from what all slots together say; None: slots know nothing of each other
    rank: int  # of the map from features to deviations
    context_weight: float
    min_runs: int  # fewer are not fitted: of all slots where they share
    growth: float  # solved again when the runs that came or left since are (growth - 1) of those it was solved for


@dataclass(frozen=True, eq=False)
class _Prior:
    """One layer, all slots. float64."""

    scale: Tensor  # [features]
    weights: Tensor  # [features, rank + 1]: in the directions `kept`
    kept: Thin
    level: Tensor  # [channels]: mean over runs of y less what `weights` make of x


@dataclass(eq=False)
class _Slot:
    """Mutable."""

    groups: list[Groups]  # per layer
    kinds: list[tuple[int, int]]  # per layer: channels of keys and values; targets are these and one more
    moments: list[Moments]  # per layer
    runs: int = 0
    fitted: int = 0  # runs that `lines` were fitted to
    changes: int = 0  # runs that came or left since
    lines: list[Line | None] | None = None


class Regressions:
    """Mutable; not thread safe."""

    def __init__(self, rules: Rules, widen: Widen) -> None:
        self.rules, self._widen = rules, widen
        self._slots: dict[str, _Slot] = {}
        self._prior: list[_Prior | None] | None = None
        self._runs = self._fitted = self._changes = 0  # as in _Slot: of all slots, and of the prior

    def lines(self, slot: str) -> list[Line | None] | None:
        """Per layer, None for one that needs no correction; None for a slot that too little is known of."""
        found = self._slots.get(slot)
        return found.lines if found and self._enough(found) else None

    def mean_y(self, slot: str, layer: int) -> Tensor | None:
        """float64 [targets] over the tokens seen."""
        return self._slots[slot].moments[layer].mean_y() if slot in self._slots else None

    def add(
        self,
        slot: str,
        groups: Sequence[Groups],
        kinds: Sequence[tuple[int, int]],
        xs: Sequence[Tensor],
        ys: Sequence[Tensor],
    ) -> None:
        """Take in one run: per layer x [tokens, features] and y [tokens, targets]."""
        if slot not in self._slots:
            empty = [Moments(x.shape[1], y.shape[1], x.device) for x, y in zip(xs, ys, strict=True)]
            self._slots[slot] = _Slot(list(groups), list(kinds), empty)
        for moments, x, y in zip(self._slots[slot].moments, xs, ys, strict=True):
            moments.add(x, y)
        self._changed(slot, 1)

    def remove(self, slot: str, xs: Iterable[Tensor], ys: Iterable[Tensor]) -> None:
        """Take back what `add` took in."""
        for moments, x, y in zip(self._slots[slot].moments, xs, ys, strict=True):
            moments.remove(x, y)
        self._changed(slot, -1)

    def _changed(self, name: str, sign: int) -> None:
        slot = self._slots[name]
        slot.runs += sign
        slot.changes += 1
        self._runs += sign
        self._changes += 1
        if not slot.runs:
            del self._slots[name]
        if self._sharing and (self._prior is None or self._due(self._changes, self._fitted)):
            self._prior = [self._fit_prior(layer) for layer in range(len(slot.moments))]
            self._fitted, self._changes = self._runs, 0
        for each in self._slots.values():
            if self._enough(each) and (each.lines is None or (each is slot and self._due(slot.changes, slot.fitted))):
                each.lines = [self._fit(each, layer) for layer in range(len(each.moments))]
                each.fitted, each.changes = each.runs, 0

    @property
    def _sharing(self) -> bool:
        """Whether there is something to share."""
        return self.rules.slot_lam is not None and len(self._slots) > 1 and self._runs >= self.rules.min_runs

    def _enough(self, slot: _Slot) -> bool:
        return (slot.runs if self.rules.slot_lam is None else self._runs) >= self.rules.min_runs

    def _due(self, changes: int, fitted: int) -> bool:
        return changes >= max(1, (self.rules.growth - 1) * fitted)

    def _fit_prior(self, layer: int) -> _Prior | None:
        slots = list(self._slots.values())
        if all(_negligible(slot, layer) for slot in slots):
            return None
        moments = pooled(slot.moments[layer] for slot in slots)
        scale = self._scale(slots[0], layer, moments)
        solved = solve(moments, scale, self.rules.lam)
        kept = thin(solved, _sizes(moments, slots[0].kinds[layer]), self.rules.rank)
        weights = kept.reduce(solved.weights)
        levels = [slot.runs * _level(slot.moments[layer], weights, kept) for slot in slots]
        return _Prior(scale, weights, kept, torch.stack(levels).sum(0) / self._runs)

    def _fit(self, slot: _Slot, layer: int) -> Line | None:
        """Towards the prior where there is one; towards 0 else. A slot of few runs keeps a part of the common level."""
        if _negligible(slot, layer):
            return None
        prior = self._prior[layer] if self._sharing and self._prior else None
        sums = slot.moments[layer]
        moments, mean = sums.centred(), sums.mean_y()[:-1]
        if prior is None:
            whole = solve(moments, self._scale(slot, layer, moments), self.rules.lam)
            kept = thin(whole, _sizes(moments, slot.kinds[layer]), self.rules.rank)
            solved = replace(whole, weights=kept.reduce(whole.weights), fitted=kept.reduce(whole.fitted))
        else:
            assert self.rules.slot_lam is not None
            kept = prior.kept
            solved = solve(replace(moments, xy=kept.reduce(moments.xy)), prior.scale, self.rules.slot_lam, prior.weights)
            mean = mean + (prior.level - _level(sums, prior.weights, kept)) / (slot.runs + 1)
        line = make_line(solved, kept, moments, sums.mean_x(), mean, 1 / slot.runs)
        wide = [self._widen(x, slot.groups[layer], slot.kinds[layer]) for x in (line.into, line.doubting)]
        return replace(line, into=wide[0], doubting=wide[1])

    def _scale(self, slot: _Slot, layer: int, moments: Centred) -> Tensor:
        return scales(moments, slot.groups[layer], (1, 1, 1, 1, self.rules.context_weight))


def _sizes(moments: Centred, kinds: tuple[int, int]) -> Tensor:
    """[channels]: root mean square of deviations, of keys and of values: an error of either counts against its own."""
    parts = (moments.yy[:-1] / moments.tokens).split(kinds)
    return torch.cat([part.mean().sqrt().clamp_min(1e-12).expand(len(part)) for part in parts])


def _level(moments: Moments, weights: Tensor, kept: Thin) -> Tensor:
    """[channels]: mean of y less what `weights` [features, rank + 1] make of the mean x."""
    return moments.mean_y()[:-1] - moments.mean_x() @ weights[:, :-1] @ kept.out


def _negligible(slot: _Slot, layer: int) -> bool:
    """Whether keys and values both hardly deviate from their base (as in the first layer, which sees one token alone)."""
    moments, groups = slot.moments[layer], slot.groups[layer]
    base = moments.xx.diagonal().split(list(groups))[:2]
    deviation = moments.yy[:-1].split(slot.kinds[layer])
    return all(bool(d.sum() <= NEGLIGIBLE * b.sum()) for d, b in zip(deviation, base, strict=True))
