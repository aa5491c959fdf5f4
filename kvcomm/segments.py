"""The nouns that every part of kvcomm shares: frozen records, no behaviour beyond what their fields imply.

Knows nothing of models, stores or policies. Torch is imported for type checking only, so that tools which never touch a
tensor start quickly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KEY", "RUNGS", "Ids", "Plan", "ReuseReport", "Rung", "Segment", "SegmentKV", "Span", "SpanReport"]

KEY = re.compile(r"[0-9a-f]{32}")
"""What `Segment.key` and other digests look like."""

Ids = npt.NDArray[np.int32]
"""Token ids, [tokens]."""

Rung = Literal["exact", "rotate", "boundary", "anchor", "dense"]
RUNGS: tuple[Rung, ...] = ("exact", "rotate", "boundary", "anchor", "dense")


@dataclass(frozen=True, eq=False)
class SegmentKV:
    """KV of a run of tokens, as the model cached it: keys are rotated at positions `start .. start + tokens - 1`."""

    keys: tuple[Tensor, ...]  # per layer [kv_heads, tokens, key_dim]
    values: tuple[Tensor, ...]  # per layer [kv_heads, tokens, value_dim]
    start: int  # position of the first token when it was computed
    length: int  # tokens of the whole sequence when it was computed; dynamic and longrope tables depend on it

    @property
    def tokens(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of token ids with an identity: what it is, what stood in front of it, who computed it and for whom."""

    ids: Ids  # [tokens]
    context: Ids  # [start]: every token in front of it when its KV was computed
    fingerprint: str  # model identity; KV never crosses it
    tenant: str = ""
    producer: str = ""  # agent that first computed it
    exact: bool = True  # nothing in front of it was reused approximately
    length: int = 1  # tokens of a sequence with the rotary tables that its keys carry; tells apart where they follow the length
    alone: bool = False  # computed ahead of any prompt: whatever a prompt puts in front of it is missing in its KV
    cost_ms: float | None = None  # what its prefill took where it was computed: what reuse saves; no part of its identity

    @cached_property
    def key(self) -> str:
        """Content address: equal segments computed behind equal contexts share it."""
        from hashlib import blake2b

        facts = (self.fingerprint, self.tenant, int(self.exact), self.length, len(self.context))
        h = blake2b("".join(f"{fact}\0" for fact in facts).encode(), digest_size=16)
        h.update(np.ascontiguousarray(self.context).data)
        h.update(np.ascontiguousarray(self.ids).data)
        return h.hexdigest()

    @property
    def start(self) -> int:
        return len(self.context)


@dataclass(frozen=True)
class Span:
    """Prompt tokens [start, end) served from `segment.ids[offset : offset + end - start]`."""

    start: int
    end: int
    rung: Rung
    segment: Segment
    offset: int

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def moved(self) -> int:
        """New position minus base position, in tokens (the paper's positional offset)."""
        return self.start - (self.segment.start + self.offset)


@dataclass(frozen=True, eq=False)
class Plan:
    """How one prompt is served. Spans are disjoint and in order; what they do not cover is in `recompute`.

    prompt     |  span 0  | seam |   span 1    | new text | last token
    recompute             xxxxxxxxx            xxxxxxxxxxxxxxxxxxxxxxx     (seam + the first k tokens of span 1 + ...)
    """

    length: int  # tokens of the prompt
    spans: tuple[Span, ...]
    recompute: npt.NDArray[np.int64]  # positions computed in the one pass, ascending, always holding length - 1
    fallback: str | None = None  # why nothing is reused, or no more than an exact prefix

    @classmethod
    def dense(cls, length: int, reason: str) -> Plan:
        """Everything is computed."""
        return cls(length, (), np.arange(length), reason)

    @property
    def reused(self) -> int:
        return self.length - len(self.recompute)


@dataclass(frozen=True)
class SpanReport:
    """One span of a finished request."""

    start: int
    end: int
    rung: Rung
    reused_tokens: int  # not computed for this request
    recomputed_tokens: int  # computed again: boundary, closing text, and what anchors doubt
    producer: str
    moved_tokens: int


@dataclass(frozen=True)
class ReuseReport:
    """What happened to one request: what was reused, how, what it cost and why anything fell back."""

    agent: str
    prompt_tokens: int
    reused_tokens: int
    computed_tokens: int
    spans: tuple[SpanReport, ...] = ()
    fallback: str | None = None
    declined: Mapping[str, int] = field(default_factory=dict)  # why known text was left to be computed -> its tokens
    waited_ms: float | None = None  # within match_ms: for other processes that were computing the same text
    match_ms: float | None = None  # from the request's turn on: it may have waited for others
    plan_ms: float | None = None
    estimate_ms: float | None = None  # what anchors say of moved text
    assemble_ms: float | None = None  # rotate and copy stored KV into the request's cache
    forward_ms: float | None = None  # the first forward: the one pass, or the dense prefill
    learn_ms: float | None = None  # storing what is new, after the answer
    ttft_ms: float | None = None  # from the call to the first token's logits: waiting and all of the above but learning

    @property
    def reuse_rate(self) -> float:
        """Share of prompt tokens not prefilled for this request."""
        return self.reused_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def tokens_by_rung(self) -> dict[Rung, int]:
        """Reused tokens per rung; `dense` holds every computed token."""
        out: dict[Rung, int] = dict.fromkeys(RUNGS, 0)
        for span in self.spans:
            out[span.rung] += span.reused_tokens
        out["dense"] = self.computed_tokens
        return out
