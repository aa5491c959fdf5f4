"""What a stack of tiers remembers of the keys that passed through it, so that it need not ask a far tier for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from threading import Lock

__all__ = ["Ledger"]

LIMIT = 1 << 17  # keys; some 25 MB


class Ledger:
    """By key, the most recently used: bytes of the record, and whether the back was last seen to keep it. Thread safe.

    The back is believed to keep what it took or brought, until it says that it evicted it, or misses it. What is forgotten
    here is believed to be nowhere.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._known: OrderedDict[str, tuple[int, bool]] = OrderedDict()
        self._lock = Lock()

    def saw(self, key: str, nbytes: int) -> None:
        """A record passed through."""
        with self._lock:
            _, below = self._known.pop(key, (0, False))
            self._known[key] = (nbytes, below)
            while len(self._known) > self.limit:
                self._known.popitem(last=False)

    def mark(self, keys: Iterable[str], *, below: bool) -> None:
        """The back keeps these now, or does not. Only of keys that passed through."""
        with self._lock:
            for key in keys:
                if key in self._known:
                    self._known[key] = (self._known[key][0], below)

    def is_below(self, key: str) -> bool:
        with self._lock:
            return self._known.get(key, (0, False))[1]

    def size(self, key: str) -> int | None:
        """Bytes of its record, where that is remembered."""
        with self._lock:
            return self._known[key][0] if key in self._known else None

    def forget(self, key: str) -> None:
        with self._lock:
            self._known.pop(key, None)
