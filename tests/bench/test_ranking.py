"""AUC and the kept curve against counting pairs and drawing ties at random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvcomm.bench.fidelity.ranking import auc, auc_interval, kept_accuracy


def by_pairs(scores: np.ndarray, unsafe: np.ndarray) -> float:
    """Every unsafe request against every safe one."""
    pairs = [(a, b) for a in scores[unsafe] for b in scores[~unsafe]]
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_equals_counting_pairs(levels: int) -> None:
    """With many ties, some and hardly any, and infinite scores among them."""
    rng = np.random.default_rng(levels)
    scores, unsafe = rng.integers(levels, size=60).astype(float), rng.random(60) < 0.3
    scores[:3] = math.inf
    assert auc(scores, unsafe) == pytest.approx(by_pairs(scores, unsafe))


def test_auc_of_known_cases() -> None:
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auc([1, 2, 3, 4], [True, True, False, False]) == 0
    assert auc([5, 5, 5], [True, False, False]) == 0.5
    assert auc([1, 2], [True, True]) is None
    assert auc_interval([1, 2], [False, False]) is None


def test_the_interval_covers_the_truth_and_narrows() -> None:
    """Normal scores one standard deviation apart, whose AUC is known: 0.760."""
    widths = []
    for n in (60, 600):
        unsafe = np.arange(n) % 3 == 0
        scores = np.random.default_rng(n).normal(size=n) + unsafe
        interval = auc_interval(scores, unsafe, draws=300)
        assert interval is not None
        assert interval == auc_interval(scores, unsafe, draws=300), "seeded"
        assert interval[0] < 0.760 < interval[1]
        widths.append(interval[1] - interval[0])
    assert widths[1] < widths[0] / 2


def test_kept_accuracy() -> None:
    """Against the mean over many random orders of what is tied."""
    scores, right = np.array([0, 1, 1, 1, 2, 3]), np.array([True, True, False, False, False, True])
    assert kept_accuracy(scores, right, 1 / 6) == 1
    assert kept_accuracy(scores, right, 1) == pytest.approx(right.mean())
    rng, drawn = np.random.default_rng(0), []
    for _ in range(4000):
        order = np.lexsort((rng.random(6), scores))
        drawn.append(right[order[:3]].mean())
    assert kept_accuracy(scores, right, 0.5) == pytest.approx(np.mean(drawn), abs=0.02)
