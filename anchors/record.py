"""Anchors as bytes: one safetensors document each, and the entry that says what it must be. Knows nothing of folders.

The entry says what the tensors mean (slot, model, tenant, codecs) and the checksum that a document must have; names, dtypes
and shapes of tensors stand in the document's own header, under the same checksum.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.entry import VERSION, Entry, Layout, checksum, pack_manifest, unpack_manifest
from kvcomm.anchors.parts import tensors
from kvcomm.codecs.base import Packed, PackedKV
from kvcomm.errors import CacheFault

__all__ = ["VERSION", "Entry", "Layout", "checksum", "decode", "encode", "layouts", "pack_manifest", "unpack_manifest"]


def layouts(anchor: Anchor) -> tuple[Layout, Layout]:
    """Of its base and of its deviation."""
    return _layout(anchor.base), _layout(anchor.deviation)


def encode(anchor: Anchor) -> tuple[Entry, bytes]:
    """The anchor's document and its line in the manifest."""
    arrays = {name: torch.tensor(getattr(anchor, name)) for name in ("ids", "producer_context", "consumer_context")}
    # Cloned: safetensors refuses tensors that share memory, which a codec may make.
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors(anchor).items()}
    what = json.dumps([anchor.key, *layouts(anchor)])  # so that no two anchors, or packings of one, share a document
    data = save_tensors({**arrays, **own}, metadata={"anchor": what})
    entry = Entry(anchor.key, anchor.slot, anchor.fingerprint, anchor.tenant, *layouts(anchor), checksum(data), len(data))
    return entry, data


def decode(entry: Entry, data: bytes) -> Anchor:
    """The anchor as it was encoded, on the CPU. Raises CacheFault unless `data` is what `entry` says."""
    if len(data) != entry.nbytes or checksum(data) != entry.checksum:
        raise CacheFault(f"anchor {entry.key}: {len(data)} bytes that are not the {entry.nbytes} that were written")
    try:
        named = load_tensors(data)
        ids, producer, consumer = (named.pop(name).numpy() for name in ("ids", "producer_context", "consumer_context"))
        context, parts = named.pop("context"), _by_layer(named)
        base, deviation = (
            _packed(parts, name, layout, len(ids)) for name, layout in (("base", entry.base), ("deviation", entry.deviation))
        )
    except (SafetensorError, KeyError, ValueError) as fault:
        raise CacheFault(f"anchor {entry.key}: not a document of version {VERSION}: {fault!r}") from fault
    anchor = Anchor(entry.slot, ids, base, deviation, context, producer, consumer, entry.fingerprint, entry.tenant)
    if anchor.key != entry.key:
        raise CacheFault(f"anchor {entry.key}: its document holds {anchor.key}")
    return anchor


def _layout(kv: PackedKV) -> Layout:
    return Layout(kv.codec, tuple(p.channels for p in kv.keys), tuple(p.channels for p in kv.values))


def _by_layer(named: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"base.keys.0": {part: tensor}, ...} of {"base.keys.0.part": tensor, ...}; a part's name may hold dots."""
    out: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, t in named.items():
        kv, kind, layer, part = name.split(".", 3)
        out[f"{kv}.{kind}.{layer}"][part] = t
    return out


def _packed(parts: Mapping[str, dict[str, Tensor]], name: str, layout: Layout, tokens: int) -> PackedKV:
    def layers(kind: str, channels: tuple[int, ...]) -> tuple[Packed, ...]:
        return tuple(Packed(tokens, c, parts[f"{name}.{kind}.{layer}"]) for layer, c in enumerate(channels))

    return PackedKV(layout.codec, layers("keys", layout.keys), layers("values", layout.values))
