"""Anchors between a log or a pool and a snapshot's folder (`kvcomm.anchors.snapshot`), by which they move between hosts."""

from __future__ import annotations

import os
import sys
from collections import Counter

from kvcomm.anchors import snapshot
from kvcomm.anchors.pool import AnchorPool
from kvcomm.anchors.record import decode, encode
from kvcomm.anchors.snapshot import Loaded, Saved
from kvcomm.errors import CacheFault
from kvcomm.wire.anchor_entry import pack_entry, unpack_entry
from kvcomm.wire.anchor_log import AnchorLog

__all__ = ["export_anchors", "import_anchors"]


def export_anchors(source: AnchorLog | AnchorPool, folder: str | os.PathLike[str]) -> Saved:
    """Commit what `source` holds at one moment, of all tenants and models, to a snapshot's folder. Whatever is no sound anchor
    is left out. Raises as `snapshot.save` does.
    """
    return snapshot.save(source if isinstance(source, AnchorPool) else _pool(source), folder)


def import_anchors(target: AnchorLog | AnchorPool, folder: str | os.PathLike[str], fingerprint: str | None = None) -> Loaded:
    """Add what a snapshot's folder holds, the oldest first; with a `fingerprint`, only that model's. What `target` refuses is
    counted with what is damaged. Into a `SharedPool`: to its server. Raises as `snapshot.load` does.
    """
    if isinstance(target, AnchorPool):
        return snapshot.load(target, folder, fingerprint)
    pool = _boundless()
    loaded = snapshot.load(pool, folder, fingerprint)
    dropped = Counter(loaded.dropped)
    for anchor in pool.anchors():
        entry, document = encode(anchor)
        reason = target.add(anchor.tenant, pack_entry(entry), document)["reason"]
        if reason is not None:
            dropped[reason] += 1
    return Loaded(len(pool) - (dropped.total() - sum(loaded.dropped.values())), dict(dropped))


def _pool(source: AnchorLog) -> AnchorPool:
    pool = _boundless()
    for entry, document in source.documents():
        try:
            pool.add(decode(unpack_entry(entry), document))
        except CacheFault:
            continue
    return pool


def _boundless() -> AnchorPool:
    return AnchorPool(sys.maxsize, sys.maxsize)
