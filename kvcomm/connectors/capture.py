"""What a request leaves behind: which runs of its prompt and answer become segments, and how their K/V get into the store.

Choosing is the scheduler's part, reading the workers'. Answers are kept under the ids that were sampled: where readers encode
the text otherwise, matching finds the runs that agree and what lies between them is a hole. So is the last sampled token,
whose K/V nobody ever computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kvcomm.connectors.messages import Save
from kvcomm.connectors.pages import Pages
from kvcomm.segments import Ids, Plan, Segment, SegmentKV
from kvcomm.store.base import Kept, Store

__all__ = ["Keeper", "answer_segment", "prompt_segments"]


def prompt_segments(
    ids: Ids, plan: Plan, known: Plan, fingerprint: str, tenant: str, producer: str, least: int
) -> list[Segment]:
    """Runs of at least `least` tokens of the prompt `ids` that `known` has in no span. `plan` is how the prompt was served:
    only what lies before its first moved span is exact.
    """
    edges = [0, *(edge for span in known.spans for edge in (span.start, span.end)), len(ids)]
    exact_to = _exact_to(plan)
    return [
        Segment(ids[a:b].copy(), ids[:a].copy(), fingerprint, tenant, producer, exact=b <= exact_to)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
        if b - a >= least
    ]


def answer_segment(
    prompt: Ids, generated: Ids, plan: Plan, fingerprint: str, tenant: str, producer: str, least: int
) -> list[Segment]:
    """The answer's tokens that have K/V; none where they are fewer than `least`."""
    if len(generated) < least:
        return []
    return [Segment(generated.copy(), prompt.copy(), fingerprint, tenant, producer, exact=_exact_to(plan) == plan.length)]


class Keeper:
    """Reads the cache of one worker into its store."""

    def __init__(self, pages: Pages, store: Store) -> None:
        self._pages, self._store = pages, store

    @property
    def block_size(self) -> int:
        return self._pages.block_size

    @torch.inference_mode()
    def keep(self, segment: Segment, save: Save) -> Kept:
        """Raises CacheFault where the K/V is not finite."""
        if not self._store.wants(segment.key):
            return Kept(stored=True)
        return self._store.put(segment, self.read(save.blocks, segment.start, segment.start + len(segment.ids)))

    @torch.inference_mode()
    def read(self, blocks: Sequence[int], start: int, end: int) -> SegmentKV:
        """Copies of what a request's cache holds of tokens [start, end)."""
        both = [self._pages.read(layer, blocks, start, end) for layer in range(len(self._pages.layers))]
        keys, values = (tuple(pair[i] for pair in both) for i in (0, 1))
        return SegmentKV(keys, values, start, end)


def _exact_to(plan: Plan) -> int:
    """Tokens in front of everything that was approximated."""
    return int(np.min([span.start for span in plan.spans if span.rung != "exact"], initial=plan.length))
