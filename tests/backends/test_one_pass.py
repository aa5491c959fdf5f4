"""The pass and what goes into it, in float32, against plain transformers forwards over the same prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache

from kvcomm.errors import CacheFault
from kvcomm.rope import relative
from kvcomm.segments import SegmentKV, Span

if TYPE_CHECKING:
    from tests.backends.conftest import Case

N = 72  # as in conftest
PLACES = ((0, 20), (22, 40), (40, 61))  # known in the same place; the rest is recomputed
SEAMS = torch.tensor([7, 20, 21, 40, 41, *range(61, N)])  # and a few known ones again


def test_recomputing_everything_equals_dense(case: Case) -> None:
    cache = case.backend.cache(N)
    logits = case.backend.run(cache, case.ids, torch.arange(N))
    torch.testing.assert_close(logits, case.logits[-1], rtol=0, atol=1e-4)
    for layer, keys, values in zip(cache.layers, case.kv.keys, case.kv.values, strict=True):
        torch.testing.assert_close(layer.keys[0], keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values[0], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("recompute", [SEAMS, torch.arange(61, N), torch.tensor([N - 1])], ids=["seams", "suffix", "last"])
def test_reuse_in_the_same_place_equals_dense(case: Case, recompute: Tensor) -> None:
    known = PLACES if len(recompute) > 11 else ((0, int(recompute[0])),)
    cache = case.cache(case.same_place(*known))
    logits = case.backend.run(cache, case.ids, recompute)
    torch.testing.assert_close(logits, case.logits[-1], rtol=0, atol=1e-4)
    read = case.backend.read(cache, 0, N, N)
    for ours, theirs in zip((*read.keys, *read.values), (*case.kv.keys, *case.kv.values), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_greedy_text_is_the_same(case: Case) -> None:
    cache = case.cache(case.same_place(*PLACES))
    case.backend.arm(cache, case.ids, SEAMS)
    with case.backend.hooked():
        shared = case.generate(cache)
    assert torch.equal(shared, case.generate())


def foreign(case: Case) -> tuple[list[tuple[Span, SegmentKV]], Tensor]:
    """Random parts of two other prompts at random places of this one, and every position not covered or at a span's start."""
    rng = np.random.default_rng(5)
    others = [case.dense(case.prompt(21, 50))[0], case.dense(case.prompt(22, 30))[0]]  # beyond and below the switch of 40
    spans, position = [], int(rng.integers(0, 4))
    while position < N - 8:
        kv = others[int(rng.integers(2))]
        tokens = int(rng.integers(3, 16))
        end = min(position + tokens, N - 3)
        spans.append((case.span(position, end, int(rng.integers(kv.tokens - tokens))), kv))
        position = end + int(rng.integers(0, 4))
    again = torch.ones(N, dtype=torch.bool)
    for each, _ in spans:
        again[each.start + 1 : each.end] = False
    return spans, again.nonzero()[:, 0]


def one_after_the_other(case: Case, cache: tuple[list[Tensor], list[Tensor]], recompute: Tensor) -> Tensor:
    """Plain transformers, a plain cache and one token per forward; a second row at the last position makes ropes that follow
    the length use the tables of the whole prompt. Changes the K and V [heads, N, dim] in `cache`; returns the last logits.
    """
    case.reset(case.model)
    for r in recompute.tolist():
        past = DynamicCache()
        for i, (k, v) in enumerate(zip(*cache, strict=True)):
            past.update(k[None, :, :r].repeat(2, 1, 1, 1), v[None, :, :r].repeat(2, 1, 1, 1), i)
        with torch.no_grad():
            ids = case.ids[:, r : r + 1].repeat(2, 1)
            logits = case.model(
                input_ids=ids, position_ids=torch.tensor([[r], [N - 1]]), past_key_values=past, use_cache=True
            ).logits
        for i, layer in enumerate(past.layers):
            cache[0][i][:, r], cache[1][i][:, r] = layer.keys[0, :, r], layer.values[0, :, r]  # type: ignore[union-attr,index]  # as in conftest
    last: Tensor = logits[0, -1]
    return last


