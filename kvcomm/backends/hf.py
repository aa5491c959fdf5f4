"""Serves Hugging Face models: known K/V goes into the cache, and generate's own first forward becomes the one pass.

Nothing of transformers is patched: there is a cache with its own way of writing, a mask, and, inside `hooked`, two hooks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvcomm.backends import grouped, watched
from kvcomm.backends.base import Look
from kvcomm.backends.one_pass import OnePass
from kvcomm.backends.pre_rope import correct, plain
from kvcomm.backends.probe import probe
from kvcomm.backends.refusal import refusal
from kvcomm.backends.span_cache import BufferPool, SpanCache
from kvcomm.backends.watched import Witness
from kvcomm.errors import CacheFault
from kvcomm.estimators.features import context_features
from kvcomm.fingerprint import Watch, fingerprint
from kvcomm.plain import PlainKV
from kvcomm.rope import Tables, reach
from kvcomm.segments import Ids, SegmentKV, Span

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["HFBackend"]


class HFBackend:
    """A `Backend` (see its contract) for one decoder-only model with rotary or no positions per layer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Tries the model's cache with three short forwards, which leave it as it was. Raises UnsupportedModel, saying why."""
        self.model, self.tokenizer = model, tokenizer
        self.rope, self.shapes = probe(model)
        self._config = model.config.get_text_config(decoder=True)
        self._rotary: nn.Module = model.get_decoder().rotary_emb
        grouped.register()
        watched.register()
        self._masked = grouped.NAME if grouped.fits(model) else "sdpa"
        self._watch = Watch(model)
        self._pool = BufferPool(self.shapes)
        self._armed: dict[int, SpanCache] = {}  # thread -> the cache it armed last

    @property
    def name(self) -> str:
        return str(self.model.config.name_or_path or type(self.model).__name__)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model, self.tokenizer)

    @property
    def context_limit(self) -> int | None:
        return reach(self._config)

    def same_tables(self, length: int, other: int) -> bool:
        return self.rope.same(length, other)

    def refusal(
        self, input_ids: Any, generate_kwargs: Mapping[str, Any], generation_config: GenerationConfig | None = None
    ) -> str | None:
        changed = self._watch.changed()
        if changed is not None:
            return f"the model is not what was loaded: {changed}"
        follows_length = self.rope.follows_length
        return refusal(self.model, input_ids, generate_kwargs, generation_config, follows_length=follows_length)

    # -- known K/V into a cache, and out of it --------------------------------------------------------------------------

    def cache(self, tokens: int) -> SpanCache:
        return self._pool.take(tokens)

    def release(self, cache: SpanCache) -> None:
        self._pool.give(cache)

    @torch.no_grad()
    def fill(self, cache: SpanCache, length: int, spans: Sequence[tuple[Span, SegmentKV]], *, rotate: bool = True) -> None:
        assert length <= cache.capacity, f"{length} tokens into a cache for {cache.capacity}"
        for _, kv in spans:
            self._check(kv)
        turns = [self._turn(length, span, kv) if rotate else None for span, kv in spans]
        for i, layer in enumerate(cache.layers):
            for (span, kv), turn in zip(spans, turns, strict=True):
                source = slice(span.offset, span.offset + span.tokens)
                layer.v[0, :, span.start : span.end] = kv.values[i][:, source]
                into = layer.k[0, :, span.start : span.end]  # [heads, tokens, dim]
                if turn is None:
                    into.copy_(kv.keys[i][:, source])
                else:
                    self.rope.rotate(i, kv.keys[i][:, source].to(into.device), turn, into)
        cache.filled += [(span.start, span.end) for span, _ in spans]
        cache.made_at = length

    def _check(self, kv: SegmentKV) -> None:
        """Raises CacheFault for KV that is not of this model's layers, whatever its fingerprint says."""
        if len(kv.keys) != len(self.shapes):
            raise CacheFault(f"stored KV has {len(kv.keys)} layers; the model has {len(self.shapes)}")
        for i, (shape, keys, values) in enumerate(zip(self.shapes, kv.keys, kv.values, strict=True)):
            for x, dim in ((keys, shape.key_dim), (values, shape.value_dim)):
                wanted = (shape.heads, kv.tokens, dim)
                if tuple(x.shape) != wanted or x.dtype != shape.dtype:
                    raise CacheFault(f"layer {i}: stored KV is {x.dtype} {tuple(x.shape)}; {shape.dtype} {wanted} was expected")

    def _turn(self, length: int, span: Span, kv: SegmentKV) -> Tables | None:
        """The rotation that a span's keys need; None where they are right as they are."""
        old = kv.start + span.offset
        if old == span.start and self.rope.same(length, kv.length):
            return None
        steps = torch.arange(span.tokens, device=self.model.device)
        return self.rope.turn(self.rope.tables(span.start + steps, length), self.rope.tables(old + steps, kv.length))

    def read(self, cache: SpanCache, start: int, end: int, length: int) -> SegmentKV:
        held = cache.get_seq_length()
        if not 0 <= start < end <= held:
            raise CacheFault(f"tokens {start} to {end} are asked of a cache that holds {held}")
        if end > cache.made_at and not self.rope.same(cache.made_at, held):
            raise CacheFault(f"keys behind token {cache.made_at} were rotated with other tables than those in front of it")
        with torch.inference_mode(False), torch.no_grad():
            keys, values = (
                tuple(x[0, :, start:end].clone(memory_format=torch.contiguous_format) for x in buffers)
                for buffers in zip(*((layer.k, layer.v) for layer in cache.layers), strict=True)
            )
        return SegmentKV(keys, values, start, length)

    # -- pre-RoPE space -------------------------------------------------------------------------------------------------

    def plain(self, kv: SegmentKV, start: int, end: int) -> PlainKV:
        return plain(self.rope, kv, start, end)

    def correct(self, cache: SpanCache, length: int, start: int, deviation: PlainKV) -> None:
        correct(self.rope, cache, length, start, deviation)

    def context(self, ids: Ids) -> Tensor:
        embedding: Any = self.model.get_input_embeddings()  # declared as a module, of which any attribute may be one
        table: Tensor = embedding.weight.detach()
        return context_features(ids, lambda tail: table[tail.to(table.device)])

    # -- the pass -------------------------------------------------------------------------------------------------------

    def arm(self, cache: SpanCache, ids: Tensor, recompute: Tensor) -> None:
        self._arm(cache, ids, recompute)

    def _arm(
        self, cache: SpanCache, ids: Tensor, recompute: Tensor, witness: Witness | None = None, keep: int | None = None
    ) -> None:
        tokens = ids.shape[1]
        known = torch.zeros(tokens, dtype=torch.bool)
        for start, end in [(0, cache.get_seq_length()), *cache.filled]:
            known[start:end] = True
        known[recompute] = True
        if not bool(known.all()):
            raise CacheFault(f"token {int(known.int().argmin())} of {tokens} is neither known nor recomputed")
        assert int(recompute[-1]) == tokens - 1, "the last token is always recomputed"
        assert bool((recompute.diff() > 0).all()), "recompute must ascend"
        if cache.made_at and not self.rope.same(cache.made_at, tokens):
            raise CacheFault(f"keys with the rotary tables of {cache.made_at} tokens do not fit a sequence of {tokens}")
        device = self.model.device
        cache.set_length(tokens - 1)
        dtype = self.shapes[0].dtype
        ids, recompute = ids.to(device), recompute.to(device)
        cache.armed = OnePass(self._config, cache, ids, recompute, dtype, self._masked, witness, keep)
        self._armed[threading.get_ident()] = cache

    @contextmanager
    def hooked(self, on_first_logits: Callable[[Tensor], None] | None = None) -> Iterator[None]:
        thread, told = threading.get_ident(), False

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            cache = kwargs.get("past_key_values")
            if threading.get_ident() != thread or not isinstance(cache, SpanCache):
                return None
            coming = None if cache.armed is None or cache.armed.begun else cache.armed  # begun already where hooks are nested
            if coming is not None or not cache:
                self.rope.reset(self._rotary, self.model.device)  # tables of this request, whatever came before it
            return None if coming is None else (args, coming.begin(kwargs))

        def after(_: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            nonlocal told
            if threading.get_ident() != thread:
                return
            cache = kwargs.get("past_key_values")
            if isinstance(cache, SpanCache):
                if cache.armed is not None:
                    out.logits = cache.armed.end(out.logits)
                    cache.armed, cache.made_at = None, 0
                cache.made_at = cache.made_at or cache.get_seq_length()
            if not told and on_first_logits is not None and hasattr(out, "logits"):
                told = True
                on_first_logits(out.logits[0, -1])

        hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            unused = self._armed.pop(thread, None)
            if unused is not None and unused.armed is not None:
                unused.armed.restore()
                unused.reset()

    @torch.no_grad()
    def run(self, cache: SpanCache, ids: Tensor, recompute: Tensor) -> Tensor:
        self._arm(cache, ids, recompute)
        return self._last_logits(cache, ids)[-1]

    @torch.no_grad()
    def look(self, cache: SpanCache, ids: Tensor, recompute: Tensor, last: int = 1) -> Look:
        witness = Witness.of(self.model, self._config._attn_implementation)
        if witness is None:
            raise CacheFault(f"attention {self._config._attn_implementation!r} of this model cannot be watched")
        self._arm(cache, ids, recompute, witness, last)
        return Look(self._last_logits(cache, ids), witness.attention())

    def _last_logits(self, cache: SpanCache, ids: Tensor) -> Tensor:
        """The armed pass without generate: logits [tokens kept, vocabulary]."""
        with self.hooked():
            out = self.model(input_ids=ids[:, -1:].to(self.model.device), past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits[0]
        return logits
