"""Ridge regression from moments alone: solve, then predict with two thin matrices. Knows nothing of anchors or KV.

Targets are the channels to predict and, last, one more that is never mixed with them: the logarithm of how wrong estimates are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomm.estimators.moments import Centred

__all__ = ["Line", "Solved", "Thin", "make_line", "scales", "solve", "thin"]

_SKETCH = 16  # rows of a random matrix that stand for all features when the leverage of a token is estimated


@dataclass(frozen=True, eq=False)
class Solved:
    """float64."""

    weights: Tensor  # [features, targets]
    fitted: Tensor  # [features, targets]: X'X @ weights
    sketch: Tensor  # [features, _SKETCH]: |x @ sketch|^2 estimates x' (X'X + penalty)^-1 x for a centred x
    freedom: float  # degrees of freedom spent


@dataclass(frozen=True, eq=False)
class Thin:
    """The few directions of the channels in which estimates vary. float64."""

    into: Tensor  # [channels, rank]
    out: Tensor  # [rank, channels]: into @ out is the projection on these directions

    def reduce(self, x: Tensor) -> Tensor:
        """[n, channels + 1] -> [n, rank + 1]"""
        return torch.cat([x[:, :-1] @ self.into, x[:, -1:]], dim=1)


@dataclass(frozen=True, eq=False)
class Line:
    """y = mean + (x @ into - shift) @ out, for x = [*parts [n, *] side by side, context [*] the same for all]. float32.

    `doubting` and `doubt_shift` say in the same way how wrong y is: one column is the logarithm of its squared error against
    the mean one, _SKETCH are for leverage.
    """

    into: Tensor  # [features, rank]
    shift: Tensor  # [rank]
    out: Tensor  # [rank, channels]
    mean: Tensor  # [channels]
    doubting: Tensor  # [features, 1 + _SKETCH]
    doubt_shift: Tensor  # [1 + _SKETCH]
    residual: float  # mean squared error expected of a token, all channels together
    least_leverage: float

    def at(self, parts: Sequence[Tensor], context: Tensor) -> Tensor:
        """y [n, channels]."""
        around = context @ self.into[len(self.into) - len(context) :] - self.shift
        return torch.addmm(self.mean, around + _sum(parts, self.into), self.out)

    def glance(self, parts: Sequence[Tensor]) -> Tensor:
        """[n, 1 + _SKETCH]: all that `doubt` needs of the tokens, whatever stands in front of them."""
        return _sum(parts, self.doubting)

    def doubt(self, glanced: Tensor, context: Tensor) -> Tensor:
        """Expected squared error of y [n]: NaN or infinite wherever y could be."""
        z = glanced + (context @ self.doubting[len(self.doubting) - len(context) :] - self.doubt_shift)
        leverage = z[:, 1:].square().sum(1) + self.least_leverage
        return self.residual * z[:, 0].clamp(-6, 6).exp() * (1 + leverage)


def scales(moments: Centred, groups: Sequence[int], weights: Sequence[float]) -> Tensor:
    """[features]: the standard deviation of each over the weight of its group; `groups` are their widths.

    Not less than a twentieth of what is usual in the group, so that features that hardly vary are not blown up.
    """
    variances = (moments.xx.diagonal() / moments.tokens).clamp_min(0).split(list(groups))
    out = [torch.maximum(v.sqrt(), 0.05 * v.mean().sqrt()) / w for v, w in zip(variances, weights, strict=True)]
    scale = torch.cat(out)
    return torch.where(scale > 0, scale, 1)


def solve(moments: Centred, scale: Tensor, lam: float, prior: Tensor | None = None) -> Solved:
    """Least squares with penalty lam * features * |scale * (weights - prior)|^2 per target; no prior means 0."""
    features, penalty = len(scale), lam * len(scale)
    gram = moments.xx / scale[:, None] / scale
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    right = moments.xy if prior is None else moments.xy - moments.xx @ prior
    change = torch.cholesky_solve(right / scale[:, None], factor) / scale[:, None]
    drawn = torch.randn(_SKETCH, features, dtype=gram.dtype, generator=torch.Generator().manual_seed(features))
    sketch = torch.linalg.solve_triangular(factor, drawn.to(gram) / _SKETCH**0.5, upper=False, left=False)
    return Solved(
        weights=change if prior is None else prior + change,
        fitted=moments.xy - penalty * scale.square()[:, None] * change,  # by the normal equations
        sketch=sketch.T / scale[:, None],
        freedom=features - penalty * float(sketch.square().sum()),  # trace of X'X (X'X + penalty)^-1
    )


def thin(solved: Solved, sizes: Tensor, rank: int) -> Thin:
    """The `rank` directions that hold most of what `solved` predicts for the tokens seen, channels in units of `sizes`."""
    channels = len(sizes)
    weights, fitted = solved.weights[:, :-1] / sizes, solved.fitted[:, :-1] / sizes
    if rank >= channels:
        basis = torch.eye(channels).to(weights)
    else:
        spread = weights.T @ fitted  # of predictions, [channels, channels]
        basis = torch.randn(channels, min(channels, rank + 8), generator=torch.Generator().manual_seed(channels)).to(weights)
        for _ in range(6):  # subspace iteration
            basis = torch.linalg.qr(spread @ basis).Q
        basis = basis @ torch.linalg.eigh(basis.T @ spread @ basis).eigenvectors[:, -rank:]
    return Thin(basis / sizes[:, None], basis.T * sizes)


def make_line(solved: Solved, kept: Thin, moments: Centred, mean_x: Tensor, mean: Tensor, least_leverage: float) -> Line:
    """`solved` is in the few directions `kept`, `moments` and `mean` [channels] are in all."""
    weights, fitted = solved.weights[:, :-1], solved.fitted[:, :-1]
    agreement = (weights.T @ moments.xy[:, :-1] * kept.out).sum()
    explained = (weights.T @ fitted @ kept.out * kept.out).sum()
    left = (moments.yy[:-1].sum() - 2 * agreement + explained).clamp_min(0) / moments.tokens
    doubting = torch.cat([solved.weights[:, -1:], solved.sketch], dim=1)
    return Line(
        into=weights.float().contiguous(),
        shift=(mean_x @ weights).float(),
        out=kept.out.float().contiguous(),
        mean=mean.float(),
        doubting=doubting.float(),
        doubt_shift=(mean_x @ doubting).float(),
        residual=float(left) / max(0.1, 1 - solved.freedom / moments.tokens) ** 2,
        least_leverage=least_leverage,
    )


def _sum(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    """[n, m]: parts [n, *] side by side times the leading rows of `weights` [features, m]."""
    first = 0
    total = weights.new_zeros(len(parts[0]), weights.shape[1])
    for part in parts:
        total = torch.addmm(total, part, weights[first : first + part.shape[1]])
        first += part.shape[1]
    return total
