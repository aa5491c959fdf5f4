"""The life of one request: match -> plan -> assemble -> run -> learn.

The engine owns its store and its index of known text; both are passed in. It never lets a fault of its own reach the caller:
whatever goes wrong with stored KV or on the way to the first token, the request is answered densely, by plain generate if need
be, the fault is counted, and the report says why.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvcomm.anchors.pool import AnchorPool
from kvcomm.call import Call
from kvcomm.config import Config
from kvcomm.correcting import Corrector, empty_pool
from kvcomm.draft_check import check
from kvcomm.errors import CacheFault, InputError
from kvcomm.learning import Learner
from kvcomm.matching import Index, Match, TextIndex, tokens_by_key
from kvcomm.metrics import Counters
from kvcomm.policy import Rule
from kvcomm.policy import plan as make_plan
from kvcomm.request import Request
from kvcomm.segments import Plan, ReuseReport, SegmentKV, Span
from kvcomm.store.memory import MemoryStore
from kvcomm.store.tiered import Tiered
from kvcomm.streaming import Stream
from kvcomm.waiting import longest
from kvcomm.who import Callers, Who

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcomm.backends.base import Backend
    from kvcomm.backends.span_cache import SpanCache
    from kvcomm.store.base import Store

__all__ = ["KVComm", "Output", "Prompt", "Rule", "Who"]

Prompt = str | Sequence[Mapping[str, str]]
TELL_AGAIN = 10.0  # s between two warnings of one kind of fault
WORTH_WAITING = 128  # tokens; who computes fewer is not asked to hand them over before the answer
ROOM = 256  # new tokens that a cache has room for from the start; it grows
NOBODY_KNOWS = "nobody knows who asks: acting() is open, and this thread was started without its context"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """An answer and what its prompt cost."""

    text: str
    token_ids: list[int]
    ttft_ms: float
    report: ReuseReport


class _Unusable(CacheFault):
    """Some KV that a plan reuses is not what it should be: all of the plan's is forgotten."""


class _Poisoned(_Unusable):
    """The first logits were not numbers: some stored KV was not either."""


class _Doubted(Exception):  # no fault: reuse was checked, and is given up for this request
    """The drafted answer is not to be trusted."""


