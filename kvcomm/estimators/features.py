"""What a regression sees of a token: its base K/V, which token it is, its place in the segment, the context in front.

Wide vectors are made narrow by fixed random matrices, so that costs are bounded whatever the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvcomm.plain import PlainKV
from kvcomm.segments import Ids

__all__ = ["TOKEN_WIDTH", "Groups", "Projection", "Seen", "Sight", "context_features", "position_features"]

_CENTRES = (0, 1, 2, 3, 4, 6, 9, 13, 18, 25, 36, 50, 70, 100, 140, 200, 280, 400, 560, 800)  # tokens
_WIDTHS = (0.6, 0.6, 0.6, 0.6, 0.8, 1.5, 2, 3, 4, 6, *(0.3 * c for c in _CENTRES[10:]))  # tokens

_CONTEXT = 8  # tokens in front of a run whose embeddings are its context

TOKEN_WIDTH = 64  # features, at most, of which token it is


def position_features(first: int, tokens: int, device: torch.device | None = None) -> Tensor:
    """[tokens, 20]: bumps around a few positions, narrow near the start of a segment, where deviations change fast.

    All are 0 far out: what was seen at the end of the longest anchor says nothing of tokens far behind it.
    """
    at = torch.arange(first, first + tokens, device=device, dtype=torch.float32)[:, None]
    centres, widths = at.new_tensor(_CENTRES), at.new_tensor(_WIDTHS)
    return torch.exp(-((at - centres) / widths).square())


def context_features(ids: Ids, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """float32 [c] on the CPU, of a text `ids` in front of a run; `embed` maps ids [n] (int64) to the model's [n, channels]."""
    tail = embed(torch.from_numpy(ids[-_CONTEXT:].astype(np.int64))).float().cpu()
    return torch.cat([tail.new_zeros(_CONTEXT - len(tail), tail.shape[1]), tail]).flatten()


class Projection:
    """Maps vectors wider than `width` to `width` by a random matrix that depends on both widths alone, and no others.

    Inner products and distances are kept, up to a relative error of about 1 / sqrt(width).
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._matrices: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """[n, channels] -> float32 [n, min(channels, width)]"""
        return x.float() if x.shape[1] <= self.width else x.float() @ self._matrix(x.shape[1], x.device)

    def unfold(self, weights: Tensor, channels: int) -> Tensor:
        """Of weights [min(channels, width), m], those [channels, m] that do to x what these do to its projection."""
        return weights if channels <= self.width else self._matrix(channels, weights.device).to(weights.dtype) @ weights

    def _matrix(self, channels: int, device: torch.device) -> Tensor:
        if (channels, device) not in self._matrices:
            drawn = torch.randn(channels, self.width, generator=torch.Generator().manual_seed(channels))
            self._matrices[channels, device] = (drawn / self.width**0.5).to(device)
        return self._matrices[channels, device]


class Groups(NamedTuple):
    """How many features are of what, in this order. Keys and values are those of one layer."""

    keys: int
    values: int
    token: int
    places: int
    context: int


@dataclass(frozen=True, eq=False)
class Seen:
    """A run of tokens, as features. float32."""

    base: PlainKV
    token: Tensor  # [tokens, <= TOKEN_WIDTH]: K/V of the first layer, which has seen nothing else
    places: Tensor  # [tokens, <= 20]
    context: Tensor  # [<= context width]

    @property
    def tokens(self) -> int:
        return len(self.places)

    def parts(self, layer: int) -> tuple[Tensor, ...]:
        """Side by side [tokens, features]: keys and values as they are, token and place. Not the context."""
        return self.base.keys[layer], self.base.values[layer], self.token, self.places


class Sight:
    """Makes features: the same run gives the same ones, always and everywhere.

    Sums are kept over narrow ones (`x`); what is found on them is widened once, so that estimating projects nothing.
    """

    def __init__(self, width: int, context_width: int, places: int = len(_CENTRES)) -> None:
        """`places`: how many of the position features, from the start of a segment on, are seen."""
        self._places = places
        self._narrow, self._narrow_token = Projection(width), Projection(TOKEN_WIDTH)
        self._narrow_context = Projection(context_width)

    def see(self, base: PlainKV, context: Tensor, first: int = 0) -> Seen:
        """`first`: index of the run's first token in its segment."""
        device = base.keys[0].device
        token, places = self._narrow_token(base.rows(0)), position_features(first, base.tokens, device)[:, : self._places]
        return Seen(base, token, places, self.around(context.to(device)))

    def around(self, context: Tensor) -> Tensor:
        """The features of a context, made narrow [<= context width]."""
        return self._narrow_context(context[None])[0]

    def x(self, seen: Seen, layer: int) -> Tensor:
        """[tokens, features]: keys and values made narrow, token, place and context."""
        keys, values = self._narrow(seen.base.keys[layer]), self._narrow(seen.base.values[layer])
        return torch.cat([keys, values, seen.token, seen.places, seen.context.expand(seen.tokens, -1)], dim=1)

    def groups(self, seen: Seen, layer: int) -> Groups:
        """Of `x`."""
        keys, values = (min(x.shape[1], self._narrow.width) for x in (seen.base.keys[layer], seen.base.values[layer]))
        return Groups(keys, values, seen.token.shape[1], seen.places.shape[1], len(seen.context))

    def widen(self, weights: Tensor, groups: Groups, kinds: tuple[int, int]) -> Tensor:
        """What weights [features of x, m] are for keys and values as they are: `kinds` are their channels."""
        keys, values, rest = weights.split([groups.keys, groups.values, sum(groups[2:])])
        return torch.cat([self._narrow.unfold(keys, kinds[0]), self._narrow.unfold(values, kinds[1]), rest])
