"""An anchor: one stored observation of what a new context does to the KV of a text (the paper's section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from kvcomm.codecs.base import PackedKV
from kvcomm.segments import Ids

__all__ = ["Anchor"]


@dataclass(frozen=True, eq=False)
class Anchor:
    """A run of tokens whose KV was seen twice: behind its producer's context (base) and behind a consumer's (real).

    Base and deviation are in pre-RoPE space, packed: real KV, un-rotated, minus base KV, un-rotated.
    """

    slot: str  # the place in a prompt that the text filled
    ids: Ids  # [tokens]
    base: PackedKV  # [tokens]
    deviation: PackedKV  # [tokens]
    context: Tensor  # float32 [c]: features of the text in front of it in the consumer's prompt
    producer_context: Ids  # tokens in front of it when the base was computed
    consumer_context: Ids  # tokens in front of it when the real KV was computed
    fingerprint: str  # model identity; anchors never cross it
    tenant: str = ""

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def nbytes(self) -> int:
        ids = self.ids.nbytes + self.producer_context.nbytes + self.consumer_context.nbytes
        return self.base.nbytes + self.deviation.nbytes + self.context.numel() * self.context.element_size() + ids

    @cached_property
    def key(self) -> str:
        """Content address: the same text, seen in the same two contexts in the same slot, is one observation."""
        from hashlib import blake2b

        h = blake2b(f"{self.fingerprint}\0{self.tenant}\0{self.slot}\0".encode(), digest_size=16)
        for ids in (self.producer_context, self.consumer_context, self.ids):
            h.update(f"{len(ids)}\0".encode())
            h.update(np.ascontiguousarray(ids).data)
        return h.hexdigest()
