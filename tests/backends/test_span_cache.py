"""The cache as a cache, step for step against transformers' own layers; and the pool of its buffers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcomm.backends.span_cache import BufferPool, LayerShape, SpanCache, SpanLayer


def shape(window: int | None = None) -> LayerShape:
    return LayerShape(2, 6, 4, torch.float32, torch.device("cpu"), window)


def layer_of(window: int | None, tokens: int = 8) -> SpanLayer:
    return SpanLayer(shape(window).buffers(tokens), window)


def some_kv(tokens: int, rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 6, generator=generator), torch.randn(rows, 2, tokens, 4, generator=generator)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 9)),
        st.tuples(st.just("draft"), st.integers(1, 5)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("select"), st.integers(0, 5)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, window=st.sampled_from([None, 4]))
def test_steps_equal_transformers_layers(steps: list[tuple[str, int]], window: int | None) -> None:
    """What queries are shown, mask sizes, length: SpanLayer against DynamicLayer or DynamicSlidingWindowLayer."""
    ours, theirs = layer_of(window), DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    if isinstance(theirs, DynamicSlidingWindowLayer):
        theirs.activate_past_recording()  # so that it can be cropped, as ours always can
    rows = 1
    for i, (step, n) in enumerate([("append", 3), *steps]):
        if step in ("append", "draft"):
            sizes = ours.get_mask_sizes(n), theirs.get_mask_sizes(n)
            assert sizes[0] == sizes[1]
            shown, expected = (layer.update(*some_kv(n, rows, i)) for layer in (ours, theirs))
            assert sizes[0][0] == shown[0].shape[2]
            for a, b in zip(shown, expected, strict=True):
                assert torch.equal(a, b[:, :, -a.shape[2] :])
            for layer in (ours, theirs):  # once per forward, as assisted decoding does
                layer.crop(1 - n if step == "draft" else 0)
        elif step == "repeat" and rows < 5:
            rows *= n
            ours.batch_repeat_interleave(n)
            theirs.batch_repeat_interleave(n)
        elif step in ("reorder", "select"):
            order: Any = (torch.arange(rows) + n) % rows
            for layer in (ours, theirs):
                (layer.reorder_cache if step == "reorder" else layer.batch_select_indices)(order)
        assert ours.get_seq_length() == theirs.get_seq_length()
    if window is None:
        assert theirs.keys is not None
        assert theirs.values is not None
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def test_a_sliding_layer_keeps_everything_and_shows_its_window() -> None:
    layer, (k, v) = layer_of(4), some_kv(20)
    layer.update(k[:, :, :19], v[:, :, :19])
    shown, _ = layer.update(k[:, :, 19:], v[:, :, 19:])
    assert torch.equal(shown, k[:, :, 16:])
    assert torch.equal(layer.keys, k)
    assert torch.equal(layer.values, v)
    assert layer.is_sliding
    assert not layer_of(None).is_sliding


def test_growing_keeps_what_is_cached() -> None:
    layer, (k, v) = layer_of(None, tokens=4), some_kv(50)
    for i in range(50):
        layer.update(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert torch.equal(layer.keys, k)
    assert torch.equal(layer.values, v)


def test_scattering_writes_in_place_and_shows_all() -> None:
    layer, (k, v), (new_k, new_v) = layer_of(4, 16), some_kv(12), some_kv(3, seed=9)
    layer.update(k, v)
    at = torch.tensor([1, 5, 11])
    layer.at = at
    shown, shown_v = layer.update(new_k, new_v)
    expected = k.clone()
    expected[:, :, at] = new_k
    assert torch.equal(shown, expected)
    assert torch.equal(shown_v[:, :, at], new_v)
    assert layer.get_seq_length() == 12


def test_older_meaning_of_crop_and_reset() -> None:
    layer = layer_of(None)
    layer.update(*some_kv(7))
    layer.crop(5)
    assert layer.get_seq_length() == 5
    layer.crop(9)
    assert layer.get_seq_length() == 5
    layer.crop(torch.tensor(-2))
    assert type(layer.get_seq_length()) is int
    assert layer.get_seq_length() == 3
    layer.at = torch.tensor([0])
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.at is None


def test_a_dense_prefill_may_have_several_rows() -> None:
    layer = layer_of(None)
    k, v = some_kv(5, rows=3)
    shown, _ = layer.update(k, v)
    assert torch.equal(shown, k)


def test_the_cache_is_true_when_it_holds_tokens() -> None:
    cache = BufferPool([shape()] * 2).take(10)
    assert not cache
    assert len(cache) == 2
    cache.set_length(3)
    assert cache
    assert cache.rows == 1
    cache.reset()
    assert not cache


def storage(cache: SpanCache) -> set[int]:
    return {x.untyped_storage().data_ptr() for layer in cache.layers for x in (layer.k, layer.v)}


def test_buffers_come_back_and_their_last_cache_cannot_reach_them() -> None:
    pool = BufferPool([shape(), shape(4)])
    cache = pool.take(300)
    assert 300 <= cache.capacity < 600
    first = storage(cache)
    assert len(first) == 4
    cache.update(*some_kv(3), 0)
    cache.filled, cache.made_at = [(0, 3)], 3
    pool.give(cache)
    again = pool.take(200)
    assert storage(again) == first
    assert (again.get_seq_length(), again.filled, again.made_at, again.armed) == (0, [], 0, None)
    again.layers[0].k.zero_()
    cache.update(*some_kv(3, seed=4), 0)  # the stale holder
    assert not again.layers[0].k.any()


def test_no_buffer_is_given_twice() -> None:
    pool = BufferPool([shape()])
    a, b = pool.take(10), pool.take(10)
    assert not storage(a) & storage(b)
    pool.give(a)
    c, d = pool.take(10), pool.take(10)
    assert not storage(c) & storage(d)


def test_giving_back_twice_gives_once() -> None:
    pool = BufferPool([shape()])
    cache = pool.take(10)
    pool.give(cache)
    pool.give(cache)
    a, b = pool.take(10), pool.take(10)
    assert not storage(a) & storage(b)
    assert min(a.capacity, b.capacity) >= 10


def test_the_pool_keeps_the_largest_and_serves_the_smallest_that_fits() -> None:
    pool = BufferPool([shape()], keep=2)
    caches = [pool.take(tokens) for tokens in (100, 3000, 1000)]
    small, large, middle = (storage(c) for c in caches)
    for cache in caches:
        pool.give(cache)
    assert storage(pool.take(900)) == middle
    assert storage(pool.take(900)) == large
    assert storage(pool.take(90)) not in (small, middle, large)


def test_the_pool_is_bounded_in_bytes() -> None:
    """256 tokens of `shape()` are 2 heads x 10 numbers x 4 bytes each: 20,480 bytes."""
    pool = BufferPool([shape()], keep=3, keep_bytes=3 * 20_480)
    caches = [pool.take(tokens) for tokens in (10, 10, 500, 1000)]
    small, _, middle, large = (storage(c) for c in caches)
    for cache in caches:
        pool.give(cache)
    assert storage(pool.take(1000)) != large, "larger than the bound alone"
    assert storage(pool.take(300)) == middle
    assert storage(pool.take(10)) == small
    assert pool.take(0).capacity == 0, "beside the larger one there was room for one"


@pytest.mark.parametrize("change", ["batch_repeat_interleave", "inference"])
def test_buffers_of_beams_and_of_inference_mode_are_not_kept(change: str) -> None:
    pool = BufferPool([shape()])
    cache: Any = pool.take(10)
    if change == "inference":
        with torch.inference_mode():
            cache.reorder_cache(torch.tensor([0]))
    else:
        cache.batch_repeat_interleave(3)
    theirs = storage(cache)
    pool.give(cache)
    again = pool.take(10)
    assert storage(again) != theirs
    assert again.rows == 1
