"""A worker's part of every step: forget, load and compute holes before the engine's forward, save after it, report.

Nothing that goes wrong here ends a step: a request whose K/V cannot be assembled is computed densely in its place, in the pass
that computes holes. Where not even that works, its blocks are reported and the engine's own policy decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvcomm.connectors.advising import Adviser
from kvcomm.connectors.capture import Keeper
from kvcomm.connectors.holes import HolePass, Row
from kvcomm.connectors.loading import Loader, Lost
from kvcomm.connectors.messages import Answer, Hole, Load, News, Save, Step
from kvcomm.connectors.vllm_compat import log
from kvcomm.store.base import Kept, Store

__all__ = ["Refusing", "Worker"]


class Worker:
    """One rank. `alone`: no other rank computes the same requests; `adviser`: only there; `shared`: the store is other engines'
    too. `try_fold` is called once, after the first forward of the engine that took holes, and raises where it did not compute
    them: then none takes any more.
    """

    def __init__(
        self,
        loader: Loader,
        keeper: Keeper,
        holes: HolePass,
        store: Store,
        try_fold: Callable[[Load], None],
        adviser: Adviser | None = None,
        *,
        least_gain: int | None = None,
        alone: bool,
        shared: bool = False,
    ) -> None:
        self._loader, self._keeper, self._holes, self._store = loader, keeper, holes, store
        self._alone, self._shared = alone, shared
        self._try_fold, self._folds, self._judged = try_fold, True, False
        self._on_trial: list[Load] = []
        self._adviser = adviser
        self._news = News(least_gain=least_gain)
        self._told = False
        self._finished: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._given_up: set[str] = set()  # requests whose blocks were bad once: nothing of them is kept

    @torch.inference_mode()
    def before_forward(self, step: Step, context: Any) -> None:
        """Must run before the engine's forward of the step that the loads belong to, under its `context`."""
        self._forget(step)
        apart: list[Row] = []
        whole: list[Load] = []  # assembled, and their holes can be folded
        for load in step.loads:
            assembled = self._assembled(load)
            if load.folded and (assembled or not self._alone):  # ranks must do alike: their forwards are one
                whole.append(load)
            else:
                apart += _rows(load, load.holes_apart() if assembled or not self._alone else ((load.start, load.end),))
        taken = self._folded(whole, context) if whole else set()
        for load in whole:
            if load.request_id not in taken:
                self._news.apart.add(load.request_id)
                apart += _rows(load, load.holes_apart())
        if not apart:
            return
        try:
            self._holes.run(apart)
        except Exception as fault:  # noqa: BLE001  # the engine's step must go on
            log.exception("kvcomm: computing holes failed")
            for load in step.loads:
                self._give_up(load, fault)

    def after_forward(self, step: Step) -> None:
        """Must run when the K/V of the step's tokens are in the cache."""
        if self._on_trial:
            self._judge(self._on_trial)
        for save in step.saves:
            try:
                self._save(save)
            finally:
                if save.last:
                    self._finished.add(save.request_id)
                    self._given_up.discard(save.request_id)
        if self._adviser is not None:
            for ask in step.asks:
                self._adviser.ask(ask)
            for request_id, said in self._adviser.answers():
                if isinstance(said, Exception):
                    self._optional("estimate", request_id, said)
                    said = Answer(None, fault=repr(said))
                self._news.answers[request_id] = said

    def finished(self) -> set[str]:
        """Requests whose blocks are not needed any more, since the last call."""
        done, self._finished = self._finished, set()
        return done

    def bad_blocks(self) -> set[int]:
        """Blocks that hold nothing that could be used, since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def news(self) -> News | None:
        """What happened since the last call; None when nothing did. The first call always has something to say."""
        if self._adviser is not None:
            for learned in self._adviser.learned():
                if isinstance(learned, Exception):
                    self._optional("anchor", "", learned)
                else:
                    self._news.able.add(learned)
        news, self._news = self._news, News()
        nothing = self._told and news == self._news
        self._told = True
        return None if nothing else news

    def _assembled(self, load: Load) -> bool:
        """Writes what is stored; False where that failed."""
        try:
            deviations = self._adviser.deviations(load.corrections) if self._adviser and load.corrections else ()
            self._loader.load(load, deviations)
        except Exception as fault:  # noqa: BLE001  # whatever it was, the request is computed
            if isinstance(fault, Lost):
                self._news.gone.add(fault.key)
            if self._alone:
                self._fault("load", load, fault)
            else:  # other ranks compute these holes: so must this one
                self._give_up(load, fault)
            return False
        return True

    def _folded(self, loads: list[Load], context: Any) -> set[str]:
        """The requests whose holes the engine's forward computes."""
        try:
            taken = self._holes.fold(context, loads) if self._folds else set()
        except Exception as fault:  # noqa: BLE001  # nothing was changed, and there is the other way
            if self._alone:
                self._fault("fold", loads[0], fault)
                return set()
            for load in loads:
                self._give_up(load, fault)
            return {load.request_id for load in loads}
        if not self._judged:
            self._on_trial = [load for load in loads if load.request_id in taken]
        return taken

    @torch.inference_mode()
    def _judge(self, loads: list[Load]) -> None:
        """The first forward that took holes: has it computed them?"""
        self._on_trial, self._judged = [], True
        try:
            self._try_fold(loads[0])
        except Exception as fault:  # noqa: BLE001  # whatever it was, those requests are computed again
            if self._alone:
                self._folds = False
                log.exception("kvcomm: holes are computed apart from now on")
            else:  # the other ranks may have seen nothing
                self._news.refusal = repr(fault)
                log.exception("kvcomm: nothing is shared from now on")
            for load in loads:
                self._give_up(load, fault)

    def _forget(self, step: Step) -> None:
        """What the scheduler does not know any more. After a reset nothing of a shared store is found by this engine, whose
        fingerprint is another from then on, and others need it.
        """
        try:
            keys = [segment.key for segment in self._store.segments()] if step.reset and not self._shared else step.forget
            for key in keys:
                self._store.remove(key)
        except Exception as fault:  # noqa: BLE001  # nobody finds it
            self._optional("forget", "", fault)
        if step.reset and self._adviser is not None:
            self._adviser.reset()

    def _give_up(self, load: Load, fault: Exception) -> None:
        self._fault("give-up", load, fault)
        self._given_up.add(load.request_id)
        size = self._keeper.block_size
        self._bad_blocks |= set(load.blocks[load.start // size : -(-load.end // size)])

    def _save(self, save: Save) -> None:
        for segment in save.segments:
            kept = Kept(stored=False)
            try:
                if save.request_id not in self._given_up:
                    kept = self._keeper.keep(segment, save)
            except Exception as fault:  # noqa: BLE001  # keeping is optional
                self._optional("keep", save.request_id, fault)
            self._news.gone |= set(kept.evicted)
            if kept:
                self._news.kept[segment.key] += 1
                self._news.gone.discard(segment.key)
            else:
                self._news.gone.add(segment.key)
        if save.lesson is not None and self._adviser is not None and save.request_id not in self._given_up:
            try:
                self._adviser.learn(save.lesson, save.blocks)
            except Exception as fault:  # noqa: BLE001  # so is learning
                self._optional("anchor", "", fault)

    def _optional(self, kind: str, request_id: str, fault: Exception) -> None:
        """Counts what failed and was not needed."""
        self._news.faults.append((kind, request_id, repr(fault)))
        log.warning("kvcomm: a fault (%s), counted: %r", kind, fault)

    def _fault(self, kind: str, load: Load, fault: Exception) -> None:
        self._news.faults.append((kind, load.request_id, repr(fault)))
        log.warning("kvcomm: %s of request %s: %r", kind, load.request_id, fault)


def _rows(load: Load, holes: Sequence[Hole]) -> list[Row]:
    return [Row(load.blocks, a, load.ids[a:b]) for a, b in holes]


class Refusing:
    """In place of a `Worker` where the engine cannot be served: says why, once, and lets every request's blocks go."""

    def __init__(self, refusal: str) -> None:
        self._news: News | None = News(refusal=refusal)
        self._finished: set[str] = set()

    def before_forward(self, step: Step, context: Any) -> None:
        assert not step.loads, "nothing is promised before the workers have reported"

    def after_forward(self, step: Step) -> None:
        self._finished |= {save.request_id for save in step.saves if save.last}

    def finished(self) -> set[str]:
        done, self._finished = self._finished, set()
        return done

    def bad_blocks(self) -> set[int]:
        return set()

    def news(self) -> News | None:
        news, self._news = self._news, None
        return news
