"""Ridge regression of the deviation on base K/V, context and position: per slot and layer, fitted as anchors come.

Only running sums are kept, so cost and memory do not grow with what was learned: 8 * d * (d + channels) bytes per slot and
layer, d being at most 2 * width + context_width + 84. With `share`, a slot's own regression is drawn towards that of all slots
together instead of towards 0: slots with few anchors live on the others', those with many differ. Sums and solving are in
float64, and both happen in `learn` and `forget`; estimating is two thin products per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.features import Seen, Sight
from kvcomm.estimators.line import Line
from kvcomm.estimators.observed import observed
from kvcomm.estimators.regressions import Regressions, Rules
from kvcomm.plain import PlainKV

__all__ = ["Glimpse", "Ridge"]


@dataclass(frozen=True, eq=False)
class Glimpse:
    """A base as the regressions of one moment see it."""

    lines: list[Line | None]  # per layer
    glances: list[Tensor | None]  # per layer [tokens, a few]
    tokens: int

    @property
    def nbytes(self) -> int:
        return sum(glance.nbytes for glance in self.glances if glance is not None)


class Ridge:
    """None below `min_anchors`: of the slot, with `share` of all slots.

    Doubt: the residual of each layer, scaled by how wrong estimates were for tokens like this one before they were learned
    (a regression of its own, on the same features) and by how unusual the token is (leverage).
    """

    name = "ridge"

    def __init__(
        self,
        lam: float = 0.35,  # penalty on weights of standardised features, times their number; the same for few and many tokens
        rank: int = 64,  # of the map from features to deviations
        share: bool = False,
        one: bool = False,  # all slots are one
        slot_lam: float = 5.0,  # with `share`: the same penalty on differing from all slots together
        context_weight: float = 0.3,  # of a context feature against one of the base
        width: int = 256,  # features of the keys, and of the values, of a layer
        context_width: int = 256,
        places: int = 20,  # position features, the first of them
        min_anchors: int = 5,
        growth: float = 1.25,  # solved again when the anchors that came or left are (growth - 1) of those it was solved for
    ) -> None:
        if not (min(lam, slot_lam, context_weight) > 0 and min(rank, width, context_width, min_anchors, growth) >= 1):
            raise InputError(
                f"lam is {lam}, slot_lam {slot_lam}, context_weight {context_weight}: all must be positive; rank is {rank}, "
                f"width {width}, context_width {context_width}, min_anchors {min_anchors}, growth {growth}: all at least 1"
            )
        self._sight = Sight(width, context_width, places)
        rules = Rules(lam, slot_lam if share else None, rank, context_weight, min_anchors, growth)
        self._regressions = Regressions(rules, self._sight.widen)
        self._one = one
        self._learned: dict[str, Tensor] = {}  # by key [layers, tokens]: what `_surprise` gave

    @property
    def anchors(self) -> int:
        """Learned and not forgotten."""
        return len(self._learned)

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        whole = base.finite() and deviation.finite() and bool(torch.isfinite(anchor.context).all())
        if anchor.key in self._learned or not whole:
            return
        seen = self._sight.see(base, anchor.context)
        surprise = self._learned[anchor.key] = self._surprise(self._slot(anchor.slot), seen, deviation)
        layers = range(deviation.layers)
        kinds = [(deviation.keys[i].shape[1], deviation.values[i].shape[1]) for i in layers]
        groups, xs = zip(*((self._sight.groups(seen, i), self._sight.x(seen, i)) for i in layers), strict=True)
        self._regressions.add(self._slot(anchor.slot), groups, kinds, xs, _targets(deviation, surprise))

    def forget(self, anchor: Anchor) -> None:
        surprise = self._learned.pop(anchor.key, None)
        if surprise is not None:
            base, deviation = observed(anchor)
            seen = self._sight.see(base, anchor.context)
            xs = [self._sight.x(seen, i) for i in range(deviation.layers)]
            self._regressions.remove(self._slot(anchor.slot), xs, _targets(deviation, surprise))

    def estimate(self, place: Place) -> Estimate | None:
        lines = self._regressions.lines(self._slot(place.slot))
        if lines is None:
            return None
        seen = self._sight.see(place.base, place.context, place.first)
        doubt = self.doubt(_glimpse(lines, seen), place.context)
        if doubt is None:
            return None
        keys, values = [], []
        for layer, (k, v) in enumerate(zip(place.base.keys, place.base.values, strict=True)):
            line = lines[layer]
            if line is None:
                keys.append(torch.zeros_like(k))
                values.append(torch.zeros_like(v))
            else:
                y = line.at(seen.parts(layer), seen.context)
                keys.append(y[:, : k.shape[1]])
                values.append(y[:, k.shape[1] :])
        return Estimate(PlainKV(tuple(keys), tuple(values)), doubt)

    def glimpse(self, place: Place) -> Glimpse | None:
        """All that `doubt` needs of a base, for any context; None where too little is known."""
        lines = self._regressions.lines(self._slot(place.slot))
        return None if lines is None else _glimpse(lines, self._sight.see(place.base, place.context, place.first))

    def doubt(self, glimpse: Glimpse, context: Tensor) -> Tensor | None:
        """[tokens], of an estimate behind a text with these features; None where it is not finite."""
        around = self._sight.around(context)
        pairs = zip(glimpse.lines, glimpse.glances, strict=True)
        doubts = [line.doubt(glance, around) for line, glance in pairs if line is not None and glance is not None]
        squares = torch.stack(doubts).sum(0) if doubts else around.new_zeros(glimpse.tokens)
        return squares.sqrt() if bool(torch.isfinite(squares).all()) else None

    def fresh(self, glimpse: Glimpse, slot: str) -> bool:
        """Whether nothing was fitted anew since."""
        return self._regressions.lines(self._slot(slot)) is glimpse.lines

    def _slot(self, name: str) -> str:
        return "" if self._one else name

    def _surprise(self, slot: str, seen: Seen, deviation: PlainKV) -> Tensor:
        """[layers, tokens]: logarithm of the squared error of what would have been estimated, less its mean over the run."""
        lines = self._regressions.lines(slot)
        out = []
        for layer in range(deviation.layers):
            error = deviation.rows(layer)
            line, mean = lines[layer] if lines else None, self._regressions.mean_y(slot, layer)
            if line is not None:
                error = error - line.at(seen.parts(layer), seen.context)
            elif mean is not None:
                error = error - mean[:-1].to(error)
            squares = error.square().sum(1)
            out.append((squares + 1e-4 * squares.mean() + 1e-30).log())
        errors = torch.stack(out)
        return errors - errors.mean(1, keepdim=True)


def _glimpse(lines: list[Line | None], seen: Seen) -> Glimpse:
    glances = [None if line is None else line.glance(seen.parts(i)) for i, line in enumerate(lines)]
    return Glimpse(lines, glances, seen.tokens)


def _targets(deviation: PlainKV, surprise: Tensor) -> list[Tensor]:
    return [torch.cat([deviation.rows(i), surprise[i, :, None]], dim=1) for i in range(deviation.layers)]
