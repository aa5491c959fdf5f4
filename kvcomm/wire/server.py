"""The server of a host: listens, keeps the processes that are connected apart, and ends in good order.

One loop in one thread; a few threads beside it for what waits on disks and networks. The socket is private to the user, and is
made again where somebody removes it; TCP wants a token for every tenant, and TLS but for the loopback.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar
from uuid import uuid4

from kvcomm._version import __version__
from kvcomm.errors import InputError
from kvcomm.store.base import StoreStats
from kvcomm.wire.address import Address, is_trusted, other_end
from kvcomm.wire.anchor_log import AnchorLog
from kvcomm.wire.flights import Flights
from kvcomm.wire.library import Library
from kvcomm.wire.peers import Peers
from kvcomm.wire.session import GREETING, Refused, Session
from kvcomm.wire.tokens import token_of

__all__ = ["Server", "ServerCounters", "check_place"]

THREADS = 4
WAITING = 256  # calls that may wait for a thread; more are refused
CONNECTIONS = 1024
BY_TCP = 256  # of these, for who is not on this host: strangers, until they have said hello
LIMIT = 1 << 18  # bytes that are read ahead of a session
LOOK = 0.5  # s between two looks at the socket's path
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class ServerCounters:
    """What happened since the server started; only grows."""

    connections: int = 0
    requests: Counter[str] = field(default_factory=Counter)  # by kind
    malformed: int = 0
    refused: int = 0
    faults: int = 0
    damaged: int = 0  # records that a client found altered
    waited: int = 0  # requests that waited for another one's text
    handed_out: int = 0  # records
    handed_out_bytes: int = 0


class Server:
    """Serves one `Library` at any number of addresses. `tokens`: what a client must say over TCP, by tenant ("*": any)."""

    def __init__(self, library: Library, tokens: Mapping[str, str] | None = None, anchors: AnchorLog | None = None) -> None:
        """`anchors`: None keeps them as long as the server runs. Both belong to the server, which closes them."""
        self.library, self._tokens = library, dict(tokens or {})
        self.anchors = AnchorLog() if anchors is None else anchors
        self.flights, self.peers = Flights(), Peers(library.slabs, log.info)
        self.counters = ServerCounters()
        self.epoch = uuid4().hex  # leases and flights of another epoch mean nothing here
        self.started = monotonic()
        self._threads = ThreadPoolExecutor(THREADS, "kvcomm-server")
        self._waiting = 0
        self._bodies = 0  # bytes
        self._sessions: set[asyncio.Task[None]] = set()
        self._by_tcp = 0  # of these
        self._listeners: dict[str, asyncio.Server] = {}  # by address
        self._watchers: list[asyncio.Task[None]] = []

    @contextmanager
    def room_for(self, nbytes: int) -> Iterator[bool]:
        """Inside, a body of so many bytes may be in memory; False where all of them would exceed the store."""
        room = nbytes if self._bodies + nbytes <= self.most_body else 0
        self._bodies += room
        try:
            yield room == nbytes
        finally:
            self._bodies -= room

    @property
    def most_body(self) -> int:
        """Bytes of the largest record that can come in a frame."""
        return int(self.library.slabs.arena.capacity)

    def knows(self, tenant: str, token: str) -> bool:
        """Is it the token of this tenant?"""
        wanted = token_of(self._tokens, tenant)
        return bool(wanted) and hmac.compare_digest(wanted.encode(), token.encode())

    async def listen(self, address: Address, tls: ssl.SSLContext | None = None) -> None:
        """Raises InputError where that cannot be."""
        if address.path is not None:
            await self._listen_at(address.path)
            self._watchers.append(asyncio.create_task(self._keep_at(address.path)))
            return
        if not self._tokens:
            raise InputError(f"{address} needs a token; give --token-file, so that not everybody can read what is kept")
        if tls is None and address.tls:
            raise InputError(f"{address} needs a certificate; give --tls-cert and --tls-key")
        try:
            self._listeners[str(address)] = await asyncio.start_server(
                self._connected_by_tcp,
                address.host,
                address.port,
                ssl=tls,
                ssl_handshake_timeout=None if tls is None else GREETING,
                limit=LIMIT,
            )
        except OSError as fault:
            raise InputError(f"cannot listen at {address}: {fault.strerror}; choose another host or port") from fault

    async def run(self, work: Callable[[], T]) -> T:
        """In a thread. Raises Refused where too many wait for one."""
        if self._waiting >= WAITING:
            raise Refused(f"busy: {self._waiting} calls wait already")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1

    async def asked(self) -> dict[str, Any]:
        """`status`, without waiting in the loop for tiers that are elsewhere."""
        return self.status(await self.run(self.library.stats))

    def status(self, tiers: Mapping[str, StoreStats] | None = None) -> dict[str, Any]:
        """For `kvcomm server status` and the metrics; `tiers`: where they have been asked already."""
        c, tiers = self.counters, self.library.stats() if tiers is None else tiers
        return {
            "kvcomm": __version__,
            "pid": os.getpid(),
            "epoch": self.epoch,
            "uptime_s": monotonic() - self.started,
            "connections": len(self._sessions),
            "processes": len(self.peers),
            "leases": self.peers.leases,
            "reservations": self.peers.reservations,
            "flights": len(self.flights),
            "waiting_calls": self._waiting,
            "counters": {**vars(c), "requests": dict(c.requests)},
            "tiers": {
                name: {**vars(stats), "refused": dict(stats.refused), "faults": dict(stats.faults)}
                for name, stats in tiers.items()
            },
            "anchors": vars(self.anchors.stats()),
        }

    async def close(self) -> None:
        """Hangs up on everybody, lets what is being written be written, and gives back what the system lent."""
        for task in self._watchers:
            task.cancel()
        for address, listener in self._listeners.items():
            listener.close()
            if address.startswith("/"):
                Path(address).unlink(missing_ok=True)
        for session in self._sessions:
            session.cancel()
        await asyncio.gather(*self._watchers, *self._sessions, return_exceptions=True)
        self.peers.close()
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        self.library.close()
        self.anchors.close()

    # -- listening --------------------------------------------------------------------------------------------------------

    async def _listen_at(self, path: Path) -> None:
        check_place(path)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_trusted(path.parent.stat().st_uid):
            raise InputError(f"{path.parent} is another user's, who could serve in our place; choose another with --socket")
        if path.exists():
            with socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1.0)
                try:
                    probe.connect(str(path))
                except (ConnectionRefusedError, FileNotFoundError):
                    path.unlink(missing_ok=True)  # its server was killed
                except OSError as fault:
                    raise InputError(f"{path} is there and cannot be used: {fault.strerror}; choose another path") from fault
                else:
                    raise InputError(f"a server answers at {path} already; stop it, or choose another path with --socket")
        before = os.umask(0o177)  # private to the user from its first moment
        try:
            self._listeners[str(path)] = await asyncio.start_unix_server(self._connected, path, limit=LIMIT)
        except OSError as fault:
            raise InputError(f"cannot listen at {path}: {fault.strerror}; choose another path with --socket") from fault
        finally:
            os.umask(before)

    async def _keep_at(self, path: Path) -> None:
        """Makes the socket again where somebody removes it."""
        while True:
            await asyncio.sleep(LOOK)
            if not path.exists():
                log.warning("%s was removed; it is made again", path)
                self._listeners[str(path)].close()  # nobody can reach it any more; who is connected stays so
                with suppress(InputError):
                    await self._listen_at(path)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = other_end(writer.get_extra_info("socket"))
        if not is_trusted(uid):
            writer.close()
            return
        await self._serve(Session(self, reader, writer, pid, self.counters.connections))

    async def _connected_by_tcp(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(self, reader, writer, None, self.counters.connections)
        if self._by_tcp >= BY_TCP:
            session.hang_up()
            return
        self._by_tcp += 1
        try:
            await self._serve(session)
        finally:
            self._by_tcp -= 1

    async def _serve(self, session: Session) -> None:
        self.counters.connections += 1
        task = asyncio.current_task()
        assert task is not None
        if len(self._sessions) >= CONNECTIONS:
            session.hang_up()
            return
        self._sessions.add(task)
        try:
            with suppress(asyncio.CancelledError):  # the server closes
                await session.run()
        finally:
            self._sessions.discard(task)


def check_place(path: Path) -> None:
    """Raises InputError where something lies at a socket's path that is none, and is not ours to remove."""
    if path.exists() and not path.is_socket():
        raise InputError(f"{path} is there and is no socket; choose another path with --socket")
