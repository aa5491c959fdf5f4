"""When to stop asking a service that fails. Knows nothing of what is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from kvcomm.errors import InputError

__all__ = ["ENOUGH", "Breaker", "Open"]

ENOUGH = 0.9  # of a deadline lost: one call that misses it opens the breaker, whatever clocks round


class Open(Exception):
    """No call is made now; `seconds` until one may be tried."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"open for another {seconds:.3g} s")
        self.seconds = seconds


class Breaker:
    """After `after` failures in a row, or fewer that took `lost_s` seconds, it opens for `first_s` seconds, or for as long as
    the last of them took; then one call is tried, and each trial that fails doubles the time, up to `longest_s`. Any success
    closes it. Thread safe.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        after: int = 3,
        lost_s: float = 1.0,
        first_s: float = 1.0,
        longest_s: float = 60.0,
    ) -> None:
        """`clock`: seconds, never going back."""
        if after < 1 or not lost_s > 0 or not 0 < first_s <= longest_s:
            raise InputError(
                f"a breaker after {after} failures or {lost_s} s, for {first_s} to {longest_s} s: at least 1, above 0, "
                "0 < from <= to"
            )
        self._clock, self._after, self._lost_s = clock, after, lost_s
        self._first_s, self._longest_s = first_s, longest_s
        self._failures = 0  # in a row
        self._lost = 0.0  # s that they took
        self._until: float | None = None  # open until then; None while closed
        self._open_s = first_s  # how long it is open the next time
        self._trial = False  # one is under way
        self._lock = Lock()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around one call: what it raises is a failure. Raises Open in its place while no call is to be made."""
        trial, began = self._enter(), self._clock()
        try:
            yield
        except BaseException:
            self._failed(trial, self._clock() - began)
            raise
        self._passed()

    @property
    def closed(self) -> bool:
        with self._lock:
            return self._until is None

    def _enter(self) -> bool:
        with self._lock:
            if self._until is None:
                return False
            left = self._until - self._clock()
            if left > 0 or self._trial:
                raise Open(max(left, 0.0))
            self._trial = True
            return True

    def _passed(self) -> None:
        with self._lock:
            self._failures, self._lost = 0, 0.0
            self._until, self._open_s, self._trial = None, self._first_s, False

    def _failed(self, trial: bool, took: float) -> None:
        with self._lock:
            self._failures += 1
            self._lost += took
            if trial:
                self._trial = False
            elif self._until is not None or (self._failures < self._after and self._lost < self._lost_s):
                return  # it began before the breaker opened, or is one of few
            self._until = self._clock() + max(self._open_s, took)
            self._open_s = min(2 * self._open_s, self._longest_s)
