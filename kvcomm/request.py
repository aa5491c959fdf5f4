"""What is written down about one request while it runs, and the report that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from kvcomm.matching import Found
from kvcomm.plain import PlainKV
from kvcomm.segments import Ids, Plan, ReuseReport, Span, SpanReport
from kvcomm.who import Who

__all__ = ["Request"]

TELLING = 64  # tokens; fewer say more about a forward than about a token


@dataclass
class Request:
    """Moments are in seconds of `perf_counter`; None: it did not come to that."""

    who: Who
    began: float  # the call
    turn: float = field(default_factory=perf_counter)  # no other request runs any more
    ids: Ids = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    deviations: tuple[tuple[int, PlainKV], ...] = ()  # to be added to what is assembled, from a position on
    known: list[Span] = field(default_factory=list)  # text of the prompt that could be moved, whether it was or not
    found: Found | None = None  # what the index said last
    matched: float | None = None
    planned: float | None = None
    estimated: float | None = None  # anchors had their say
    assembled: float | None = None
    first: float | None = None  # the first token's logits

    def mark_first(self) -> None:
        if self.first is None:
            self.first = perf_counter()

    def ms_per_token(self, plan: Plan) -> float | None:
        """What computing a token took; None where too few were computed to tell."""
        forward = _ms(self.assembled, self.first)
        return None if forward is None or len(plan.recompute) < TELLING else forward / len(plan.recompute)

    def report(self, plan: Plan) -> ReuseReport:
        """What came of it, served by `plan`."""
        spans = []
        for span in plan.spans:
            again = int(np.searchsorted(plan.recompute, span.end) - np.searchsorted(plan.recompute, span.start))
            spans.append(
                SpanReport(span.start, span.end, span.rung, span.tokens - again, again, span.segment.producer, span.moved)
            )
        return ReuseReport(
            agent=self.who.agent,
            prompt_tokens=plan.length,
            reused_tokens=plan.reused,
            computed_tokens=len(plan.recompute),
            spans=tuple(spans),
            fallback=plan.fallback,
            declined=self.found.declined if self.found else {},
            waited_ms=self.found.waited_ms if self.found else None,
            match_ms=_ms(self.turn, self.matched),
            plan_ms=_ms(self.matched, self.planned),
            estimate_ms=_ms(self.planned, self.estimated),
            assemble_ms=_ms(self.estimated, self.assembled),
            forward_ms=_ms(self.assembled, self.first),
            ttft_ms=_ms(self.began, self.first),
        )


def _ms(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else (b - a) * 1e3
