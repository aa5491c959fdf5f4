"""Ridge from running sums, against the closed form on stacked data in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvcomm.errors import InputError
from kvcomm.estimators import Estimate, Mean, Place, Ridge
from kvcomm.estimators.features import position_features
from kvcomm.plain import PlainKV

if TYPE_CHECKING:
    from tests.estimators.conftest import Error, Sample, World

Matrix = npt.NDArray[np.float64]
LAM, CONTEXT_WEIGHT = 0.35, 0.3  # the defaults


def features(place: Place, layer: int) -> Matrix:
    tokens = place.base.tokens
    parts = [
        place.base.rows(layer),
        place.base.rows(0),
        position_features(place.first, tokens),
        place.context.expand(tokens, -1),
    ]
    return np.concatenate([x.double().numpy() for x in parts], axis=1)


def scale_of(x: Matrix, widths: Sequence[int]) -> Matrix:
    """Standard deviations, not below a twentieth of what is usual in the group; contexts count less."""
    out, start = [], 0
    for width, weight in zip(widths, (1, 1, 1, 1, CONTEXT_WEIGHT), strict=True):
        std = x[:, start : start + width].std(0)
        out.append(np.maximum(std, 0.05 * np.sqrt((std**2).mean())) / weight)
        start += width
    scale = np.concatenate(out)
    return np.where(scale > 0, scale, 1.0)


def widths_of(place: Place, layer: int) -> tuple[int, ...]:
    base = place.base
    of_layer = base.keys[layer].shape[1], base.values[layer].shape[1]
    return *of_layer, base.rows(0).shape[1], position_features(0, 1).shape[1], len(place.context)


def stacked(samples: Sequence[Sample], layer: int) -> tuple[Matrix, Matrix]:
    x = np.concatenate([features(s.place, layer) for s in samples])
    return x, np.concatenate([s.deviation.rows(layer).double().numpy() for s in samples])


def closed_form(samples: Sequence[Sample], place: Place, layer: int) -> Matrix:
    """All data at once: (X'X + penalty)^-1 X'Y on centred and scaled X, by least squares with the penalty as extra rows."""
    x, y = stacked(samples, layer)
    scale = scale_of(x, widths_of(place, layer))
    standard = (x - x.mean(0)) / scale
    penalty = np.sqrt(LAM * x.shape[1]) * np.eye(x.shape[1])
    targets = np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))])
    weights = np.linalg.lstsq(np.concatenate([standard, penalty]), targets, rcond=None)[0]
    return np.asarray(y.mean(0) + (features(place, layer) - x.mean(0)) / scale @ weights)


def given(estimate: Estimate | None) -> PlainKV:
    assert estimate is not None
    assert estimate.deviation is not None
    return estimate.deviation


def doubt(estimate: Estimate | None) -> float:
    """Mean over the tokens."""
    assert estimate is not None
    return float(estimate.doubt.mean())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(("tokens", "first"), [(12, 0), (1, 0), (7, 3), (40, 0)])
def test_equals_the_closed_form_at_every_number_of_anchors(world: World, share: bool, tokens: int, first: int) -> None:
    """A slot that is alone shares with nobody."""
    estimator = Ridge(growth=1, share=share)
    samples = []
    place = replace(world.sample(tokens).place, first=first)
    for number in range(1, 13):
        samples.append(world.sample(12))
        samples[-1].teach(estimator)
        estimate = estimator.estimate(place)
        if number < 5:
            assert estimate is None
            continue
        deviation = given(estimate)
        for layer in (1, 2):
            np.testing.assert_allclose(deviation.rows(layer), closed_form(samples, place, layer), rtol=1e-3, atol=1e-3)


def test_shared_slots_are_drawn_to_each_other(world: World) -> None:
    """Two steps in numpy: all slots, each around its own means; then each slot's residual, and half the common level."""
    estimator, slot_lam = Ridge(growth=1, share=True, slot_lam=0.7), 0.7
    slots = {slot: [world.sample(12, slot) for _ in range(n)] for slot, n in (("b", 6), ("c", 5), ("a", 1))}
    for samples in slots.values():
        for sample in samples:
            sample.teach(estimator)
    place = world.sample(15).place
    deviation = given(estimator.estimate(place))
    for layer in (1, 2):
        data = {slot: stacked(samples, layer) for slot, samples in slots.items()}
        x, y = (np.concatenate([each[i] - each[i].mean(0) for each in data.values()]) for i in (0, 1))
        scale = scale_of(x, widths_of(place, layer))
        common = ridge(x / scale, y, LAM * len(scale))
        levels = {slot: y.mean(0) - x.mean(0) / scale @ common for slot, (x, y) in data.items()}
        level = sum(len(slots[slot]) * levels[slot] for slot in slots) / 12
        x, y = data["a"]
        x0, mean = (x - x.mean(0)) / scale, y.mean(0) + (level - levels["a"]) / 2  # one anchor: half its own level
        weights = common + ridge(x0, y - y.mean(0) - x0 @ common, slot_lam * len(scale))
        expected = mean + (features(place, layer) - x.mean(0)) / scale @ weights
        np.testing.assert_allclose(deviation.rows(layer), expected, rtol=1e-3, atol=1e-3)


def ridge(x: Matrix, y: Matrix, penalty: float) -> Matrix:
    return np.asarray(np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y))


