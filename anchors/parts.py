"""The tensors that an anchor is made of, by name. Knows nothing of pools or files."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.codecs.base import Packed, PackedKV

__all__ = ["owned", "tensors"]


def tensors(anchor: Anchor) -> dict[str, Tensor]:
    """`context`, and `base.keys.<layer>.<part>`, `deviation.values.<layer>.<part>` and so on: the anchor's own, not copies."""
    out = {"context": anchor.context}
    for name, kv in (("base", anchor.base), ("deviation", anchor.deviation)):
        for kind, layers in (("keys", kv.keys), ("values", kv.values)):
            for layer, packed in enumerate(layers):
                out |= {f"{name}.{kind}.{layer}.{part}": t for part, t in packed.parts.items()}
    return out


def owned(anchor: Anchor) -> Anchor:
    """`anchor` itself, or a copy of it where a tensor is a view that would keep larger memory alive."""
    if all(t.untyped_storage().nbytes() == t.nbytes for t in tensors(anchor).values()):
        return anchor
    return replace(anchor, base=_owned_kv(anchor.base), deviation=_owned_kv(anchor.deviation), context=_owned(anchor.context))


def _owned_kv(kv: PackedKV) -> PackedKV:
    return replace(kv, keys=tuple(map(_owned_packed, kv.keys)), values=tuple(map(_owned_packed, kv.values)))


def _owned_packed(packed: Packed) -> Packed:
    return replace(packed, parts={part: _owned(t) for part, t in packed.parts.items()})


def _owned(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)
