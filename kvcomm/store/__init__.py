"""Where segments' KV is kept: the contract in `base`, one implementation per module.

`MemoryStore` alone needs torch, and is imported when it is first used: a server of bytes does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvcomm.store.base import Kept, Store, StoreStats
from kvcomm.store.eviction import Quotas
from kvcomm.store.null import NullStore
from kvcomm.store.slabs import SlabStore

if TYPE_CHECKING:
    from kvcomm.store.memory import MemoryStore

__all__ = ["Kept", "MemoryStore", "NullStore", "Quotas", "SlabStore", "Store", "StoreStats"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """PEP 562: `MemoryStore`."""
        if name != "MemoryStore":
            raise AttributeError(f"module 'kvcomm.store' has no attribute {name!r}")
        from kvcomm.store.memory import MemoryStore

        return MemoryStore
