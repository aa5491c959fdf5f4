"""What anchors do for a request: whether its moved text can be served, what is added to it, and what is computed again.

The base of a text that was computed alone knows nothing of what it stands behind now, and one from another prompt may know
something else. Where texts are prefilled alone, moved text is computed and leaves anchors behind, until they say what a new
context changes; from then on it is served on rung `anchor`, whatever its base.
Knows nothing of how a plan comes about, or of requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

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
from kvcomm.segments import Ids, Plan, Span
from kvcomm.store.base import Store

if TYPE_CHECKING:
    from kvcomm.backends.base import Backend
    from kvcomm.backends.span_cache import SpanCache
    from kvcomm.who import Who

__all__ = ["Corrected", "Corrector"]

LESSONS = 8  # spans learned from one request, the longest


@dataclass(frozen=True, eq=False)
class Corrected:
    """A plan after anchors had their say."""

    plan: Plan
    deviations: tuple[tuple[int, PlainKV], ...] = ()  # position of the first token, what is to be added from there on


class Corrector:
    """Mutable; one request at a time, which the engine sees to. The pool may be shared with others."""

    def __init__(self, backend: Backend, store: Store, pool: AnchorPool, config: Config) -> None:
        """Learns first from what `pool` holds. Raises InputError for an unknown estimator or codec in `config`."""
        self.backend, self.store, self.pool, self.config = backend, store, pool, config
        self._codec = codec(config.anchor_codec)
        make([config.estimator])
        self._pupils = Pupils(lambda: backend.fingerprint, lambda: make([config.estimator])[config.estimator])
        self._waiting: set[str] = set()  # tenants whose moved text waits for anchors
        self._asked: Counter[str] = Counter()  # by tenant: requests that could be served with anchors
        pool.subscribe(self._pupils)

    def expect_alone(self, tenant: str) -> None:
        """Texts of this tenant are computed alone: from now on its moved text waits for anchors."""
        self._waiting.add(tenant)

    def _waits(self, tenant: str, known: Sequence[Span]) -> bool:
        if any(span.segment.alone for span in known):
            self._waiting.add(tenant)
        return self.config.anchors == "all" or tenant in self._waiting

    def correct(self, ids: Ids, plan: Plan, who: Who) -> Corrected | None:
        """`plan` with its moved spans served by anchors; None where that cannot be done and they wait for anchors.

        Where nothing waits, too few anchors leave the plan as it is. One request in 1 / `explore` gets None, to learn from it.
        """
        moved = [span for span in plan.spans if span.rung == "boundary"]
        if not moved:
            return Corrected(plan)
        waits = self._waits(who.tenant, moved)
        if waits and self._due(who.tenant):
            return None
        estimates: list[Estimate] = []
        for span in moved:
            estimate = self._estimate(ids, span, who)
            if estimate is None:
                return None if waits else Corrected(plan)
            estimates.append(estimate)
        self.pool.use(anchor.key for anchor in self.pool.match(who.agent, self.backend.fingerprint, who.tenant))
        return self._corrected(plan, moved, estimates)

    def lessons(self, plan: Plan, known: Sequence[Span], who: Who) -> list[Span]:
        """Those of the `known` spans of a prompt that `plan` leaves to be computed behind nothing approximate."""
        if not self._waits(who.tenant, known) or any(span.rung != "exact" for span in plan.spans):
            return []
        served = {span.start for span in plan.spans}
        return [span for span in known if span.start not in served and span.segment.key in self.store]

    def learn(self, ids: Ids, lessons: Sequence[Span], cache: SpanCache, who: Who) -> None:
        """Deposits an anchor for each lesson, of many the longest; `cache` holds their real KV."""
        for span in sorted(lessons, key=lambda span: -span.tokens)[:LESSONS]:
            base = self._base(span)
            real = self.backend.read(cache, span.start, span.end, len(ids))
            anchor = Anchor(
                slot=who.agent,
                ids=ids[span.start : span.end],
                base=pack(self._codec, base),
                deviation=pack(self._codec, self.backend.plain(real, 0, span.tokens).minus(base)),
                context=self.backend.context(ids[: span.start]),
                producer_context=np.concatenate([span.segment.context, span.segment.ids[: span.offset]]),
                consumer_context=ids[: span.start],
                fingerprint=self.backend.fingerprint,
                tenant=who.tenant,
            )
            self.pool.add(anchor)

    def _due(self, tenant: str) -> bool:
        """Whether it is time to look at how things really are."""
        self._asked[tenant] += 1
        return self.config.explore > 0 and self._asked[tenant] % round(1 / self.config.explore) == 0

    def _estimate(self, ids: Ids, span: Span, who: Who) -> Estimate | None:
        key = f"{span.segment.key} {span.offset} {span.tokens}"
        context = self.backend.context(ids[: span.start])
        place = Place(who.agent, ids[span.start : span.end], lambda: self._base(span), context, key=key)
        return self._pupils.estimate(who.tenant, place)

    def _base(self, span: Span) -> PlainKV:
        kv = self.store.get(span.segment.key)
        if kv is None:
            raise CacheFault("a known segment left the store, or was altered in it")
        return self.backend.plain(kv, span.offset, span.offset + span.tokens)

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
