"""A Hugging Face cache over preallocated buffers, in which known K/V lies before the first forward.

Two ways of writing: appended, as every cache does, or scattered to given positions (the one pass). Layers with a sliding window
keep all their K/V, so that spans can be read from them, and show only the window when tokens are appended, with the numbers of
transformers' own sliding layer. Knows nothing of plans or rotation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from kvcomm.backends.one_pass import OnePass

__all__ = ["BufferPool", "LayerShape", "SpanCache", "SpanLayer"]


@dataclass(frozen=True)
class LayerShape:
    """What one layer caches per token."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None  # tokens that a query sees, itself included; None sees all

    def buffers(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Uninitialised K and V, each [1, heads, tokens, dim]."""
        dims = (self.key_dim, self.value_dim)
        with torch.inference_mode(False):  # buffers outlive the request, and its mode
            k, v = (torch.empty(1, self.heads, tokens, dim, dtype=self.dtype, device=self.device) for dim in dims)
        return k, v


class SpanLayer(CacheLayerMixin):
    """One layer: tokens 0 .. length - 1 are cached. `at` [tokens] set: the next update writes there instead of appending."""

    is_croppable = True

    def __init__(self, buffers: tuple[Tensor, Tensor], window: int | None) -> None:
        self.k, self.v = buffers  # [rows, heads, capacity, dim]
        self.length = 0
        self.at: Tensor | None = None
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    @property
    def keys(self) -> Tensor:  # type: ignore[override]  # a view of the buffer where the base has a tensor
        return self.k[:, :, : self.length]

    @property
    def values(self) -> Tensor:  # type: ignore[override]  # as keys
        return self.v[:, :, : self.length]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: buffers are given."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write K and V [rows, heads, tokens, dim]; returns what these tokens may attend to."""
        if self.at is not None:
            at = self.at.to(key_states.device)
            self.k.index_copy_(2, at, key_states)
            self.v.index_copy_(2, at, value_states)
            return self.keys, self.values
        start, end = self.length, self.length + key_states.shape[2]
        self.reserve(end, rows=key_states.shape[0])
        self.k[:, :, start:end] = key_states
        self.v[:, :, start:end] = value_states
        self.length = end
        seen = slice(self._first_seen(start), end)
        return self.k[:, :, seen], self.v[:, :, seen]

    def reserve(self, tokens: int, rows: int | None = None) -> None:
        """Make room for `tokens` in all, keeping what is cached; another number of rows is possible while nothing is."""
        rows = self.k.shape[0] if rows is None else rows
        capacity = self.k.shape[2]
        if tokens > capacity or rows != self.k.shape[0]:
            self._map(lambda x: self._larger(x, rows, max(capacity, tokens + tokens // 4 + 64)))

    def _larger(self, buffer: Tensor, rows: int, tokens: int) -> Tensor:
        with torch.inference_mode(False):
            larger = buffer.new_empty(rows, buffer.shape[1], tokens, buffer.shape[3])
        larger[:, :, : self.length] = buffer[:, :, : self.length]
        return larger

    def _first_seen(self, position: int) -> int:
        """The first token that the window of `position` holds."""
        return 0 if self.window is None else max(position - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        first = self._first_seen(self.length)
        return self.length + query_length - first, first

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Drop the last -tokens_to_remove tokens; a positive number is the length to keep (the older meaning)."""
        change = int(tokens_to_remove)  # some versions hand over a tensor
        self.length = min(self.length, change) if change > 0 else max(self.length + change, 0)

    def reset(self) -> None:
        self.length, self.at = 0, None

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.k, self.v = change(self.k), change(self.v)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])


class SpanCache(Cache):
    """The cache of one request. `filled`: the [start, end) written ahead of the pass. `armed`: the pass that the next forward
    becomes. `made_at`: tokens of the sequence whose rotary tables the prompt's keys carry, 0 if there are none.
    """

    layers: list[SpanLayer]  # type: ignore[assignment]  # the base allows more kinds, and never adds one by itself

    def __init__(self, shapes: Sequence[LayerShape], buffers: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(layers=[SpanLayer(b, shape.window) for shape, b in zip(shapes, buffers, strict=True)])
        self.filled: list[tuple[int, int]] = []
        self.armed: OnePass | None = None
        self.made_at = 0

    def __bool__(self) -> bool:
        """Whether any token is cached. Phi-3 drops a true cache when a prompt begins beyond its longrope switch."""
        return self.get_seq_length() > 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the base does; raises RuntimeError for an armed cache in a forward that was not turned into its pass."""
        if self.armed is not None and not self.armed.begun:
            raise RuntimeError("this cache is armed: run the forward inside the backend's hooked()")
        keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return keys, values

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return min(int(layer.k.shape[2]) for layer in self.layers)

    @property
    def rows(self) -> int:
        """Sequences cached side by side: 1, or one per beam."""
        return int(self.layers[0].k.shape[0])

    def set_length(self, tokens: int, at: Tensor | None = None) -> None:
        """Say that `tokens` are cached, and where the next forward writes (None: behind them)."""
        for layer in self.layers:
            layer.reserve(tokens)
            layer.length, layer.at = tokens, at

    def reset(self) -> None:
        """Forget all tokens; buffers stay."""
        for layer in self.layers:
            layer.reset()
        self.filled, self.armed, self.made_at = [], None, 0


class BufferPool:
    """Keeps a few buffers for later requests: fresh ones of 128 MB cost 22-50 ms. Safe to use from several threads."""

    def __init__(self, shapes: Sequence[LayerShape], keep: int = 2, keep_bytes: int = 1 << 30) -> None:
        """`keep` and `keep_bytes` bound what is kept together."""
        self._shapes = tuple(shapes)
        self._keep, self._keep_bytes = keep, keep_bytes
        self._free: list[tuple[tuple[Tensor, Tensor], ...]] = []
        self._lock = threading.Lock()

    def take(self, tokens: int) -> SpanCache:
        """An empty cache with room for `tokens`: the smallest kept one that is large enough, or a new one."""
        with self._lock:
            fitting = [b for b in self._free if _capacity(b) >= tokens]
            buffers = min(fitting, key=_capacity, default=None)
            if buffers is not None:
                self._free = [b for b in self._free if b is not buffers]
        return SpanCache(self._shapes, buffers or [shape.buffers(-(-tokens // 256) * 256) for shape in self._shapes])

    def give(self, cache: SpanCache) -> None:
        """Take the cache's buffers back, of which the largest that the bounds allow are kept; it is left empty, and without
        room to write to them.
        """
        buffers = tuple((layer.k, layer.v) for layer in cache.layers)
        cache.reset()
        for layer in cache.layers:
            layer.k, layer.v = layer.k[:1, :, :0], layer.v[:1, :, :0]
        if buffers[0][0].shape[0] == 1 and not buffers[0][0].is_inference():  # beams have rows of their own
            with self._lock:
                candidates = sorted([*self._free, buffers], key=_capacity, reverse=True)
                self._free, left = [], self._keep_bytes
                for one in candidates:
                    if len(self._free) < self._keep and _nbytes(one) <= left:
                        self._free.append(one)
                        left -= _nbytes(one)


def _capacity(buffers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return min(int(k.shape[2]) for k, _ in buffers)


def _nbytes(buffers: Sequence[tuple[Tensor, Tensor]]) -> int:
    return sum(x.nbytes for pair in buffers for x in pair)
