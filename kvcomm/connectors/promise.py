"""From a plan to what the engine is promised, and to what its workers do for it.

A plan reuses tokens anywhere in a prompt; an engine takes a number of tokens that it need not compute, and computes the last
ones. Either these change places with the ones that really are to be computed, wherever they are (`folded`), or the engine has
its way: it computes the last ones, and what is missing in front of them is computed apart. Pure arithmetic: knows no KV.

    prompt    | local | piece | hole | piece | hole |  piece  | last |      n tokens in holes, the last one among them
    folded    0       computed: hole, hole, last                     N      the engine is told of N - n tokens
    apart     0       loaded, and the holes computed  |   N - n: the engine computes all from here on
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvcomm.connectors.messages import Hole, Piece
from kvcomm.segments import Ids, Plan, Segment, Span

__all__ = ["Promise"]


@dataclass(frozen=True, eq=False)
class Promise:
    """The prompt as `plan` serves it."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan, hole_tokens: int) -> Promise:
        """As much of `plan` as has at most `hole_tokens` to compute before its last reused token."""
        reused = _reused(plan)
        holes_before = np.cumsum(~reused)  # [length], of every position: not reused up to and with it
        too_far = np.flatnonzero(reused & (holes_before > hole_tokens))
        if not len(too_far):
            return cls(plan)
        reused[too_far[0] :] = False
        spans = tuple(span for span in plan.spans if reused[span.start : span.end].any())
        if not spans:
            return cls(Plan.dense(plan.length, "too-many-holes"))
        return cls(Plan(plan.length, spans, np.flatnonzero(~reused)))

    def end(self, local: int) -> int:
        """Tokens that the engine need not compute, where it has the first `local` itself."""
        return self.plan.length - int(np.count_nonzero(self.plan.recompute >= local))

    def last(self, end: int) -> int:
        """Tokens up to the last reused one before `end`; 0 where there is none."""
        reused = np.flatnonzero(_reused(self.plan)[:end])
        return int(reused[-1]) + 1 if len(reused) else 0

    def holes(self, start: int, end: int) -> tuple[Hole, ...]:
        """Runs of tokens in [start, end) that are not reused."""
        return tuple(_runs(~_reused(self.plan)[:end], start))

    def pieces(self, start: int, end: int) -> tuple[Piece, ...]:
        """Runs of tokens in [start, end) that are."""
        reused = _reused(self.plan)
        return tuple(
            Piece(a, b, span.segment.key, span.offset + a - span.start)
            for span in self.plan.spans
            for a, b in _runs(reused[: min(span.end, end)], max(span.start, start))
        )

    def served(self, ids: Ids, start: int, end: int, fingerprint: str, tenant: str) -> Plan:
        """What has become of the prompt `ids` where the engine had [0, start) itself, exactly, and computed all from `end`."""
        plan, spans = self.plan, []
        if start:
            spans.append(Span(0, start, "exact", Segment(ids[:start], ids[:0], fingerprint, tenant), 0))
        for span in plan.spans:
            a, b = max(span.start, start), min(span.end, end)
            if a < b:
                spans.append(Span(a, b, span.rung, span.segment, span.offset + a - span.start))
        inner = plan.recompute[(plan.recompute >= start) & (plan.recompute < end)]
        return Plan(plan.length, tuple(spans), np.concatenate([inner, np.arange(end, plan.length)]))

    @cached_property
    def keys(self) -> frozenset[str]:
        """Of the segments that it needs."""
        return frozenset(span.segment.key for span in self.plan.spans)


def _reused(plan: Plan) -> npt.NDArray[np.bool_]:
    """[length]"""
    reused = np.ones(plan.length, dtype=bool)
    reused[plan.recompute] = False
    return reused


def _runs(mask: npt.NDArray[np.bool_], start: int = 0) -> list[tuple[int, int]]:
    """[start, end) of every run of True from `start` on."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask[start:], [False]]).astype(np.int8))) + start
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
