"""Calls that are waited for only so long. Knows nothing of what they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition, Thread
from typing import Any, TypeVar

__all__ = ["DEADLINE", "SLOWEST", "Late", "Workers"]

DEADLINE = "deadline"  # why a call failed: not finished in time
SLOWEST = 32 << 20  # bytes/s that what moves data is waited for

T = TypeVar("T")


class Late(Exception):
    """The call was not finished in time; `began` is False where it never started and never will."""

    def __init__(self, began: bool) -> None:
        super().__init__("not finished in time" if began else "not even begun in time")
        self.began = began


class Workers:
    """At most `threads` daemon threads, made when needed. A call that is given up keeps its thread until it returns; its result
    is dropped. At the end of the process nobody waits for them, unlike for those of concurrent.futures.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._limit, self._name = threads, name
        self._threads = self._idle = 0
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._closed = False
        self._changed = Condition()

    def run(self, work: Callable[[], T], seconds: float) -> T:
        """What `work()` returns or raises, in another thread. Raises Late after `seconds`."""
        future: Future[T] = Future()
        with self._changed:
            self._waiting.append((future, work))
            if self._idle < len(self._waiting) and self._threads < self._limit and not self._closed:
                self._threads += 1
                Thread(target=self._serve, name=self._name, daemon=True).start()
            self._changed.notify()
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():  # finished just now, or the work's own
                return future.result()
        raise Late(began=not future.cancel())

    def close(self) -> None:
        """Threads end when they are idle; calls that still come are late."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._idle -= 1
                if self._closed:
                    self._threads -= 1
                    return
                future, work = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                _finish(future, work)
            del future, work  # an idle thread keeps nothing alive


def _finish(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as e:  # noqa: BLE001  # whoever waits for it gets it
        future.set_exception(e)
