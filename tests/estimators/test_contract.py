"""What every estimator keeps to, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from kvcomm.estimators import Estimate, Estimator, Fallback, Knn, Mean, Paper, Place, Ridge
from kvcomm.estimators.edges import Edges
from kvcomm.plain import PlainKV

if TYPE_CHECKING:
    from tests.estimators.conftest import World

MAKERS: dict[str, Callable[[], Estimator]] = {
    "paper": lambda: Paper(gamma=None),
    "mean": Mean,
    "knn": Knn,
    "ridge": lambda: Ridge(growth=1),
    "ridge-shared": lambda: Ridge(growth=1, share=True),
    "ridge>knn": lambda: Fallback(Ridge(growth=1), Knn()),
    "edges:mean": lambda: Edges(Mean(), 4),
}
OURS = [name for name in MAKERS if name != "paper"]


@pytest.fixture(params=sorted(MAKERS))
def estimator(request: pytest.FixtureRequest) -> Estimator:
    return MAKERS[request.param]()


def same(a: PlainKV | None, b: PlainKV | None, tolerance: float = 0.0) -> bool:
    assert a is not None
    assert b is not None
    pairs = zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    return all(torch.allclose(x, y, rtol=tolerance, atol=tolerance) for x, y in pairs)


def check(estimate: Estimate | None, place: Place) -> Estimate:
    assert estimate is not None
    assert estimate.deviation is not None
    shapes = [[x.shape for x in (*kv.keys, *kv.values)] for kv in (estimate.deviation, place.base)]
    assert shapes[0] == shapes[1]
    assert all(x.dtype == torch.float32 for x in (*estimate.deviation.keys, *estimate.deviation.values))
    assert estimate.deviation.finite()
    assert estimate.doubt.shape == (place.base.tokens,)
    assert estimate.doubt.dtype == torch.float32
    assert bool(torch.isfinite(estimate.doubt).all())
    assert bool((estimate.doubt >= 0).all())
    return estimate


@pytest.mark.parametrize("name", MAKERS)
def test_name(name: str) -> None:
    assert MAKERS[name]().name == name.removesuffix("-shared")


def test_knows_nothing_at_first(estimator: Estimator, world: World) -> None:
    assert estimator.estimate(world.sample(5).place) is None


def test_unknown_slot(estimator: Estimator, world: World) -> None:
    for _ in range(8):
        world.sample(12).teach(estimator)
    assert estimator.estimate(world.sample(5, "elsewhere").place) is None


@pytest.mark.parametrize(("tokens", "first"), [(12, 0), (1, 0), (1, 7), (5, 3)])
def test_shape(estimator: Estimator, world: World, tokens: int, first: int) -> None:
    """Runs as long as anchors, of one token, and from the middle of a segment."""
    for _ in range(8):
        world.sample(12).teach(estimator)
    place = replace(world.sample(tokens).place, first=first)
    check(estimator.estimate(place), place)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("tokens", "first"), [(30, 0), (4, 2000)])
def test_longer_than_every_anchor(name: str, world: World, tokens: int, first: int) -> None:
    estimator = MAKERS[name]()
    for _ in range(8):
        world.sample(12).teach(estimator)
    place = replace(world.sample(tokens).place, first=first)
    check(estimator.estimate(place), place)


@pytest.mark.parametrize("name", OURS)
def test_anchors_of_one_token(name: str, world: World) -> None:
    estimator = MAKERS[name]()
    for _ in range(8):
        world.sample(1).teach(estimator)
    place = world.sample(6).place
    check(estimator.estimate(place), place)


def test_without_context_features(estimator: Estimator, world: World) -> None:
    for sample in (world.sample(12) for _ in range(8)):
        replace(sample, place=replace(sample.place, context=torch.zeros(0))).teach(estimator)
    place = replace(world.sample(12).place, context=torch.zeros(0))
    check(estimator.estimate(place), place)


def test_anchors_all_alike(estimator: Estimator, world: World) -> None:
    """Features that do not vary at all, and contexts of zeros."""
    sample = world.sample(12)
    for number in range(8):
        place = replace(sample.place, context=torch.zeros(5))
        anchor = replace(sample, place=place).anchor()
        estimator.learn(replace(anchor, producer_context=np.full(1, number, np.int32)), place.base, sample.deviation)
    place = replace(sample.place, context=torch.ones(5))
    check(estimator.estimate(place), place)


def test_no_deviation_at_all(estimator: Estimator, world: World) -> None:
    for sample in (world.sample(12) for _ in range(8)):
        replace(sample, deviation=sample.deviation.map(torch.zeros_like)).teach(estimator)
    place = world.sample(12).place
    estimate = check(estimator.estimate(place), place)
    assert same(estimate.deviation, place.base.map(torch.zeros_like))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "ridge-shared"])
def test_slots_know_nothing_of_each_other(name: str, world: World) -> None:
    estimator = MAKERS[name]()
    for _ in range(8):
        world.sample(12).teach(estimator)
    place = world.sample(10).place
    before = check(estimator.estimate(place), place)
    for _ in range(8):
        world.sample(12, "b").teach(estimator)
    assert same(before.deviation, check(estimator.estimate(place), place).deviation)


def test_learning_twice_counts_once(estimator: Estimator, world: World) -> None:
    samples = [world.sample(12) for _ in range(8)]
    for sample in samples:
        sample.teach(estimator)
    place = world.sample(12).place
    before = check(estimator.estimate(place), place)
    samples[3].teach(estimator)
    assert same(before.deviation, check(estimator.estimate(place), place).deviation)


def test_forgetting_restores_the_earlier_estimate(estimator: Estimator, world: World) -> None:
    """And forgetting what was never learned, or twice, changes nothing."""
    for slot in "babababababababa":
        world.sample(12, slot).teach(estimator)
    place = world.sample(12).place
    before = check(estimator.estimate(place), place)
    more = [world.sample(15).teach(estimator) for _ in range(3)]
    assert not same(before.deviation, check(estimator.estimate(place), place).deviation, 1e-3)
    for anchor in (*more, *more, world.sample(12).anchor(), world.sample(12, "c").anchor()):
        estimator.forget(anchor)
    after = check(estimator.estimate(place), place)
    assert same(before.deviation, after.deviation, 1e-4)
    assert torch.allclose(before.doubt, after.doubt, rtol=1e-3, atol=1e-3)


def test_forgetting_all(estimator: Estimator, world: World) -> None:
    anchors = [world.sample(12, slot).teach(estimator) for slot in "abababababab"]
    place = world.sample(12).place
    assert estimator.estimate(place) is not None
    for anchor in anchors:
        estimator.forget(anchor)
    assert estimator.estimate(place) is None
    for anchor, base, deviation in ((s.anchor(), s.place.base, s.deviation) for s in (world.sample(12) for _ in range(8))):
        estimator.learn(anchor, base, deviation)
    check(estimator.estimate(place), place)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_anchor_that_is_not_finite_teaches_nothing(estimator: Estimator, world: World, bad: float) -> None:
    for _ in range(8):
        world.sample(12).teach(estimator)
    place = world.sample(12).place
    before = check(estimator.estimate(place), place)
    sample = world.sample(12)
    anchor, deviation = sample.anchor(), sample.deviation.map(torch.clone)
    deviation.values[1][4, 2] = bad
    estimator.learn(anchor, sample.place.base, deviation)
    assert same(before.deviation, check(estimator.estimate(place), place).deviation)
    estimator.forget(anchor)
    assert same(before.deviation, check(estimator.estimate(place), place).deviation)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_never_nan_for_a_base_that_is_not_finite(estimator: Estimator, world: World, bad: float) -> None:
    for _ in range(8):
        world.sample(12).teach(estimator)
    place = world.sample(12).place
    base = place.base.map(torch.clone)
    base.keys[1][4, 2] = bad
    estimate = estimator.estimate(replace(place, source=base))
    if estimate is not None:
        check(estimate, place)


@pytest.mark.parametrize("name", ["mean", "knn", "ridge", "ridge-shared"])
def test_doubt_tells_where_estimates_are_wrong(name: str, noisy: World) -> None:
    """Rank correlation with the true error, token by token, over fresh runs."""
    estimator = MAKERS[name]()
    for _ in range(40):
        noisy.sample(20).teach(estimator)
    doubts, errors = [], []
    for sample in (noisy.sample(20) for _ in range(20)):
        estimate = check(estimator.estimate(sample.place), sample.place)
        assert estimate.deviation is not None
        left = estimate.deviation.minus(sample.deviation)
        doubts.append(estimate.doubt)
        errors.append(sum((left.rows(i).square().sum(1) for i in range(left.layers)), torch.zeros(())).sqrt())
    ranks = torch.stack([torch.cat(x).argsort().argsort().double() for x in (doubts, errors)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.3
