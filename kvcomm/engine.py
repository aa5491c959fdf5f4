"""The life of one request: match -> plan -> assemble -> run -> learn.

The engine owns its store and its index of known text; both are passed in. It never lets a cache fault reach the caller:
whatever goes wrong with stored KV, the request is answered densely, the fault is counted, and the report says why.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvcomm.config import Config
from kvcomm.errors import CacheFault, InputError
from kvcomm.learning import Learner
from kvcomm.matching import Match, TextIndex
from kvcomm.metrics import Counters
from kvcomm.policy import Rule
from kvcomm.policy import plan as make_plan
from kvcomm.segments import Ids, Plan, ReuseReport, SegmentKV, Span, SpanReport
from kvcomm.store.memory import MemoryStore
from kvcomm.streaming import Stream

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvcomm.backends.base import Backend
    from kvcomm.backends.span_cache import SpanCache
    from kvcomm.store.base import Store

__all__ = ["KVComm", "Output", "Prompt", "Rule", "Who"]

Prompt = str | Sequence[Mapping[str, str]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Who:
    """On whose behalf a request runs. Nothing crosses tenants; rule `exact` reuses exact prefixes only."""

    agent: str = ""
    rule: Rule = "auto"
    tenant: str = ""

    def __post_init__(self) -> None:
        if self.rule not in ("auto", "exact"):
            raise InputError(f"rule is {self.rule!r} for agent {self.agent!r}; use auto or exact")


NOBODY = Who()


@dataclass(frozen=True)
class Output:
    """An answer and what its prompt cost."""

    text: str
    token_ids: list[int]
    ttft_ms: float
    report: ReuseReport


class _Poisoned(CacheFault):
    """The first logits were not numbers: some stored KV was not either."""


@dataclass
class _Request:
    """Times of one request, in seconds since `began`."""

    who: Who
    ids: Ids
    began: float = field(default_factory=perf_counter)
    matched: float | None = None
    planned: float | None = None
    assembled: float | None = None
    first: float | None = None

    def ms(self, a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else (b - a) * 1e3


class KVComm:
    """Shares the KV-cache of one model among the agents that use it. Safe to call from several threads: requests take turns."""

    def __init__(self, backend: Backend, *, config: Config | None = None, store: Store | None = None) -> None:
        self.backend = backend
        self.config = config or Config.from_env()
        self.store: Store = MemoryStore(self.config.store_bytes) if store is None else store
        self.index = TextIndex(
            min_run=self.config.min_run, max_windows=self.config.index_windows, variants=self.config.variants
        )
        self.counters = Counters()
        self.reports: deque[ReuseReport] = deque(maxlen=1000)
        self._learner = Learner(backend, self.store, self.index, self.config)
        self._who: ContextVar[Who] = ContextVar("kvcomm_who", default=NOBODY)
        self._lock = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        config: Config | None = None,
        store: Store | None = None,
        **options: Any,  # Hugging Face loading options, passed on
    ) -> KVComm:
        """Loads a Hugging Face id or folder, without one the embedded model. Raises InputError where there is no usable
        checkpoint and UnsupportedModel where its cache cannot be shared.
        """
        from kvcomm.backends.loading import load
        from kvcomm.tiny import FOLDER

        return cls(load(model_id or str(FOLDER), dtype=dtype, **options), config=config, store=store)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        config: Config | None = None,
        store: Store | None = None,
    ) -> KVComm:
        """For a model that is loaded already."""
        from kvcomm.backends.hf import HFBackend

        return cls(HFBackend(model, tokenizer), config=config, store=store)

    # -- asking ---------------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of chat messages under the model's own template. Raises InputError where there is nothing."""
        tokenizer: Any = self.backend.tokenizer  # what its calls return depends on their arguments
        if tokenizer is None:
            raise InputError("this model came without a tokenizer; pass one to KVComm.from_model")
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
        agent: str = "",
        rule: Rule = "auto",
        tenant: str = "",
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Output:
        """Answers one prompt; `options` go to the model's own `generate`. Raises InputError for an unusable prompt."""
        ids = self.encode(prompt)
        limit = self.backend.context_limit
        if limit is not None and len(ids) + 1 > limit:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the model's context {limit}; shorten the prompt to at most {limit - 1}"
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        inputs = torch.tensor([ids], device=self.backend.model.device)
        model: Any = self.backend.model  # transformers leaves `generate` loosely typed
        with self.acting(agent, rule=rule, tenant=tenant), self._lock:
            sequences = self._generate(
                model.generate,
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                **options,
            )
            report = self.reports[-1]
        new = sequences[0, len(ids) :].tolist()
        tokenizer: Any = self.backend.tokenizer  # decodes one sequence to one text
        text = tokenizer.decode(new, skip_special_tokens=True) if tokenizer else ""
        assert report.ttft_ms is not None
        return Output(text.strip(), new, report.ttft_ms, report)

    def stream(self, prompt: Prompt, **options: Any) -> Stream:
        """As `generate`, piece by piece: iterate for text, then read `.output`. An unusable prompt raises here, at once."""
        self.encode(prompt)
        return Stream(lambda streamer: self.generate(prompt, streamer=streamer, **options), self.backend.tokenizer)

    @contextmanager
    def acting(self, agent: str, *, rule: Rule = "auto", tenant: str = "") -> Iterator[None]:
        """Says for whom the requests inside are made, for code that calls an attached model's `generate` itself."""
        token = self._who.set(Who(agent, rule, tenant))
        try:
            yield
        finally:
            self._who.reset(token)

    @contextmanager
    def attach(self, model: PreTrainedModel | None = None) -> Iterator[KVComm]:
        """Within it, every `model.generate(...)`, whoever calls it, shares KV. Undone on exit, also after an exception."""
        own: Any = self.backend.model
        if model is not None and model is not own:
            raise InputError("attach() was given another model than this KVComm holds; use KVComm.from_model(model, tokenizer)")
        if "generate" in vars(own):
            raise InputError("this model's generate is already replaced; leave the other attach() first")
        original = own.generate

        def shared(*args: Any, **kwargs: Any) -> Any:
            return self._generate(original, *args, **kwargs)

        own.generate = shared  # an instance attribute that hides the method until it is deleted
        try:
            yield self
        finally:
            del own.generate

    # -- one request ----------------------------------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Serves one call of the model's own `generate`, which stays in charge of everything but the first forward."""
        inputs: Any = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        who = self._who.get()
        with self._lock:
            refusal = "mode-off" if self.config.mode == "off" else self.backend.refusal(inputs, kwargs)
            if refusal is not None:
                return self._untouched(original, args, kwargs, inputs, who, refusal)
            request = _Request(who, inputs[0].to("cpu", torch.int32).numpy())
            plan = self._plan(request)
            result, cache, plan = self._run(
                request, plan, lambda cache: original(*args, **{**kwargs, "past_key_values": cache}), kwargs
            )
            report = self._report(request, plan)
            started = perf_counter()
            try:
                self._learner.learn(request.ids, plan, cache, result, who.agent, who.tenant)
            except Exception as fault:  # noqa: BLE001  # learning is optional: the answer is already there
                self._count_fault("learn", fault)
            report = replace(report, learn_ms=(perf_counter() - started) * 1e3)
            if isinstance(result, torch.Tensor):  # else the caller may hold the cache
                self.backend.release(cache)
            self.reports.append(report)
            self.counters.record(report)
            return result

    def _untouched(self, original: Callable[..., Any], args: Any, kwargs: Any, inputs: Any, who: Who, reason: str) -> Any:
        """Plain generate, with the reason on record. Its time to first token is measured where hooks can see it."""
        tokens = int(inputs.shape[-1]) if isinstance(inputs, torch.Tensor) else 0
        request = _Request(who, np.zeros(tokens, dtype=np.int32))
        with self.backend.hooked(lambda _: self._mark_first(request)):
            result = original(*args, **kwargs)
        report = self._report(request, Plan(tokens, (), np.arange(tokens), reason))
        self.reports.append(report)
        self.counters.record(report)
        return result

    def _plan(self, request: _Request) -> Plan:
        who = request.who
        try:
            matches = self._matches(request)
            request.matched = perf_counter()
            plan = make_plan(len(request.ids), matches, self.config, who.rule)
        except Exception as fault:  # noqa: BLE001  # no plan is a dense answer, whatever went wrong
            self._count_fault("plan", fault)
            plan = self._dense(request, f"fault: {fault}")
        request.planned = perf_counter()
        return plan

    def _matches(self, request: _Request) -> list[Match]:
        """Known runs whose KV is in the store; what the store has evicted since is forgotten here."""
        while True:
            found = self.index.find(request.ids, fingerprint=self.backend.fingerprint, tenant=request.who.tenant)
            gone = {match.segment.key for match in found if match.segment.key not in self.store}
            if not gone:
                return found
            for key in gone:
                self._learner.forget(key)

    def _run(
        self, request: _Request, plan: Plan, call: Callable[[SpanCache], Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, SpanCache, Plan]:
        """Runs `call` on an assembled cache; densely where assembling fails or the first logits are not numbers."""
        room = plan.length + int(kwargs.get("max_new_tokens") or 256)
        if plan.spans:
            cache = self.backend.cache(room)
            try:
                self._assemble(request, plan, cache)
                return self._forward(request, plan, call, cache), cache, plan
            except CacheFault as fault:
                self._count_fault("poisoned" if isinstance(fault, _Poisoned) else "assemble", fault)
                for span in plan.spans:
                    self._learner.forget(span.segment.key)
                plan = self._dense(request, f"fault: {fault}")
        cache = self.backend.cache(room)
        request.assembled = perf_counter()
        return self._forward(request, plan, call, cache), cache, plan

    def _assemble(self, request: _Request, plan: Plan, cache: SpanCache) -> None:
        """Raises CacheFault whatever goes wrong."""
        stored: list[tuple[Span, SegmentKV]] = []
        try:
            for span in plan.spans:
                kv = self.store.get(span.segment.key)
                if kv is None:
                    raise CacheFault("a planned segment left the store, or was altered in it")
                stored.append((span, kv))
            self.backend.fill(cache, plan.length, stored, rotate=self.config.rung != "naive")
            self.backend.arm(cache, torch.from_numpy(request.ids.astype(np.int64))[None], torch.from_numpy(plan.recompute))
        except CacheFault:
            raise
        except Exception as fault:
            raise CacheFault(f"assembling failed: {fault!r}") from fault
        request.assembled = perf_counter()

    def _forward(self, request: _Request, plan: Plan, call: Callable[[SpanCache], Any], cache: SpanCache) -> Any:
        def first(logits: torch.Tensor) -> None:
            if plan.spans and bool(torch.isnan(logits).any()):
                raise _Poisoned("the first logits hold NaN, so some reused KV did")
            self._mark_first(request)

        with self.backend.hooked(first):
            return call(cache)

    @staticmethod
    def _mark_first(request: _Request) -> None:
        if request.first is None:
            request.first = perf_counter()

    @staticmethod
    def _dense(request: _Request, reason: str) -> Plan:
        return Plan(len(request.ids), (), np.arange(len(request.ids)), reason)

    def _count_fault(self, kind: str, fault: Exception) -> None:
        self.counters.fault(kind)
        log.warning("a %s fault, counted: %s", kind, fault)

    def _report(self, request: _Request, plan: Plan) -> ReuseReport:
        reports = []
        for span in plan.spans:
            again = int(np.searchsorted(plan.recompute, span.end) - np.searchsorted(plan.recompute, span.start))
            reports.append(
                SpanReport(span.start, span.end, span.rung, span.tokens - again, again, span.segment.producer, span.moved)
            )
        return ReuseReport(
            agent=request.who.agent,
            prompt_tokens=plan.length,
            reused_tokens=plan.reused,
            computed_tokens=len(plan.recompute),
            spans=tuple(reports),
            fallback=plan.fallback,
            match_ms=request.ms(request.began, request.matched),
            plan_ms=request.ms(request.matched, request.planned),
            assemble_ms=request.ms(request.planned, request.assembled),
            forward_ms=request.ms(request.assembled, request.first),
            ttft_ms=request.ms(request.began, request.first),
        )
