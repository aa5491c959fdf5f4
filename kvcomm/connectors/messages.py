"""What the scheduler's side and the workers' side of a connector tell each other. Plain records that can be pickled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvcomm.segments import Ids, Plan, Segment, Span
from kvcomm.who import Who

__all__ = ["Answer", "Ask", "Hole", "Lesson", "Load", "News", "Piece", "Save", "Step"]

Hole = tuple[int, int]
"""Prompt positions [start, end) that are computed before the engine's own forward."""


@dataclass(frozen=True)
class Piece:
    """Prompt tokens [start, end) are tokens from `offset` on of the segment stored under `key`."""

    start: int
    end: int
    key: str
    offset: int


@dataclass(frozen=True, eq=False)
class Ask:
    """What do anchors say of the moved text of a plan?"""

    request_id: str
    ids: Ids  # [plan.length]
    plan: Plan
    who: Who


@dataclass(frozen=True, eq=False)
class Answer:
    """To an `Ask`."""

    recompute: npt.NDArray[np.int64] | None  # positions that are to be computed, as in Plan; None: anchors say too little
    adds: bool = False  # a deviation is to be added to what is not
    fault: str | None = None  # why nothing could be said


@dataclass(frozen=True, eq=False)
class Load:
    """KV that the scheduler was promised for one request: it does not compute tokens [start, end).

    Where the engine's own forward takes the holes in place of the tokens from `end` on (`folded`), pieces and holes are those
    of the whole prompt, and as many tokens are in holes as there are from `end` on; else they are those before `end`.

    prompt   | there already | piece | hole |  piece  | hole | piece |  left to the engine
             0             start                                    end
    """

    request_id: str
    ids: Ids  # of the prompt
    blocks: tuple[int, ...]  # of the paged cache, from position 0 on
    start: int
    end: int
    pieces: tuple[Piece, ...]
    holes: tuple[Hole, ...]
    folded: bool = False
    corrections: Ask | None = None  # what anchors say of this is added to the pieces
    tenant: str = ""

    def holes_apart(self) -> tuple[Hole, ...]:
        """What is to be computed before the engine's forward where that one computes all from `end` on."""
        return tuple((a, min(b, self.end)) for a, b in self.holes if a < self.end)


@dataclass(frozen=True, eq=False)
class Lesson:
    """Known text that a prompt computed all the same, behind nothing approximate: what its context changed can be seen."""

    ids: Ids  # [prompt]
    spans: tuple[Span, ...]
    who: Who


@dataclass(frozen=True, eq=False)
class Save:
    """Segments whose KV the paged cache holds at their own positions, to be put into the store, and what can be learned."""

    request_id: str
    segments: tuple[Segment, ...]
    blocks: tuple[int, ...]
    last: bool  # the request has finished: its blocks are free once this is done
    lesson: Lesson | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """What the workers do around one step of the engine, in this order: forget, load, (the engine's forward,) save, answer."""

    reset: bool = False  # forget everything
    forget: tuple[str, ...] = ()  # keys of segments
    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
    asks: tuple[Ask, ...] = ()


@dataclass
class News:
    """What workers report after a step. Aggregated over ranks: a segment is known only when every rank keeps it."""

    refusal: str | None = None  # why this engine cannot be served
    least_gain: int | None = None  # tokens from which on loading is faster here than computing; None: not said
    kept: Counter[str] = field(default_factory=Counter)  # key -> ranks that keep it
    gone: set[str] = field(default_factory=set)  # keys that some rank does not keep, or no more
    apart: set[str] = field(default_factory=set)  # requests whose holes were computed apart although they could be folded
    faults: list[tuple[str, str, str]] = field(default_factory=list)  # kind, request ("": of none in particular), reason
    answers: dict[str, Answer] = field(default_factory=dict)  # by request
    able: set[tuple[str, str]] = field(default_factory=set)  # tenant, agent: what was learned of them now says something

    def aggregate(self, other: News) -> News:
        """Both together; named as vLLM calls it."""
        return News(
            self.refusal or other.refusal,
            max((x for x in (self.least_gain, other.least_gain) if x is not None), default=None),
            self.kept + other.kept,
            self.gone | other.gone,
            self.apart | other.apart,
            self.faults + other.faults,
            self.answers | other.answers,
            self.able | other.able,
        )
