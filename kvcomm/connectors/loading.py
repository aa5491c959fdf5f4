"""Puts stored K/V to their new place in the engine's paged cache: keys rotated in float32, values copied.

What did not move is copied bit for bit. Knows nothing of plans, schedulers or versions of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from kvcomm.connectors.messages import Load, Piece
from kvcomm.connectors.pages import Pages
from kvcomm.errors import CacheFault
from kvcomm.rope import Rope, Tables
from kvcomm.segments import SegmentKV
from kvcomm.store.base import Store

__all__ = ["Loader", "Lost"]

PART = 256  # tokens


class Loader:
    """Fills the cache of one worker from its store."""

    def __init__(self, pages: Pages, rope: Rope, store: Store) -> None:
        self._pages, self._rope, self._store = pages, rope, store

    @torch.inference_mode()
    def load(self, load: Load) -> None:
        """Writes the pieces of `load`. Raises CacheFault, having written nothing, where a segment is not there (`Lost`, which
        says which one) or is too short.
        """
        pieces = [part for piece in load.pieces for part in _parts(piece)]
        if not pieces:
            return
        found = [(piece, self._found(piece)) for piece in pieces]
        turns = [self._turn(piece, kv) for piece, kv in found]
        where = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
        slots = self._pages.slots(load.blocks, where)
        keys = values = torch.empty(0)  # of one layer, [tokens, heads, dim]; the next one's overwrite them
        for layer, cache in enumerate(self._pages.layers):
            device, shape = cache.paged.device, (len(where), cache.heads, cache.dim)
            if keys.shape != shape or keys.device != device:
                keys, values = (torch.empty(shape, dtype=self._pages.dtype, device=device) for _ in range(2))
            at = 0
            for (piece, kv), turn in zip(found, turns, strict=True):
                end = at + piece.end - piece.start
                part = slice(piece.offset, piece.offset + piece.end - piece.start)
                old, new = kv.keys[layer][:, part].to(device), keys[at:end].transpose(0, 1)  # [heads, tokens, dim]
                if turn is None:
                    new.copy_(old)
                else:
                    self._rope.rotate(layer, old, turn, new)
                values[at:end].transpose(0, 1).copy_(kv.values[layer][:, part])
                at = end
            self._pages.write(layer, keys, values, slots.to(device))

    def _found(self, piece: Piece) -> SegmentKV:
        kv = self._store.get(piece.key)
        if kv is None:
            raise Lost(piece.key)
        if not 0 <= piece.offset <= piece.offset + piece.end - piece.start <= kv.tokens:
            raise CacheFault(f"a segment of {kv.tokens} tokens has none from {piece.offset} on to [{piece.start}, {piece.end})")
        return kv

    def _turn(self, piece: Piece, kv: SegmentKV) -> Tables | None:
        """The rotation of a piece; None where it did not move."""
        old = kv.start + piece.offset
        if old == piece.start:
            return None
        steps, length = torch.arange(piece.end - piece.start), max(piece.end, old + piece.end - piece.start)
        return self._rope.turn(self._rope.tables(piece.start + steps, length), self._rope.tables(old + steps, length))


def _parts(piece: Piece) -> Iterator[Piece]:
    """A piece in parts that stay in a CPU's cache while they are rotated."""
    for start in range(piece.start, piece.end, PART):
        yield Piece(start, min(start + PART, piece.end), piece.key, piece.offset + start - piece.start)


class Lost(CacheFault):
    """A segment is not in the store any more."""

    def __init__(self, key: str) -> None:
        super().__init__("a planned segment left the store, or was altered in it")
        self.key = key
