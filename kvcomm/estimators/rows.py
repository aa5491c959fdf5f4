"""PlainKV as one matrix: keys of every layer, then values of every layer, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from kvcomm.plain import PlainKV

__all__ = ["from_rows", "to_rows"]


def to_rows(kv: PlainKV) -> Tensor:
    """[tokens, channels of all layers]"""
    return torch.cat((*kv.keys, *kv.values), dim=1)


def from_rows(rows: Tensor, like: PlainKV) -> PlainKV:
    """What `to_rows` made one matrix of, as views, with the layers and widths of `like`."""
    parts = rows.split([t.shape[1] for t in (*like.keys, *like.values)], dim=1)
    return PlainKV(parts[: like.layers], parts[like.layers :])
