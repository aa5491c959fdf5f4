"""The published estimator, against a loop over its equations."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from kvcomm.errors import InputError
from kvcomm.estimators import Estimate, Paper, Place
from kvcomm.estimators.paper import Distance
from kvcomm.plain import PlainKV

if TYPE_CHECKING:
    from tests.estimators.conftest import Sample, World


def given(estimate: Estimate | None) -> PlainKV:
    assert estimate is not None
    assert estimate.deviation is not None
    return estimate.deviation


def by_the_book(samples: list[Sample], place: Place, distance: Distance) -> tuple[list[Tensor], list[Tensor]]:
    """Token by token and channel by channel, in plain Python floats."""
    kinds = []
    for kind in ("keys", "values"):
        out = [torch.zeros_like(x) for x in getattr(place.base, kind)]
        for token in range(place.base.tokens):
            at = place.first + token
            usable = [s for s in samples if s.place.base.tokens >= place.first + place.base.tokens]
            scores = []
            for s in usable:
                differences = [
                    float(a) - float(b)
                    for mine, theirs in zip(getattr(place.base, kind), getattr(s.place.base, kind), strict=True)
                    for a, b in zip(mine[token], theirs[at], strict=True)
                ]
                if distance == "norm":
                    scores.append(math.exp(-math.sqrt(sum(d * d for d in differences))))
                else:
                    scores.append(math.exp(-sum(map(abs, differences)) / len(differences)))
            for layer, rows in enumerate(out):
                for s, score in zip(usable, scores, strict=True):
                    rows[token] += score / sum(scores) * getattr(s.deviation, kind)[layer][at]
        kinds.append(out)
    return kinds[0], kinds[1]


def entropy(samples: list[Sample], place: Place) -> float:
    """Section 3.4: of the weights of the whole run's values, divided by log2 of their number."""
    tokens = place.base.tokens
    distances = []
    for s in samples:
        pairs = zip(place.base.values, s.place.base.values, strict=True)
        distances.append(math.sqrt(sum(float((a - b[:tokens]).square().sum()) for a, b in pairs)))
    weights = [math.exp(-d) / sum(math.exp(-e) for e in distances) for d in distances]
    return -sum(w * math.log2(w) for w in weights if w) / math.log2(len(samples))


def near(world: World, sample: Sample, noise: float) -> Sample:
    """The same text behind another context, its base a little different."""
    base = sample.place.base.map(lambda x: x + noise * world.draw(*x.shape))
    return replace(sample, place=replace(sample.place, source=base, context=world.draw(5)))


@pytest.mark.parametrize("distance", ["norm", "mean"])
@pytest.mark.parametrize(("tokens", "first"), [(6, 0), (1, 0), (4, 3)])
def test_equals_its_equations(world: World, distance: Distance, tokens: int, first: int) -> None:
    """Three anchors of which one is too short for the later runs; several of them matter."""
    samples = [near(world, world.sample(9), 0.2) for _ in range(2)]
    samples += [near(world, samples[0], 0.2), world.sample(6)]
    estimator = Paper(gamma=None, distance=distance)
    for sample in samples:
        sample.teach(estimator)
    base = samples[0].place.base.part(first, first + tokens)
    place = Place("a", samples[0].place.ids[first : first + tokens], base.map(lambda x: x + 0.1), world.draw(5), first)
    deviation = given(estimator.estimate(place))
    keys, values = by_the_book(samples, place, distance)
    for got, wanted in zip((*deviation.keys, *deviation.values), (*keys, *values), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_longer_than_every_anchor(world: World) -> None:
    estimator = Paper(gamma=None)
    for _ in range(4):
        world.sample(8).teach(estimator)
    assert estimator.estimate(world.sample(8).place) is not None
    assert estimator.estimate(world.sample(9).place) is None
    assert estimator.estimate(replace(world.sample(4).place, first=5)) is None


@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3, 1.0])
def test_entropy_gate(world: World, noise: float) -> None:
    """One text seen four times among others: the closer its bases, the more even the weights."""
    sample = world.sample(8)
    samples = [near(world, sample, noise) for _ in range(4)] + [world.sample(8) for _ in range(4)]
    found = entropy(samples, sample.place)
    for gamma, open_ in ((found - 0.01, False), (found + 0.01, True), (None, True)):
        estimator = Paper(gamma=gamma)
        for each in samples:
            each.teach(estimator)
        assert (estimator.estimate(sample.place) is not None) is open_


def test_single_anchor_passes_no_gate(world: World) -> None:
    """Fewer than two: always dense."""
    sample = world.sample(8)
    for estimator, given in ((Paper(), False), (Paper(gamma=None), True)):
        sample.teach(estimator)
        assert (estimator.estimate(sample.place) is not None) is given


def remembers(estimator: Paper, sample: Sample) -> bool:
    """Whether (nearly) the very deviation of this anchor comes back for its own base."""
    pairs = zip(given(estimator.estimate(sample.place)).values, sample.deviation.values, strict=True)
    return all((a - b).norm() <= 0.5 * b.norm() for a, b in pairs)


def test_least_used_of_the_oldest_leaves(world: World) -> None:
    """Limit 4, window 3: of the three oldest, the two used ones stay."""
    samples = [world.sample(8) for _ in range(5)]
    estimator = Paper(gamma=None, limit=4, oldest=3)
    for sample in samples[:4]:
        sample.teach(estimator)
    for used in (samples[0], samples[2], samples[2]):
        assert estimator.estimate(used.place) is not None
    samples[4].teach(estimator)
    assert [remembers(estimator, sample) for sample in samples] == [True, False, True, True, True]


def test_at_most_twenty_anchors(world: World) -> None:
    samples = [world.sample(8) for _ in range(23)]
    estimator = Paper(gamma=None)
    for sample in samples:
        sample.teach(estimator)
    assert [remembers(estimator, sample) for sample in samples] == [False] * 3 + [True] * 20


@pytest.mark.parametrize("options", [{"limit": 0}, {"oldest": 0}])
def test_refuses_bounds_below_one(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        Paper(**options)  # type: ignore[arg-type]  # the keys are the names of integers
