"""What the engine asks of a store: KV by content address, bounded, never wrong. Knows nothing of prompts, plans or models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvcomm.errors import CacheFault
from kvcomm.segments import Segment, SegmentKV

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ALTERED", "TOO_LARGE", "Kept", "Store", "StoreStats", "check_kv"]

TOO_LARGE = "larger-than-store"  # why put kept nothing: the object alone exceeds the store's limit
ALTERED = "altered-in-store"  # why get found nothing: the tensors are not what was put


@dataclass(frozen=True)
class Kept:
    """What `Store.put` did. True as a condition when the object is kept now."""

    stored: bool
    evicted: tuple[str, ...] = ()  # keys that left to make room: whoever indexes them must forget them
    reason: str | None = None  # why it is not stored: `TOO_LARGE`

    def __bool__(self) -> bool:
        return self.stored


@dataclass(frozen=True)
class StoreStats:
    """A store's state and history, at one moment."""

    objects: int
    nbytes: int
    limit_bytes: int
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)  # reason -> times that put stored nothing
    faults: Mapping[str, int] = field(default_factory=dict)  # reason -> times that a kept object turned out unusable


class Store(Protocol):
    """KV of segments by `Segment.key`. Every method may be called from any thread."""

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        """Keep `kv`, evicting others if need be. Stored is also what was kept already; it then counts as used.

        The tensors belong to the store from here on: the caller must not write to them or to memory that they share. What
        cannot be stored is refused with a reason, and nothing else is evicted for it.
        Raises CacheFault, and changes nothing, when `check_kv` finds `kv` unusable.
        """

    def get(self, key: str) -> SegmentKV | None:
        """The KV as it was put, to be read and never written; None when it is not here or not what was put any more.

        What is returned stays valid for as long as the caller holds it, whatever is evicted meanwhile.
        """

    def get_many(self, keys: Iterable[str]) -> dict[str, SegmentKV]:
        """As `get`, of several at once: what is not here is left out. One round trip where the store is elsewhere."""

    def remove(self, key: str) -> bool:
        """Forget one object; False when it was not here. Not counted as evicted."""

    def __contains__(self, key: object) -> bool:
        """Is something kept under `key`? Does not count as use."""

    def wants(self, key: str) -> bool:
        """Would it gain by a put of this? Of what it has none, and of what it has where reading takes long, perhaps."""

    @property
    def nbytes(self) -> int:
        """Bytes of KV kept now, at most the store's limit."""

    def segments(self) -> list[Segment]:
        """What is kept, the next to be evicted first."""

    def stats(self) -> StoreStats:
        """Counts since the store was made."""

    def check_integrity(self) -> None:
        """Raise AssertionError when bounds, counts and objects contradict each other. Slow; for tests and tools."""


def check_kv(segment: Segment, kv: SegmentKV) -> None:
    """Raise CacheFault unless `kv` is finite and has the shapes and position of `segment`'s KV. Reads every element."""
    tokens = len(segment.ids)
    if not tokens:
        raise CacheFault("the segment has no tokens")
    if not kv.keys or len(kv.keys) != len(kv.values):
        raise CacheFault(f"{len(kv.keys)} layers of keys and {len(kv.values)} of values; there must be as many, at least one")
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        for name, t in (("keys", keys), ("values", values)):
            if t.dim() != 3 or t.shape[1] != tokens:
                raise CacheFault(f"layer {layer}: {name} are {list(t.shape)}; [kv_heads, {tokens} tokens, dim] was expected")
            if not t.is_floating_point():
                raise CacheFault(f"layer {layer}: {name} are {t.dtype}; a floating type was expected")
            if not _finite(t):
                raise CacheFault(f"layer {layer}: {name} hold NaN or infinity")
        if keys.shape[0] != values.shape[0]:
            raise CacheFault(f"layer {layer}: {keys.shape[0]} heads of keys and {values.shape[0]} of values")
    if kv.start != segment.start:
        raise CacheFault(f"KV starts at position {kv.start}, the segment at {segment.start}")
    if kv.length < kv.start + tokens:
        raise CacheFault(f"KV of a sequence of {kv.length} tokens cannot end at position {kv.start + tokens}")


def _finite(t: Tensor) -> bool:
    """No NaN, no infinity: both show in the extremes, which are found 20 times as fast as `isfinite` looks at every element."""
    import torch  # here, so that a process which moves bytes alone does without it

    extremes = torch.aminmax(t if t.itemsize > 1 else t.float()) if t.numel() else ()
    return all(bool(torch.isfinite(x)) for x in extremes)
