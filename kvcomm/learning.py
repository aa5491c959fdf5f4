"""What a finished request leaves behind for others: the KV of new text, and of the answer under the ids its readers will see.

Runs after the answer, never before the first token. Text that was itself reused is not stored again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvcomm.answers import Alignment, align
from kvcomm.config import Config
from kvcomm.matching import Index
from kvcomm.segments import Ids, Plan, Segment, Span

if TYPE_CHECKING:
    from kvcomm.backends.base import Backend
    from kvcomm.backends.span_cache import SpanCache
    from kvcomm.store.base import Store

__all__ = ["Learner"]


class Learner:
    """Writes segments to the store and the index, and keeps the two in step."""

    def __init__(self, backend: Backend, store: Store, index: Index, config: Config) -> None:
        self.backend, self.store, self.index, self.config = backend, store, index, config

    def learn_prompt(
        self,
        ids: Ids,
        plan: Plan,
        cache: SpanCache,
        producer: str,
        tenant: str,
        known: Sequence[Span] = (),
        ms_per_token: float | None = None,
    ) -> None:
        """Deposits unknown runs of the prompt [tokens], whose KV `cache` must hold; `ms_per_token`: what computing one took.
        Text of the `known` spans is kept already, and not once more in this context. Raises CacheFault where the store refuses.
        """
        approximate_from = _approximate_from(plan)
        for start, end in self._unknown(plan.length, [*plan.spans, *known]):
            exact = start <= approximate_from
            segment = self._segment(ids[start:end], ids[:start], producer, tenant, exact, plan.length)
            cost = None if ms_per_token is None else ms_per_token * (end - start)
            self._keep(replace(segment, cost_ms=cost), cache, plan.length)

    def learn_answer(self, ids: Ids, plan: Plan, cache: SpanCache, result: Any, producer: str, tenant: str) -> None:
        """Deposits the answer of `result` to a prompt: a tensor [rows, prompt + new], or an output record that holds one; then
        the cache is the caller's too, and only read. Raises CacheFault where the store refuses.
        """
        ours = isinstance(result, torch.Tensor)
        sequences = result if ours else result.sequences
        if len(sequences) == 1 and cache.rows == 1:
            generated = [int(t) for t in sequences[0, len(ids) :]]
            exact = _approximate_from(plan) == plan.length
            self._keep_answer(ids, generated, cache, producer, tenant, exact=exact, write=ours)

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor, first: int, producer: str, tenant: str) -> int:
        """Computes a text and keeps tokens [first, n) of `ids` [1, n]; returns how many, 0 for what is kept already."""
        whole = ids[0].to("cpu", torch.int32).numpy()
        segment = replace(self._segment(whole[first:], whole[:first], producer, tenant, True, len(whole)), alone=True)
        if not self.store.wants(segment.key) or self.store.get(segment.key) is not None:  # perhaps another process put it
            self._know(segment)
            return 0
        cache = self.backend.cache(len(whole))
        with self.backend.hooked():
            self.backend.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._keep(segment, cache, len(whole))
        self.backend.release(cache)
        return len(segment.ids) if segment.key in self.index else 0

    def forget(self, key: str) -> None:
        self.index.remove(key)
        self.store.remove(key)

    def _unknown(self, length: int, spans: Sequence[Span]) -> list[tuple[int, int]]:
        """Runs of at least min_run prompt tokens that none of the spans, which are disjoint, covers."""
        edges = [0, *(e for s in sorted(spans, key=lambda s: s.start) for e in (s.start, s.end)), length]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= self.config.min_run]

    def _segment(self, ids: Ids, context: Ids, producer: str, tenant: str, exact: bool, length: int) -> Segment:
        tables = 1 if self.backend.same_tables(1, length) else length
        return Segment(ids.copy(), context.copy(), self.backend.fingerprint, tenant, producer, exact, tables)

    def _keep(self, segment: Segment, cache: SpanCache, length: int) -> None:
        """`length`: tokens of the sequence that `cache` holds it of."""
        if self.store.wants(segment.key):
            kept = self.store.put(segment, self.backend.read(cache, segment.start, segment.start + len(segment.ids), length))
            for evicted in kept.evicted:
                self.index.remove(evicted)
            if not kept:
                return
        self._know(segment)  # also where another engine has put it into the store

    def _know(self, segment: Segment) -> None:
        for lost in self.index.add(segment):
            self.store.remove(lost)

    def _keep_answer(
        self, prompt: Ids, generated: list[int], cache: SpanCache, producer: str, tenant: str, *, exact: bool, write: bool
    ) -> None:
        """The answer as its readers will encode it. What does not align, and the last sampled token, is computed here: in
        `cache` itself where nothing moves and it may be written to.
        """
        tokenizer, start = self.backend.tokenizer, len(prompt)
        if tokenizer is None:
            return
        canonical = tokenizer.encode(tokenizer.decode(generated, skip_special_tokens=True), add_special_tokens=False)
        if len(canonical) < self.config.min_run:
            return
        alignment = align(generated, canonical, cached=len(generated) - 1)
        held = start + len(generated) - 1
        length = held if alignment.in_place else start + len(canonical)
        answer = np.asarray(canonical, dtype=np.int32)
        segment = self._segment(answer, prompt, producer, tenant, exact and alignment.in_place, length)
        if alignment.in_place:
            self._keep(segment, cache, held)
            return
        whole = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))[None]
        missing = torch.from_numpy(np.union1d(start + alignment.missing, [length - 1]))
        target = cache
        if not write or any(b.generated != b.canonical for b in alignment.blocks):
            target = self._moved(cache, prompt, generated, alignment, length)
        self.backend.run(target, whole, missing)
        self._keep(segment, target, length)
        if target is not cache:
            self.backend.release(target)

    def _moved(self, cache: SpanCache, prompt: Ids, generated: list[int], alignment: Alignment, length: int) -> SpanCache:
        """A cache with the prompt where it was and the answer's blocks where their canonical ids stand."""
        start, end = len(prompt), len(prompt) + len(generated) - 1
        kv = self.backend.read(cache, 0, end, end)
        source = Segment(
            np.concatenate([prompt, np.asarray(generated[:-1], dtype=np.int32)]), prompt[:0], self.backend.fingerprint
        )
        spans = [Span(0, start, "exact", source, 0)]
        for block in alignment.blocks:
            at = start + block.canonical
            spans.append(Span(at, at + block.tokens, "rotate", source, start + block.generated))
        target = self.backend.cache(length)
        self.backend.fill(target, length, [(span, kv) for span in spans])
        return target


def _approximate_from(plan: Plan) -> int:
    """Where what was computed may differ from a dense prefill."""
    return min((span.start for span in plan.spans if span.rung != "exact"), default=plan.length)