class KVComm:
    """Shares the KV-cache of one model among the agents that use it. Safe to call from several threads: requests take turns."""

    def __init__(
        self,
        backend: Backend,
        *,
        config: Config | None = None,
        store: Store | None = None,
        anchors: AnchorPool | None = None,
    ) -> None:
        self.backend = backend
        self.config = config or Config.from_env()
        self.store: Store = MemoryStore(self.config.store_bytes) if store is None else store
        self.index: Any = self._index()  # an `Index`; which one, who looks into it knows
        self.anchors = empty_pool(self.config) if anchors is None else anchors
        self.counters = Counters()
        self.reports: deque[ReuseReport] = deque(maxlen=1000)
        self._learner = Learner(backend, self.store, self.index, self.config)
        self._corrector = Corrector(backend, self.store, self.anchors, self.config)
        self._callers = Callers(getattr(self.store, "tenant", None) or "")  # the one that the store is bound to
        self._told: dict[str, float] = {}  # kind of fault -> when it was last told
        self._ms_per_token: float | None = None  # of prefill, as measured lately
        self._own_generate: Callable[..., Any] | None = None  # the model's, while attach() has replaced it
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        config: Config | None = None,
        store: Store | None = None,
        anchors: AnchorPool | None = None,
        **options: Any,  # Hugging Face loading options, passed on
    ) -> KVComm:
        """Loads a Hugging Face id or folder, without one the embedded model. Raises InputError where there is no usable
        checkpoint and UnsupportedModel where its cache cannot be shared.
        """
        from kvcomm.backends.loading import load
        from kvcomm.tiny import FOLDER

        return cls(load(model_id or str(FOLDER), dtype=dtype, **options), config=config, store=store, anchors=anchors)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        config: Config | None = None,
        store: Store | None = None,
        anchors: AnchorPool | None = None,
    ) -> KVComm:
        """For a model that is loaded already."""
        from kvcomm.backends.hf import HFBackend

        return cls(HFBackend(model, tokenizer), config=config, store=store, anchors=anchors)

    # -- asking ---------------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of chat messages under the model's own template. Raises InputError where there is nothing."""
        tokenizer = self._tokenizer()
        if not prompt:
            raise InputError("the prompt is empty; give it at least one token")
        if isinstance(prompt, str):
            ids: list[int] = tokenizer(prompt).input_ids
        else:
            ids = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
        if not ids:
            raise InputError("the prompt has no tokens; give it at least one")
        return ids

    def generate(
        self,
        prompt: Prompt,
        *,
        agent: str | None = None,
        rule: Rule | None = None,
        tenant: str | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Output:
        """Answers one prompt; `options` go to the model's own `generate`. Who asks, where it is not given, is as `acting` and
        `attach` say. Raises InputError for an unusable prompt.
        """
        who, ids = self._callers.who(agent, rule, tenant), self._usable(prompt, max_new_tokens)
        return self._answer(ids, who, max_new_tokens=max_new_tokens, **options)

    def stream(
        self,
        prompt: Prompt,
        *,
        agent: str | None = None,
        rule: Rule | None = None,
        tenant: str | None = None,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Stream:
        """As `generate`, piece by piece: iterate for text, then read `.output`. An unusable prompt raises here, at once."""
        who, ids = self._callers.who(agent, rule, tenant), self._usable(prompt, max_new_tokens)
        return Stream(
            lambda streamer: self._answer(ids, who, max_new_tokens=max_new_tokens, streamer=streamer, **options),
            self.backend.tokenizer,
        )

    def prefill(self, text: str, *, producer: str = "", tenant: str | None = None) -> int:
        """Computes the KV of a text ahead of any request, alone (behind the model's first token where it has one), and keeps it
        for whoever reads the text. Returns the tokens kept: 0 where they are kept already, too few, or more than fit the store.
        Raises InputError for a text without tokens or beyond the model's context, and where nobody knows the tenant.
        """
        who, tokenizer = self._callers.who(None, None, tenant), self._tokenizer()
        if who is None:
            raise InputError(f"{NOBODY_KNOWS}; pass tenant=")
        first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = self._fitting(first + tokenizer.encode(text, add_special_tokens=False))
        if len(ids) == len(first):
            raise InputError(f"the text {text!r} has no tokens; give it at least one")
        with self._lock:
            inputs = torch.tensor([ids], device=self.backend.model.device)
            reason = self.backend.refusal(inputs, {}, None)
            if reason is not None:
                raise InputError(f"this model's KV cannot be kept now: {reason}")
            self._corrector.waiting.expect_alone(who.tenant)
            return self._learner.prefill(inputs, len(first), producer, who.tenant)

    @contextmanager
    def acting(self, agent: str | None = None, *, rule: Rule | None = None, tenant: str | None = None) -> Iterator[None]:
        """Says for whom the requests inside are made, for code that calls an attached model's `generate` itself. Threads that
        are started inside do not inherit it (use `contextvars.copy_context().run`, or `attach(agent=...)`): as long as any
        such block is open, requests of threads that have none share nothing.
        """
        with self._callers.acting(agent, rule, tenant):
            yield

    @contextmanager
    def attach(
        self, model: PreTrainedModel | None = None, *, agent: str = "", rule: Rule = "auto", tenant: str | None = None
    ) -> Iterator[KVComm]:
        """Within it, every `model.generate(...)`, whoever calls it, shares KV; on behalf of these, where `acting` says nothing
        else. Undone on exit, also after an exception.
        """
        own: Any = self.backend.model
        if model is not None and model is not own:
            raise InputError("attach() was given another model than this KVComm holds; use KVComm.from_model(model, tokenizer)")
        if "generate" in vars(own):
            raise InputError("this model's generate is already replaced; leave the other attach() first")
        original = own.generate

        def shared(*args: Any, **kwargs: Any) -> Any:
            return self._generate(original, self._callers.who(), *args, **kwargs)[0]

        with self._callers.unless_said(self._callers.default.but(agent, rule, tenant)):
            own.generate, self._own_generate = shared, original  # an instance attribute hides the method until it is deleted
            try:
                yield self
            finally:
                del own.generate
                self._own_generate = None

    # -- one request ----------------------------------------------------------------------------------------------------

    def _usable(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """Token ids of a prompt that can be answered; InputError where it cannot."""
        ids = self._fitting(self.encode(prompt))
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        return ids

    def _fitting(self, ids: list[int]) -> list[int]:
        limit = self.backend.context_limit
        if limit is not None and len(ids) + 1 > limit:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the model's context {limit}; shorten the prompt to at most {limit - 1}"
            )
        return ids

    def _tokenizer(self) -> Any:  # what its calls return depends on their arguments
        if self.backend.tokenizer is None:
            raise InputError("this model came without a tokenizer; pass one to KVComm.from_model")
        return self.backend.tokenizer

    def _answer(self, ids: list[int], who: Who | None, **options: Any) -> Output:
        inputs = torch.tensor([ids], device=self.backend.model.device)
        model: Any = self.backend.model  # transformers leaves `generate` loosely typed
        original = self._own_generate or model.generate
        result, report = self._generate(original, who, inputs, attention_mask=torch.ones_like(inputs), **options)
        sequences = result if isinstance(result, torch.Tensor) else result.sequences
        new = sequences[0, len(ids) :].tolist()
        tokenizer: Any = self.backend.tokenizer  # decodes one sequence to one text
        assert report.ttft_ms is not None
        return Output(tokenizer.decode(new, skip_special_tokens=True).strip(), new, report.ttft_ms, report)

    def _generate(self, original: Callable[..., Any], who: Who | None, *args: Any, **kwargs: Any) -> tuple[Any, ReuseReport]:
        """Serves one call of the model's own `generate`, which stays in charge of everything but the first forward. `who` is
        None where nobody knows.
        """
        began = perf_counter()
        call = Call(original, args, kwargs)
        with self._lock:
            request, fault = Request(who or Who(), began), False
            try:
                reason = self._refusal(call, who)
                if reason is None:
                    return self._share(request, call)
            except Exception as error:
                if request.first is not None:
                    raise  # the caller's: there is an answer already, or a part of it
                reason, fault = f"fault: {error!r}", True
            done = self._plain(Request(request.who, began), call, call.start if fault else call.untouched, reason)
            if fault:  # it was ours: plain generate came through
                self._count_fault("shared", reason)
            return done

    def _refusal(self, call: Call, who: Who | None) -> str | None:
        if self.config.mode == "off":
            return "mode-off"
        if who is None:
            return NOBODY_KNOWS
        return self.backend.refusal(call.prompt, call.options, call.options.get("generation_config"))

    def _plain(self, request: Request, call: Call, start: Callable[[], Any], reason: str) -> tuple[Any, ReuseReport]:
        """Plain generate, with the reason on record. Its time to first token is measured where hooks can see it."""
        with self.backend.hooked(lambda _: request.mark_first()):
            result = start()
        tokens = int(call.prompt.shape[-1]) if isinstance(call.prompt, torch.Tensor) else 0
        return result, self._recorded(request.report(Plan.dense(tokens, reason)))

    def _share(self, request: Request, call: Call) -> tuple[Any, ReuseReport]:
        request.ids = call.prompt[0].to("cpu", torch.int32).numpy()
        try:
            return self._shared(request, call)
        finally:
            self._land(request)

    def _shared(self, request: Request, call: Call) -> tuple[Any, ReuseReport]:
        result, cache, plan = self._run(request, self._plan(request), call)
        report = request.report(plan)
        self._ms_per_token = request.ms_per_token(plan) or self._ms_per_token
        started, who, lessons = perf_counter(), request.who, list[Span]()
        try:
            lessons = self._corrector.waiting.lessons(plan, request.known, who.tenant, self.store)
            real = ((s, self.backend.read(cache, s.start, s.end, plan.length)) for s in longest(lessons))
            self._corrector.learn(request.ids, real, who)
        except Exception as fault:  # noqa: BLE001  # learning is optional: the answer is already there
            self._count_fault("anchor", fault)
        try:
            self._learner.learn_prompt(request.ids, plan, cache, who.agent, who.tenant, lessons, request.ms_per_token(plan))
            self._learner.learn_answer(request.ids, plan, cache, result, who.agent, who.tenant)
            if isinstance(result, torch.Tensor):  # else the caller may hold the cache
                self.backend.release(cache)
        except Exception as fault:  # noqa: BLE001  # so is this
            self._count_fault("learn", fault)
        return result, self._recorded(replace(report, learn_ms=(perf_counter() - started) * 1e3))

    def _recorded(self, report: ReuseReport) -> ReuseReport:
        self.reports.append(report)
        self.counters.record(report)
        return report

    def _plan(self, request: Request) -> Plan:
        who = request.who
        try:
            matches = self._matches(request)
            request.matched = perf_counter()
            plan = make_plan(len(request.ids), matches, self.config, who.rule)
            request.planned = perf_counter()
            plan = self._corrected(request, plan, matches)
        except Exception as fault:  # noqa: BLE001  # no plan is a dense answer, whatever went wrong
            self._count_fault("store" if isinstance(fault, CacheFault) else "plan", fault)
            plan = Plan.dense(len(request.ids), f"fault: {fault}")
        request.estimated = perf_counter()
        return plan

    def _corrected(self, request: Request, plan: Plan, matches: list[Match]) -> Plan:
        """`plan` after anchors had their say. Where they say too little, exact prefixes alone are reused."""
        if self.config.anchors == "off":
            return plan
        corrected = self._corrector.correct(request.ids, plan, request.who)
        reason = None
        if corrected is None:
            reason = "learning"
        elif corrected.plan is not plan and len(corrected.plan.recompute) > self.config.max_recompute * plan.length:
            reason = "too-much-recomputed"
        else:
            plan, request.deviations = corrected.plan, corrected.deviations
        if reason is not None:
            plan = replace(make_plan(plan.length, matches, self.config, "exact"), fallback=reason)
        request.known = [Span(m.start, m.end, "boundary", m.segment, m.offset) for m in matches if not m.exact]
        return plan

    def _matches(self, request: Request) -> list[Match]:
        """Known runs whose KV is in the store, and not in a tier of it that takes longer than computing; what the store has
        evicted since is forgotten here.
        """
        while True:
            self._land(request)  # a search that came to nothing
            request.found = self.index.look(
                request.ids,
                fingerprint=self.backend.fingerprint,
                tenant=request.who.tenant,
                same_tables=partial(self.backend.same_tables, len(request.ids)),
                ms_per_token=self._ms_per_token,
            )
            gone = self._absent(request)
            if not gone:
                return request.found.matches
            for key in gone:
                self.index.remove(key)

    def _absent(self, request: Request) -> set[str]:
        """What was found and is not in the store. What is not worth loading is taken from what was found."""
        assert request.found is not None
        tokens = tokens_by_key(request.found.matches)
        if not isinstance(self.store, Tiered):
            return {key for key in tokens if key not in self.store}
        price = math.inf if self._ms_per_token is None else self._ms_per_token
        there, slow = self.store.get_worth({key: price * count for key, count in tokens.items()})
        if slow:
            declined = Counter(request.found.declined)
            for key, reason in slow.items():
                declined[reason] += tokens[key]
            matches = [match for match in request.found.matches if match.segment.key not in slow]
            request.found = replace(request.found, matches=matches, declined=dict(declined))
        return tokens.keys() - there.keys() - slow.keys()

    def _run(self, request: Request, plan: Plan, call: Call) -> tuple[Any, SpanCache, Plan]:
        """Starts `call` on an assembled cache; densely where assembling fails or the first logits are not numbers."""
        room = plan.length + min(int(call.options.get("max_new_tokens") or ROOM), ROOM)
        if plan.spans:
            cache = self.backend.cache(room)
            try:
                plan = self._assemble(request, plan, cache, call.stop_ids(self.backend.model))
                return self._forward(request, plan, call, cache), cache, plan
            except _Doubted as doubt:
                self.backend.release(cache)
                plan = Plan.dense(plan.length, f"draft-check: {doubt}")
            except CacheFault as fault:
                self._count_fault("poisoned" if isinstance(fault, _Poisoned) else "assemble", fault)
                if isinstance(fault, _Unusable):  # else it is no fault of the KV, which others may share
                    self._forget(plan)
                plan = Plan.dense(plan.length, f"fault: {fault}")
        cache = self.backend.cache(room)
        request.assembled = perf_counter()
        return self._forward(request, plan, call, cache), cache, plan

    def _assemble(self, request: Request, plan: Plan, cache: SpanCache, stop: Collection[int]) -> Plan:
        """Returns the plan with what was computed on the way. Raises CacheFault whatever goes wrong, _Doubted where the draft
        of an answer, ended by `stop`, does.
        """
        stored: list[tuple[Span, SegmentKV]] = []
        try:
            for span in plan.spans:
                kv = self.store.get(span.segment.key)
                if kv is None:
                    self.index.remove(span.segment.key)
                    raise CacheFault("a planned segment left the store, or was altered in it")
                stored.append((span, kv))
            try:
                self.backend.fill(cache, plan.length, stored, rotate=self.config.rung != "naive")
            except CacheFault as fault:
                raise _Unusable(str(fault)) from fault
            for start, deviation in request.deviations:
                self.backend.correct(cache, plan.length, start, deviation)
            ids, recompute = torch.from_numpy(request.ids.astype(np.int64))[None], torch.from_numpy(plan.recompute)
            if self.config.draft_check and any(span.rung != "exact" for span in plan.spans):
                plan, recompute = self._checked(plan, cache, ids, stop), recompute[-1:]
            self.backend.arm(cache, ids, recompute)
        except (CacheFault, _Doubted):
            raise
        except Exception as fault:
            raise CacheFault(f"assembling failed: {fault!r}") from fault
        request.assembled = perf_counter()
        return plan

    def _forget(self, plan: Plan) -> None:
        for span in plan.spans:
            try:
                self._learner.forget(span.segment.key)
            except CacheFault as fault:
                self._count_fault("store", fault)

    def _checked(self, plan: Plan, cache: SpanCache, ids: torch.Tensor, stop: Collection[int]) -> Plan:
        """Runs the pass; `plan` with what the check has computed again as well."""
        moved = np.concatenate([np.arange(span.start, span.end) for span in plan.spans if span.rung != "exact"])
        approximate = torch.from_numpy(np.setdiff1d(moved, plan.recompute))
        found = check(self.backend, cache, ids, torch.from_numpy(plan.recompute), approximate, stop=stop)
        if not found.kl <= self.config.draft_check:
            raise _Doubted(f"{found.kl:.3g} nats, above {self.config.draft_check:g}")
        return replace(plan, recompute=np.union1d(plan.recompute, np.asarray(found.again, dtype=np.int64)))

    def _forward(self, request: Request, plan: Plan, call: Call, cache: SpanCache) -> Any:
        def first(logits: torch.Tensor) -> None:
            if plan.spans and bool(torch.isnan(logits).any()):
                raise _Poisoned("the first logits hold NaN, so some reused KV did")
            self._hand_over(request, plan, cache)
            request.mark_first()

        with self.backend.hooked(first):
            return call.start(past_key_values=cache)

    def _hand_over(self, request: Request, plan: Plan, cache: SpanCache) -> None:
        """Another process waits for what this prompt has just computed: it gets it now, not after the answer."""
        found, who = request.found, request.who
        try:
            if found is None or found.flight is None or len(plan.recompute) < WORTH_WAITING:
                return
            if self.index.awaited(found.flight, who.tenant):
                self._learner.learn_prompt(request.ids, plan, cache, who.agent, who.tenant)
                self._land(request)
        except Exception as fault:  # noqa: BLE001  # others go dense; this answer goes on
            self._count_fault("learn", fault)

    def _land(self, request: Request) -> None:
        """Nobody need wait any more for what the request computes."""
        if request.found is None or request.found.flight is None:
            return
        flight, request.found = request.found.flight, replace(request.found, flight=None)
        try:
            self.index.land(flight, request.who.tenant)
        except Exception as fault:  # noqa: BLE001  # those who wait do so up to a bound
            self._count_fault("store", fault)

    def _index(self) -> Index:
        """The store's own, where it is shared with other processes; else one of what this engine puts into it."""
        shared: Index | None = getattr(self.store, "index", None)
        if shared is not None:
            return shared
        config = self.config
        return TextIndex(min_run=config.min_run, max_windows=config.index_windows, variants=config.variants)

    def _count_fault(self, kind: str, fault: Exception | str) -> None:
        """Counted each time, told once in a while: a store that is gone fails every request."""
        self.counters.fault(kind)
        now = perf_counter()
        level = logging.WARNING if now - self._told.get(kind, -math.inf) >= TELL_AGAIN else logging.DEBUG
        if level == logging.WARNING:
            self._told[kind] = now
        log.log(level, "a %s fault, counted (%d so far): %s", kind, self.counters.value("faults", kind), fault)
