"""What a regression sees of a token: its base K/V, which token it is, its place in the segment, the context in front.

Wide vectors are made narrow by fixed random matrices, so that costs are bounded whatever the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kvcomm.plain import PlainKV

__all__ = ["TOKEN_WIDTH", "Groups", "Projection", "Seen", "Sight", "position_features"]

_CENTRES = (0, 1, 2, 3, 4, 6, 9, 13, 18, 25, 36, 50, 70, 100, 140, 200, 280, 400, 560, 800)  # tokens
_WIDTHS = (0.6, 0.6, 0.6, 0.6, 0.8, 1.5, 2, 3, 4, 6, *(0.3 * c for c in _CENTRES[10:]))  # tokens

TOKEN_WIDTH = 64  # features, at most, of which token it is


def position_features(first: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """[tokens, 20]: bumps around a few positions, narrow near the start of a segment, where deviations change fast.

    All are 0 far out: what was seen at the end of the longest anchor says nothing of tokens far behind it.
    """
    at = torch.arange(first, first + tokens, device=device, dtype=torch.float32)[:, None]
    centres, widths = at.new_tensor(_CENTRES), at.new_tensor(_WIDTHS)
    return torch.exp(-((at - centres) / widths).square())


class Projection:
    """Maps vectors wider than `width` to `width` by a random matrix that depends on both widths alone, and no others.

    Inner products and distances are kept, up to a relative error of about 1 / sqrt(width).
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """[n, channels] -> float32 [n, min(channels, width)]"""
        x, channels = x.float(), x.shape[1]
        if channels <= self.width:
            return x
        if (channels, x.device) not in self._matrices:
            drawn = torch.randn(channels, self.width, generator=torch.Generator().manual_seed(channels))
            self._matrices[channels, x.device] = (drawn / self.width**0.5).to(x.device)
        return x @ self._matrices[channels, x.device]


class Groups(NamedTuple):
    """How many features are of what, in this order."""

    keys: int
    values: int
    token: int
    places: int
    context: int


@dataclass(frozen=True, eq=False)
class Seen:
    """A run of tokens, as features. float32."""

    keys: tuple[Tensor, ...]  # per layer [tokens, <= width]
    values: tuple[Tensor, ...]
    token: Tensor  # [tokens, <= TOKEN_WIDTH]: K/V of the first layer, which has seen nothing else
    places: Tensor  # [tokens, 20]
    context: Tensor  # [<= context width]

    @property
    def tokens(self) -> int:
        return len(self.places)

    def groups(self, layer: int) -> Groups:
        return Groups(*(x.shape[-1] for x in (self.keys[layer], self.values[layer], self.token, self.places, self.context)))

    def rows(self, layer: int) -> Tensor:
        """[tokens, features]: all but those of the context, which come last and are the same for every token"""
        return torch.cat([self.keys[layer], self.values[layer], self.token, self.places], dim=1)

    def x(self, layer: int) -> Tensor:
        """[tokens, features]"""
        return torch.cat([self.rows(layer), self.context.expand(self.tokens, -1)], dim=1)


class Sight:
    """Makes features: the same run gives the same ones, always and everywhere."""

    def __init__(self, width: int, context_width: int) -> None:
        self._narrow, self._narrow_token = Projection(width), Projection(TOKEN_WIDTH)
        self._narrow_context = Projection(context_width)

    def see(self, base: PlainKV, context: Tensor, first: int = 0) -> Seen:
        """`first`: index of the run's first token in its segment."""
        device = base.keys[0].device
        return Seen(
            tuple(map(self._narrow, base.keys)),
            tuple(map(self._narrow, base.values)),
            self._narrow_token(base.rows(0)),
            position_features(first, base.tokens, device),
            self._narrow_context(context[None].to(device))[0],
        )
