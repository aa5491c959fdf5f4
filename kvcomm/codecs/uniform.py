"""Uniform quantisation in blocks: x = low + step * code, with one low and one step for each block of a matrix.

Keys per channel and values per token (KVQuant, arXiv 2401.18079), in blocks of at most 64 elements. The numbers of blocks
along both axes are the shape of `low`: restoring needs nothing else. Lows and steps are rounded outwards to bf16 before codes
are chosen, so an element that is not kept apart is off by at most half a step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kvcomm.codecs.base import Kind
from kvcomm.codecs.parts import Shape, highest, keep_apart, put_back, replaced, shape_of

__all__ = ["OUTLIERS", "decode", "encode", "fit", "grid", "quantise", "restore", "scales"]

BLOCK = 64  # elements that share a low and a step, at most
FEW_TOKENS = 16  # with fewer, scales per channel would cost over 2 bits an element: keys are then quantised like values
OUTLIERS = 0.01  # share of elements kept apart, unless told otherwise


def grid(shape: Shape, kind: Kind) -> Shape:
    """Numbers of blocks along both axes."""
    tokens, channels = shape
    if kind == "keys" and tokens >= FEW_TOKENS:
        return math.ceil(tokens / BLOCK), channels
    return tokens, math.ceil(channels / BLOCK)


def quantise(x: Tensor, blocks: Shape, bits: int, share: float) -> dict[str, Tensor]:
    """What `restore` needs; a `share` of the elements is kept apart."""
    rest, parts = fit(x, blocks, bits, share)
    return {**parts, "codes": encode(rest, *scales(parts, shape_of(x)), bits)}


def restore(parts: Mapping[str, Tensor], shape: Shape, bits: int) -> Tensor:
    """float32 [rows, columns], close to what `quantise` took."""
    return put_back(decode(parts["codes"], *scales(parts, shape), bits), parts)


def fit(x: Tensor, blocks: Shape, bits: int, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The rest of `x` without the elements kept apart; the parts that hold these and every block's low and step."""
    apart, rest = _outliers(x, blocks, share) if share else ({}, x)
    lowest, largest = _blocked(rest, blocks).aminmax(dim=-1)
    low = -_up(-lowest)
    return rest, {**apart, "low": low, "step": _up((largest - low.float()) / _levels(bits))}


def _outliers(x: Tensor, blocks: Shape, share: float) -> tuple[dict[str, Tensor], Tensor]:
    """The parts that hold the elements farthest from their block's median, in units of the block's mean distance; the rest.

    A channel that is large as a whole has no outliers, an element that stands out of its channel is one.
    """
    shape = shape_of(x)
    median = _spread(_blocked(x, blocks).median(dim=-1).values, shape)
    distance = (x - median).abs()
    usual = _spread(_blocked(distance, blocks).mean(dim=-1), shape)
    apart = highest((distance / usual).nan_to_num(nan=0.0), share)  # 0 / 0: a constant block has no outliers
    return keep_apart(x, apart), replaced(x, apart, median)


def scales(parts: Mapping[str, Tensor], shape: Shape) -> tuple[Tensor, Tensor]:
    """float32 [rows, columns] each: low and step of every element."""
    return _spread(parts["low"].float(), shape), _spread(parts["step"].float(), shape)


def encode(x: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """uint8, `8 // bits` codes to a byte, the first in the lowest bits."""
    codes = ((x - low) / step).round().nan_to_num(nan=0.0).clamp(0, _levels(bits)).to(torch.uint8)  # 0 / 0: constant block
    codes = F.pad(codes.flatten(), (0, -codes.numel() % (8 // bits)))
    return (codes.view(-1, 8 // bits) << _shifts(codes, bits)).sum(dim=1, dtype=torch.uint8)


def decode(codes: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """float32, in the shape of `low`."""
    each = (codes[:, None] >> _shifts(codes, bits)) & _levels(bits)
    return low + step * each.flatten()[: low.numel()].view(low.shape)


def _levels(bits: int) -> int:
    return (1 << bits) - 1


def _shifts(codes: Tensor, bits: int) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)


def _blocked(x: Tensor, blocks: Shape) -> Tensor:
    """[blocks down, blocks across, elements of a block]; blocks that reach over the edge repeat the last row or column."""
    (down, high), (across, wide) = ((n, math.ceil(size / n)) for n, size in zip(blocks, x.shape, strict=True))
    rows = torch.arange(down * high, device=x.device).clamp(max=x.shape[0] - 1)
    columns = torch.arange(across * wide, device=x.device).clamp(max=x.shape[1] - 1)
    return x[rows][:, columns].view(down, high, across, wide).transpose(1, 2).reshape(down, across, high * wide)


def _spread(of_blocks: Tensor, shape: Shape) -> Tensor:
    """[rows, columns] from one number for each block."""
    for dim, size in enumerate(shape):
        of_blocks = of_blocks.repeat_interleave(math.ceil(size / of_blocks.shape[dim]), dim).narrow(dim, 0, size)
    return of_blocks


def _up(x: Tensor) -> Tensor:
    """The nearest bf16 that is not less than `x`."""
    near = x.bfloat16()
    return torch.where(near.float() < x, near.nextafter(torch.full_like(near, math.inf)), near)
