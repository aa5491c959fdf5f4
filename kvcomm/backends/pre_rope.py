"""K/V out of and into pre-RoPE space: what anchors compare, average and add. Knows nothing of anchors or plans."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomm.backends.span_cache import SpanCache
from kvcomm.plain import PlainKV
from kvcomm.rope import Rope, Tables
from kvcomm.segments import SegmentKV

__all__ = ["add", "correct", "plain"]


@torch.no_grad()
def plain(rope: Rope, kv: SegmentKV, start: int, end: int) -> PlainKV:
    """Tokens [start, end) of `kv`, keys rotated to position 0; float32."""
    steps = torch.arange(start, end, device=kv.keys[0].device)
    turn = rope.turn(rope.tables(torch.zeros_like(steps), kv.length), rope.tables(kv.start + steps, kv.length))
    keys = []
    for layer, cached in enumerate(kv.keys):
        still = torch.empty(cached.shape[0], end - start, cached.shape[2], device=cached.device)
        rope.rotate(layer, cached[:, start:end], turn, still)
        keys.append(_rows(still))
    return PlainKV(tuple(keys), tuple(_rows(values[:, start:end].float()) for values in kv.values))


@torch.no_grad()
def correct(rope: Rope, cache: SpanCache, length: int, start: int, deviation: PlainKV) -> None:
    """Adds `deviation` to the K/V of tokens [start, start + deviation.tokens) in `cache`, keys rotated to their place there."""
    steps = torch.arange(deviation.tokens, device=deviation.keys[0].device)
    turn = rope.turn(rope.tables(start + steps, length), rope.tables(torch.zeros_like(steps), length))
    for i, layer in enumerate(cache.layers):
        add(rope, i, turn, deviation, *(x[0, :, start : start + deviation.tokens] for x in (layer.k, layer.v)))


def add(rope: Rope, layer: int, turn: Tables, deviation: PlainKV, keys: Tensor, values: Tensor) -> None:
    """Adds one layer of `deviation`, its keys rotated by `turn`, to `keys` and `values` [heads, tokens, dim]; in float32."""
    change = _heads(deviation.keys[layer], keys.shape[0])
    turned = torch.empty_like(change)
    rope.rotate(layer, change, turn, turned)
    keys.copy_(keys.float() + turned.to(keys.device))
    values.copy_(values.float() + _heads(deviation.values[layer], values.shape[0]).to(values.device))


def _rows(x: Tensor) -> Tensor:
    """[heads, tokens, dim] -> [tokens, heads * dim]"""
    return x.transpose(0, 1).flatten(1).contiguous()


def _heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads * dim] -> [heads, tokens, dim]"""
    return x.view(x.shape[0], heads, -1).transpose(0, 1).contiguous()