def test_recovers_a_linear_world(world: World, error: Error) -> None:
    """Held-out runs, some longer than every anchor: under a tenth is left, of what the mean leaves most."""
    estimator, mean = Ridge(lam=1e-4), Mean()
    for _ in range(60):
        sample = world.sample(20)
        for each in (estimator, mean):
            sample.teach(each)
    for tokens in (1, 10, 20, 50):
        sample = world.sample(tokens)
        left = error(given(estimator.estimate(sample.place)), sample.deviation)
        assert left < 0.1
        assert left < 0.2 * error(given(mean.estimate(sample.place)), sample.deviation)


def test_sharing_helps_a_slot_of_few_anchors(world: World, error: Error) -> None:
    own, shared = Ridge(), Ridge(share=True)
    for slot, anchors in (("b", 40), ("c", 40), ("a", 5)):
        for _ in range(anchors):
            sample = world.sample(20, slot)
            for each in (own, shared):
                sample.teach(each)
    sample = world.sample(30)
    left = [error(given(each.estimate(sample.place)), sample.deviation) for each in (own, shared)]
    assert left[1] < 0.5 * left[0]


def test_a_shared_slot_needs_one_anchor_of_its_own(world: World) -> None:
    """And all together `min_anchors`; a slot whose anchors came too early is fitted when others bring the rest."""
    estimator = Ridge(share=True, min_anchors=5)
    place = world.sample(9).place
    world.sample(12).teach(estimator)
    for slot in "bbb":
        world.sample(12, slot).teach(estimator)
        assert estimator.estimate(place) is None
    anchor = world.sample(12, "b").teach(estimator)
    assert estimator.estimate(place) is not None
    assert estimator.estimate(replace(place, slot="c")) is None
    estimator.forget(anchor)
    assert estimator.estimate(place) is None


def test_is_solved_again_only_when_enough_has_changed(world: World) -> None:
    """With growth 1.5, from 5 anchors on: half as many again every time."""
    estimator = Ridge(growth=1.5)
    place = world.sample(9).place
    before, solved = None, []
    for number in range(1, 23):
        world.sample(12).teach(estimator)
        now = estimator.estimate(place)
        values = None if now is None else given(now).values[1]
        if values is not None and (before is None or not torch.equal(values, before)):
            solved.append(number)
        before = values
    assert solved == [5, 8, 12, 18]


def test_a_full_pool_keeps_learning(world: World, error: Error) -> None:
    """Twenty anchors at a time while the world changes altogether: what has left no longer counts."""
    estimator = Ridge(lam=1e-3)
    old = [world.sample(20).teach(estimator) for _ in range(20)]
    world.of_base = [2 * world.draw(*x.shape) for x in world.of_base]
    for anchor in old:
        estimator.forget(anchor)
        world.sample(20).teach(estimator)
    sample = world.sample(20)
    assert error(given(estimator.estimate(sample.place)), sample.deviation) < 0.5


def test_layers_that_do_not_deviate_are_left_alone(world: World) -> None:
    """Found by what they do: layer 0 of this world, up to rounding; and the last one when it is made so."""
    estimator = Ridge()
    for _ in range(6):
        sample = world.sample(12)
        keys, values = list(sample.deviation.keys), list(sample.deviation.values)
        keys[0], values[2] = 1e-4 * world.draw(*keys[0].shape), torch.zeros_like(values[2])
        keys[2] = torch.zeros_like(keys[2])
        replace(sample, deviation=PlainKV(tuple(keys), tuple(values))).teach(estimator)
    deviation = given(estimator.estimate(world.sample(12).place))
    assert [bool(deviation.rows(layer).any()) for layer in range(3)] == [False, True, False]


