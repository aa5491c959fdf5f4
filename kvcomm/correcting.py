"""What anchors do for a request: what is added to its moved text, what of it is computed again, and what is learned from it.

The base of a text that was computed alone knows nothing of what it stands behind now, and one from another prompt may know
something else. Anchors say what a new context changes; with them moved text is served on rung `anchor`, whatever its base.
Knows nothing of how a plan comes about, of requests, or of where a model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvcomm.anchors.admission import Novel
from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.pool import AnchorPool
from kvcomm.codecs import codec, pack
from kvcomm.config import Config
from kvcomm.errors import CacheFault
from kvcomm.estimators.base import Estimate, Place
from kvcomm.estimators.catalogue import make
from kvcomm.estimators.doubt import far_above
from kvcomm.estimators.pupils import Pupils
from kvcomm.plain import PlainKV
from kvcomm.segments import Ids, Plan, SegmentKV, Span
from kvcomm.store.base import Store
from kvcomm.waiting import Waiting
from kvcomm.who import Who

__all__ = ["Corrected", "Corrector", "Model", "empty_pool"]


class Model(Protocol):
    """What anchors need of a model; a `Backend` is one."""

    @property
    def fingerprint(self) -> str:
        """Identity of everything that K/V depends on."""
        ...

    def plain(self, kv: SegmentKV, start: int, end: int) -> PlainKV:
        """Tokens [start, end) of `kv` in pre-RoPE space: keys rotated to position 0, float32."""
        ...

    def context(self, ids: Ids) -> Tensor:
        """float32 [c]: features of a text in front of a span, from its last tokens alone; no forward is needed."""
        ...


@dataclass(frozen=True, eq=False)
class Corrected:
    """A plan after anchors had their say."""

    plan: Plan
    deviations: tuple[tuple[int, PlainKV], ...] = ()  # position of the first token, what is to be added from there on


class Corrector:
    """Mutable; plans of one request at a time, while another thread may learn. The pool may be shared with others."""

    def __init__(self, model: Model, store: Store, pool: AnchorPool, config: Config) -> None:
        """Learns first from what `pool` holds. Raises InputError for an unknown estimator or codec in `config`."""
        self.model, self.store, self.pool, self.config = model, store, pool, config
        self.waiting = Waiting(config)
        self._codec = codec(config.anchor_codec)
        make([config.estimator])
        self._pupils = Pupils(lambda: model.fingerprint, lambda: make([config.estimator])[config.estimator])
        pool.subscribe(self._pupils)

    def correct(self, ids: Ids, plan: Plan, who: Who) -> Corrected | None:
        """`plan` with its moved spans served by anchors; None where that cannot be done and they wait for anchors.

        Where nothing waits, too few anchors leave the plan as it is. One request in 1 / `explore` gets None, to learn from it.
        """
        moved = [span for span in plan.spans if span.rung == "boundary"]
        if not moved:
            return Corrected(plan)
        waits = self.waiting.waits(who.tenant, moved)
        if waits and self.waiting.due(who.tenant):
            return None
        return self.foreseen(ids, plan, who) or (None if waits else Corrected(plan))

    def foreseen(self, ids: Ids, plan: Plan, who: Who) -> Corrected | None:
        """`plan` with its spans on rung `boundary` served by anchors; None where these say too little of some span. Raises
        CacheFault where a span's KV is not kept any more, and where what they say is not a number.
        """
        moved = [span for span in plan.spans if span.rung == "boundary"]
        anchors = self.pool.match(who.agent, self.model.fingerprint, who.tenant)  # a shared pool follows others now
        estimates: list[Estimate] = []
        for span in moved:
            estimate = self._estimate(ids, span, who)
            if estimate is None:
                return None
            estimates.append(estimate)
        self.pool.use(anchor.key for anchor in anchors)
        return self._corrected(plan, moved, estimates)

    def learn(self, ids: Ids, lessons: Iterable[tuple[Span, SegmentKV]], who: Who) -> None:
        """Deposits an anchor for each lesson: a span of the prompt `ids`, and its real KV."""
        for span, real in lessons:
            base = self._base(span)
            anchor = Anchor(
                slot=who.agent,
                ids=ids[span.start : span.end],
                base=pack(self._codec, base),
                deviation=pack(self._codec, self.model.plain(real, 0, span.tokens).minus(base)),
                context=self.model.context(ids[: span.start]),
                producer_context=np.concatenate([span.segment.context, span.segment.ids[: span.offset]]),
                consumer_context=ids[: span.start],
                fingerprint=self.model.fingerprint,
                tenant=who.tenant,
            )
            self.pool.add(anchor)

    def _estimate(self, ids: Ids, span: Span, who: Who) -> Estimate | None:
        key = f"{span.segment.key} {span.offset} {span.tokens}"
        context = self.model.context(ids[: span.start])
        place = Place(who.agent, ids[span.start : span.end], lambda: self._base(span), context, key=key)
        estimate = self._pupils.estimate(who.tenant, place)
        if estimate is not None:
            added = estimate.deviation
            if not bool(torch.isfinite(estimate.doubt).all()) or not (added is None or added.finite()):
                raise CacheFault("an estimate is not a number")
        return estimate

    def _base(self, span: Span) -> PlainKV:
        kv = self.store.get(span.segment.key)
        if kv is None:
            raise CacheFault("a known segment left the store, or was altered in it")
        return self.model.plain(kv, span.offset, span.offset + span.tokens)

    def _corrected(self, plan: Plan, moved: Sequence[Span], estimates: Sequence[Estimate]) -> Corrected:
        """What is doubted far more than other text of the prompt is computed again."""
        doubt = torch.zeros(plan.length)
        for span, estimate in zip(moved, estimates, strict=True):
            doubt[span.start : span.end] = estimate.doubt.cpu()
        doubt[torch.from_numpy(plan.recompute)] = 0
        again = torch.nonzero(far_above(doubt, self.config.doubt)).flatten().numpy()
        served = {span.start: replace(span, rung="anchor") for span in moved}
        spans = tuple(served.get(span.start, span) for span in plan.spans)
        pairs = zip(moved, estimates, strict=True)
        deviations = tuple((span.start, e.deviation) for span, e in pairs if e.deviation is not None)
        return Corrected(Plan(plan.length, spans, np.union1d(plan.recompute, again)), deviations)


def empty_pool(config: Config) -> AnchorPool:
    """A pool as `config` bounds it."""
    return AnchorPool(config.anchor_bytes, config.anchors_per_slot, codec(config.anchor_codec), Novel())
