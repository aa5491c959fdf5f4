"""What codecs share: what they refuse, and elements that are kept apart, exact to bf16, where the rest of a codec does worst.

That is "dense and sparse" in KVQuant (arXiv 2401.18079) and the sparse part of GEAR (arXiv 2403.05527). Knows nothing of how
the rest is packed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from kvcomm.codecs.base import Kind
from kvcomm.errors import CacheFault, InputError

__all__ = ["LARGEST", "Shape", "check_share", "checked", "highest", "keep_apart", "put_back", "replaced", "shape_of"]

Shape = tuple[int, int]  # rows, columns
LARGEST = 2.0**100  # magnitude; leaves bf16 and float32 room for ranges and products, and no K/V comes near it


def checked(x: Tensor, kind: Kind) -> Tensor:
    """`x` as float32 without gradient, possibly `x` itself. Raises CacheFault for what no codec packs."""
    if x.dim() != 2 or not x.numel():
        raise CacheFault(f"{kind} are {list(x.shape)}; [tokens, channels], at least one of each, was expected")
    if not x.is_floating_point():
        raise CacheFault(f"{kind} are {x.dtype}; a floating type was expected")
    if not bool(torch.isfinite(x).all()):
        raise CacheFault(f"{kind} hold NaN or infinity")
    largest = float(x.detach().abs().max())
    if largest > LARGEST:
        raise CacheFault(f"{kind} hold an element of magnitude {largest:.3g}; at most {LARGEST:.3g} was expected")
    return x.detach().float()


def shape_of(x: Tensor) -> Shape:
    """The shape of a matrix, as two numbers."""
    rows, columns = x.shape
    return rows, columns


def check_share(what: str, share: float) -> None:
    """Raise InputError unless 0 <= share < 1."""
    if not 0 <= share < 1:
        raise InputError(f"the share of {what} is {share}; it must be at least 0 and less than 1")


def highest(score: Tensor, share: float) -> Tensor:
    """int64 [n], ascending: the `share` of elements, rounded up, that score highest; never one that scores 0."""
    best = score.flatten().topk(math.ceil(share * score.numel()))
    return best.indices[best.values > 0].sort().values


def keep_apart(x: Tensor, index: Tensor) -> dict[str, Tensor]:
    """The parts from which `put_back` restores the elements at `index`."""
    return {"apart_index": index.int(), "apart": x.flatten()[index].bfloat16()} if len(index) else {}


def replaced(x: Tensor, index: Tensor, by: Tensor) -> Tensor:
    """A copy of `x` with the elements at `index` taken from `by`, of the same shape."""
    return x.flatten().index_copy(0, index, by.flatten()[index]).view(x.shape)


def put_back(y: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """`y` with the elements that were kept apart in their places; `y` may be written to."""
    if "apart" not in parts:
        return y
    return y.flatten().index_copy_(0, parts["apart_index"].long(), parts["apart"].float()).view(y.shape)
