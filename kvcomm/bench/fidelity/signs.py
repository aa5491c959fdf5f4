"""Signs of unsafe reuse: numbers that a server could look at before it emits anything. Larger means less trust.

Of a place: what anchors say. Of the cache: how wrong an early layer is. Of the output: how sure it is, and the draft check.
`kv-error` alone needs the dense run: what a perfect knowledge of the error in K/V would be worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvcomm.backends.hf import HFBackend
from kvcomm.bench.fidelity.cases import Case
from kvcomm.bench.fidelity.early import Early
from kvcomm.bench.fidelity.methods import Method, assemble, checked, score, squared_error
from kvcomm.bench.fidelity.nearby import Nearby
from kvcomm.estimators.base import Estimator, Place

__all__ = ["About", "Read", "about", "read"]


@dataclass(frozen=True, eq=False)
class About:
    """What anchors say of one request, whatever method serves it. Per token [tokens], 0 where nothing is reused."""

    entropy: float  # the paper's rule, its worst place
    novelty: float  # of the context, the worst place
    distance: Tensor
    disagreement: Tensor  # of the nearest neighbours' deviations
    doubt: Tensor  # what a ridge regression expects to be wrong


@dataclass(frozen=True)
class Read:
    """One request under one method."""

    unsafe: bool  # some answer token is not dense's first choice
    right: bool
    signs: Mapping[str, float]


@torch.no_grad()
def about(backend: HFBackend, case: Case, estimators: Mapping[str, Estimator], nearby: Nearby) -> About:
    """`estimators` hold `knn` and `select`; what one of them declines gets infinite doubt."""
    found, entropy, novelty = {name: torch.zeros(len(case.ids)) for name in ("distance", "knn", "select")}, 0.0, 0.0
    for piece in case.pieces:
        start, end = piece.span.start, piece.span.end
        place = Place(piece.slot, case.ids[start:end], piece.place(backend), backend.context(case.ids[:start]))
        near = nearby.look(place)
        found["distance"][start:end] = near.tokens
        entropy, novelty = max(entropy, near.evenness), max(novelty, near.novelty)
        for name in ("knn", "select"):
            estimate = estimators[name].estimate(place)
            found[name][start:end] = math.inf if estimate is None else estimate.doubt
    return About(entropy, novelty, found["distance"], found["knn"], found["select"])


@torch.no_grad()
def read(
    backend: HFBackend, case: Case, method: Method, estimators: Mapping[str, Estimator], early: Early, known: About
) -> Read:
    """Serves `case` and reads all signs."""
    ready = assemble(backend, case, method, estimators, early)
    left = ready.approximate
    residual = squared_error(ready.cache, early.layer, *early.kv(case.ids))[left].sqrt()
    exact = enumerate(zip(case.kv.keys, case.kv.values, strict=True))
    error = torch.stack([squared_error(ready.cache, i, *kv) for i, kv in exact]).sum(0)[left].sqrt()
    logits = backend.run(ready.cache, torch.from_numpy(case.ids).long()[None], ready.recompute)
    right, _, top1 = score(backend, case, ready.cache, logits)
    draft = checked(backend, case, ready)
    backend.release(ready.cache)
    chances = logits.softmax(-1)
    first, second = chances.topk(2).values.tolist()
    signs = {
        "paper-entropy": known.entropy,
        "context-novelty": known.novelty,
        **_both("distance", known.distance[left]),
        **_both("disagreement", known.disagreement[left]),
        **_both("doubt", known.doubt[left]),
        "doubt-left": float(known.doubt[left].sum() / known.doubt.sum()),
        **_both("early-residual", residual),
        "first-margin": second - first,
        "first-entropy": float(torch.special.entr(chances).sum()),
        "draft-margin": -draft.margin,
        "draft-kl": draft.kl,
        **_both("kv-error", error),
    }
    return Read(top1 < 1, right, {name: math.inf if math.isnan(x) else x for name, x in signs.items()})


def _both(name: str, x: Tensor) -> dict[str, float]:
    """Mean and maximum over tokens; 0 without any."""
    return {f"{name}-mean": float(x.mean()) if len(x) else 0.0, f"{name}-max": float(x.max()) if len(x) else 0.0}
