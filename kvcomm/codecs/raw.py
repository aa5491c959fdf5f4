"""Packs nothing: a copy of the matrix in its own dtype, the measure of every other codec."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomm.codecs.base import Kind, Packed
from kvcomm.codecs.parts import checked

__all__ = ["Raw"]


@dataclass(frozen=True)
class Raw:
    """A `Codec` that restores float32, bf16 and float16 bit for bit; what it restores from float32 is the packed tensor."""

    @property
    def name(self) -> str:
        return "raw"

    def pack(self, x: Tensor, kind: Kind) -> Packed:
        checked(x, kind)
        tokens, channels = x.shape
        return Packed(tokens, channels, {"x": x.detach().clone(memory_format=torch.contiguous_format)})

    def unpack(self, packed: Packed) -> Tensor:
        return packed.parts["x"].float()
