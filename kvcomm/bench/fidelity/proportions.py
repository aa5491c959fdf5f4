"""How sure a share of right answers is: its interval, and an exact test of two shares over the same requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Paired", "paired", "wilson"]


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    p, z2 = right / n, z * z
    centre, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


@dataclass(frozen=True)
class Paired:
    """Two ways over the same requests: only those count that one of them alone gets right."""

    requests: int
    lost: int  # right before, wrong now
    gained: int
    p_value: float  # of a difference at least as large, either way, if there is none: exact McNemar test
    lost_high: float  # share of all requests lost: the upper end of its 95 % interval


def paired(before: Sequence[bool], now: Sequence[bool]) -> Paired:
    """Raises ValueError for sequences of different lengths; at least one request."""
    pairs = list(zip(before, now, strict=True))
    lost, gained = pairs.count((True, False)), pairs.count((False, True))
    n = lost + gained
    tail = sum(math.comb(n, i) for i in range(min(lost, gained) + 1)) / 2**n
    return Paired(len(pairs), lost, gained, min(1.0, 2 * tail), wilson(lost, len(pairs))[1])
