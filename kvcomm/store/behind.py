"""Records that are written later, by one thread, oldest first. Knows nothing of where they go."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Condition, Thread

from kvcomm.errors import InputError
from kvcomm.store.record import Record

__all__ = ["Behind"]


class Behind:
    """A queue of at most `limit_bytes` of records, the one being written included. Thread safe.

    A record in the queue keeps its memory alive and can be had back with `get`. `write` and `undo` are called by the thread,
    without a lock, and must not raise; `undo` for a key that was discarded while it was being written.
    """

    def __init__(self, write: Callable[[Record], None], undo: Callable[[str], None], limit_bytes: int) -> None:
        if limit_bytes < 1:
            raise InputError(f"the queue's limit is {limit_bytes} bytes; it must be at least 1")
        self.limit_bytes = limit_bytes
        self._write, self._undo = write, undo
        self._waiting: OrderedDict[str, Record] = OrderedDict()
        self._hand: Record | None = None  # what the thread is writing
        self._discarded = False  # the one in hand
        self._nbytes = 0
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="kvcomm-write-behind", daemon=True)
        self._thread.start()

    def add(self, record: Record) -> bool:
        """Will it be written? False where it does not fit, and after `close`."""
        key = record.key
        with self._changed:
            if self._closed:
                return False
            if key in self._waiting or self._in_hand(key):
                return True
            if self._nbytes + record.nbytes > self.limit_bytes:
                return False
            self._waiting[key] = record
            self._nbytes += record.nbytes
            self._changed.notify_all()
            return True

    def get(self, key: str) -> Record | None:
        with self._changed:
            return self._hand if self._in_hand(key) else self._waiting.get(key)

    def discard(self, key: str) -> bool:
        """Forget a record; False when it was not here."""
        with self._changed:
            if self._in_hand(key):
                self._discarded = True
                return True
            if key not in self._waiting:
                return False
            self._nbytes -= self._waiting.pop(key).nbytes
            return True

    @property
    def nbytes(self) -> int:
        with self._changed:
            return self._nbytes

    def drain(self, seconds: float) -> bool:
        """Wait until everything is written; False when it takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and self._hand is None, seconds)

    def close(self, seconds: float) -> list[str]:
        """Take nothing more, drain, and stop; returns the keys that are given up. A write that hangs is not waited for."""
        with self._changed:
            self._closed = True
        until = time.monotonic() + seconds
        self.drain(seconds)
        with self._changed:
            given_up = [*([] if self._hand is None else [self._hand.key]), *self._waiting]
            self._nbytes -= sum(record.nbytes for record in self._waiting.values())
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(max(until - time.monotonic(), 0.1))
        return given_up

    def check_integrity(self) -> None:
        with self._changed:
            held = [*self._waiting.values(), *([] if self._hand is None else [self._hand])]
            assert self._nbytes == sum(record.nbytes for record in held) <= self.limit_bytes

    def _in_hand(self, key: str) -> bool:
        return self._hand is not None and not self._discarded and self._hand.key == key

    def _run(self) -> None:
        while (record := self._next()) is not None:
            self._write(record)
            with self._changed:
                discarded, self._discarded = self._discarded, True  # from here on it is no longer in the queue
            if discarded:
                self._undo(record.key)
            with self._changed:
                self._hand = None
                self._nbytes -= record.nbytes
                self._changed.notify_all()

    def _next(self) -> Record | None:
        """The oldest one, in hand from now on; None when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            _, self._hand = self._waiting.popitem(last=False)
            self._discarded = False
            return self._hand
