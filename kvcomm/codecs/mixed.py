"""Important tokens in eight bits, the others in four or two: no token is left out (MiKV, arXiv 2402.18096).

A token is as important as its row is long, which is all that a matrix alone can tell; MiKV itself goes by attention. Both kinds
of token share lows and steps: a step of the coarse codes is 17 (four bits) or 85 (two) steps of the fine ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvcomm.codecs.base import Kind, Packed
from kvcomm.codecs.parts import check_share, checked, put_back, shape_of
from kvcomm.codecs.uniform import OUTLIERS, decode, encode, fit, grid, scales

__all__ = ["Mixed"]


@dataclass(frozen=True)
class Mixed:
    """A `Codec` named `mixed:<share>`, or `mixed:<share>+int2` where the others have two bits."""

    share: float  # of the tokens that are important, rounded up
    bits: Literal[4, 2] = 4  # of the others' codes

    def __post_init__(self) -> None:
        check_share("important tokens", self.share)

    @property
    def name(self) -> str:
        return f"mixed:{self.share}{'+int2' if self.bits == 2 else ''}"

    def pack(self, x: Tensor, kind: Kind) -> Packed:
        x = checked(x, kind)
        rest, parts = fit(x, grid(shape_of(x), kind), bits=8, share=OUTLIERS)
        low, step = scales(parts, shape_of(x))
        length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
        fine = torch.zeros_like(length, dtype=torch.bool)
        fine[length.topk(math.ceil(self.share * len(length))).indices] = True
        parts["fine"] = fine
        parts["fine_codes"] = encode(rest[fine], low[fine], step[fine], bits=8)
        parts["codes"] = encode(rest[~fine], low[~fine], step[~fine] * self._coarser, self.bits)
        return Packed(*shape_of(x), parts)

    def unpack(self, packed: Packed) -> Tensor:
        parts = packed.parts
        low, step = scales(parts, (packed.tokens, packed.channels))
        fine = parts["fine"]
        y = torch.empty_like(low)
        y[fine] = decode(parts["fine_codes"], low[fine], step[fine], bits=8)
        y[~fine] = decode(parts["codes"], low[~fine], step[~fine] * self._coarser, self.bits)
        return put_back(y, parts)

    @property
    def _coarser(self) -> int:
        """Steps of the fine codes in one of the coarse."""
        return 255 // ((1 << self.bits) - 1)
