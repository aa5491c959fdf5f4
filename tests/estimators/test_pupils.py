"""Estimators that follow a pool: told what it holds, apart by tenant, gone with its anchors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvcomm.anchors.pool import AnchorPool
from kvcomm.estimators import Mean
from kvcomm.estimators.pupils import Pupils

if TYPE_CHECKING:
    from tests.estimators.conftest import World


def test_follow_a_pool(world: World) -> None:
    """What a pool holds is learned when they subscribe, later anchors as they come, and what leaves is forgotten."""
    pool, samples = AnchorPool(1 << 20), [world.sample(8) for _ in range(3)]
    anchors = [replace(sample.anchor(), tenant="t") for sample in samples]
    for anchor in anchors[:2]:
        pool.add(anchor)
    pupils = Pupils(lambda: "model", Mean)
    pool.subscribe(pupils)
    pool.add(anchors[2])
    alone = Mean()
    for anchor, sample in zip(anchors, samples, strict=True):
        alone.learn(anchor, sample.place.base, sample.deviation)
    place = world.sample(4).place
    found, expected = pupils.estimate("t", place), alone.estimate(place)
    assert found is not None
    assert expected is not None
    assert found.deviation is not None
    assert expected.deviation is not None
    assert all(bool((a == b).all()) for a, b in zip(found.deviation.values, expected.deviation.values, strict=True))
    for anchor in anchors:
        pool.remove(anchor.key)
    assert pupils.estimate("t", place) is None
    assert not pool.stats().faults


def test_bounded(world: World) -> None:
    """Two tenants fit: the one not needed for longest leaves, and is served again when it has learned again."""
    pupils = Pupils(lambda: "model", Mean, tenants=2)

    def teach(tenant: str) -> None:
        for _ in range(3):
            pupils.learn(replace(world.sample(8).anchor(), tenant=tenant))

    place = world.sample(4).place
    teach("a")
    teach("b")
    assert pupils.estimate("a", place) is not None
    teach("c")
    assert [pupils.estimate(tenant, place) is not None for tenant in "abc"] == [True, False, True]
    teach("b")
    assert pupils.estimate("b", place) is not None


def test_apart_by_tenant_and_model(world: World) -> None:
    pupils = Pupils(lambda: "model", Mean)
    for _ in range(3):
        pupils.learn(replace(world.sample(8).anchor(), tenant="a"))
        pupils.learn(replace(world.sample(8).anchor(), tenant="b", fingerprint="another"))
    place = world.sample(4).place
    assert pupils.estimate("a", place) is not None
    assert pupils.estimate("b", place) is None
    assert pupils.estimate("", place) is None
