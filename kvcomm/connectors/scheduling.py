"""The scheduler's part: match -> plan -> promise, what to keep of finished text, and what every request came to.

Knows token ids, never K/V. A promise is made when the scheduler asks, and can be asked for as often as it likes: the one thing
that a question changes is that the request leaves everybody's prefix cache (a salt of its own), before anything is promised,
for all that lies behind the blocks which this cache holds for it. Those stay: they are exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any
from uuid import uuid4

import numpy as np

from kvcomm.connectors import vllm_compat as compat
from kvcomm.connectors.asking import Foresight
from kvcomm.connectors.capture import answer_segment, prompt_segments
from kvcomm.connectors.messages import Hole, Lesson, Load, News, Save, Step
from kvcomm.connectors.promise import Promise
from kvcomm.connectors.settings import Settings, Wish
from kvcomm.errors import CacheFault
from kvcomm.matching import Found, Index, TextIndex
from kvcomm.metrics import Counters
from kvcomm.policy import plan as make_plan
from kvcomm.request import Request as Times
from kvcomm.segments import Ids, Plan, ReuseReport, Segment, Span
from kvcomm.waiting import longest
from kvcomm.who import Who

__all__ = ["Desk"]


@dataclass(eq=False)
class _Request:
    """One request of the engine, from its arrival to its end."""

    own: Any  # the engine's record of it
    ids: Ids  # [prompt]
    wish: Wish
    times: Times
    refusal: str | None  # why it is left alone
    known: Plan  # what was found in its prompt
    found: Found | None = None  # what the index said of it last
    movable: list[Span] = field(default_factory=list)  # and what of it does not lie where it did, whatever becomes of it
    promise: Promise | None = None  # what is promised, or was
    served: Plan | None = None  # how its prompt was computed, where something was loaded
    start: int = 0  # tokens that the engine's cache held when it was scheduled
    offer: int = 0  # tokens that the engine was last told it need not compute
    since: int = 0  # the least of `start`
    upto: int = 0  # tokens in front of what the engine computed by itself
    private_from: int | None = None  # tokens in front of its salt; None: it has none
    admitted: bool = False  # has had blocks
    kept: bool = False  # its prompt has been handed to the workers for keeping

    @property
    def plan(self) -> Plan:
        """How its prompt was computed."""
        return self.served or Plan.dense(len(self.ids), self.known.fallback or "not-loaded")


class Desk:
    """The scheduler's side of one engine, whose workers are `ranks`."""

    def __init__(
        self,
        settings: Settings,
        fingerprint: str,
        *,
        ranks: int,
        step_tokens: int,
        max_rows: int,
        block_size: int,
        prefix_caching: bool,
        shared: Index | None = None,
    ) -> None:
        """`shared`: what is known to all engines of a server; None: this engine knows what its own workers keep."""
        self._settings, self._fingerprint, self._ranks = settings, fingerprint, ranks
        self._hole_tokens = step_tokens if settings.max_hole_tokens is None else settings.max_hole_tokens
        self._least_gain = settings.least_gain or 0
        self._step_tokens, self._max_rows = step_tokens, max_rows
        self._block_size, self._prefix_caching = block_size, prefix_caching
        off = "as the settings say" if settings.config.anchors == "off" else None
        if off is None and ranks > 1:
            off = f"{ranks} ranks would choose different tokens"
        self._foresight = Foresight(settings.config, off)
        self._shared = shared
        self.index: Any = self._empty_index()  # an `Index`; which one, who looks into it knows
        self.counters = Counters()
        self._ready: str | None = "the workers have not reported yet"  # why nothing is promised; None: all is well
        self._requests: dict[str, _Request] = {}
        self._saving: dict[str, Segment] = {}  # handed to the workers, not confirmed
        self._loads: dict[str, tuple[int, ...]] = {}  # of the step that is being scheduled: the blocks of requests
        self._saves: list[Save] = []  # of requests that have finished
        self._forget: list[str] = []
        self._reset = False

    # -- what the engine's scheduler calls ------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:
        """A request has come. Changes nothing of it."""
        refusal = compat.request_refusal(request)
        tenant = request.cache_salt or ""
        wish = Wish(Who(tenant=tenant), "off")
        if refusal is None:
            try:
                wish = self._settings.wish(compat.asked(request), tenant)
            except Exception as error:  # noqa: BLE001  # clients send what they like, and this is the engine's own process
                refusal = f"unusable-wish: {error}"
        if wish.mode == "off" and refusal is None:
            refusal = "mode-off"
        ids = np.asarray(request.prompt_token_ids or [], dtype=np.int32)
        times = Times(wish.who, perf_counter())
        if wish.prefill and refusal is None:
            self._foresight.expect_alone(tenant)
        plan = Plan.dense(len(ids), refusal or (self._prefill() if wish.prefill else "nothing-known"))
        self._requests[request.request_id] = _Request(request, ids, wish, times, refusal, plan)

    def promised(self, request: Any, local: int) -> int | None:
        """Tokens that can be had beyond the `local` ones which the engine's cache holds; None: ask again in a later step."""
        state = self._requests.get(request.request_id)
        if state is None or state.refusal is not None or state.wish.prefill:
            return 0
        if state.promise is None or not self._holds(state.promise):
            if state.admitted:  # its first tokens were computed in another way: stay with it
                if local <= (state.private_from or 0):
                    state.served = None  # nothing is left of what was loaded
                return 0
            try:
                state.promise = self._make_promise(state, local)
                if state.promise is None and self._foresight.asked(request.request_id):
                    return None
            except Exception as fault:  # noqa: BLE001  # no plan is a dense answer, whatever went wrong
                self._count_fault("plan", state, fault)
                state.refusal = "fault"
                return 0
        promise = state.promise
        if promise is None or (state.admitted and state.served is None):
            return 0
        # A resumed request gets again what it had of its prompt: its answer was read from that.
        end = self._end(promise, local) if state.served is None else promise.last(state.upto)
        if end <= local:
            return 0
        if not self._computed(state, local):
            return None
        if self._prefix_caching and (state.private_from is None or local < state.private_from):
            if not compat.salt(state.own, local // self._block_size):
                state.refusal = "no-salt"
                state.known = replace(state.known, fallback="no-salt")
                return 0
            state.private_from = local
        holes = _tokens(promise.holes(local, end))
        others = [self._requests[name] for name in self._loads]
        pending = sum(_tokens(_promise(other).holes(other.start, other.offer)) for other in others)
        if pending and pending + holes > self._hole_tokens:
            return None
        state.offer = end
        return end - local

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """The request is scheduled, with `external` tokens of what was promised."""
        state = self._requests.get(request.request_id)
        if state is None:
            return
        state.admitted = True
        if external and state.promise is not None:
            state.start = state.offer - external
            self._loads[request.request_id] = tuple(blocks)

    def step(self, scheduled: dict[str, int], blocks_of: Any) -> Step:
        """What the workers do in this step. `blocks_of(request_id)`: a request's blocks. Forgets what it handed out."""
        saves, self._saves = self._saves, []
        for request_id in scheduled:
            state = self._requests.get(request_id)
            # One step after the last of the prompt was computed: the first token does not wait for it.
            if state is not None and not state.kept and state.own.num_computed_tokens >= len(state.ids):
                state.kept = True
                segments, lesson = self._prompt(state)
                if segments or lesson:
                    saves.append(Save(request_id, self._to_save(segments), tuple(blocks_of(request_id)), False, lesson))
        rows, loads = len(scheduled), []  # sequences of the engine's forward
        for request_id, held in self._loads.items():
            loads.append(self._load(request_id, held, scheduled.get(request_id, 0), self._max_rows - rows + 1))
            rows += len(loads[-1].holes) - 1 if loads[-1].folded else 0
        step = Step(self._reset, tuple(self._forget), tuple(loads), tuple(saves), self._foresight.take_asks())
        self._reset = False
        self._forget.clear()
        self._loads.clear()
        return step

    def finished(self, request: Any, blocks: list[int]) -> tuple[bool, ReuseReport | None]:
        """A request has finished; True where its blocks are needed for one more step. What happened to it."""
        state = self._requests.pop(request.request_id, None)
        self._loads.pop(request.request_id, None)
        self._foresight.forget(request.request_id)
        if state is None:
            return False, None
        self._land(state)
        report = state.times.report(state.plan)
        self.counters.record(report)
        if state.refusal is not None or self._ready is not None or not compat.finished_well(request):
            return False, report
        segments, lesson = ([], None) if state.kept else self._prompt(state)
        segments += self._answer(state)
        if not segments and lesson is None:
            return False, report
        self._saves.append(Save(request.request_id, self._to_save(segments), tuple(blocks), True, lesson))
        return True, report

    def heard(self, news: News) -> None:
        """The workers' report on a step."""
        if self._ready is not None or news.refusal is not None:
            self._ready = news.refusal
        if news.least_gain is not None and self._settings.least_gain is None:
            self._least_gain = news.least_gain
        for key, ranks in news.kept.items():
            segment = self._saving.pop(key, None)
            if segment is not None and ranks == self._ranks:
                self._forget += self.index.add(segment)
            elif key not in self.index:
                self._forget.append(key)
        for key in news.gone:
            self.index.remove(key)
            self._saving.pop(key, None)
            if self._ranks > 1:
                self._forget.append(key)
        for request_id in news.apart:
            if (state := self._requests.get(request_id)) is not None:
                state.served, state.upto = self._served(state, state.start, state.offer), state.offer
        self._foresight.heard(news)
        for kind, request_id, reason in news.faults:
            self.counters.fault(kind)
            state = self._requests.get(request_id)
            if state is not None and kind not in ("keep", "fold"):
                state.known = replace(state.known, fallback=f"fault: {reason}")
                if state.start <= (state.private_from or 0):  # else it is resumed, and keeps what it had loaded before
                    state.served = None

    def reset(self) -> None:
        """Forget all text, for example because the weights have changed. What is being loaded is computed."""
        self.index, self._reset = self._empty_index(), True
        if self._shared is not None:  # others may go on with the old weights: from here on this engine is alone
            self._fingerprint = f"{self._fingerprint} reset {uuid4().hex}"
        self._saving.clear()
        self._foresight.reset()
        for state in self._requests.values():
            if state.admitted:  # its K/V is of before
                state.refusal = state.refusal or "reset"

    # -- within ---------------------------------------------------------------------------------------------------------

    def _land(self, state: _Request) -> None:
        """What was found for a request need not be held for it any more."""
        if state.found is None or state.found.flight is None:
            return
        flight, state.found = state.found.flight, None
        try:
            self.index.land(flight, state.wish.who.tenant)
        except CacheFault as fault:
            self.counters.fault("store")
            compat.log.warning("kvcomm: a store fault, counted: %s", fault)

    def _empty_index(self) -> Index:
        if self._shared is not None:
            return self._shared
        config = self._settings.config
        return TextIndex(min_run=config.min_run, max_windows=config.index_windows, variants=config.variants)

    def _make_promise(self, state: _Request, local: int) -> Promise | None:
        """None where nothing can be promised, or not enough; `state.known` then says why. Also where the workers are asked."""
        if self._ready is not None:
            state.known = Plan.dense(len(state.ids), f"not-ready: {self._ready}")
            return None
        who, request_id, config = state.wish.who, state.own.request_id, state.wish.config
        if self._foresight.asked(request_id):
            return None
        if (answer := self._foresight.answer(request_id, self.index)) is not None:
            state.times.estimated = perf_counter()
            return self._worth(state, answer, local)
        self._land(state)
        state.found = self.index.look(state.ids, fingerprint=self._fingerprint, tenant=who.tenant)
        found = state.found.matches
        state.times.found = state.found
        state.times.matched = perf_counter()
        state.movable = [Span(m.start, m.end, "boundary", m.segment, m.offset) for m in found if not m.exact]
        state.known = make_plan(len(state.ids), found, config, who.rule)
        plan = self._foresight.allowed(request_id, state.known, who, lambda: make_plan(len(state.ids), found, config, "exact"))
        state.times.planned = perf_counter()
        promise = self._worth(state, plan, local)
        if promise is not None and self._foresight.ask(request_id, state.ids, plan, who):
            return None
        return promise

    def _worth(self, state: _Request, plan: Plan, local: int) -> Promise | None:
        """What is promised of `plan`; None where it is not enough to be worth it."""
        state.known = replace(state.known, fallback=plan.fallback)
        if not plan.spans:
            return None
        promise = Promise.of(plan, self._hole_tokens)
        if promise.end(local) - local < max(self._least_gain, 1):
            reason = plan.fallback or promise.plan.fallback or "little-gain"
            state.known = replace(state.known, fallback=reason)
            return None
        if state.wish.mode == "shadow":
            state.known = replace(state.known, fallback="shadow")
            return None
        return promise

    def _end(self, promise: Promise, local: int) -> int:
        """Tokens that the engine is told it need not compute. Where more are left than one step computes, holes cannot be
        folded: then these are all up to the last reused one.
        """
        length, end = promise.plan.length, promise.end(local)
        return end if length - end <= self._step_tokens else promise.last(length)

    def _holds(self, promise: Promise) -> bool:
        return all(key in self.index for key in promise.keys)

    def _computed(self, state: _Request, local: int) -> bool:
        """Whether the `local` tokens that the engine's cache holds are there. They are not where another request computes the
        last block of them in this very step: its K/V would come too late for holes that are computed apart.
        """
        if not local:
            return True
        last = slice(local // self._block_size - 1, local // self._block_size)
        return not any(
            other is not state
            and compat.running(other.own)
            and other.own.num_computed_tokens < local
            and other.own.block_hashes[last] == state.own.block_hashes[last]
            for other in self._requests.values()
        )

    def _load(self, request_id: str, blocks: tuple[int, ...], scheduled: int, rows: int) -> Load:
        """What the workers do for a request of this step, which computes `scheduled` of its tokens, in at most `rows` runs."""
        state = self._requests[request_id]
        start, end = state.start, state.offer
        folded = state.served is None and scheduled == len(state.ids) - end and end == _promise(state).end(start)
        folded = folded and len(_promise(state).holes(start, len(state.ids))) <= rows
        upto = len(state.ids) if folded else end
        if state.served is None or start < state.since:  # else it is resumed, with no less of its own than it had
            state.served, state.upto, state.since = self._served(state, start, upto), upto, start
        pieces, holes = _promise(state).pieces(start, upto), _promise(state).holes(start, upto)
        additions, tenant = self._foresight.additions(request_id), state.wish.who.tenant
        return Load(request_id, state.ids, blocks, start, end, pieces, holes, folded, additions, tenant)

    def _served(self, state: _Request, start: int, end: int) -> Plan:
        return _promise(state).served(state.ids, start, end, self._fingerprint, state.wish.who.tenant)

    def _labels(self, state: _Request) -> tuple[str, str, str, int]:
        who = state.wish.who
        return self._fingerprint, who.tenant, who.agent, self._settings.config.min_run

    def _prompt(self, state: _Request) -> tuple[list[Segment], Lesson | None]:
        """What a computed prompt leaves behind: text to keep, and what can be learned from text that is kept."""
        if state.refusal is not None or self._ready is not None:
            return [], None
        try:
            if state.wish.prefill:
                return self._alone(state), None
            who = state.wish.who
            lessons = self._foresight.lessons(state.plan, state.movable, who, self.index)
            held = {span.start: span for span in (*lessons, *state.known.spans)}
            known = replace(state.known, spans=tuple(held[start] for start in sorted(held)))
            segments = prompt_segments(state.ids, state.plan, known, *self._labels(state))
            return segments, Lesson(state.ids, tuple(longest(lessons)), who) if lessons else None
        except Exception as fault:  # noqa: BLE001  # learning is optional
            self._count_fault("learn", state, fault)
            return [], None

    def _alone(self, state: _Request) -> list[Segment]:
        fingerprint, tenant, producer, least = self._labels(state)
        segment = Segment(state.ids.copy(), state.ids[:0].copy(), fingerprint, tenant, producer, alone=True)
        return [segment] if len(state.ids) >= least and segment.key not in self.index else []

    def _prefill(self) -> str:
        """What becomes of a text that is computed alone."""
        return f"prefill: anchors are off, {self._foresight.off}" if self._foresight.off else "prefill"

    def _answer(self, state: _Request) -> list[Segment]:
        if state.wish.prefill:
            return []
        try:
            whole = np.asarray(state.own.all_token_ids, dtype=np.int32)
            tokens = len(state.ids)
            computed = min(int(state.own.num_computed_tokens), len(whole) - 1)
            return answer_segment(whole[:tokens], whole[tokens:computed], state.plan, *self._labels(state))
        except Exception as fault:  # noqa: BLE001  # learning is optional
            self._count_fault("learn", state, fault)
            return []

    def _count_fault(self, kind: str, state: _Request, fault: Exception) -> None:
        self.counters.fault(kind)
        state.known = replace(state.known, fallback=f"fault: {fault!r}")
        compat.log.warning("kvcomm: a %s fault, counted: %r", kind, fault)

    def _to_save(self, segments: list[Segment]) -> tuple[Segment, ...]:
        self._saving.update({segment.key: segment for segment in segments})
        return tuple(segments)


def _promise(state: _Request) -> Promise:
    assert state.promise is not None, "nothing is loaded that was not promised"
    return state.promise


def _tokens(runs: tuple[Hole, ...]) -> int:
    return sum(b - a for a, b in runs)
