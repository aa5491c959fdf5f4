"""Hashes that two texts have in common wherever they share a run of tokens, though each keeps only a few of its own.

Winnowing (Schleimer, Wilkerson and Aiken, SIGMOD 2003, section 3): every 8 tokens are hashed, and of every run of `reach`
tokens the smallest hash is kept. A run of `reach` tokens that stands in both texts has the same smallest hash in both. Of
random text about 2 / (reach - 6) hashes per token are kept. Hosts exchange these hashes, so they must never change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvcomm.segments import Ids

__all__ = ["TOKENS", "minima"]

TOKENS = 8  # hashed together
_MULTIPLIER = 0x9E3779B97F4A7C15

Hashes = npt.NDArray[np.uint64]


def minima(ids: Ids, reach: int) -> Hashes:
    """[tokens - reach + 1], empty for fewer tokens; entry i is the smallest hash within ids[i : i + reach]; `reach` >= 8."""
    if len(ids) < reach:
        return np.zeros(0, dtype=np.uint64)
    smallest, span, width = _hashes(ids), 1, reach - TOKENS + 1
    while 2 * span <= width:  # entry i: of hashes i .. i + span - 1
        smallest = np.minimum(smallest[:-span], smallest[span:])
        span *= 2
    return np.minimum(smallest[: len(ids) - reach + 1], smallest[width - span :])


def _hashes(ids: Ids) -> Hashes:
    """[tokens - 7]; of the 8 tokens from each position on."""
    mixed = _mix(ids.astype(np.uint64))
    count = len(ids) - TOKENS + 1
    out = np.zeros(count, dtype=np.uint64)
    for j in range(TOKENS):
        out = out * np.uint64(_MULTIPLIER) + mixed[j : j + count]
    return _mix(out)


def _mix(x: Hashes) -> Hashes:
    """splitmix64: neighbouring numbers do not give neighbouring hashes."""
    x = x + np.uint64(_MULTIPLIER)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
