"""Per token: the deviations of the most similar anchor tokens of the slot, at whatever position they stand.

Similar by the base KV of all layers, projected at random, and by the context in front of the run. Nothing is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.index import ExactIndex, Index
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.features import Projection
from kvcomm.estimators.rows import from_rows, to_rows
from kvcomm.plain import PlainKV

__all__ = ["Knn"]

_LARGEST = torch.finfo(torch.float16).max
_BLOCK = 64  # neighbours gathered at a time: they stay in the processor's cache


@dataclass(frozen=True, eq=False)
class _Known:
    """One anchor's tokens: ids `start`, `start + 1`, ... in the index of its slot."""

    slot: str
    start: int
    rows: Tensor  # float16 [tokens, channels of all layers]: deviations
    norms: Tensor  # float32 [tokens], squared

    @property
    def ids(self) -> range:
        return range(self.start, self.start + len(self.rows))


class Knn:
    """Weights are softmax(-distance / (temperature * mean distance of the k)). Doubt: how much the neighbours disagree.

    None below two anchors. With `elsewhere`, a slot without anchors borrows the neighbours of all others.
    """

    name = "knn"

    def __init__(
        self,
        k: int = 8,
        dim: int = 64,  # of the base's share of a representation
        context_weight: float = 0.25,  # how far contexts count, against 1 for all layers of the base
        temperature: float = 0.2,
        elsewhere: bool = False,
        index: Callable[[int], Index] = ExactIndex,
    ) -> None:
        if min(k, dim) < 1 or not temperature > 0:
            raise InputError(f"k is {k}, dim {dim}, temperature {temperature}; all must be more than 0")
        self.k, self.context_weight, self.temperature, self.elsewhere = k, context_weight, temperature, elsewhere
        self._project, self._make_index = Projection(dim), index
        self._indexes: dict[str, Index] = {}  # by slot
        self._known: dict[str, _Known] = {}  # by key, `start` ascending
        self._next = 0  # ids are never given twice
        self._base_scale: Tensor | None = None  # [channels of all layers]; both stay as the first anchors set them
        self._context_scale = 0.0

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        if anchor.key in self._known or not (base.finite() and deviation.finite()):
            return
        self._set_scales(base, anchor.context)
        rows = to_rows(deviation).clamp(-_LARGEST, _LARGEST).half()
        known = _Known(anchor.slot, self._next, rows, rows.float().square().sum(1))
        seen = self._represent(base, anchor.context)
        if anchor.slot not in self._indexes:
            self._indexes[anchor.slot] = self._make_index(seen.shape[1])
        self._indexes[anchor.slot].add(known.ids, seen)
        self._known[anchor.key] = known
        self._next += len(known.rows)

    def forget(self, anchor: Anchor) -> None:
        known = self._known.pop(anchor.key, None)
        if known is None:
            return
        self._indexes[known.slot].remove(known.ids)
        if not len(self._indexes[known.slot]):
            del self._indexes[known.slot]

    def estimate(self, place: Place) -> Estimate | None:
        slots = [place.slot] if place.slot in self._indexes or not self.elsewhere else list(self._indexes)
        anchors = [known for known in self._known.values() if known.slot in slots]
        if len(anchors) < 2 or not place.base.finite():
            return None
        ids, distances = self._nearest(slots, self._represent(place.base, place.context))
        scale = torch.where(distances.isinf(), 0, distances).sum(1) / distances.isfinite().sum(1)
        weights = torch.softmax(-distances / (self.temperature * scale + 1e-9)[:, None], dim=1)
        rows, energy = _blend(anchors, ids, weights)
        spread = (energy - rows.square().sum(1)).clamp_min(0)
        return Estimate(from_rows(rows, place.base), spread.sqrt())

    def _nearest(self, slots: Sequence[str], seen: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Ids [tokens, k], -1 for none, and distances [tokens, k], inf for none, of the nearest tokens over these slots."""
        found = [self._indexes[slot].search(seen, self.k) for slot in slots]
        ids, squared = (np.concatenate(parts, axis=1) for parts in zip(*((f.ids, f.distances) for f in found), strict=True))
        order = np.argsort(squared, axis=1, kind="stable")[:, : self.k]
        ids, squared = (np.take_along_axis(x, order, axis=1) for x in (ids, squared))
        return ids, torch.from_numpy(np.sqrt(np.maximum(squared, 0))).float()

    def _represent(self, base: PlainKV, context: Tensor) -> np.ndarray:
        """float32 [tokens, dim + c]: distances count every layer's keys and values alike, and the context as weighted."""
        assert self._base_scale is not None
        tokens = self._project(to_rows(base) * self._base_scale)
        around = self._project(context[None]) * self._context_scale
        return torch.cat([tokens, around.to(tokens).expand(len(tokens), -1)], dim=1).cpu().numpy()

    def _set_scales(self, base: PlainKV, context: Tensor) -> None:
        """From the first anchor, and the first context that is not all zeros."""
        if self._base_scale is None:
            layers = [*base.keys, *base.values]
            channels = sum(x.shape[1] for x in layers)
            scales = [1 / (_spread(x) * channels) ** 0.5 for x in layers]
            self._base_scale = torch.cat([x.new_full((x.shape[1],), s) for x, s in zip(layers, scales, strict=True)])
        if not self._context_scale and bool(context.any()):
            self._context_scale = self.context_weight / float(context.norm())


def _spread(x: Tensor) -> float:
    """Variance of rows around their mean; of a constant matrix its mean square, of zeros 1."""
    return float((x - x.mean(0)).square().mean()) or float(x.square().mean()) or 1.0


def _blend(anchors: Sequence[_Known], ids: np.ndarray, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean [tokens, channels] of the deviations with these ids, and of their squared norms [tokens]."""
    starts = np.array([known.start for known in anchors])
    owner = np.where(ids < 0, -1, np.searchsorted(starts, ids, side="right") - 1)
    rows = torch.zeros(len(ids), anchors[0].rows.shape[1], device=anchors[0].rows.device)
    energy = rows.new_zeros(len(ids))
    for number in np.unique(owner[owner >= 0]):
        tokens, columns = np.nonzero(owner == number)
        own = torch.from_numpy(ids[tokens, columns] - starts[number]).to(rows.device)
        weight, at = weights[tokens, columns].to(rows), torch.from_numpy(tokens).to(rows.device)
        energy.index_add_(0, at, anchors[number].norms[own] * weight)
        for i, j, w in zip(own.split(_BLOCK), at.split(_BLOCK), weight.split(_BLOCK), strict=True):
            rows.index_add_(0, j, anchors[number].rows[i].float().mul_(w[:, None]))
    return rows, energy
