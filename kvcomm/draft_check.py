"""Whether an assembled prompt can be trusted: the start of its answer is drafted, what the draft leans on is computed again.

    prompt   | known |a| known |a|a| R R R |     R: to be recomputed anyway      a: the reused tokens most attended to
    1st pass                         R R R | d d d      the draft, greedy, a token at a time
    2nd pass          a         a a      L | d d d      L: the last token; same rows, but now `a` is exact

If the distributions behind L and the drafted tokens stay what they were, reuse changed nothing that the answer looks at. The
first token alone tells little: most answers begin the same whatever they go on to say. Knows no plans and no thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvcomm.backends.base import Backend
    from kvcomm.backends.span_cache import SpanCache

__all__ = ["DraftCheck", "check"]


@dataclass(frozen=True)
class DraftCheck:
    """What came of it."""

    kl: float  # nats, >= 0: of the second distributions against the first, the largest over the draft; inf if not a number
    margin: float  # between the two likeliest tokens, probability: the least over the draft, before the second pass
    again: tuple[int, ...]  # positions of the prompt computed again, ascending
    draft: tuple[int, ...]  # token ids
    rows: int  # tokens that went through the model, in all passes
    ms: float  # of both passes and the draft, the recomputing that the prompt needed anyway included


@torch.no_grad()
def check(
    backend: Backend,
    cache: SpanCache,
    ids: Tensor,  # [1, N]
    recompute: Tensor,  # [r] int64, as in `Backend.arm`
    approximate: Tensor,  # [a] int64: positions whose K/V in the cache may be wrong; exact prefixes and `recompute` are not
    *,
    tokens: int = 8,  # of `approximate`, that are computed again
    draft: int = 16,  # tokens, at most: the check sees no further
    stop: Collection[int] = (),  # ids that end an answer
) -> DraftCheck:
    """Runs the pass over a filled cache and checks it. Afterwards all N tokens are cached, those of `again` exactly as far as
    what they see is exact: `arm` the cache with the last token alone and go on, or throw it away and go dense. The cache grows
    where N + `draft` tokens do not fit. Raises CacheFault as `Backend.look` does.
    """
    began = perf_counter()
    drafted = _draft(backend, cache, ids, recompute, draft, stop)
    before = torch.stack(drafted.logits).float().log_softmax(-1)  # [drafted, vocabulary]
    likeliest = before.exp().topk(2, dim=-1).values
    again = _most(drafted.attention, approximate, tokens)
    kl, rows = 0.0, len(recompute) + len(drafted.tokens) - 1
    if len(again):
        longer = _behind(ids, drafted.tokens[:-1])
        seen = torch.cat([again, torch.arange(ids.shape[1] - 1, longer.shape[1])])
        after = backend.look(cache, longer, seen, len(drafted.tokens)).logits.float().log_softmax(-1)
        kl = float((after.exp() * (after - before)).sum(-1).max().clamp_min(0))
        rows += len(seen)
    return DraftCheck(
        kl=kl if math.isfinite(kl) else math.inf,
        margin=float((likeliest[:, 0] - likeliest[:, 1]).min()),
        again=tuple(again.tolist()),
        draft=tuple(drafted.tokens),
        rows=rows,
        ms=(perf_counter() - began) * 1e3,
    )


@dataclass(frozen=True, eq=False)
class _Draft:
    """The first tokens of an answer, and what they were chosen from."""

    tokens: list[int]
    logits: list[Tensor]  # per token [vocabulary]
    attention: Tensor  # float32 [N]: of the last prompt token and of all drafted ones but the last, summed


def _draft(backend: Backend, cache: SpanCache, ids: Tensor, recompute: Tensor, count: int, stop: Collection[int]) -> _Draft:
    """The pass, then one token after the other, as long as rotary tables stay those of the prompt."""
    prompt, first = ids.shape[1], backend.look(cache, ids, recompute)
    logits, attention = [first.logits[-1]], first.attention
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < count and tokens[-1] not in stop and backend.same_tables(prompt, prompt + len(tokens)):
        longer = _behind(ids, tokens)
        step = backend.look(cache, longer, torch.tensor([longer.shape[1] - 1]))
        logits.append(step.logits[-1])
        attention = attention + step.attention[:prompt]
        tokens.append(int(logits[-1].argmax()))
    return _Draft(tokens, logits, attention)


def _behind(ids: Tensor, tokens: list[int]) -> Tensor:
    """[1, N + tokens]"""
    return torch.cat([ids, ids.new_tensor([tokens])], dim=1)


def _most(attention: Tensor, among: Tensor, count: int) -> Tensor:
    """The `count` positions of `among` with most attention, ascending."""
    best = attention.cpu()[among].topk(min(count, len(among))).indices
    return among[best].sort().values
