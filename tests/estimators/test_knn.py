"""Neighbours, against a brute-force loop over all anchor tokens in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from kvcomm.anchors.index import ExactIndex
from kvcomm.errors import InputError
from kvcomm.estimators import Knn, Place
from kvcomm.plain import PlainKV

if TYPE_CHECKING:
    from tests.estimators.conftest import Sample, World

Rows = npt.NDArray[np.float64]


def rows(kv: PlainKV | None) -> Rows:
    """[tokens, channels], keys of every layer first."""
    assert kv is not None
    return np.concatenate([x.double().numpy() for x in (*kv.keys, *kv.values)], axis=1)


def seen(place: Place, first: Place, context_weight: float) -> Rows:
    """Base of all layers, keys and values of each at unit variance in the first anchor, and the context. Not projected."""
    parts = []
    for mine, theirs in zip((*place.base.keys, *place.base.values), (*first.base.keys, *first.base.values), strict=True):
        variance = float(((theirs - theirs.mean(0)) ** 2).mean())
        parts.append(mine.double().numpy() / variance**0.5)
    base = np.concatenate(parts, axis=1) / sum(x.shape[1] for x in parts) ** 0.5
    context = place.context.double().numpy() * context_weight / float(first.context.norm())
    return np.concatenate([base, np.tile(context, (len(base), 1))], axis=1)


def by_brute_force(samples: list[Sample], place: Place, k: int, context_weight: float, temperature: float) -> tuple[Rows, Rows]:
    first = samples[0].place
    known = np.concatenate([seen(s.place, first, context_weight) for s in samples])
    deviations = np.concatenate([rows(s.deviation) for s in samples])
    out, doubt = [], []
    for query in seen(place, first, context_weight):
        distances = np.sqrt(((known - query) ** 2).sum(1))
        nearest = np.argsort(distances, kind="stable")[:k]
        scores = np.exp(-distances[nearest] / (temperature * distances[nearest].mean() + 1e-9))
        weights = scores / scores.sum()
        mean = weights @ deviations[nearest]
        out.append(mean)
        doubt.append(np.sqrt(weights @ ((deviations[nearest] - mean) ** 2).sum(1)))
    return np.array(out), np.array(doubt)


@pytest.mark.parametrize(("k", "anchors"), [(1, 5), (8, 5), (3, 2), (40, 2)])
def test_equals_brute_force(world: World, k: int, anchors: int) -> None:
    """Fewer neighbours than asked for among them; `dim` is so large that nothing is projected."""
    estimator = Knn(k=k, dim=1000)
    samples = [world.sample(9) for _ in range(anchors)]
    for sample in samples:
        sample.teach(estimator)
    place = world.sample(14).place
    estimate = estimator.estimate(place)
    assert estimate is not None
    deviation, doubt = by_brute_force(samples, place, k, estimator.context_weight, estimator.temperature)
    np.testing.assert_allclose(rows(estimate.deviation), deviation, rtol=2e-3, atol=2e-3)  # float16 is kept
    np.testing.assert_allclose(estimate.doubt.numpy(), doubt, rtol=1e-2, atol=2e-2)


def test_projection_finds_nearly_the_same(world: World) -> None:
    """64 of 1000 random directions are enough to tell which tokens are alike."""
    samples = [world.sample(20) for _ in range(20)]
    exact, projected = Knn(dim=1000), Knn(dim=24)
    for sample in samples:
        for estimator in (exact, projected):
            sample.teach(estimator)
    place = world.sample(30).place
    a, b = exact.estimate(place), projected.estimate(place)
    assert a is not None
    assert b is not None
    difference = np.linalg.norm(rows(a.deviation) - rows(b.deviation)) / np.linalg.norm(rows(a.deviation))
    assert difference < 0.5


def test_exact_on_duplicates(world: World) -> None:
    """A run seen before, behind the same context: every token finds itself, and others far off do not count."""
    samples = [world.sample(12) for _ in range(10)]
    estimator = Knn(k=8, temperature=0.01)
    for sample in samples:
        sample.teach(estimator)
    for sample in samples:
        estimate = estimator.estimate(sample.place)
        assert estimate is not None
        np.testing.assert_allclose(rows(estimate.deviation), rows(sample.deviation), rtol=1e-3, atol=1e-2)
        assert float(estimate.doubt.max()) < 0.5


def test_duplicates_at_other_positions(world: World) -> None:
    """What stood at the end of an anchor now stands at the start."""
    samples = [world.sample(12) for _ in range(5)]
    estimator = Knn(k=1)
    for sample in samples:
        sample.teach(estimator)
    place = samples[2].place
    turned = replace(place, ids=place.ids[::-1].copy(), source=place.base.map(lambda x: x.flip(0)))
    estimate = estimator.estimate(turned)
    assert estimate is not None
    np.testing.assert_allclose(rows(estimate.deviation), rows(samples[2].deviation)[::-1], rtol=1e-3, atol=1e-3)


def test_the_nearest_context_decides_between_equal_tokens(world: World) -> None:
    sample = world.sample(12)
    behind = [replace(sample, place=replace(sample.place, context=world.draw(5))) for _ in range(6)]
    behind = [replace(s, deviation=world.deviation(s.place)) for s in behind]
    estimator = Knn(k=3, temperature=0.05)
    for each in behind:
        each.teach(estimator)
    for each in behind:
        near = replace(each.place, context=each.place.context + 0.02 * world.draw(5))
        estimate = estimator.estimate(near)
        assert estimate is not None
        np.testing.assert_allclose(rows(estimate.deviation), rows(each.deviation), rtol=1e-2, atol=5e-2)


def test_needs_two_anchors(world: World) -> None:
    estimator = Knn()
    world.sample(12).teach(estimator)
    place = world.sample(5).place
    assert estimator.estimate(place) is None
    anchor = world.sample(12).teach(estimator)
    assert estimator.estimate(place) is not None
    estimator.forget(anchor)
    assert estimator.estimate(place) is None


def test_elsewhere(world: World) -> None:
    """Off, a slot without anchors gets none; on, the neighbours of all other slots, but only while it has none."""
    samples = [world.sample(9, slot) for slot in "bcbc"]
    alone, borrowing = Knn(dim=1000), Knn(dim=1000, elsewhere=True)
    for sample in samples:
        for estimator in (alone, borrowing):
            sample.teach(estimator)
    place = world.sample(14).place
    assert alone.estimate(place) is None
    estimate = borrowing.estimate(place)
    assert estimate is not None
    deviation, _ = by_brute_force(samples, place, 8, alone.context_weight, alone.temperature)
    np.testing.assert_allclose(rows(estimate.deviation), deviation, rtol=2e-3, atol=2e-3)
    world.sample(9).teach(borrowing)
    assert borrowing.estimate(place) is None


def test_index_is_of_the_callers_choice(world: World) -> None:
    """One per slot, as wide as a representation, holding every token."""
    made = []

    def index(dim: int) -> ExactIndex:
        made.append(ExactIndex(dim))
        return made[-1]

    estimator = Knn(dim=16, index=index)
    anchors = [world.sample(9, slot).teach(estimator) for slot in "aba"]
    assert [each.dim for each in made] == [16 + 5] * 2
    assert [len(each) for each in made] == [18, 9]
    for anchor in anchors:
        estimator.forget(anchor)
    assert [len(each) for each in made] == [0, 0]


def test_deviations_beyond_float16_are_cut(world: World) -> None:
    estimator = Knn(k=1)
    for _ in range(3):
        sample = world.sample(4)
        replace(sample, deviation=sample.deviation.map(lambda x: x * 1e6)).teach(estimator)
    estimate = estimator.estimate(sample.place)
    assert estimate is not None
    assert np.abs(rows(estimate.deviation)).max() == torch.finfo(torch.float16).max


@pytest.mark.parametrize("options", [{"k": 0}, {"dim": 0}, {"temperature": 0.0}, {"temperature": float("nan")}])
def test_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="more than 0"):
        Knn(**options)
