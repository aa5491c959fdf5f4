"""What loading costs here beside computing, measured once on the engine's empty cache: from how many tokens on reuse is faster.

Milliseconds of wall time, the device waited for. Knows nothing of requests or versions of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from time import perf_counter

import numpy as np
import torch

from kvcomm.connectors.holes import HolePass, Row
from kvcomm.connectors.loading import Loader
from kvcomm.connectors.messages import Load, Piece
from kvcomm.connectors.pages import Pages
from kvcomm.rope import Rope
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.memory import MemoryStore

__all__ = ["Costs", "measure"]

FEW = 8  # tokens
REPEATS = 5
UNKNOWN = 32  # tokens from which on reuse is taken to be faster where time could not be measured


@dataclass(frozen=True)
class Costs:
    """Of one worker."""

    prefill_ms: float  # of one more token that is computed
    load_ms: float  # of one more token that is loaded and rotated
    request_ms: float  # of loading anything at all

    @property
    def least_gain(self) -> int | None:
        """Tokens from which on loading is faster; None: never. UNKNOWN where computing more took no longer."""
        if self.prefill_ms <= 0:
            return UNKNOWN
        saved = self.prefill_ms - self.load_ms
        return ceil(self.request_ms / saved) if saved > 0 else None

    def __str__(self) -> str:
        from_ = "never" if self.least_gain is None else f"from {self.least_gain} tokens on"
        return (
            f"a token costs {self.prefill_ms:.3g} ms to compute and {self.load_ms:.3g} ms to load, a request "
            f"{self.request_ms:.3g} ms: reuse is faster {from_}"
        )


def measure(pages: Pages, rope: Rope, holes: HolePass, max_tokens: int) -> Costs:
    """With prompts of at most `max_tokens`: short ones on a CPU, where time grows with every token, and long ones elsewhere,
    where the first hundreds are free. Overwrites the first blocks of the cache.
    """
    layers, device = pages.layers, pages.layers[0].paged.device
    size, blocks = pages.block_size, layers[0].paged.shape[0] - 1  # number 0 is never a request's
    tokens = min(128 if device.type == "cpu" else 1024, max_tokens - 1, blocks * size - 1)
    if tokens <= FEW:
        return Costs(0.0, 0.0, 0.0)
    where = tuple(range(1, -(-(tokens + 1) // size) + 1))
    ids = np.arange(5, 5 + tokens, dtype=np.int32) % 251

    def compute(count: int) -> None:
        holes.run([Row(where, 0, ids[:count])])

    many, few = (_ms(lambda n=n: compute(n), device) for n in (tokens, FEW))  # type: ignore[misc]  # a default argument
    both = [pages.read(layer, where, 0, tokens) for layer in range(len(layers))]
    kv = SegmentKV(tuple(k for k, _ in both), tuple(v for _, v in both), 0, tokens)
    segment = Segment(ids, ids[:0], "costs")
    store = MemoryStore(kv.nbytes)
    store.put(segment, kv)
    loader = Loader(pages, rope, store)

    def load(count: int) -> None:  # one further than they were
        loader.load(Load("costs", ids, where, 1, 1 + count, (Piece(1, 1 + count, segment.key, 0),), ()))

    much, little = (_ms(lambda n=n: load(n), device) for n in (tokens, FEW))  # type: ignore[misc]  # a default argument
    return Costs((many - few) / (tokens - FEW), max(much - little, 0.0) / (tokens - FEW), little)


def _ms(call: Callable[[], None], device: torch.device) -> float:
    """The least of some calls, after one that is not counted."""
    took = []
    for _ in range(REPEATS + 1):
        began = perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        took.append((perf_counter() - began) * 1e3)
    return min(took[1:])
