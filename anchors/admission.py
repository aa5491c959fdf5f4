"""Which anchors are worth keeping: what no pool takes, and one class per rule for the rest.

Functions of an anchor and of what its slot holds. Knows nothing of pools or limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.parts import tensors
from kvcomm.errors import InputError

__all__ = ["MALFORMED", "NEAR_DUPLICATE", "NON_FINITE", "Admission", "Everything", "Novel", "flaw"]

MALFORMED = "malformed"  # its packed KV is not of its tokens, or of no layer
NON_FINITE = "non-finite"  # NaN or infinity in its context features or in what is packed
NEAR_DUPLICATE = "near-duplicate"  # same text and base, and nearly the same context, as an anchor that is kept


class Admission(Protocol):
    """A rule of admission. Stateless: may be shared by pools and called from any thread."""

    def refusal(self, anchor: Anchor, kept: Sequence[Anchor]) -> str | None:
        """Why `anchor` adds nothing to `kept`, the anchors of its slot, oldest first; None when it is worth keeping.

        None of `kept` has the key of `anchor`. Nothing is changed.
        """
        ...


class Everything:
    """Keep whatever is sound."""

    def refusal(self, anchor: Anchor, kept: Sequence[Anchor]) -> str | None:
        return None


class Novel:
    """Keep what was not seen before: refuse text over the same base behind a context that is within `distance` of a kept one.

    The base counts through the producer's context: over another base, the deviation of the same text is another observation.
    """

    def __init__(self, distance: float = 0.02) -> None:
        if not distance >= 0:
            raise InputError(f"distance is {distance}; it must be at least 0 (relative to the context features' norm)")
        self.distance = distance

    def refusal(self, anchor: Anchor, kept: Sequence[Anchor]) -> str | None:
        near = any(self._near(anchor.context, other.context) for other in kept if _same_text(anchor, other))
        return NEAR_DUPLICATE if near else None

    def _near(self, a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.device != b.device:
            return False
        scale = torch.maximum(a.norm(), b.norm())
        return bool((a - b).norm() <= self.distance * scale)


def flaw(anchor: Anchor) -> str | None:
    """Why no pool takes `anchor`; None when it is sound. Reads every element."""
    kvs = (anchor.base, anchor.deviation)
    layers = {len(part) for kv in kvs for part in (kv.keys, kv.values)}
    rows = {packed.tokens for kv in kvs for packed in (*kv.keys, *kv.values)}
    if not anchor.tokens or rows != {anchor.tokens} or len(layers) != 1:
        return MALFORMED
    return None if all(map(_finite, tensors(anchor).values())) else NON_FINITE


def _finite(t: Tensor) -> bool:
    if not t.is_floating_point():
        return True
    return bool(torch.isfinite(t.float() if t.itemsize == 1 else t).all())  # torch has no isfinite for 8-bit floats


def _same_text(a: Anchor, b: Anchor) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.producer_context, b.producer_context)
