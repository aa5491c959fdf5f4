"""Corrections at the start of a run only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from kvcomm.errors import InputError
from kvcomm.estimators.edges import Edges
from kvcomm.estimators.mean import Mean
from kvcomm.estimators.select import Select

if TYPE_CHECKING:
    from tests.estimators.conftest import World


@pytest.mark.parametrize("tokens", [1, 4, 50])
def test_corrects_the_first_tokens_as_the_inner_one_does_and_no_others(world: World, tokens: int) -> None:
    edges, inner = Edges(Mean(), tokens), Mean()
    for sample in (world.sample(12) for _ in range(5)):
        sample.teach(edges)
        sample.teach(inner)
    place = world.sample(12).place
    found, expected = edges.estimate(place), inner.estimate(place)
    assert found is not None
    assert found.deviation is not None
    assert expected is not None
    assert expected.deviation is not None
    for layer in range(place.base.layers):
        got, want = found.deviation.rows(layer), expected.deviation.rows(layer)
        assert torch.equal(got[:tokens], want[:tokens])
        assert not got[tokens:].any()
        assert layer == 0 or want[tokens:].any() or tokens >= 12
    assert torch.equal(found.doubt, expected.doubt)


def test_what_corrects_nothing_stays_so(world: World) -> None:
    edges = Edges(Select(min_anchors=5))
    for sample in (world.sample(12) for _ in range(8)):
        sample.teach(edges)
    found = edges.estimate(world.sample(9).place)
    assert found is not None
    assert found.deviation is None


def test_no_edge_is_refused() -> None:
    with pytest.raises(InputError, match="at least 1"):
        Edges(Mean(), 0)
