"""A world of anchors whose deviations are known: what every estimator is tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.codecs import Raw, pack
from kvcomm.estimators import Estimator, Place
from kvcomm.plain import PlainKV

CHANNELS = ((4, 6), (8, 4), (6, 6))  # per layer: of keys, of values
VOCABULARY = 40
CONTEXT = 5  # features


@dataclass(frozen=True, eq=False)
class Sample:
    """One run of tokens: where it stands, and the deviation that it really shows there."""

    place: Place
    deviation: PlainKV

    def anchor(self) -> Anchor:
        ids = self.place.ids
        base, deviation = pack(Raw(), self.place.base), pack(Raw(), self.deviation)
        around = self.place.context.numpy().view(np.int32)  # two contexts are the same text when their features are
        return Anchor(self.place.slot, ids, base, deviation, self.place.context, np.zeros(0, np.int32), around, "model")

    def teach(self, estimator: Estimator) -> Anchor:
        anchor = self.anchor()
        estimator.learn(anchor, self.place.base, self.deviation)
        return anchor


class World:
    """Base K/V: a vector per token id and some noise. Deviation of layers 1 and 2: a slot's constant, plus linear maps of the
    layer's base and of the context, plus noise that only tokens with an odd id have. Layer 0 does not deviate.
    """

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        self.noise = noise
        self.random = torch.Generator().manual_seed(seed)
        self.tokens = [(self.draw(VOCABULARY, k), 3 * self.draw(VOCABULARY, v)) for k, v in CHANNELS]
        self.of_base = [self.draw(k + v, k + v) / (k + v) ** 0.5 for k, v in CHANNELS]
        self.of_context = [self.draw(CONTEXT, k + v) for k, v in CHANNELS]
        self.of_slot: dict[str, list[Tensor]] = {}

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def sample(self, tokens: int, slot: str = "a") -> Sample:
        ids = torch.randint(VOCABULARY, (tokens,), generator=self.random)
        keys, values = (
            tuple(of_kind[ids] + 0.3 * self.draw(tokens, of_kind.shape[1]) for of_kind in kind)
            for kind in zip(*self.tokens, strict=True)
        )
        place = Place(slot, ids.numpy().astype(np.int32), PlainKV(keys, values), self.draw(CONTEXT))
        return Sample(place, self.deviation(place))

    def deviation(self, place: Place) -> PlainKV:
        constants = self.of_slot.setdefault(place.slot, [self.draw(k + v) for k, v in CHANNELS])
        loud = torch.from_numpy(place.ids % 2).float()[:, None] * self.noise
        keys, values = [], []
        for layer, (k, _) in enumerate(CHANNELS):
            rows = place.base.rows(layer) @ self.of_base[layer] + place.context @ self.of_context[layer] + constants[layer]
            rows = (rows + loud * self.draw(*rows.shape)) * (layer > 0)
            keys.append(rows[:, :k])
            values.append(rows[:, k:])
        return PlainKV(tuple(keys), tuple(values))


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def noisy() -> World:
    return World(noise=2.0)


Error = Callable[[PlainKV, PlainKV], float]


@pytest.fixture(scope="session")
def error() -> Error:
    """How much of a deviation an estimate leaves: relative L2."""

    def relative(estimate: PlainKV, truth: PlainKV) -> float:
        left = estimate.minus(truth)
        energies = [[float(kv.rows(i).square().sum()) for i in range(truth.layers)] for kv in (left, truth)]
        return float((sum(energies[0]) / sum(energies[1])) ** 0.5)

    return relative
