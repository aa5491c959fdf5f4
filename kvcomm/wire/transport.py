"""One connection to a server, from a client's side: blocking calls with a deadline each, and the server's memory mapped.

Whatever goes wrong ends the connection and is raised as `Unreachable`; the next call makes a new one. Knows requests, not what
they are for.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from threading import Lock
from time import monotonic
from typing import Any
from uuid import uuid4

from kvcomm._version import __version__
from kvcomm.errors import CacheFault, InputError
from kvcomm.store.arena import Window
from kvcomm.store.deadline import SLOWEST
from kvcomm.store.record import Bytes, empty
from kvcomm.store.speed import Speed
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address, is_trusted, other_end

__all__ = ["Answer", "Connection", "Holdings", "Unreachable"]

CHUNK = 1 << 20
LAST_WORDS = 0.1  # s
RELEASED = 1 << 12  # leases that one frame gives back
MADE_ANEW = "made-anew"  # the server that a request is meant for is not there any more


class Unreachable(CacheFault):
    """The server cannot be asked now; `reason` is a word for a report."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason = reason


_News = tuple[str, tuple[int, ...]]  # for the server of this epoch


class Holdings:
    """What all connections of a client have of the server that was last seen: its memory, mapped once; and what they have to
    tell it, over whichever of them is used next.
    """

    def __init__(self) -> None:
        self.released: deque[_News] = deque()  # a number: may grow in any thread, at any moment
        self.lost: deque[_News] = deque()  # a connection that failed, and how many replies have arrived on it
        self.network = Speed()  # of what comes over TCP, once it has begun to
        self._clients: dict[int, str] = {}  # by process: those that it was forked from among them
        self._epoch = ""
        self._window: Window | None = None
        self._lock = Lock()

    @property
    def client(self) -> str:
        """Whom the server knows all of this as. A fork is somebody else: what its parent has leased is not its to release."""
        return self._clients.setdefault(os.getpid(), uuid4().hex)

    def of(self, epoch: str, fd: int, capacity: int) -> Window:
        """Of the server of this epoch. Raises CacheFault where the descriptor cannot be mapped."""
        with self._lock:
            if self._window is None or self._epoch != epoch:
                self.close()
                self._epoch, self._window = epoch, Window(fd, capacity)
            return self._window

    def forget(self) -> None:
        """Nobody answers where that server was: its memory goes with the last connection and the last array that look at it."""
        with self._lock:
            self._window = None

    def close(self) -> None:
        """What was read stays readable."""
        if self._window is not None:
            self._window.close()
            self._window = None


