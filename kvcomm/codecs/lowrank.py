"""A product of two thin factors, and the elements that it gets most wrong kept apart.

The low-rank and the sparse part of GEAR (arXiv 2403.05527), without the quantised matrix that GEAR puts under them. Truncating
the singular value decomposition gives the best factors there are; the one taken of large matrices is randomised, with random
numbers of its own that are always the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomm.codecs.base import Kind, Packed
from kvcomm.codecs.parts import Shape, check_share, checked, highest, keep_apart, put_back, replaced, shape_of
from kvcomm.codecs.uniform import decode, grid, quantise, scales
from kvcomm.errors import InputError

__all__ = ["LowRank"]

OVERSAMPLED = 8  # directions searched beyond the rank
ROUNDS = 2  # of power iteration
TURNS = 3  # factors, then elements apart; further turns gain below 3 % on noise with heavy tails


@dataclass(frozen=True)
class LowRank:
    """A `Codec` named `lowrank:<rank>[+int8][+sparse:<share>]`. A matrix that factors would not make smaller stays whole."""

    rank: int  # at most; a matrix has no more than its shorter side
    sparse: float = 0.0  # share of elements kept apart
    int8: bool = False  # factors in eight bits instead of bf16

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"the rank is {self.rank}; it must be at least 1")
        check_share("elements kept apart", self.sparse)

    @property
    def name(self) -> str:
        return f"lowrank:{self.rank}{'+int8' * self.int8}{f'+sparse:{self.sparse}' if self.sparse else ''}"

    def pack(self, x: Tensor, kind: Kind) -> Packed:
        x = checked(x, kind)
        tokens, channels = x.shape
        rank = min(self.rank, tokens, channels)
        if rank * (tokens + channels) * (1 if self.int8 else 2) >= tokens * channels * 2:
            return Packed(tokens, channels, {"whole": x.to(torch.bfloat16, copy=True)})
        return Packed(tokens, channels, self._fit(x, rank))

    def unpack(self, packed: Packed) -> Tensor:
        if "whole" in packed.parts:
            return packed.parts["whole"].float()
        return put_back(self._product(packed.parts, (packed.tokens, packed.channels)), packed.parts)

    def _fit(self, x: Tensor, rank: int) -> dict[str, Tensor]:
        """Factors of what is not kept apart, and what they get most wrong kept apart, in turns (GoDec, ICML 2011)."""
        rest = x
        for _ in range(TURNS if self.sparse else 1):
            parts = self._keep(_factors(rest, rank))
            product = self._product(parts, shape_of(x))
            apart = highest((x - product).abs(), self.sparse)
            rest = replaced(x, apart, product)
        return {**parts, **keep_apart(x, apart)}

    def _keep(self, factors: Tensor) -> dict[str, Tensor]:
        if not self.int8:
            return {"factors": factors.bfloat16()}
        return quantise(factors, grid(shape_of(factors), "values"), bits=8, share=0.0)

    def _product(self, parts: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """[tokens, channels] from the factors as they were kept."""
        if self.int8:
            codes, length = parts["codes"], sum(shape)
            factors = decode(codes, *scales(parts, (len(codes) // length, length)), bits=8)
        else:
            factors = parts["factors"].float()
        return factors[:, : shape[0]].T @ factors[:, shape[0] :]


def _factors(x: Tensor, rank: int) -> Tensor:
    """[rank, tokens + channels]: left factor, transposed, and right, with elements of one usual size: they share blocks."""
    u, s, v = _svd(x, rank)
    ratio = (x.shape[0] / x.shape[1]) ** 0.25
    return torch.cat([u.T * ratio, v / ratio], dim=1)[:rank] * s[:rank, None].sqrt()


def _svd(x: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """At least `rank` leading singular vectors [tokens, n], values [n] and vectors [n, channels]."""
    width = rank + OVERSAMPLED
    if 4 * width >= min(x.shape):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        return u, s, v
    basis = _leading(x, width)  # Halko et al., arXiv 0909.4061, algorithms 4.4 and 5.1
    u, s, v = torch.linalg.svd(basis.T @ x, full_matrices=False)
    return basis @ u, s, v


def _leading(x: Tensor, width: int) -> Tensor:
    """[tokens, width], orthonormal: spans nearly what the leading left singular vectors of `x` span."""
    own = torch.Generator().manual_seed(0)
    y = x @ torch.randn(x.shape[1], width, generator=own).to(x.device)
    for _ in range(ROUNDS):
        y = x @ _orthonormal(x.T @ _orthonormal(y))
    return _orthonormal(y)


def _orthonormal(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y).Q
    return q