def test_pass_equals_one_token_after_the_other(case: Case) -> None:
    spans, recompute = foreign(case)
    cache = case.cache(spans)
    before = [layer.k[0, :, :N].clone() for layer in cache.layers], [layer.v[0, :, :N].clone() for layer in cache.layers]
    logits = case.backend.run(cache, case.ids, recompute)
    expected = one_after_the_other(case, before, recompute)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for layer, keys, values in zip(cache.layers, *before, strict=True):
        torch.testing.assert_close(layer.keys[0], keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(layer.values[0], values, rtol=0, atol=1e-4)
    assert relative(logits, case.logits[-1]) > 1e-3  # or nothing foreign was there


def moved_in(case: Case, *, rotate: bool) -> Tensor:
    """Layer-0 keys [heads, 24, dim] of a span moved from place 3 of a prompt of 30 to place 40 of one of N."""
    kv, _ = case.dense(torch.cat([case.prompt(9, 3), case.ids[:, 40:64], case.prompt(10, 3)], dim=1))
    cache = case.backend.cache(N)
    case.backend.fill(cache, N, [(case.span(40, 64, 3), kv)], rotate=rotate)
    return cache.layers[0].k[0, :, 40:64]


def test_first_layer_keys_of_a_moved_span_equal_dense(case: Case) -> None:
    torch.testing.assert_close(moved_in(case, rotate=True), case.kv.keys[0][:, 40:64], rtol=0, atol=1e-5)


def test_without_rotation_they_do_not(case: Case) -> None:
    assert relative(moved_in(case, rotate=False), case.kv.keys[0][:, 40:64]) > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3", "glm", "phi3-longrope"])
def test_low_precision_is_copied_bit_for_bit_in_the_same_place(make: Callable[..., Case], family: str) -> None:
    case = make(family, torch.bfloat16)
    cache = case.cache(case.same_place(*PLACES))
    for layer, keys, values in zip(cache.layers, case.kv.keys, case.kv.values, strict=True):
        assert keys.dtype == torch.bfloat16
        for a, b in PLACES:
            assert torch.equal(layer.k[0, :, a:b], keys[:, a:b])
            assert torch.equal(layer.v[0, :, a:b], values[:, a:b])
    torch.testing.assert_close(case.backend.run(cache, case.ids, SEAMS), case.logits[-1], rtol=0, atol=0.1)


def test_tables_below_the_switch_are_one(make: Callable[..., Case]) -> None:
    """A longrope span captured in 20 tokens and served in 35, both short, is not touched; served in N it is turned in place."""
    case = make("phi3-longrope")
    kv, _ = case.dense(case.ids[:, :20])
    cache = case.cache([(case.span(0, 20), kv)], 35)
    assert torch.equal(cache.layers[0].k[0, :, :20], kv.keys[0])
    cache = case.cache([(case.span(0, 20), kv)], N)
    torch.testing.assert_close(cache.layers[0].k[0, :, :20], case.kv.keys[0][:, :20], rtol=0, atol=1e-5)
    assert relative(cache.layers[0].k[0, :, :20], kv.keys[0]) > 0.1


def test_a_hole_is_refused(llama: Case) -> None:
    cache = llama.cache(llama.same_place((0, 20), (21, 60)))
    with pytest.raises(CacheFault, match="token 20 of 72 is neither known nor recomputed"):
        llama.backend.arm(cache, llama.ids, torch.arange(60, N))


def test_the_last_token_is_always_recomputed_and_order_kept(llama: Case) -> None:
    for wrong in (torch.tensor([20, 21]), torch.tensor([21, 20, N - 1]), torch.tensor([20, 20, N - 1])):
        with pytest.raises(AssertionError):
            llama.backend.arm(llama.cache(llama.same_place((0, N))), llama.ids, wrong)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral-sliding"])
def test_both_attentions(make: Callable[..., Case], family: str, attention: str) -> None:
    case = make(family, attn_implementation=attention)
    assert case.model.config._attn_implementation == attention
    logits = case.backend.run(case.cache(case.same_place(*PLACES)), case.ids, SEAMS)
    torch.testing.assert_close(logits, case.logits[-1], rtol=0, atol=1e-4)


def test_attention_that_cannot_mask_by_position_is_swapped_for_one_forward(make: Callable[..., Case]) -> None:
    """An attention named flex..., which fails when it is used, against sdpa; also when the forward fails."""
    case = make("llama")
    config = case.model.config

    def refuse(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    AttentionInterface.register("flex_of_a_test", refuse)
    try:
        cache = case.cache(case.same_place(*PLACES))
        config._attn_implementation = "flex_of_a_test"
        torch.testing.assert_close(case.backend.run(cache, case.ids, SEAMS), case.logits[-1], rtol=0, atol=1e-4)
        assert config._attn_implementation == "flex_of_a_test"

        case.model.lm_head.forward = refuse
        with pytest.raises(ZeroDivisionError):
            case.backend.run(case.cache(case.same_place(*PLACES)), case.ids, SEAMS)
        assert config._attn_implementation == "flex_of_a_test"
    finally:
        AttentionInterface._global_mapping.pop("flex_of_a_test")


def test_older_model_code_is_told_the_positions(llama: Case) -> None:
    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.arm(cache, llama.ids, SEAMS)
    assert cache.armed is not None
    last = {"input_ids": llama.ids[:, -1:]}
    assert "cache_position" not in cache.armed.begin(last)
    assert torch.equal(cache.armed.begin({**last, "cache_position": torch.tensor([N - 1])})["cache_position"], SEAMS)


def test_run_continues_a_used_cache(llama: Case) -> None:
    """Ten tokens appended, three before them recomputed, against dense over all."""
    cache = llama.cache(llama.same_place(*PLACES))
    llama.backend.run(cache, llama.ids, SEAMS)
    longer = torch.cat([llama.ids, llama.prompt(30, 10)], dim=1)
    logits = llama.backend.run(cache, longer, torch.tensor([50, 51, 52, *range(N, N + 10)]))
    torch.testing.assert_close(logits, llama.dense(longer)[1][-1], rtol=0, atol=1e-4)


def test_cached_keys_of_other_tables_are_not_continued(make: Callable[..., Case]) -> None:
    case = make("llama-dynamic")
    cache = case.cache(case.same_place((0, N - 1)))
    case.backend.run(cache, case.ids, torch.tensor([N - 1]))
    with pytest.raises(CacheFault, match="rotary tables of 72 tokens do not fit a sequence of 74"):
        case.backend.arm(cache, torch.cat([case.ids, case.prompt(30, 2)], dim=1), torch.arange(N, N + 2))


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3-longrope"])
def test_fill_and_read_change_nothing_of_the_model(make: Callable[..., Case], family: str) -> None:
    case = make(family)
    case.dense(case.prompt(31, 60))  # leaves the tables of 60 tokens behind
    before = {name: x.clone() for name, x in (*case.model.named_parameters(), *case.model.named_buffers())}
    cache = case.cache(case.same_place(*PLACES))
    cache.set_length(20)
    case.backend.read(cache, 3, 9, N)
    after = dict((*case.model.named_parameters(), *case.model.named_buffers()))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
