"""K/V in pre-RoPE space: keys as if every token stood at position 0, so that runs from different places can be compared.

Rows are tokens; heads lie side by side. Arithmetic only: knows nothing of models, anchors or rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlainKV"]


@dataclass(frozen=True, eq=False)
class PlainKV:
    """K/V, or a deviation of K/V, of a run of tokens. Never written to."""

    keys: tuple[Tensor, ...]  # per layer float32 [tokens, kv_heads * key_dim]
    values: tuple[Tensor, ...]  # per layer float32 [tokens, kv_heads * value_dim]

    @property
    def tokens(self) -> int:
        return int(self.keys[0].shape[0])

    @property
    def layers(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def rows(self, layer: int) -> Tensor:
        """[tokens, key channels + value channels] of one layer."""
        return torch.cat([self.keys[layer], self.values[layer]], dim=1)

    def map(self, change: Callable[[Tensor], Tensor]) -> PlainKV:
        """`change` applied to the keys and values of every layer."""
        return PlainKV(tuple(map(change, self.keys)), tuple(map(change, self.values)))

    def part(self, start: int, end: int) -> PlainKV:
        """Tokens [start, end), as views."""
        return self.map(lambda x: x[start:end])

    def minus(self, other: PlainKV) -> PlainKV:
        """The deviation of this from `other`, token by token."""
        return PlainKV(
            tuple(a - b for a, b in zip(self.keys, other.keys, strict=True)),
            tuple(a - b for a, b in zip(self.values, other.values, strict=True)),
        )

    def finite(self) -> bool:
        """No NaN, no infinity. A finite sum says so at once; one that is not may be an overflow."""
        parts = (*self.keys, *self.values)
        sums = torch.stack([t.sum() for t in parts])
        return bool(torch.isfinite(sums).all()) or all(bool(torch.isfinite(t).all()) for t in parts)
