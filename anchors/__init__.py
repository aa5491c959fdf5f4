"""Anchors: observed deviations of a segment's KV in a consumer's context, and the pool that keeps them.

The contracts are in `base`, `admission` and `eviction`; a pool on disk is in `snapshot`.
"""

from kvcomm.anchors.admission import Admission, Everything, Novel
from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.base import Admitted, Listener, PoolStats, SlotKey
from kvcomm.anchors.eviction import Eviction, LeastRecentlyUsed, LeastUsedOfOldest
from kvcomm.anchors.pool import AnchorPool

__all__ = [
    "Admission",
    "Admitted",
    "Anchor",
    "AnchorPool",
    "Everything",
    "Eviction",
    "LeastRecentlyUsed",
    "LeastUsedOfOldest",
    "Listener",
    "Novel",
    "PoolStats",
    "SlotKey",
]