@dataclass(frozen=True)
class Answer:
    """A reply, and of which server: offsets and numbers in it mean something there alone."""

    fields: dict[str, Any]
    body: Bytes | None
    window: Window | None  # the server's memory; None over TCP
    epoch: str


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
        holdings: Holdings | None = None,
    ) -> None:
        """Connects with the first call. `deadline_s`: for connecting, and for a call that does not say otherwise."""
        self.address, self.tenant, self.deadline_s = address, tenant, deadline_s
        self._token, self._tls, self._most_body = token, tls, most_body
        self._holdings, self._alone = holdings or Holdings(), holdings is None
        self._socket: socket.socket | None = None
        self._window: Window | None = None
        self._epoch = ""  # of the server that the connection is to
        self._number = 0  # that the server has given the connection
        self._replies = 0  # that have arrived on it
        self._told: list[tuple[deque[_News], _News]] = []  # since the last reply; perhaps not heard
        self._pid = os.getpid()
        self._lock = Lock()

    @property
    def shares_memory(self) -> bool:
        return self.address.path is not None

    def call(
        self, request: p.Request, body: Bytes | None = None, *, deadline_s: float | None = None
    ) -> tuple[dict[str, Any], Bytes | None]:
        """The fields and the body of what `ask` returns."""
        answer = self.ask(request, body, deadline_s=deadline_s)
        return answer.fields, answer.body

    def ask(
        self, request: p.Request, body: Bytes | None = None, *, deadline_s: float | None = None, epoch: str | None = None
    ) -> Answer:
        """The reply, and its body where it has one. `epoch`: of the server that alone is to be asked. Raises Unreachable, and
        InputError where the server refuses this client for good: another protocol, a wrong token.
        """
        deadline = monotonic() + (self.deadline_s if deadline_s is None else deadline_s)
        if not self._lock.acquire(timeout=max(0.0, deadline - monotonic())):
            raise Unreachable("busy", f"other calls to {self.address} took the whole deadline")
        try:
            made_before = self._socket is not None
            try:
                answer = self._exchange(request, body, deadline, epoch)
            except (ConnectionError, EOFError):  # the server may have been made anew since the last call
                if not made_before:
                    raise
                self._lose()
                answer = self._exchange(request, body, deadline, epoch)
        except (OSError, p.Malformed, EOFError, MemoryError) as fault:
            self._lose()
            kind = "deadline" if isinstance(fault, TimeoutError) else "unreachable"
            raise Unreachable(kind, f"{request.op} at {self.address}: {fault or type(fault).__name__}") from fault
        except Unreachable:
            raise
        except BaseException:  # interrupted: what comes next on this connection answers this request, whatever is asked then
            self._lose()
            raise
        finally:
            self._lock.release()
        if "error" in answer.fields:
            raise Unreachable(str(answer.fields["error"]), f"{request.op} at {self.address}: {answer.fields.get('text')}")
        return answer

    def let_go(self, epoch: str, number: int) -> None:
        """A lease or a reservation is not needed any more; the server hears of it with the next call. Takes no lock, as a
        finalizer calls it.
        """
        self._holdings.released.append((epoch, (number,)))

    def close(self) -> None:
        with self._lock:
            if self._socket is not None and self._pid == os.getpid():
                with suppress(OSError):
                    self._socket.settimeout(LAST_WORDS)
                    self._socket.sendall(self._news())
            self._drop()
            if self._alone:
                self._holdings.close()

    # -- with the lock ----------------------------------------------------------------------------------------------------

    def _exchange(self, request: p.Request, body: Bytes | None, deadline: float, epoch: str | None) -> Answer:
        connection = self._connected(deadline)
        if epoch not in (None, self._epoch):
            raise Unreachable(MADE_ANEW, f"{request.op} is meant for a server that was at {self.address} before")
        self._send(connection, p.pack_request(request), body, deadline)
        reply, data = self._receive(connection, deadline) if request.replied else ({}, None)
        if reply.get("error") == "malformed":
            raise p.Malformed(f"it is called malformed: {reply.get('text')}")
        if request.replied:
            self._replies += 1
            self._told.clear()
        return Answer(reply, data, self._window, self._epoch)

    def _connected(self, deadline: float) -> socket.socket:
        if self._pid != os.getpid():  # a fork: the parent's connection and leases are not ours
            self._told.clear()
            self._drop()
            self._pid = os.getpid()
        if self._socket is None:
            self._socket = self._connect(deadline)
        return self._socket

    def _connect(self, deadline: float) -> socket.socket:
        if self.address.path is not None:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                made.settimeout(_left(deadline))
                made.connect(str(self.address.path))
                _check_owner(made, self.address)
            except BaseException as fault:
                made.close()
                if isinstance(fault, ConnectionRefusedError | FileNotFoundError):
                    self._holdings.forget()
                raise
        else:
            made = socket.create_connection((self.address.host, self.address.port), _left(deadline))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.address.tls:
                context = self._tls or ssl.create_default_context()
                made.settimeout(_left(deadline))
                made = context.wrap_socket(made, server_hostname=self.address.host)
        try:
            return self._greet(made, deadline)
        except BaseException:
            made.close()
            raise

    def _greet(self, made: socket.socket, deadline: float) -> socket.socket:
        hello = p.Hello(p.VERSION, __version__, self.tenant, self._token, self._holdings.client)
        made.settimeout(_left(deadline))
        made.sendall(p.frame(p.pack_request(hello)))
        fds: list[int] = []
        first = b""
        if self.shares_memory:
            first, fds, _, _ = socket.recv_fds(made, 1, 1)
            if first == p.FD:
                first = b""
        try:
            reply, _ = self._receive(made, deadline, first)
            if "error" in reply:
                raise InputError(f"{self.address} refuses this client: {reply.get('text')}")
            epoch, number, capacity = (reply.get(name) for name in ("epoch", "connection", "capacity"))
            if not isinstance(epoch, str) or not isinstance(number, int) or not isinstance(capacity, int):
                raise p.Malformed("no greeting of a server")
            if self.shares_memory:
                if not fds:
                    raise p.Malformed("no memory came with the greeting")
                self._window = self._holdings.of(epoch, fds[0], capacity)
            self._epoch, self._number, self._replies = epoch, number, 1
        finally:
            for fd in fds:
                os.close(fd)
        return made

    def _send(self, connection: socket.socket, payload: bytes, body: Bytes | None, deadline: float) -> None:
        front = self._news()
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
        if not body:
            return reply, None
        began = monotonic()
        data = _exactly(connection, body, deadline + body / SLOWEST, self.deadline_s)
        self._holdings.network.observe(body, (monotonic() - began) * 1e3)
        return reply, data

    def _news(self) -> bytes:
        """A frame, where the server is to be told something."""
        released, lost = self._to_tell(self._holdings.released), self._to_tell(self._holdings.lost)
        return p.frame(p.pack_request(p.Release(released, lost))) if released or lost else b""

    def _to_tell(self, queue: deque[_News]) -> list[int]:
        """The next of what the server is to be told; what another one was to be told is forgotten."""
        numbers: list[int] = []
        while len(numbers) < RELEASED:
            try:
                item = queue.popleft()
            except IndexError:
                break
            if item[0] == self._epoch:
                numbers += item[1]
                self._told.append((queue, item))
        return numbers

    def _lose(self) -> None:
        """The connection failed in the middle of a call: whatever it was told or has replied is to be said again."""
        if self._socket is not None:
            self._holdings.lost.append((self._epoch, (self._number, self._replies)))
        self._drop()

    def _drop(self) -> None:
        for queue, item in self._told:
            queue.append(item)
        self._told.clear()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._window = None


def _check_owner(connection: socket.socket, address: Address) -> None:
    """Raises InputError where another user serves at a socket: who can put a socket there could hand out any KV."""
    _, uid = other_end(connection)
    if not is_trusted(uid):
        raise InputError(f"{address} is served by user {uid}; only this user's own server, or root's, is trusted")


def _exactly(connection: socket.socket, count: int, deadline: float, patience: float = inf) -> Bytes:
    """`patience`: seconds for each piece."""
    data = empty(count)
    view, read = data.data, 0
    while read < count:
        connection.settimeout(min(_left(deadline), patience))
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
