"""Puts stored K/V to their new place in the engine's paged cache: keys rotated in float32, values copied, deviations added.

What did not move is copied bit for bit. Knows nothing of plans, schedulers or versions of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvcomm.backends.pre_rope import add
from kvcomm.connectors.messages import Load, Piece
from kvcomm.connectors.pages import Pages
from kvcomm.errors import CacheFault
from kvcomm.plain import PlainKV
from kvcomm.rope import Rope, Tables
from kvcomm.segments import SegmentKV
from kvcomm.store.base import Store
from kvcomm.wire.client import ServerStore

__all__ = ["Deviations", "Loader", "Lost"]

PART = 256  # tokens that are rotated at a time: they stay in a CPU's cache


@dataclass(frozen=True, eq=False)
class _Part:
    """Tokens of a piece, and where they go."""

    keys: list[Tensor]  # per layer [heads, tokens, dim], as stored
    values: list[Tensor]
    turn: Tables | None  # None: they did not move
    slots: Tensor  # int64 [tokens]
    change: tuple[Tables, PlainKV] | None  # what is added, and the rotation that brings it there


Deviations = Sequence[tuple[int, PlainKV]]
"""Position of the first token, what is to be added from there on."""


class Loader:
    """Fills the cache of one worker from its store."""

    def __init__(self, pages: Pages, rope: Rope, store: Store) -> None:
        self._pages, self._rope, self._store = pages, rope, store

    @torch.inference_mode()
    def load(self, load: Load, deviations: Deviations = ()) -> None:
        """Writes the pieces of `load`, `deviations` added to them. Raises CacheFault, having written nothing, where a segment
        is not there (`Lost`, which says which one) or is too short.
        """
        if isinstance(self._store, ServerStore):
            self._store.belong((piece.key for piece in load.pieces), load.tenant)
        held = self._store.get_many(dict.fromkeys(piece.key for piece in load.pieces))
        parts = [part for piece in load.pieces for part in self._parts(piece, _found(piece, held), load.blocks, deviations)]
        for layer, cache in enumerate(self._pages.layers):
            device = cache.paged.device
            turned = torch.empty(PART, cache.heads, cache.dim, dtype=self._pages.dtype, device=device)
            for part in parts:
                keys, values = part.keys[layer].to(device), part.values[layer].to(device)  # [heads, tokens, dim]
                if part.turn is not None:
                    moved = turned[: keys.shape[1]].transpose(0, 1)
                    self._rope.rotate(layer, keys, part.turn, moved)
                    keys = moved
                if part.change is not None:
                    keys, values = (x.to(torch.float32, copy=True) for x in (keys, values))
                    add(self._rope, layer, *part.change, keys, values)
                    keys, values = (x.to(self._pages.dtype) for x in (keys, values))
                self._pages.write(layer, keys.transpose(0, 1), values.transpose(0, 1), part.slots.to(device))

    def _parts(self, piece: Piece, kv: SegmentKV, blocks: Sequence[int], deviations: Deviations) -> Iterator[_Part]:
        slots = self._pages.slots(blocks, np.arange(piece.start, piece.end))
        turn = self._turn(piece, kv)
        for a in range(0, piece.end - piece.start, PART):
            b = min(a + PART, piece.end - piece.start)
            there = slice(piece.offset + a, piece.offset + b)
            yield _Part(
                [k[:, there] for k in kv.keys],
                [v[:, there] for v in kv.values],
                None if turn is None else {t: (cos[:, a:b], sin[:, a:b]) for t, (cos, sin) in turn.items()},
                slots[a:b],
                self._change(piece.start + a, piece.start + b, deviations),
            )

    def _turn(self, piece: Piece, kv: SegmentKV) -> Tables | None:
        """The rotation of a piece; None where it did not move."""
        old = kv.start + piece.offset
        if old == piece.start:
            return None
        steps, length = torch.arange(piece.end - piece.start), max(piece.end, old + piece.end - piece.start)
        return self._rope.turn(self._rope.tables(piece.start + steps, length), self._rope.tables(old + steps, length))

    def _change(self, start: int, end: int, deviations: Deviations) -> tuple[Tables, PlainKV] | None:
        """Of tokens [start, end); None where nothing is added to them."""
        for first, deviation in deviations:
            if first <= start < end <= first + deviation.tokens:
                where = torch.arange(start, end)
                turn = self._rope.turn(self._rope.tables(where, end), self._rope.tables(torch.zeros_like(where), end))
                return turn, deviation.part(start - first, end - first)
        return None


class Lost(CacheFault):
    """A segment is not in the store any more."""

    def __init__(self, key: str) -> None:
        super().__init__("a planned segment left the store, or was altered in it")
        self.key = key


def _found(piece: Piece, held: Mapping[str, SegmentKV]) -> SegmentKV:
    kv = held.get(piece.key)
    if kv is None:
        raise Lost(piece.key)
    if not 0 <= piece.offset <= piece.offset + piece.end - piece.start <= kv.tokens:
        raise CacheFault(f"a segment of {kv.tokens} tokens has none from {piece.offset} on to [{piece.start}, {piece.end})")
    return kv
