"""One connection of a server: reads frames, answers each request before it reads the next, and hangs up on what is malformed.

What takes long runs in the server's few threads; a client that is slow to send or to read is given up after a bound, and one
that asks more than can be queued is told that the server is busy.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgpack

from kvcomm._version import __version__
from kvcomm.errors import KVCommError
from kvcomm.store.base import Kept
from kvcomm.store.record import PREFIX, Bytes, Record, Unreadable, empty, header_end
from kvcomm.store.slabs import Slot
from kvcomm.wire import protocol as p
from kvcomm.wire.library import ids_of
from kvcomm.wire.peers import Handed

if TYPE_CHECKING:
    from kvcomm.wire.peers import Peer
    from kvcomm.wire.server import Server

__all__ = ["GREETING", "Refused", "Session"]

CHUNK = 1 << 20  # bytes of a body that are read or written at a time
PATIENCE = 30.0  # s for the rest of a frame, and for a client to read
GREETING = 5.0  # s for a client to say hello
LONGEST_WAIT = 60.0  # s for another's text, whatever a client asks for: it is not heard meanwhile
T = TypeVar("T")
log = logging.getLogger(__name__)


class Refused(KVCommError):
    """A request that is understood and not served; the connection goes on."""


@dataclass(frozen=True)
class _Body:
    """A reply with records in its body, unpinned when they are sent."""

    fields: dict[str, Any]
    slots: list[Slot]
    sizes: list[int]  # bytes of each that are sent


class Session:
    """`pid`: of the process at the other end, which shares memory with us (0: it cannot be seen); None where it does not."""

    def __init__(
        self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, pid: int | None, number: int
    ) -> None:
        self._server, self._reader, self._writer, self._pid = server, reader, writer, pid
        self._peer: Peer | None = None  # once it has said hello, if it shares memory
        self._library, self._flights = server.library, server.flights
        self.number, self.tenant = number, ""
        self._replies = 0
        self._handed: tuple[int, ...] = ()  # leases and reservations of the last reply; a next request says that it has arrived

    async def run(self) -> None:
        """Until either side hangs up."""
        try:
            if await asyncio.wait_for(self._greeted(), GREETING):
                while await self._answered():
                    pass
        except p.Malformed as fault:
            self._server.counters.malformed += 1
            await self._last_words("malformed", str(fault))
        except (OSError, asyncio.IncompleteReadError):
            pass  # it has gone, or is too slow
        finally:
            self._flights.leave(self)
            if self._peer is not None:
                self._server.peers.left(self._peer, self.number, Handed(self._replies, self._handed))
            self._writer.close()

    def hang_up(self) -> None:
        """At once."""
        self._writer.close()

    async def _greeted(self) -> bool:
        """Has it said hello, and may it come in?"""
        hello, _ = await self._request(p.MAX_HELLO)
        if not isinstance(hello, p.Hello):
            raise p.Malformed(f"a connection begins with hello, not with {hello.op}")
        reason = None
        if hello.protocol != p.VERSION:
            reason = f"protocol {hello.protocol}; this server speaks {p.VERSION} (kvcomm {__version__})"
        elif self._pid is None and not self._server.knows(hello.tenant, hello.token):
            said = "the token is not that of" if hello.token else "no token came for"
            reason = f"{said} tenant {hello.tenant!r}; say what the server's token file has for it"
        if reason is not None:
            self._server.counters.refused += 1
            log.warning("a client is refused: %s", reason)
            await self._last_words("refused", reason)
            return False
        self.tenant = hello.tenant
        arena = self._library.slabs.arena
        if self._pid is not None:
            self._peer = self._server.peers.connected(self._pid, hello.client, self.number)
            with self._writer.get_extra_info("socket").dup() as own:
                socket.send_fds(own, [p.FD], [arena.fd])
        await self._reply(
            {
                "protocol": p.VERSION,
                "kvcomm": __version__,
                "capacity": arena.capacity,
                "epoch": self._server.epoch,
                "connection": self.number,
            }
        )
        return True

    async def _request(self, most: int = p.MAX_PAYLOAD) -> tuple[p.Request, int]:
        """The next request, and how many bytes of body follow. It may think as long as it likes before it speaks."""
        first = await self._reader.readexactly(1)
        async with asyncio.timeout(PATIENCE):
            prefix = first + await self._reader.readexactly(p.PREFIX.size - 1)
            payload, body = p.lengths(prefix, self._server.most_body if self._pid is None else 0, most)
            request = p.request_of(await self._reader.readexactly(payload))
        if body and not isinstance(request, p.Put):
            raise p.Malformed(f"{request.op} has no body, and came with one of {body} bytes")
        return request, body

    async def _answered(self) -> bool:
        """One request; False where it ended the connection in an orderly way."""
        try:
            request, body = await self._request()
        except asyncio.IncompleteReadError as end:
            if end.partial:
                raise
            return False
        self._handed = ()
        self._server.counters.requests[request.op] += 1
        try:
            reply = await self._served(request, body)
        except (Refused, Unreadable) as refusal:
            self._server.counters.refused += 1
            reply = {"error": "refused", "text": str(refusal)}
        except p.Malformed:
            raise
        except ConnectionError:  # in the middle of a body
            raise
        except Exception as fault:  # a fault of ours costs this request, not the server
            log.exception("a request (%s) failed", request.op)
            self._server.counters.faults += 1
            reply = {"error": "fault", "text": repr(fault)}
        if request.replied:
            await self._reply(reply)
        return True

    async def _served(self, request: p.Request, body: int) -> dict[str, Any] | _Body:
        library = self._library
        match request:
            case p.Find():
                return await self._find(request)
            case p.Get():
                return self._leased({}, await self._maybe_slow(lambda: library.get(self.tenant, request.keys)))
            case p.Has():
                return {"keys": list(library.has(self.tenant, request.keys))}
            case p.Reserve():
                return await self._reserve(request)
            case p.Commit():
                return await self._commit(request)
            case p.Put():
                return await self._put(request, body)
            case p.Release():
                self._release(request)
            case p.Remove():
                if request.damaged:
                    self._server.counters.damaged += len(request.keys)
                forget = library.damaged if request.damaged else library.remove
                return {"removed": await self._maybe_slow(lambda: forget(self.tenant, request.keys))}
            case p.Land():
                self._flights.land(request.flight, self)
            case p.Awaited():
                return {"awaited": self._flights.awaited(request.flight)}
            case p.AddAnchor():
                anchors = self._server.anchors
                return await self._server.run(lambda: anchors.add(self.tenant, request.entry, request.document))
            case p.Anchors():
                return self._server.anchors.since(self.tenant, request.fingerprint, request.version)
            case p.Stats():
                return await self._server.asked()
            case p.List():
                count = min(request.count, p.MAX_LISTED)
                rows = await self._server.run(lambda: library.page(self.tenant, request.after, count))
                return {"segments": rows}
            case _:
                raise p.Malformed(f"{request.op} in the middle of a conversation")
        return {}

    # -- requests ---------------------------------------------------------------------------------------------------------

    async def _find(self, request: p.Find) -> dict[str, Any] | _Body:
        library, ids, loop = self._library, ids_of(request.ids), asyncio.get_running_loop()
        began, waited, flight = loop.time(), None, None
        while True:
            found = library.find_now(self.tenant, request.fingerprint, ids)
            if found is None:
                found = await self._server.run(
                    lambda: library.find(self.tenant, request.fingerprint, ids, request.ms_per_token)
                )
            ahead = self._flights.ahead(self, ids, found.matches, request.fingerprint, self.tenant, flight)
            if flight is None:
                flight = self._flights.take_off(self, ids, found.matches, request.fingerprint, self.tenant)
            left = 0.0
            if ahead is not None:
                price = float("inf") if request.ms_per_token is None else request.ms_per_token * ahead.tokens
                left = began + min(request.wait_ms, price, LONGEST_WAIT * 1e3) / 1e3 - loop.time()
            if ahead is None or left <= 0:
                break
            library.unpin(found.slots)
            await self._flights.wait(ahead, left)
            waited = (loop.time() - began) * 1e3
        if waited is not None:
            self._server.counters.waited += 1
        if self._peer is None and request.kv and request.ms_per_token is not None and request.ms_per_mib is not None:
            found = library.worth_sending(found, request.ms_per_token, request.ms_per_mib)
        fields = {
            "matches": [[m.start, m.end, m.segment.key, m.offset, m.exact] for m in found.matches],
            "declined": found.declined,
            "waited_ms": waited,
            "flight": flight,
        }
        return self._leased(fields, found.slots, kv=request.kv)

    def _leased(self, fields: dict[str, Any], slots: list[Slot], *, kv: bool = True) -> dict[str, Any] | _Body:
        """The reply that hands these out: as places in shared memory, or as bytes, then without `kv` their headers alone."""
        self._server.counters.handed_out += len(slots)
        self._server.counters.handed_out_bytes += sum(slot.nbytes for slot in slots)
        if self._peer is None:
            sizes = [s.nbytes if kv else self._header_of(s) for s in slots]
            objects = [[s.key, size, s.nbytes, 0] for s, size in zip(slots, sizes, strict=True)]
            return _Body({**fields, "objects": objects}, slots, sizes)
        self._handed = tuple(self._server.peers.lease(self._peer, slot) for slot in slots)
        objects = [[s.key, s.offset, s.nbytes, number] for s, number in zip(slots, self._handed, strict=True)]
        return {**fields, "objects": objects}

    async def _reserve(self, request: p.Reserve) -> dict[str, Any]:
        if self._peer is None:
            raise Refused("only a process of this host can write to the server's memory; put the record instead")
        reserved = self._library.reserve(self.tenant, request.key, request.nbytes, request.cost_ms)
        if isinstance(reserved, Kept):
            if reserved:
                await self._maybe_slow(lambda: self._library.settle(request.key))
            return {"stored": reserved.stored, "reason": reserved.reason}
        number = self._server.peers.reserve(self._peer, reserved)
        self._handed = (number,)
        return {"offset": reserved.offset, "number": number}

    async def _commit(self, request: p.Commit) -> dict[str, Any]:
        slot = None if self._peer is None else self._peer.reserved.pop(request.number, None)
        if self._peer is None or slot is None:
            raise Refused(f"{request.number} was not reserved by this process")
        try:
            kept = await self._maybe_slow(lambda: self._library.commit(self.tenant, slot.key, slot.generation))
        except Refused:  # it was not begun: the memory is the client's still, to commit again or to release
            self._peer.reserved[request.number] = slot
            raise
        return {"stored": kept.stored, "reason": kept.reason}

    async def _put(self, request: p.Put, body: int) -> dict[str, Any]:
        with self._server.room_for(body) as room:
            data = await self._body(body, keep=room)
            if data is None:
                raise Refused(f"busy: there is no room for {body} bytes, as other records are being received")
            kept = await self._server.run(lambda: self._kept(request.key, Record(data)))
        return {"stored": kept.stored, "reason": kept.reason}

    def _kept(self, key: str, record: Record) -> Kept:
        """In one of the server's threads, as a header may be as long as a prompt."""
        if record.key != key:
            raise Refused(f"a record of {record.key} in place of {key}")
        return self._library.put(self.tenant, record)

    async def _body(self, nbytes: int, *, keep: bool) -> Bytes | None:
        """Of a client that sends at least 1 MB/s at every moment, as what it announces has its room from the first one. None
        where there is none: it is read all the same, as clients hear no reply while they send. Who answers before, or hangs up,
        breaks their connection, and they take the server for gone. Raises ConnectionError.
        """
        data, clock = None, asyncio.get_running_loop().time
        if keep:
            with suppress(MemoryError):
                data = empty(nbytes)
        began = clock()
        try:
            for start in range(0, nbytes, CHUNK):
                end = min(start + CHUNK, nbytes)
                async with asyncio.timeout_at(began + PATIENCE + end / 1e6):
                    piece = await self._reader.readexactly(end - start)
                if data is not None:
                    data[start:end] = memoryview(piece)
        except (OSError, EOFError) as fault:  # what follows is no frame
            raise ConnectionError("a body that cannot be read") from fault
        return data

    def _release(self, request: p.Release) -> None:
        if self._peer is not None:
            self._server.peers.release(self._peer, request.numbers)
            for connection, arrived in zip(request.lost[::2], request.lost[1::2], strict=True):
                self._server.peers.lose(self._peer, connection, arrived)

    # -- the connection ---------------------------------------------------------------------------------------------------

    async def _maybe_slow(self, work: Callable[[], T]) -> T:
        """In one of the server's threads where it may reach below the memory."""
        return await self._server.run(work) if self._library.slow else work()

    async def _reply(self, reply: dict[str, Any] | _Body) -> None:
        self._replies += 1
        fields, slots, sizes = (reply.fields, reply.slots, reply.sizes) if isinstance(reply, _Body) else (reply, [], [])
        try:
            self._writer.write(p.frame(msgpack.packb(fields), sum(sizes)))
            async with asyncio.timeout(PATIENCE):
                await self._writer.drain()
            for slot, size in zip(slots, sizes, strict=True):
                view = self._library.slabs.arena.view(slot.offset, size)
                for start in range(0, size, CHUNK):
                    self._writer.write(view[start : start + CHUNK].data)
                    async with asyncio.timeout(PATIENCE):
                        await self._writer.drain()
        finally:
            self._library.unpin(slots)

    def _header_of(self, slot: Slot) -> int:
        """Bytes of its record in front of the tensors."""
        return min(slot.nbytes, header_end(self._library.slabs.arena.view(slot.offset, PREFIX).tobytes()))

    async def _last_words(self, error: str, text: str) -> None:
        with suppress(TimeoutError, ConnectionError):
            await self._reply({"error": error, "text": text})
