"""Which rung for which span: from matches and rules alone, without looking at KV, models or clocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np

from kvcomm.config import Config
from kvcomm.errors import InputError
from kvcomm.matching import Match
from kvcomm.segments import Plan, Rung, Span

__all__ = ["FALLBACKS", "MIN_REUSED", "Rule", "plan"]

Rule = Literal["auto", "exact"]

MIN_REUSED = 8  # tokens; a span with fewer left to reuse is computed again: it is not worth assembling

FALLBACKS: Mapping[str, str] = MappingProxyType(
    {
        "mode-off": "sharing is switched off",
        "nothing-known": "no run of the prompt is known",
        "nothing-exact": "runs of the prompt are known, but the rule allows exact prefixes only and none of them is one",
        "nothing-left": "of every known run so much must be computed again that too little is left",
        "learning": "moved text waits for anchors: this request is computed, and learned from",
        "draft-check": "the start of the answer changed when what it leans on was computed again",
        "too-much-recomputed": "the share of the prompt that must be computed exceeds max_recompute; no exact prefix is known",
    }
)
"""Every value of `Plan.fallback` that this module gives, and what it means."""


def plan(length: int, matches: Sequence[Match], config: Config, rule: Rule = "auto") -> Plan:
    """How to serve a prompt of `length` tokens whose known runs are `matches` (disjoint, in order).

    A span is exact when its match is and no moved span lies before it: what is computed behind exact text is exact. Other spans
    are moved: under rung `boundary` their first `config.boundary` tokens are computed again, and so are the last
    `config.closing` of the prompt. Exact spans need neither. The last token is always computed, for its logits. Where a larger
    share of the prompt than `config.max_recompute` would be computed, moved spans are given up; an exact prefix is worth it at
    any length.
    Raises InputError for an empty prompt.

        prompt     | exact | exact | seam |   moved    | new text | moved | last
        recompute                  xxxxxxxxx           xxxxxxxxxxxxx    xxxxxxx     (closing reaches into the last span)
    """
    if length < 1:
        raise InputError(f"the prompt has {length} tokens; it must have at least 1")
    if config.mode == "off":
        return Plan.dense(length, "mode-off")
    if not matches:
        return Plan.dense(length, "nothing-known")
    moved: Rung = "boundary" if config.rung == "boundary" else "rotate"
    exact_to = 0
    spans: list[Span] = []
    for match in matches:
        if match.exact and match.tokens >= MIN_REUSED and all(span.rung == "exact" for span in spans):
            exact_to = match.end
            spans.append(Span(match.start, match.end, "exact", match.segment, match.offset))
        elif rule == "auto":
            spans.append(Span(match.start, match.end, moved, match.segment, match.offset))
    if not spans:
        return Plan.dense(length, "nothing-exact")

    compute = np.ones(length, dtype=bool)
    for span in spans:
        compute[span.start + (config.boundary if span.rung == "boundary" else 0) : span.end] = False
    if moved == "boundary":
        compute[max(length - config.closing, exact_to) :] = True
    compute[-1] = True
    kept = []
    for span in spans:
        if span.tokens - np.count_nonzero(compute[span.start : span.end]) >= MIN_REUSED:
            kept.append(span)
        else:
            compute[span.start : span.end] = True
    if not kept:
        return Plan.dense(length, "nothing-left")
    recompute = np.flatnonzero(compute)
    if len(recompute) > config.max_recompute * length and any(span.rung != "exact" for span in kept):
        prefix = plan(length, matches, config, "exact")  # an exact prefix is worth it at any length
        return prefix if prefix.spans else Plan.dense(length, "too-much-recomputed")
    return Plan(length, tuple(kept), recompute)
