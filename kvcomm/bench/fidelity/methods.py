"""Ways of reusing KV, by name: what corrects the base, and which tokens are computed again.

A name is a base treatment and what is added to it, in any order: `rotate`, `boundary:2`, `cacheblend:0.1`, `ridge`,
`knn+refresh:0.05`, `ridge+boundary:2`, `rotate+random:0.1`, `select+refresh:0.05`, `select+refresh:0.03+draft:0.1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kvcomm.backends.hf import HFBackend
from kvcomm.backends.span_cache import SpanCache
from kvcomm.bench.fidelity.cases import Case
from kvcomm.bench.fidelity.early import Early
from kvcomm.draft_check import DraftCheck, check
from kvcomm.errors import InputError
from kvcomm.estimators.base import Estimator, Place
from kvcomm.estimators.catalogue import ESTIMATORS
from kvcomm.estimators.doubt import far_above
from kvcomm.plain import PlainKV

__all__ = ["Method", "Outcome", "Ready", "assemble", "checked", "deviation", "score", "serve", "squared_error"]

CHOICES = ("above", "refresh", "residual", "cacheblend", "random", "oracle")


@dataclass(frozen=True)
class Method:
    """One way of serving a prompt."""

    name: str
    rotate: bool = True
    dense: bool = False
    estimator: str | None = None
    boundary: int = 0  # tokens computed again at the start of every piece
    chosen_by: str | None = None  # one of CHOICES
    share: float = 0.0  # of the prompt's tokens, chosen so; for "above", how many times the lower decile of doubts
    draft: float | None = None  # nats: the draft check's KL above which the prompt goes dense

    @classmethod
    def parse(cls, name: str) -> Method:
        """Raises InputError for an unknown part."""
        made = dict[str, object](name=name)
        for part in name.split("+"):
            word, _, number = part.partition(":")
            try:
                if word == "dense":
                    made["dense"] = True
                elif word in ("rotate", "naive"):
                    made["rotate"] = word == "rotate"
                elif word == "boundary":
                    made["boundary"] = int(number)
                elif word in ESTIMATORS:
                    made["estimator"] = word
                elif word in CHOICES:
                    made |= {"chosen_by": word, "share": float(number)}
                elif word == "draft":
                    made["draft"] = float(number)
                else:
                    raise ValueError
            except ValueError:
                known = ["dense", "naive", "rotate", "boundary:<tokens>", *ESTIMATORS, *(f"{c}:<share>" for c in CHOICES)]
                known.append("draft:<nats>")
                raise InputError(f"{part!r} in method {name!r} is unknown; a method is made of {', '.join(known)}") from None
        return cls(**made)  # type: ignore[arg-type]  # filled in by field name above


@dataclass(frozen=True)
class Outcome:
    """One case served by one method."""

    right: bool
    kl: float  # mean over the answer's tokens, of this against dense, nats
    top1: float  # share of answer tokens with dense's first choice
    reused: float  # share of the prompt's tokens never computed in full
    compute: float  # share of a dense prefill's token-layers that were computed, check layers counted
    ms: Mapping[str, float]  # rotate, estimate, choose, check (if any), pass; their sum is the time to the first token
    declined: bool  # the estimator had no safe estimate for some piece, which was computed instead
    went_dense: bool  # the draft check found that reuse changes the answer


@dataclass(frozen=True, eq=False)
class Ready:
    """A prompt in its cache, before the pass."""

    cache: SpanCache
    recompute: Tensor  # [r] int64
    approximate: Tensor  # [a] int64: what is reused and may be wrong
    doubt: Tensor  # [tokens], the estimator's
    declined: bool
    layers: int  # computed for all tokens to choose by
    clock: tuple[float, ...]  # seconds: begun, rotated, estimated, chosen


@torch.no_grad()
def serve(backend: HFBackend, case: Case, method: Method, estimators: Mapping[str, Estimator], early: Early) -> Outcome:
    """Serves `case`, then scores the answer token by token with dense's own answer fed in."""
    ready = assemble(backend, case, method, estimators, early)
    tokens, names, clock = len(case.ids), ["rotate", "estimate", "choose"], list(ready.clock)
    now, spent, computed, dense = ready.recompute, 0, len(ready.recompute), method.dense
    if method.draft is not None:
        found = checked(backend, case, ready)
        names.append("check")
        clock.append(perf_counter())
        dense = found.kl > method.draft
        now, spent, computed = now[-1:], found.rows, tokens if dense else computed + len(found.again)
    if dense:
        ready.cache.reset()
        logits, spent = _dense(backend, case, ready.cache), spent + tokens
    else:
        logits, spent = backend.run(ready.cache, _row(case), now), spent + len(now)
    clock.append(perf_counter())
    right, kl, top1 = score(backend, case, ready.cache, logits)
    share = ready.layers / len(ready.cache.layers)
    backend.release(ready.cache)
    return Outcome(
        right=right,
        kl=kl,
        top1=top1,
        reused=1 - computed / tokens,
        compute=spent / tokens + share * (1 - len(ready.recompute) / tokens),
        ms={name: (b - a) * 1e3 for name, a, b in zip([*names, "pass"], clock, clock[1:], strict=False)},
        declined=ready.declined,
        went_dense=dense and not method.dense,
    )


