"""How well a number tells unsafe requests from safe ones. Knows nothing of KV."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["auc", "auc_interval", "kept_accuracy"]


def auc(scores: ArrayLike, unsafe: ArrayLike) -> float | None:
    """Chance that an unsafe request scores above a safe one, a tie counting half (Mann-Whitney); None without both kinds."""
    x, bad = np.asarray(scores, float), np.asarray(unsafe, bool)
    n, m = int(bad.sum()), int((~bad).sum())
    if not n or not m:
        return None
    _, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1, ties share their mean rank
    return float((ranks[bad].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(scores: ArrayLike, unsafe: ArrayLike, draws: int = 1000, seed: int = 0) -> tuple[float, float] | None:
    """95 % of the AUC over requests drawn with replacement (percentile bootstrap); None without both kinds."""
    x, bad = np.asarray(scores, float), np.asarray(unsafe, bool)
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(len(x), size=len(x)) for _ in range(draws)]
    found = [value for at in drawn if (value := auc(x[at], bad[at])) is not None]
    if auc(x, bad) is None or not found:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def kept_accuracy(scores: ArrayLike, right: ArrayLike, share: float) -> float:
    """Share of right answers where only the `share` of requests with the lowest scores is kept; ties are kept in proportion."""
    x, good = np.asarray(scores, float), np.asarray(right, float)
    keep = max(1, round(share * len(x)))
    cut = np.sort(x)[keep - 1]
    below = x < cut
    return float((good[below].sum() + (keep - below.sum()) * good[x == cut].mean()) / keep)
