"""Means, against numpy over the stacked deviations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from kvcomm.errors import InputError
from kvcomm.estimators import Mean, Place
from kvcomm.plain import PlainKV

if TYPE_CHECKING:
    from tests.estimators.conftest import Sample, World

Rows = npt.NDArray[np.float64]


def rows(kv: PlainKV | None) -> Rows:
    """[tokens, channels], layer after layer."""
    assert kv is not None
    return np.concatenate([kv.rows(layer).double().numpy() for layer in range(kv.layers)], axis=1)


def by_numpy(samples: list[Sample], place: Place, shrink: float) -> tuple[Rows, Rows]:
    seen = np.concatenate([rows(s.deviation) for s in samples])
    ids = np.concatenate([s.place.ids for s in samples])
    common = seen.sum(0) / (len(seen) + shrink)
    variance = ((seen - seen.mean(0)) ** 2).sum(1).mean()
    out, doubt = [], []
    for token in place.ids:
        own = seen[ids == token]
        spread = ((own - own.mean(0)) ** 2).sum() if len(own) else 0.0
        out.append((own.sum(0) + shrink * common) / (len(own) + shrink))
        doubt.append(np.sqrt((spread + shrink * variance) / (len(own) + shrink)))
    return np.array(out), np.array(doubt)


@pytest.mark.parametrize("shrink", [0.5, 1.0, 10.0])
def test_equals_numpy(world: World, shrink: float) -> None:
    """After every anchor, tokens seen and unseen, repeated within a run and not."""
    estimator, samples = Mean(shrink), []
    place = world.sample(30).place
    for _ in range(6):
        samples.append(world.sample(11))
        samples[-1].teach(estimator)
        estimate = estimator.estimate(place)
        assert estimate is not None
        deviation, doubt = by_numpy(samples, place, shrink)
        np.testing.assert_allclose(rows(estimate.deviation), deviation, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(estimate.doubt.numpy(), doubt, rtol=1e-4, atol=1e-4)


def test_forgetting_is_the_inverse_of_learning(world: World) -> None:
    """What is left equals what was never told of the rest."""
    samples = [world.sample(11) for _ in range(9)]
    estimator, fresh = Mean(), Mean()
    anchors = [sample.teach(estimator) for sample in samples]
    for anchor in anchors[:6]:
        estimator.forget(anchor)
    for sample in samples[6:]:
        sample.teach(fresh)
    place = world.sample(30).place
    left, told = estimator.estimate(place), fresh.estimate(place)
    assert left is not None
    assert told is not None
    np.testing.assert_allclose(rows(left.deviation), rows(told.deviation), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shrink", [0.0, -1.0, float("nan")])
def test_refuses_no_shrinkage(shrink: float) -> None:
    with pytest.raises(InputError, match="more than 0"):
        Mean(shrink)
