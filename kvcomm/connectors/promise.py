"""From a plan to what the engine is promised: the KV of a prefix, in pieces to load and holes to compute.

A plan reuses tokens anywhere in a prompt; an engine takes one prefix. What follows the last reused token is the engine's own
business. Pure arithmetic: knows no KV and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kvcomm.connectors.messages import Hole, Piece
from kvcomm.segments import Plan

__all__ = ["Promise"]


@dataclass(frozen=True, eq=False)
class Promise:
    """Tokens [0, end) of a prompt, as `plan` serves them; everything from `end` on is in `plan.recompute`."""

    plan: Plan

    @classmethod
    def of(cls, plan: Plan, hole_tokens: int) -> Promise:
        """The longest prefix of `plan` with at most `hole_tokens` to compute before its end."""
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

    @cached_property
    def end(self) -> int:
        """Tokens promised; 0 where nothing is."""
        reused = np.flatnonzero(_reused(self.plan))
        return int(reused[-1]) + 1 if len(reused) else 0

    @cached_property
    def holes(self) -> tuple[Hole, ...]:
        return tuple(_runs(~_reused(self.plan)[: self.end]))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        reused, out = _reused(self.plan), []
        for span in self.plan.spans:
            for a, b in _runs(reused[span.start : span.end]):
                out.append(Piece(span.start + a, span.start + b, span.segment.key, span.offset + a))
        return tuple(out)

    @property
    def hole_tokens(self) -> int:
        return sum(b - a for a, b in self.holes)

    def holes_from(self, start: int) -> tuple[Hole, ...]:
        """What is left of the holes where tokens before `start` are there already."""
        return tuple((max(a, start), b) for a, b in self.holes if b > start)

    def pieces_from(self, start: int) -> tuple[Piece, ...]:
        """The same of the pieces."""
        return tuple(
            Piece(max(p.start, start), p.end, p.key, p.offset + max(start - p.start, 0)) for p in self.pieces if p.end > start
        )


def _reused(plan: Plan) -> npt.NDArray[np.bool_]:
    """[length]"""
    reused = np.ones(plan.length, dtype=bool)
    reused[plan.recompute] = False
    return reused


def _runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