@torch.no_grad()
def assemble(backend: HFBackend, case: Case, method: Method, estimators: Mapping[str, Estimator], early: Early) -> Ready:
    """Everything before the pass."""
    tokens = len(case.ids)
    cache = backend.cache(tokens + len(case.answer))
    compute = torch.ones(tokens, dtype=torch.bool)
    clock = [perf_counter()]
    if not method.dense:
        compute[: case.exact] = False
        for piece in case.pieces:
            compute[piece.span.start : piece.span.end] = False
        spans = [(piece.span, piece.base) for piece in case.pieces]
        backend.fill(cache, tokens, [(case.prefix(backend), case.kv), *spans], rotate=method.rotate)
    clock.append(perf_counter())
    doubt, declined = _correct(backend, case, method, estimators, cache, compute)
    clock.append(perf_counter())
    for piece in case.pieces if method.boundary else ():
        compute[piece.span.start : min(piece.span.start + method.boundary, piece.span.end)] = True
    layers = _choose(case, method, cache, compute, doubt, early)
    compute[-1] = True
    clock.append(perf_counter())
    recompute, reused = (torch.nonzero(x).flatten() for x in (compute, ~compute))
    return Ready(cache, recompute, reused[reused >= case.exact], doubt, declined, layers, tuple(clock))


def checked(backend: HFBackend, case: Case, ready: Ready) -> DraftCheck:
    """The draft check as a request would have it, drafting no further than generate would."""
    config: Any = backend.model.generation_config
    ends = config.eos_token_id
    stop = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return check(backend, ready.cache, _row(case), ready.recompute, ready.approximate, stop=stop)


def score(backend: HFBackend, case: Case, cache: SpanCache, logits: Tensor) -> tuple[bool, float, float]:
    """Whether the answer is right, its KL against dense and its top-1, from the prompt's cache and last logits [vocabulary]."""
    scored = torch.cat([logits[None], _rest(backend, case, cache)])
    want, got = case.logits.log_softmax(-1), scored.log_softmax(-1)
    right: bool = scored.argmax(-1).tolist() == case.answer.tolist()
    kl = float((want.exp() * (want - got)).sum(-1).mean())
    return right, kl, float((want.argmax(-1) == got.argmax(-1)).float().mean())


def _row(case: Case) -> Tensor:
    """[1, tokens] int64"""
    return torch.from_numpy(case.ids).long()[None]


def _correct(
    backend: HFBackend, case: Case, method: Method, estimators: Mapping[str, Estimator], cache: SpanCache, compute: Tensor
) -> tuple[Tensor, bool]:
    """Adds estimated deviations; a piece without an estimate is computed. Returns every token's doubt [tokens]."""
    doubt, declined = torch.zeros(len(case.ids)), False
    if method.estimator is None:
        return doubt, declined
    for piece in case.pieces:
        start, end = piece.span.start, piece.span.end
        place = Place(piece.slot, case.ids[start:end], piece.place(backend), backend.context(case.ids[:start]))
        found = estimators[method.estimator].estimate(place)
        if found is None:
            compute[start:end], declined = True, True
            continue
        if found.deviation is not None:
            backend.correct(cache, len(case.ids), start, found.deviation)
        doubt[start:end] = found.doubt
    return doubt, declined


def _choose(case: Case, method: Method, cache: SpanCache, compute: Tensor, doubt: Tensor, early: Early) -> int:
    """Marks the chosen tokens; returns the number of layers that had to be computed for all tokens to choose them."""
    if method.chosen_by is None:
        return 0
    number, layers = round(method.share * len(case.ids)), 0
    if method.chosen_by == "above":
        compute |= far_above(doubt.masked_fill(compute, 0), method.share)
        return 0
    if method.chosen_by == "refresh":
        score = doubt.clone()
    elif method.chosen_by == "random":
        score = torch.rand(len(doubt), generator=torch.Generator().manual_seed(len(doubt)))
    elif method.chosen_by == "oracle":
        exact = enumerate(zip(case.kv.keys, case.kv.values, strict=True))
        score = torch.stack([squared_error(cache, i, *kv) for i, kv in exact]).sum(0)
    else:
        score, layers = squared_error(cache, early.layer, *early.kv(case.ids)), early.layer
    score[compute] = 0
    score[: case.exact] = 0
    best = score.topk(min(number, len(score))).indices
    compute[best[score[best] > 0]] = True
    return layers


def squared_error(cache: SpanCache, layer: int, keys: Tensor, values: Tensor) -> Tensor:
    """Squared distance of what the cache holds of one layer from exact K/V [heads, tokens, dim]; [tokens]."""
    held, tokens = cache.layers[layer], keys.shape[1]
    return _distance(held.k[0, :, :tokens], keys) + _distance(held.v[0, :, :tokens], values)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """[heads, tokens, dim] twice -> [tokens]; what was never written counts as nothing."""
    return ((a.float() - b.float()) ** 2).sum((0, 2)).nan_to_num(0.0, 0.0, 0.0)


def _dense(backend: HFBackend, case: Case, cache: SpanCache) -> Tensor:
    with backend.hooked():
        out = backend.model(input_ids=_row(case), past_key_values=cache, use_cache=True, logits_to_keep=1)
    last: Tensor = out.logits[0, -1]
    return last


def _rest(backend: HFBackend, case: Case, cache: SpanCache) -> Tensor:
    """Logits behind every answer token but the last, [answer - 1, vocabulary]."""
    if len(case.answer) < 2:
        return case.logits[:0]
    given = torch.from_numpy(case.answer[:-1]).long()[None]
    with backend.hooked():
        rest: Tensor = backend.model(input_ids=given, past_key_values=cache, use_cache=True).logits[0]
    return rest


def deviation(backend: HFBackend, case: Case, number: int) -> tuple[PlainKV, PlainKV]:
    """Base and deviation of piece `number`, in pre-RoPE space."""
    piece = case.pieces[number]
    base = piece.place(backend)
    return base, backend.plain(case.kv, piece.span.start, piece.span.end).minus(base)
