"""Eight bits an element, and a small share of outliers apart: keys per channel, values per token (arXiv 2401.18079)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcomm.codecs.integer import Integer

__all__ = ["Int8"]


@dataclass(frozen=True)
class Int8(Integer):
    """The `Codec` named `int8`."""

    bits: ClassVar[int] = 8
