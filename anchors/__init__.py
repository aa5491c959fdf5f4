"""Anchors: observed deviations of a segment's KV in a consumer's context, and the pool that keeps them.

The contracts are in `base`, `admission` and `eviction`; a pool on disk is in `snapshot`. Each name below is imported from its
module when it is first used: a server that moves anchors as bytes needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """PEP 562: find the module that defines `name`; raises AttributeError for names outside `__all__`."""
        match name:
            case "Admission" | "Everything" | "Novel":
                module = "admission"
            case "Anchor":
                module = "anchor"
            case "Admitted" | "Listener" | "PoolStats" | "SlotKey":
                module = "base"
            case "Eviction" | "LeastRecentlyUsed" | "LeastUsedOfOldest":
                module = "eviction"
            case "AnchorPool":
                module = "pool"
            case _:
                raise AttributeError(f"module 'kvcomm.anchors' has no attribute {name!r}")
        return getattr(import_module(f"kvcomm.anchors.{module}"), name)
