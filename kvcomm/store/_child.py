"""A process that makes calls which may hang or crash, and what is done about it. Knows nothing of what is called."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import IO, Any

from kvcomm.store._mooncake_child import receive, send
from kvcomm.store.remote import RemoteFault

__all__ = ["Child"]

PATIENCE_S = 10.0  # an answer that is later than that does not come: the process is replaced
SETUP_S = 60.0  # the same, of `setup`, which may have much memory to prepare
ENDING_S = 3.0  # for `close`


class Child:
    """Runs `script` and asks it one thing at a time, `setup` first. Thread safe; callers take turns.

    A call that is not answered in time is a fault, and so are further ones until its answer comes, which is dropped; after ten
    seconds, or when the process ended, the next call begins with a new one.
    """

    def __init__(self, tier: str, script: Path, setup: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._tier, self._script, self._setup, self._clock = tier, script, setup, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._said: IO[bytes] | None = None
        self._asked: float | None = None  # when, of a question that has no answer yet
        self._ready = False
        self._closed = False
        self._lock = Lock()

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def call(self, request: dict[str, Any], fd: int | None, seconds: float) -> tuple[dict[str, Any], int | None]:
        """The answer and the descriptor that came along, now the caller's. Raises RemoteFault."""
        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise RemoteFault(self._tier, "busy", f"other calls took all of {seconds:.3g} s")
        try:
            self._prepare(until)
            return self._exchange(request, fd, until)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Asks it to end, waits three seconds, and ends it."""
        with self._lock:
            self._closed = True
            if self._process is not None and self._asked is None:
                try:
                    self._exchange({"do": "close"}, None, time.monotonic() + ENDING_S)
                    self._process.wait(ENDING_S)
                except (RemoteFault, subprocess.TimeoutExpired):
                    pass
            self._kill()

    def _prepare(self, until: float) -> None:
        """A process that is set up and has nothing left to answer."""
        if self._closed:
            raise RemoteFault(self._tier, "closed", "the store was closed")
        if self._asked is not None:
            self._catch_up(until)
        if self._process is not None and self._process.poll() is not None:
            self._kill()
        if self._process is None:
            self._spawn()
        if not self._ready:
            reply, _ = self._exchange(self._setup, None, until)
            self._check_setup(reply)

    def _catch_up(self, until: float) -> None:
        """Takes the answer that is still to come, and drops it; gives the process up where it is much too late."""
        assert self._asked is not None
        late = self._clock() - self._asked > (PATIENCE_S if self._ready else SETUP_S)
        try:
            reply, fd = self._answer(time.monotonic() if late else until)
        except RemoteFault as fault:
            if not late and fault.reason == self._waiting:
                raise
            self._kill()
            return
        if fd is not None:
            os.close(fd)
        if not self._ready:
            self._check_setup(reply)

    @property
    def _waiting(self) -> str:
        return "timeout" if self._ready else "starting"

    def _check_setup(self, reply: dict[str, Any]) -> None:
        if "error" in reply:
            said = self._last_words()
            self._kill()
            raise RemoteFault(self._tier, reply["error"], f"{reply['text']}{said}")
        self._ready = True

    def _exchange(self, request: dict[str, Any], fd: int | None, until: float) -> tuple[dict[str, Any], int | None]:
        assert self._sock is not None
        self._sock.settimeout(max(until - time.monotonic(), 0.001))
        try:
            send(self._sock, request, fd)
        except OSError as e:
            self._kill()
            raise RemoteFault(self._tier, "client-ended", f"its process takes no request: {e}") from None
        self._asked = self._clock()
        return self._answer(until)

    def _answer(self, until: float) -> tuple[dict[str, Any], int | None]:
        """Of the last question."""
        assert self._sock is not None
        self._sock.settimeout(max(until - time.monotonic(), 0.001))
        try:
            message = receive(self._sock)
        except TimeoutError:
            raise RemoteFault(self._tier, self._waiting, "no answer yet") from None
        except OSError as e:
            self._kill()
            raise RemoteFault(self._tier, "client-ended", str(e)) from None
        if message is None:
            said = self._last_words()
            self._kill()
            raise RemoteFault(self._tier, "client-ended", f"its process ended{said}")
        self._asked = None
        return message  # the caller closes its descriptor

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        with theirs:
            # -P: this file's folder, which holds a mooncake.py, is not looked into. A session of its own: no Ctrl-C of ours.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(self._script), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, "GLOG_minloglevel": "1"},
            )
        self._sock, self._ready, self._asked = ours, False, None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for thing in (self._sock, self._said):
            if thing is not None:
                thing.close()
        self._process = self._sock = self._said = None
        self._asked, self._ready = None, False

    def _last_words(self) -> str:
        """What it wrote last, for people."""
        if self._said is None:
            return ""
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(size - 400, 0))
        text = self._said.read().decode(errors="replace").strip()
        return f" ({text})" if text else ""