def test_a_layer_whose_values_alone_deviate_is_not(world: World) -> None:
    estimator = Ridge()
    for _ in range(6):
        sample = world.sample(12)
        keys = tuple(map(torch.zeros_like, sample.deviation.keys))
        base = PlainKV(tuple(1000 * k for k in sample.place.base.keys), sample.place.base.values)
        place = replace(sample.place, source=base)
        replace(sample, place=place, deviation=PlainKV(keys, sample.deviation.values)).teach(estimator)
    deviation = given(estimator.estimate(replace(place, context=world.draw(5))))
    assert bool(deviation.values[1].any())


def test_collinear_features(world: World, error: Error) -> None:
    """Every channel of the base twice, and contexts that are all the same."""
    estimator = Ridge(lam=1e-4)
    for number in range(30):
        sample = world.sample(20)
        base = sample.place.base.map(lambda x: torch.cat([x[:, ::2], x[:, ::2]], dim=1))
        place = replace(sample.place, source=base, context=torch.full((5,), 3.0))
        doubled = replace(sample, place=place, deviation=base.map(lambda x: 2 * x + 1))
        if number < 29:
            anchor = replace(doubled.anchor(), producer_context=np.full(1, number, np.int32))
            estimator.learn(anchor, place.base, doubled.deviation)
    assert error(given(estimator.estimate(place)), doubled.deviation) < 0.01


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_low_rank_is_nearly_the_best_of_that_rank(world: World, error: Error, rank: int) -> None:
    """Against truncated SVD of what full rank predicts for the very tokens that were learned, keys and values each on their
    own scale: not more than 1 % more is lost.
    """
    full, low = Ridge(growth=1), Ridge(growth=1, rank=rank)
    samples = [world.sample(20) for _ in range(20)]
    for sample in samples:
        for each in (full, low):
            sample.teach(each)
    for layer in (1, 2):
        rows = [
            np.concatenate([given(each.estimate(s.place)).rows(layer).double().numpy() for s in samples])
            for each in (full, low)
        ]
        keys = samples[0].place.base.keys[layer].shape[1]
        _, y = stacked(samples, layer)
        variances = ((y - y.mean(0)) ** 2).mean(0)
        size = np.sqrt(np.concatenate([np.full(len(v), v.mean()) for v in np.split(variances, [keys])]))
        predicted, kept = ((r - rows[0].mean(0)) / size for r in rows)
        u, s, vt = np.linalg.svd(predicted, full_matrices=False)
        best = np.linalg.norm(predicted - (u[:, :rank] * s[:rank]) @ vt[:rank])
        assert np.linalg.norm(predicted - kept) <= 1.01 * best + 1e-3


def test_wide_bases_and_contexts_are_projected(world: World, error: Error) -> None:
    """With fewer features than this world has, less is explained, but much still is."""
    left = []
    estimators = [Ridge(lam=1e-3), Ridge(lam=1e-3, width=4, context_width=4)]
    samples = [world.sample(20) for _ in range(41)]
    for each in estimators:
        for sample in samples[:40]:
            sample.teach(each)
        left.append(error(given(each.estimate(samples[40].place)), samples[40].deviation))
    assert left[0] < left[1] < 0.8


def test_doubt_grows_with_what_was_never_seen(world: World) -> None:
    """A run whose base is ten times larger than every anchor's."""
    estimator = Ridge()
    for _ in range(20):
        world.sample(20).teach(estimator)
    place = world.sample(20).place
    far = replace(place, source=place.base.map(lambda x: 10 * x))
    assert doubt(estimator.estimate(far)) > 2 * doubt(estimator.estimate(place))


def test_a_context_that_is_not_finite_teaches_nothing(world: World) -> None:
    estimator = Ridge(min_anchors=1)
    sample = world.sample(12)
    replace(sample, place=replace(sample.place, context=torch.full((5,), torch.nan))).teach(estimator)
    assert estimator.estimate(world.sample(12).place) is None


@pytest.mark.parametrize(
    "options",
    [{"lam": 0.0}, {"slot_lam": -1.0}, {"rank": 0}, {"width": 0}, {"min_anchors": 0}, {"growth": 0.5}, {"lam": float("nan")}],
)
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be positive"):
        Ridge(**options)
