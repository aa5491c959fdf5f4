"""One estimator behind another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvcomm.estimators import Estimate, Fallback, Knn, Mean, Place, Ridge

if TYPE_CHECKING:
    from tests.estimators.conftest import World


def values(estimate: Estimate | None) -> torch.Tensor:
    assert estimate is not None
    assert estimate.deviation is not None
    return torch.cat(estimate.deviation.values, dim=1)


def test_asks_the_next_where_one_does_not_know(world: World) -> None:
    """By the number of anchors: none, 1 (mean), 2 to 4 (knn), 5 (ridge); and back when they are forgotten."""
    chain = Fallback(Ridge(min_anchors=5), Fallback(Knn(), Mean()))
    ridge, knn, mean = Ridge(min_anchors=5), Knn(), Mean()
    assert chain.name == "ridge>knn>mean"
    place: Place = world.sample(9).place
    assert chain.estimate(place) is None
    anchors = []
    for number in range(1, 7):
        sample = world.sample(12)
        anchors.append(sample.teach(chain))
        for each in (ridge, knn, mean):
            sample.teach(each)
        expected = mean if number == 1 else knn if number < 5 else ridge
        torch.testing.assert_close(values(chain.estimate(place)), values(expected.estimate(place)))
    for anchor in anchors:
        chain.forget(anchor)
    assert chain.estimate(place) is None
