"""Running sums of a linear regression: all that ridge needs of the tokens it has seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Centred", "Moments", "pooled"]

ROUNDING = 1e-8  # of a feature's mean square: less variance is not told from rounding


@dataclass(frozen=True, eq=False)
class Centred:
    """Second moments around the means: of one slot, or summed over slots, each around its own. float64."""

    tokens: int
    xx: Tensor  # [features, features]
    xy: Tensor  # [features, targets]
    yy: Tensor  # [targets]


class Moments:
    """Sums over the tokens of one slot and layer. `add` and its inverse `remove` agree up to rounding in float64.

    Memory: 8 * features * (features + targets) bytes, whatever the number of tokens.
    """

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.tokens = 0
        self.x, self.y, self.yy, self.xx, self.xy = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((features,), (targets,), (targets,), (features, features), (features, targets))
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in tokens: x [n, features], y [n, targets], any floating dtype."""
        self._change(x.double(), y.double(), 1)

    def remove(self, x: Tensor, y: Tensor) -> None:
        """Take back what `add` took in."""
        self._change(x.double(), y.double(), -1)

    def mean_x(self) -> Tensor:
        return self.x / self.tokens

    def mean_y(self) -> Tensor:
        return self.y / self.tokens

    def centred(self) -> Centred:
        """Around the means. A feature that does not vary is exactly 0. Raises ZeroDivisionError for no tokens."""
        n = self.tokens
        xx = self.xx - torch.outer(self.x, self.x) / n
        xy = self.xy - torch.outer(self.x, self.y) / n
        still = xx.diagonal() <= ROUNDING * self.xx.diagonal()
        xx[still], xx[:, still], xy[still] = 0.0, 0.0, 0.0
        return Centred(n, xx, xy, (self.yy - self.y.square() / n).clamp_min(0))

    def _change(self, x: Tensor, y: Tensor, sign: int) -> None:
        self.tokens += sign * len(x)
        self.x += sign * x.sum(0)
        self.y += sign * y.sum(0)
        self.yy += sign * y.square().sum(0)
        self.xx.addmm_(x.T, x, alpha=sign)
        self.xy.addmm_(x.T, y, alpha=sign)


def pooled(slots: Iterable[Moments]) -> Centred:
    """Over all slots, each around its own means."""
    first, *rest = (moments.centred() for moments in slots)
    tokens, xx, xy, yy = first.tokens, first.xx, first.xy, first.yy
    for each in rest:
        tokens, xx, xy, yy = tokens + each.tokens, xx + each.xx, xy + each.xy, yy + each.yy
    return Centred(tokens, xx, xy, yy)
