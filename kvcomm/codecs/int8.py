"""Eight bits an element, and a small share of outliers apart: keys per channel, values per token (arXiv 2401.18079)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvcomm.codecs.base import Kind, Packed
from kvcomm.codecs.parts import check_share, checked, shape_of
from kvcomm.codecs.uniform import OUTLIERS, grid, quantise, restore

__all__ = ["Int8"]


@dataclass(frozen=True)
class Int8:
    """A `Codec` named `int8`, or `int8+sparse:<share>` where another share is kept apart than usual."""

    sparse: float = OUTLIERS  # share of elements kept apart

    def __post_init__(self) -> None:
        check_share("outliers", self.sparse)

    @property
    def name(self) -> str:
        return "int8" if self.sparse == OUTLIERS else f"int8+sparse:{self.sparse}"

    def pack(self, x: Tensor, kind: Kind) -> Packed:
        x = checked(x, kind)
        return Packed(*shape_of(x), quantise(x, grid(shape_of(x), kind), bits=8, share=self.sparse))

    def unpack(self, packed: Packed) -> Tensor:
        return restore(packed.parts, (packed.tokens, packed.channels), bits=8)
