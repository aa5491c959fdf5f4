"""Turns the rows of a replay into the numbers that it reports: per policy, agent and hop. Not measured is None."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import Any

from kvcomm.replay.results import Outcome, Row
from kvcomm.segments import RUNGS

__all__ = ["summarise"]

Pair = tuple[Row, Outcome]


def summarise(rows: Sequence[Row], policies: Sequence[str]) -> dict[str, Any]:
    """Body of the document. Every number of a block is over the same calls for each policy: those that were served."""
    served = [row for row in rows if row.policies]
    return {
        "calls": len(rows),
        "calls_served": len(served),
        "calls_skipped": len(rows) - len(served),
        "skipped": dict(Counter(_kind(row.skipped) for row in rows if row.skipped)),
        "changes": dict(sum((Counter(row.changes) for row in rows), Counter())),
        "sessions": len({row.session for row in rows}),
        "calls_that_read_outputs": sum(bool(row.reads) for row in rows),
        "policies": _by_policy(served, policies),
        "agents": _grouped(served, policies, lambda row: row.agent, "agent"),
        "hops": sorted(_grouped(served, policies, lambda row: row.hop, "hop"), key=lambda found: found["hop"]),
    }


def _kind(reason: str | None) -> str:
    """Reasons differ by their numbers."""
    return re.sub(r"\d+", "#", reason or "")


def _grouped(rows: Sequence[Row], policies: Sequence[str], key: Callable[[Row], Any], name: str) -> list[dict[str, Any]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return [{name: k, "calls": len(of), "policies": _by_policy(of, policies)} for k, of in groups.items()]


def _by_policy(rows: Sequence[Row], policies: Sequence[str]) -> dict[str, Any]:
    dense = [row.policies["dense"].ttft_ms for row in rows]
    return {name: _numbers([row.policies[name] for row in rows], dense) for name in policies if rows}


def _numbers(outcomes: Sequence[Outcome], dense_ms: Sequence[float | None]) -> dict[str, Any]:
    tokens = sum(o.prompt_tokens for o in outcomes)
    timed = [(d, o.ttft_ms) for o, d in zip(outcomes, dense_ms, strict=True) if o.ttft_ms and d]
    return {
        "prompt_tokens": tokens,
        "answer_tokens": sum(o.answer_tokens for o in outcomes),
        "token_reuse_rate": sum(o.reused_tokens for o in outcomes) / tokens if tokens else None,
        "tokens_by_rung": {rung: sum(o.tokens_by_rung.get(rung, 0) for o in outcomes) for rung in RUNGS},
        "ttft_ms": _of(median, (o.ttft_ms for o in outcomes)),
        "ttft_sum_ms": _of(sum, (o.ttft_ms for o in outcomes)),
        "dense_over_this_ttft_sum": sum(d for d, _ in timed) / sum(t for _, t in timed) if timed else None,
        "dense_over_this_ttft": _of(median, (d / t for d, t in timed)),
        "kl_first": _of(fmean, (o.kl_first for o in outcomes)),
        "kl_early": _of(fmean, (o.kl_early for o in outcomes)),
        "kl": _of(fmean, (o.kl for o in outcomes)),
        "kl_max": _of(max, (o.kl for o in outcomes)),
        "top1_first": _of(fmean, (o.top1_first for o in outcomes)),
        "top1_early": _of(fmean, (o.top1_early for o in outcomes)),
        "top1": _of(fmean, (o.top1 for o in outcomes)),
        "answers_equal_to_dense": _of(fmean, (o.same_text for o in outcomes)),
        "fallbacks": dict(Counter(o.fallback.partition(":")[0] for o in outcomes if o.fallback)),
    }


def _of(how: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    found = [float(v) for v in values if v is not None]
    return how(found) if found else None
