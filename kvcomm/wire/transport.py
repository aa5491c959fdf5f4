"""One connection to a server, from a client's side: blocking calls with a deadline each, and the server's memory mapped.

Whatever goes wrong ends the connection and is raised as `Unreachable`; the next call makes a new one. Knows requests, not what
they are for.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque
from threading import Lock
from time import monotonic
from typing import Any

from kvcomm._version import __version__
from kvcomm.errors import CacheFault, InputError
from kvcomm.store.arena import Window
from kvcomm.store.record import Bytes, empty
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address

__all__ = ["Connection", "Unreachable", "Windows"]

FD = b"F"
CHUNK = 1 << 20
RELEASED = 1 << 12  # leases that one frame gives back


class Unreachable(CacheFault):
    """The server cannot be asked now; `reason` is a word for a report."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason = reason


class Windows:
    """The memory of the server that was last seen, mapped once for all connections to it."""

    def __init__(self) -> None:
        self._epoch = ""
        self._window: Window | None = None
        self._lock = Lock()

    def of(self, epoch: str, fd: int, capacity: int) -> Window:
        """Of the server of this epoch. Raises CacheFault where the descriptor cannot be mapped."""
        with self._lock:
            if self._window is None or self._epoch != epoch:
                self.close()
                self._epoch, self._window = epoch, Window(fd, capacity)
            return self._window

    def close(self) -> None:
        """What was read stays readable."""
        if self._window is not None:
            self._window.close()
            self._window = None


class Connection:
    """To one server, for one tenant. Calls from several threads take turns."""

    def __init__(
        self,
        address: Address,
        tenant: str,
        *,
        token: str = "",
        tls: ssl.SSLContext | None = None,
        deadline_s: float = 1.0,
        most_body: int = 1 << 34,
        windows: Windows | None = None,
    ) -> None:
        """Connects with the first call. `deadline_s`: for connecting, and for a call that does not say otherwise."""
        self.address, self.tenant, self.deadline_s = address, tenant, deadline_s
        self._token, self._tls, self._most_body, self._windows = token, tls, most_body, windows or Windows()
        self._socket: socket.socket | None = None
        self.window: Window | None = None  # the server's memory; None over TCP
        self.epoch = ""  # of the server that the connection is to
        self._pid = os.getpid()
        self._released: deque[tuple[str, int]] = deque()  # epoch, generation: may grow in any thread, at any moment
        self._lock = Lock()

    @property
    def shares_memory(self) -> bool:
        return self.address.path is not None

    def call(
        self, request: p.Request, body: Bytes | None = None, *, deadline_s: float | None = None
    ) -> tuple[dict[str, Any], Bytes | None]:
        """The reply, and its body where it has one. Raises Unreachable, and InputError where the server refuses this client for
        good: another protocol, a wrong token.
        """
        deadline = monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        if not self._lock.acquire(timeout=max(0.0, deadline - monotonic())):
            raise Unreachable("busy", f"other calls to {self.address} took the whole deadline")
        try:
            connection = self._connected(deadline)
            self._send(connection, p.pack_request(request), body, deadline)
            if not request.replied:
                return {}, None
            reply, data = self._receive(connection, deadline)
        except (OSError, p.Malformed, EOFError) as fault:
            self._drop()
            kind = "deadline" if isinstance(fault, TimeoutError) else "unreachable"
            raise Unreachable(kind, f"{request.op} at {self.address}: {fault or type(fault).__name__}") from fault
        finally:
            self._lock.release()
        if "error" in reply:
            if reply["error"] == "malformed":
                self.close()
            raise Unreachable(str(reply["error"]), f"{request.op} at {self.address}: {reply.get('text')}")
        return reply, data

    def let_go(self, epoch: str, generation: int) -> None:
        """A lease is not needed any more; the server hears of it with the next call. Takes no lock: a finalizer calls it."""
        self._released.append((epoch, generation))

    def close(self) -> None:
        with self._lock:
            self._drop()

    # -- with the lock ----------------------------------------------------------------------------------------------------

    def _connected(self, deadline: float) -> socket.socket:
        if self._pid != os.getpid():  # a fork: the parent's connection and leases are not ours
            self._socket, self._pid = None, os.getpid()
            self._released.clear()
        if self._socket is None:
            self._socket = self._connect(deadline)
        return self._socket

    def _connect(self, deadline: float) -> socket.socket:
        if self.address.path is not None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(_left(deadline))
                made.connect(str(self.address.path))
            except BaseException:
                made.close()
                raise
        else:
            made = socket.create_connection((self.address.host, self.address.port), _left(deadline))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.address.tls:
                context = self._tls or ssl.create_default_context()
                made = context.wrap_socket(made, server_hostname=self.address.host)
        try:
            return self._greet(made, deadline)
        except BaseException:
            made.close()
            raise

    def _greet(self, made: socket.socket, deadline: float) -> socket.socket:
        hello = p.Hello(p.VERSION, __version__, self.tenant, self._token)
        made.settimeout(_left(deadline))
        made.sendall(p.frame(p.pack_request(hello)))
        fds: list[int] = []
        first = b""
        if self.shares_memory:
            first, fds, _, _ = socket.recv_fds(made, 1, 1)
            if first == FD:
                first = b""
        try:
            reply, _ = self._receive(made, deadline, first)
            if "error" in reply:
                raise InputError(f"{self.address} refuses this client: {reply.get('text')}")
            self.epoch = str(reply["epoch"])
            if self.shares_memory:
                if not fds:
                    raise p.Malformed("no memory came with the greeting")
                self.window = self._windows.of(self.epoch, fds[0], int(reply["capacity"]))
        finally:
            for fd in fds:
                os.close(fd)
        return made

    def _send(self, connection: socket.socket, payload: bytes, body: Bytes | None, deadline: float) -> None:
        released: list[int] = []
        while self._released and len(released) < RELEASED:
            epoch, generation = self._released.popleft()
            if epoch == self.epoch:
                released.append(generation)
        front = p.frame(p.pack_request(p.Release(released))) if released else b""
        connection.settimeout(_left(deadline))
        connection.sendall(front + p.frame(payload, 0 if body is None else body.nbytes))
        if body is not None:
            for start in range(0, body.nbytes, CHUNK):
                connection.settimeout(_left(deadline))
                connection.sendall(body[start : start + CHUNK].data)

    def _receive(self, connection: socket.socket, deadline: float, first: bytes = b"") -> tuple[dict[str, Any], Bytes | None]:
        prefix = first + _exactly(connection, p.PREFIX.size - len(first), deadline).tobytes()
        payload, body = p.lengths(prefix, self._most_body)
        reply = p.reply_of(_exactly(connection, payload, deadline).tobytes())
        return reply, _exactly(connection, body, deadline) if body else None

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = self.window = None


def _exactly(connection: socket.socket, count: int, deadline: float) -> Bytes:
    data = empty(count)
    view, read = data.data, 0
    while read < count:
        connection.settimeout(_left(deadline))
        got = connection.recv_into(view[read:])
        if not got:
            raise EOFError("the server hung up")
        read += got
    return data


def _left(deadline: float) -> float:
    """Seconds; raises TimeoutError where there are none."""
    left = deadline - monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left
