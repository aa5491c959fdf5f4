"""How far one way of serving is from dense on one answer: KL and first choices, token by token of the same text.

A distribution is known as a whole, or by its likeliest tokens. In the second case KL is over the tokens that both sides name
and one rest: it is never more than the true one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["EARLY", "Agreement", "Heard", "agreement"]

EARLY = 8  # answer positions called the first ones
RARE = -1e4  # nats: as good as never


@dataclass(frozen=True, eq=False)
class Heard:
    """What a model gave for each position of an answer, before it was told what stands there."""

    values: Tensor  # [positions, vocabulary] logits, or [positions, k] log-probabilities of `ids`
    ids: Tensor | None = None  # [positions, k], the likeliest first; None: the whole vocabulary

    @property
    def choices(self) -> Tensor:
        """[positions]: the likeliest token."""
        return self.values.argmax(-1) if self.ids is None else self.ids[:, 0]


@dataclass(frozen=True)
class Agreement:
    """Of one answer with dense. KL is of dense from this, in nats."""

    positions: int  # compared
    kl_first: float  # at the first
    kl_early: float  # mean over the first EARLY
    kl: float  # mean over all
    top1_first: bool
    top1_early: float  # share of the first EARLY with dense's first choice
    top1: float
    differs: tuple[tuple[int, int, int], ...] = ()  # position, dense's first choice, this one's; the first of them only


def agreement(dense: Heard, ours: Heard, show: int = 32) -> Agreement:
    """Both are of the same text. `show`: differing choices that are kept."""
    kl = _kl(dense, ours)
    theirs, mine = dense.choices, ours.choices
    same = theirs == mine
    at = torch.nonzero(~same).flatten()[:show].tolist()
    return Agreement(
        positions=len(kl),
        kl_first=float(kl[0]),
        kl_early=float(kl[:EARLY].mean()),
        kl=float(kl.mean()),
        top1_first=bool(same[0]),
        top1_early=float(same[:EARLY].float().mean()),
        top1=float(same.float().mean()),
        differs=tuple((i, int(theirs[i]), int(mine[i])) for i in at),
    )


def _kl(dense: Heard, ours: Heard) -> Tensor:
    """[positions], float32."""
    if dense.ids is not None and ours.ids is not None:
        pairs = [(dense.ids, dense.values), (ours.ids, ours.values)]
        rows = zip(*(zip(i.tolist(), v.tolist(), strict=True) for i, v in pairs), strict=True)
        return torch.tensor([_of_known(dict(zip(*a, strict=True)), dict(zip(*b, strict=True))) for a, b in rows])
    want, got = (heard.values.float().log_softmax(-1) for heard in (dense, ours))
    terms = want.exp() * (want - got.clamp(min=RARE))
    return torch.where(want.exp() > 0, terms, 0.0).sum(-1).clamp(min=0.0)


def _of_known(dense: dict[int, float], ours: dict[int, float]) -> float:
    """KL over the tokens that both name and one rest, from log-probabilities."""
    both = dense.keys() & ours.keys()
    p, q = (_with_rest([side[token] for token in both]) for side in (dense, ours))
    return max(0.0, float((p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum()))


def _with_rest(logprobs: Sequence[float]) -> Tensor:
    known = torch.tensor(logprobs, dtype=torch.float64).exp()
    return torch.cat([known, (1 - known.sum()).clamp(min=0.0)[None]])
