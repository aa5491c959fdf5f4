"""The worker's part of anchors: says what a plan's moved text needs behind its new context, and learns from what was computed.

The method is `Corrector`'s. Learning goes on beside the engine's next steps, from copies; what comes while there is enough to
do is let go. Knows nothing of schedulers, or of how anything is written.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcomm.backends.pre_rope import plain
from kvcomm.config import Config
from kvcomm.connectors.capture import Keeper
from kvcomm.connectors.loading import Deviations
from kvcomm.connectors.messages import Answer, Ask, Lesson
from kvcomm.connectors.vllm_compat import Runner
from kvcomm.correcting import Corrected, Corrector, empty_pool
from kvcomm.errors import CacheFault
from kvcomm.estimators.features import context_features
from kvcomm.plain import PlainKV
from kvcomm.rope import Rope
from kvcomm.segments import Ids, Plan, SegmentKV, Span
from kvcomm.store.base import Store
from kvcomm.wire.client import ServerStore

__all__ = ["Adviser", "Lens"]

BACKLOG = 256 << 20  # bytes of K/V that wait to be learned from; beyond them no more are taken
KEPT = 16  # requests whose deviations are kept until they are loaded
WAIT = 0.02  # s; what a step of the engine may spend on answers that are not there yet


@dataclass(frozen=True)
class Lens:
    """An engine as anchors see it: a `Model` of `kvcomm.correcting`."""

    fingerprint: str
    rope: Rope
    runner: Runner

    def plain(self, kv: SegmentKV, start: int, end: int) -> PlainKV:
        return plain(self.rope, kv, start, end)

    def context(self, ids: Ids) -> Tensor:
        return context_features(ids, self.runner.embed)


class Adviser:
    """Of one worker, which computes all heads. Called from one thread; all that takes time happens in another one of its own,
    a text at a time, so that questions are answered between two texts that are learned from.
    """

    def __init__(self, lens: Lens, store: Store, keeper: Keeper, config: Config) -> None:
        self._lens, self._store, self._keeper, self._config = lens, store, keeper, config
        self._corrector = self._fresh()
        self._thread = ThreadPoolExecutor(1, "kvcomm-anchors")
        self._asked: dict[str, Future[Corrected | None]] = {}  # by request
        self._added: OrderedDict[str, Deviations] = OrderedDict()  # by request, the latest last
        self._lessons: dict[Lesson, int] = {}  # not learned yet, and the bytes that they hold
        self._able: set[tuple[str, str]] = set()  # tenant, agent: could be answered when last looked at
        self._said: deque[tuple[str, str] | Exception] = deque()

    def reset(self) -> None:
        """Forget everything; what is being learned or answered comes to nothing."""
        self._corrector = self._fresh()
        for forgotten in (self._asked, self._added, self._lessons, self._able, self._said):
            forgotten.clear()

    def ask(self, ask: Ask) -> None:
        if isinstance(self._store, ServerStore):
            self._store.belong((span.segment.key for span in ask.plan.spans), ask.who.tenant)
        self._asked[ask.request_id] = self._thread.submit(self._foreseen, self._corrector, ask)

    def answers(self) -> Iterator[tuple[str, Answer | Exception]]:
        """By request, to what was asked; waits a moment for those that are not known yet."""
        done, _ = wait(self._asked.values(), WAIT)
        for request_id in [name for name, found in self._asked.items() if found in done]:
            found = self._asked.pop(request_id)
            if (fault := found.exception()) is not None:
                yield request_id, _usual(fault)
            elif (corrected := found.result()) is None:
                yield request_id, Answer(None)
            else:
                if corrected.deviations:
                    self._added[request_id] = corrected.deviations
                    while len(self._added) > KEPT:
                        self._added.popitem(last=False)
                yield request_id, Answer(corrected.plan.recompute, bool(corrected.deviations))

    def deviations(self, ask: Ask) -> Deviations:
        """What is added to the KV that is loaded. Raises CacheFault where that is not known any more."""
        if ask.request_id in self._added:
            return self._added[ask.request_id]
        found = self._thread.submit(self._foreseen, self._corrector, ask).result()
        if found is None:
            raise CacheFault("what anchors said of a request is forgotten")
        return found.deviations

    def learn(self, lesson: Lesson, blocks: Sequence[int]) -> None:
        """Reads what the cache holds now; the rest comes later."""
        if not self._lessons or sum(tuple(self._lessons.values())) < BACKLOG:
            left = [(span, self._keeper.read(blocks, span.start, span.end)) for span in lesson.spans]
            self._lessons[lesson] = sum(real.nbytes for _, real in left)
            self._thread.submit(self._learn, self._corrector, lesson, left)

    def learned(self) -> Iterator[tuple[str, str] | Exception]:
        """Since the last call: of whom (tenant, agent) so much is known now that their requests can be served, and what went
        wrong.
        """
        while self._said:
            yield self._said.popleft()

    def wait(self) -> None:
        """Until there is nothing left to learn; for tests and measurements."""
        while self._lessons:
            self._thread.submit(lambda: None).result()

    def _fresh(self) -> Corrector:
        return Corrector(self._lens, self._store, empty_pool(self._config), self._config)

    # -- in the other thread --------------------------------------------------------------------------------------------

    def _foreseen(self, corrector: Corrector, ask: Ask) -> Corrected | None:
        with _ordinary_tensors():
            found = corrector.foreseen(ask.ids, ask.plan, ask.who)
        if found is None:
            self._able.discard((ask.who.tenant, ask.who.agent))
        return found

    def _learn(self, corrector: Corrector, lesson: Lesson, left: list[tuple[Span, SegmentKV]]) -> None:
        """From one of the texts that are left; then the next one's turn comes, behind what was asked meanwhile."""
        try:
            with _ordinary_tensors():
                corrector.learn(lesson.ids, [left.pop()], lesson.who)
                if not left:
                    self._look(corrector, lesson)
        except Exception as fault:  # noqa: BLE001  # learning is optional
            left.clear()
            self._said.append(fault)
        if left and corrector is self._corrector:
            self._thread.submit(self._learn, corrector, lesson, left)
        else:
            self._lessons.pop(lesson, None)

    def _look(self, corrector: Corrector, lesson: Lesson) -> None:
        """Can requests like this one be served from now on, if they could not before?"""
        asker, length = (lesson.who.tenant, lesson.who.agent), len(lesson.ids)
        if asker in self._able or corrector is not self._corrector:
            return
        if corrector.foreseen(lesson.ids, Plan(length, lesson.spans, np.asarray([length - 1])), lesson.who) is not None:
            self._able.add(asker)
            self._said.append(asker)


def _usual(fault: BaseException) -> Exception:
    return fault if isinstance(fault, Exception) else RuntimeError(repr(fault))


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """The engine's steps run in inference mode; what is learned outlives them, and is used by another thread."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield
