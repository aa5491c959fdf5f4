"""Select against the plain ridge whose doubt it is, and against a world in which some tokens cannot be foreseen."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from kvcomm.anchors.anchor import Anchor
from kvcomm.estimators import Place, Ridge
from kvcomm.estimators.select import Select
from kvcomm.plain import PlainKV

if TYPE_CHECKING:
    from tests.estimators.conftest import Sample, World


def keyed(place: Place, key: str) -> Place:
    return replace(place, key=key)


def unwanted() -> PlainKV:
    raise AssertionError("the base was asked for")


def test_doubts_what_cannot_be_foreseen(world: World) -> None:
    """Some tokens deviate at random too, those with a positive first key: they are the ones doubted most."""

    def seen(sample: Sample) -> Sample:
        loud = 8.0 * (sample.place.base.keys[1][:, :1] > 0)
        noise = [torch.zeros_like(sample.deviation.rows(0)), *(world.draw(*sample.deviation.rows(i).shape) for i in (1, 2))]
        keys, values = sample.deviation.keys, sample.deviation.values
        louder = PlainKV(
            tuple(k + loud * n[:, : k.shape[1]] for k, n in zip(keys, noise, strict=True)),
            tuple(v + loud * n[:, -v.shape[1] :] for v, n in zip(values, noise, strict=True)),
        )
        return replace(sample, deviation=louder)

    select = Select()
    for _ in range(150):
        seen(world.sample(16)).teach(select)
    place = world.sample(200, "elsewhere").place
    found = select.estimate(place)
    assert found is not None
    assert found.deviation is None
    loud = place.base.keys[1][:, 0] > 0
    worst = found.doubt.topk(50).indices
    assert loud[worst].float().mean() > 0.9 > loud.float().mean() + 0.3


def test_none_below_min_anchors_over_all_slots(world: World) -> None:
    select = Select(min_anchors=4)
    for slot in ("a", "b", "c"):
        world.sample(12, slot).teach(select)
    assert select.estimate(world.sample(5, "a").place) is None
    world.sample(12, "d").teach(select)
    assert select.estimate(world.sample(5, "never seen").place) is not None


def test_what_the_last_taught_stays(world: World) -> None:
    """In a pool with room for one anchor, each is forgotten when the next one comes: there is an estimate all the same."""
    select, place = Select(min_anchors=4), world.sample(5).place
    anchors: list[Anchor] = []
    for i in range(12):
        anchors.append(world.sample(12).teach(select))
        if i:
            select.forget(anchors[i - 1])
        assert (select.estimate(place) is not None) == (i >= 3)
    assert list(select._ridge._learned) == [anchor.key for anchor in anchors[4:]]
    assert list(select._left) == [anchor.key for anchor in anchors[4:11]]


def test_what_comes_back_is_not_forgotten(world: World) -> None:
    select = Select(min_anchors=1)
    sample = world.sample(12)
    anchor = sample.teach(select)
    select.forget(anchor)
    sample.teach(select)
    for _ in range(4):
        world.sample(12).teach(select)
    assert anchor.key in select._ridge._learned


def test_the_same_with_and_without_what_is_kept(world: World) -> None:
    """A base seen before is not asked for again, and the doubt behind a new context is that of a fresh ridge."""
    select, ridge = Select(), Ridge(width=64, context_width=64, places=6, min_anchors=20, one=True)
    for _ in range(20):
        sample = world.sample(12)
        sample.teach(select)
        sample.teach(ridge)
    place = keyed(world.sample(9).place, "p")
    select.estimate(place)
    elsewhere = replace(place, source=unwanted, context=world.draw(len(place.context)))
    again, expected = select.estimate(elsewhere), ridge.estimate(replace(elsewhere, source=place.base))
    assert again is not None
    assert expected is not None
    torch.testing.assert_close(again.doubt, expected.doubt)


def test_what_is_kept_goes_with_the_fit(world: World) -> None:
    """Anchors that lead to another fit make what was kept worthless."""
    select = Select(min_anchors=5)
    for _ in range(5):
        world.sample(12).teach(select)
    place = keyed(world.sample(9).place, "p")
    before = select.estimate(place)
    for _ in range(10):
        world.sample(12).teach(select)
    with pytest.raises(AssertionError, match="asked for"):
        select.estimate(replace(place, source=unwanted))
    after = select.estimate(place)
    assert before is not None
    assert after is not None
    assert not torch.allclose(before.doubt, after.doubt)


def test_bounded(world: World) -> None:
    """Two places fit; the one not used for longest leaves. A place without a key is never kept."""
    select = Select(min_anchors=5, keep_bytes=2 * 9 * 2 * 17 * 4)  # 2 places of 9 tokens, 2 layers that deviate, float32
    for _ in range(5):
        world.sample(12).teach(select)
    places = {key: keyed(world.sample(9).place, key) for key in ("p", "q", "r")}
    for key in ("p", "q", "p", "r"):
        select.estimate(places[key])
    for key in ("p", "r"):
        assert select.estimate(replace(places[key], source=unwanted)) is not None
    with pytest.raises(AssertionError, match="asked for"):
        select.estimate(replace(places["q"], source=unwanted))
    select.estimate(keyed(places["p"], ""))
    with pytest.raises(AssertionError, match="asked for"):
        select.estimate(replace(places["p"], key="", source=unwanted))
