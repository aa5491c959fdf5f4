"""What `int8` and `int4` have in common: all but the number of bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvcomm.codecs.base import Kind, Packed
from kvcomm.codecs.parts import check_share, checked, shape_of
from kvcomm.codecs.uniform import OUTLIERS, grid, quantise, restore

__all__ = ["Integer"]


@dataclass(frozen=True)
class Integer:
    """A `Codec` named `int<bits>`, or `int<bits>+sparse:<share>` where another share is kept apart than usual."""

    bits: ClassVar[int]
    sparse: float = OUTLIERS  # share of elements kept apart

    def __post_init__(self) -> None:
        check_share("outliers", self.sparse)

    @property
    def name(self) -> str:
        return f"int{self.bits}" if self.sparse == OUTLIERS else f"int{self.bits}+sparse:{self.sparse}"

    def pack(self, x: Tensor, kind: Kind) -> Packed:
        x = checked(x, kind)
        return Packed(*shape_of(x), quantise(x, grid(shape_of(x), kind), bits=self.bits, share=self.sparse))

    def unpack(self, packed: Packed) -> Tensor:
        return restore(packed.parts, (packed.tokens, packed.channels), bits=self.bits)
