"""Where segments' KV is kept: the contract in `base`, one implementation per module."""

from kvcomm.store.base import Kept, Store, StoreStats
from kvcomm.store.eviction import Quotas
from kvcomm.store.memory import MemoryStore
from kvcomm.store.null import NullStore
from kvcomm.store.slabs import SlabStore

__all__ = ["Kept", "MemoryStore", "NullStore", "Quotas", "SlabStore", "Store", "StoreStats"]
