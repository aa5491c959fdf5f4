"""The scheduler's part of anchors: which requests wait for them, what the workers are asked, and who is learned from.

A plan whose moved text waits is shown to the workers, who hold the K/V; a step later they have said what is to be computed
again, and the request is promised that plan. Where they know too little it is computed, and learned from. Knows token ids only.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from kvcomm.config import Config
from kvcomm.connectors.messages import Answer, Ask, News
from kvcomm.errors import CacheFault
from kvcomm.segments import Ids, Plan, Span
from kvcomm.waiting import Waiting
from kvcomm.who import Who

__all__ = ["Foresight"]

PATIENCE = 5.0  # s that a request waits for an answer


@dataclass(eq=False)
class _Case:
    """One request whose moved text waits."""

    due: bool  # it is computed to learn from it
    ask: Ask | None = None
    without: Plan | None = None  # how it is served where the answer does not help
    asked: float = 0.0  # when, in seconds of perf_counter
    answer: Plan | None = None
    adds: bool = False


class Foresight:
    """What the desk of one engine knows of its workers' anchors. `off`: why they are not used; None where they are."""

    def __init__(self, config: Config, off: str | None) -> None:
        self._config, self.off = config, off
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._waiting = Waiting(self._config)
        self._cases: dict[str, _Case] = {}
        self._asks: list[Ask] = []  # not handed out
        self._able: set[str] = set()  # tenants of whom the workers have learned enough
        self._unable: set[tuple[str, str]] = set()  # tenant, agent: when last asked they had not

    def expect_alone(self, tenant: str) -> None:
        """Texts of this tenant are computed alone: from now on its moved text waits for anchors."""
        self._waiting.expect_alone(tenant)

    def allowed(self, request_id: str, plan: Plan, who: Who, exact: Callable[[], Plan]) -> Plan:
        """`plan`, or `exact`, with exact prefixes alone, where its moved text waits in vain or is to be learned from."""
        if not self._waits(plan, who):
            return plan
        case = self._cases.get(request_id)
        if case is None:
            case = self._cases[request_id] = _Case(self._waiting.due(who.tenant))
        if case.due or who.tenant not in self._able or (who.tenant, who.agent) in self._unable:
            return replace(exact(), fallback="learning")
        case.without = exact()
        return plan

    def ask(self, request_id: str, ids: Ids, plan: Plan, who: Who) -> bool:
        """Asks the workers where `plan`, which is allowed, has moved text that waits; False where it has not."""
        if not self._waits(plan, who):
            return False
        case = self._cases[request_id]
        case.ask, case.asked, case.answer = Ask(request_id, ids, plan, who), perf_counter(), None
        self._asks.append(case.ask)
        return True

    def asked(self, request_id: str) -> bool:
        """Whether an answer is on its way. Raises CacheFault where that takes too long."""
        case = self._cases.get(request_id)
        if case is None or case.ask is None or case.answer is not None:
            return False
        if perf_counter() - case.asked > PATIENCE:
            raise CacheFault(f"the workers did not say within {PATIENCE:g} s what anchors know")
        return True

    def answer(self, request_id: str, known: Container[str]) -> Plan | None:
        """The plan that came of the last question; None where there is none, or it needs a segment that is not `known` now."""
        case = self._cases.get(request_id)
        if case is None or case.answer is None:
            return None
        return case.answer if all(span.segment.key in known for span in case.answer.spans) else None

    def additions(self, request_id: str) -> Ask | None:
        """What the workers must know to add deviations to what they load; None where nothing is added."""
        case = self._cases.get(request_id)
        return case.ask if case is not None and case.adds else None

    def lessons(self, served: Plan, known: Sequence[Span], who: Who, kept: Container[str]) -> list[Span]:
        """Those of the `known` spans of a prompt that can be learned from, `served` as it was."""
        return [] if self.off else self._waiting.lessons(served, known, who.tenant, kept)

    def take_asks(self) -> tuple[Ask, ...]:
        """For the workers, in this step."""
        asks, self._asks = tuple(self._asks), []
        return asks

    def heard(self, news: News) -> None:
        for request_id, answer in news.answers.items():
            case = self._cases.get(request_id)
            if case is not None and case.ask is not None and case.answer is None:
                self._answered(case, answer)
        for tenant, agent in news.able:
            self._able.add(tenant)
            self._unable.discard((tenant, agent))

    def forget(self, request_id: str) -> None:
        """A request has finished."""
        self._cases.pop(request_id, None)

    def _waits(self, plan: Plan, who: Who) -> bool:
        moved = [span for span in plan.spans if span.rung == "boundary"]
        return bool(moved) and not self.off and self._waiting.waits(who.tenant, moved)

    def _answered(self, case: _Case, answer: Answer) -> None:
        assert case.ask is not None and case.without is not None, "an answer to no question"
        plan, who = case.ask.plan, case.ask.who
        reason = None
        if answer.fault is not None:
            reason = f"fault: {answer.fault}"
        elif answer.recompute is None:
            reason = "learning"
            self._unable.add((who.tenant, who.agent))
        elif len(answer.recompute) > self._config.max_recompute * plan.length:
            reason = "too-much-recomputed"
        if reason is not None or answer.recompute is None:
            case.answer, case.adds = replace(case.without, fallback=reason), False
            return
        spans = tuple(replace(span, rung="anchor") if span.rung == "boundary" else span for span in plan.spans)
        case.answer, case.adds = Plan(plan.length, spans, answer.recompute), answer.adds
