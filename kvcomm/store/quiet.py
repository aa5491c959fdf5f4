"""What has been asked for in vain, for a while. Knows nothing of what the names stand for."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import Lock

__all__ = ["Quiet"]


class Quiet:
    """Names that are not to be asked for until `seconds` after they were added; the newest `limit` of them. Thread safe."""

    def __init__(self, seconds: float, limit: int = 1 << 16, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.limit = seconds, limit
        self._clock = clock
        self._until: OrderedDict[str, float] = OrderedDict()
        self._lock = Lock()

    def add(self, names: Iterable[str]) -> None:
        until = self._clock() + self.seconds
        with self._lock:
            for name in names:
                self._until.pop(name, None)
                self._until[name] = until
            while len(self._until) > self.limit:
                self._until.popitem(last=False)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return self._until.get(name, 0.0) > self._clock()  # type: ignore[call-overload,no-any-return]  # any object may be asked for

    def __len__(self) -> int:
        with self._lock:
            return len(self._until)
