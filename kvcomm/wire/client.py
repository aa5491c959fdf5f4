"""An engine's store, and its index of known text, that are a server's: what one process computed, all of them find.

    store = ServerStore("unix:/run/user/1000/kvcomm.sock")
    comm = KVComm.from_pretrained(model, store=store)

One prompt costs one round trip: `index.look` finds the known text and leases its KV on the way. On the server's host KV is read
and written in shared memory; elsewhere it travels. All that is read is verified here. What goes wrong is raised as CacheFault,
which an engine turns into a dense answer; after failures in a row the server is left alone for a while.
"""

from __future__ import annotations

import ssl
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from time import monotonic
from typing import Any, ClassVar

import numpy as np

from kvcomm.errors import InputError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.base import Kept, StoreStats, check_kv
from kvcomm.store.breaker import ENOUGH, Breaker, Open
from kvcomm.store.deadline import SLOWEST
from kvcomm.store.priced import RETRY
from kvcomm.store.record import Bytes, Draft, Record, empty
from kvcomm.store.records import Counts, Listed, RecordStore
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address, address_of
from kvcomm.wire.index import ServerIndex
from kvcomm.wire.tokens import token_of
from kvcomm.wire.transport import Answer, Connection, Holdings, Unreachable

__all__ = ["ServerStore"]

HELD = 256  # prompts whose finds are held; of more, those found first are let go
PUTS = 4.0  # deadlines that a put is waited for, besides the time that its bytes take: the server has tiers that are far
CONNECTIONS = 64  # tenants with a connection of their own; the one not used for longest is closed


class ServerStore(RecordStore):
    """A `Store` that a server keeps, and `index`, which knows the text of all that it keeps. Safe to call from several threads.

    `tenant`: the only one that may use it; None: any, with a connection each. `deadline_s` bounds every call; only a prompt
    that waits for another one's text (`wait_ms`) takes longer, by so much.
    """

    name: ClassVar[str] = "server"

    def __init__(
        self,
        address: str | Address | None = None,
        *,
        tenant: str | None = None,
        token: str | Mapping[str, str] = "",
        tls: ssl.SSLContext | None = None,
        deadline_s: float = 1.0,
        wait_ms: float = 1000.0,
        reads_kv: bool = True,
    ) -> None:
        """`address`: None is that of KVCOMM_SERVER, else the user's own place. `token`: for TCP; of each tenant its own where
        it is a mapping ("*": any other). `reads_kv`: False for who finds text and leaves its KV to others, so that headers
        alone are verified. Raises InputError for an address that is none; connects with the first call.
        """
        if not deadline_s > 0 or not wait_ms >= 0:
            raise InputError(f"deadline_s is {deadline_s} and wait_ms {wait_ms}; they must be above 0, and at least 0")
        self.address = address if isinstance(address, Address) else address_of(address)
        self.tenant, self.wait_ms, self.reads_kv = tenant, wait_ms, reads_kv
        self._holdings = Holdings()
        self._tokens: Mapping[str, str] = {"*": token} if isinstance(token, str) else token
        self._options: Mapping[str, Any] = {"tls": tls, "deadline_s": deadline_s, "holdings": self._holdings}
        self._connections: OrderedDict[str, Connection] = OrderedDict()  # by tenant
        self._held: OrderedDict[int, dict[str, Record]] = OrderedDict()  # by flight: what was found for a prompt
        self._tenants: OrderedDict[str, str] = OrderedDict()  # key -> tenant, of what was found or put lately
        self._counts = Counts()
        self._breaker = Breaker(monotonic, lost_s=ENOUGH * deadline_s, first_s=0.1, longest_s=5.0)
        self._finds = 0
        self._closed = False
        self._lock = Lock()
        self.index = ServerIndex(self)

    # -- the contract of stores -------------------------------------------------------------------------------------------

    def put(self, segment: Segment, kv: SegmentKV) -> Kept:
        """Written straight to the server's memory where it is on this host. Raises CacheFault where it cannot be."""
        check_kv(segment, kv)
        return self._put(Draft(segment, kv))

    def put_record(self, record: Record) -> Kept:
        return self._put(record)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        asked = list(dict.fromkeys(keys))
        found = self._held_of(asked) if self.reads_kv else {}  # else headers alone may be held
        for tenant, wanted in self._by_tenant(key for key in asked if key not in found).items():
            connection = self._connection(tenant)
            with self._guarded():
                answer = connection.ask(p.Get(wanted))
            found |= self._received(connection, answer, whole=True)
        self._counts.looked_up(len(found), len(asked))
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        asked = set(keys)
        found = set(self._held_of(asked))
        for tenant, wanted in self._by_tenant(asked - found).items():
            reply, _ = self.call(tenant, p.Has(wanted))
            with self.understood():
                found |= asked.intersection(reply["keys"])
        return found

    def remove(self, key: str) -> bool:
        self.let_go(key)
        return bool(self.call(self._tenant_of(key), p.Remove([key], damaged=False))[0]["removed"])

    def segments(self) -> list[Segment]:
        """Of this store's tenant. Reads all of their KV."""
        keys = [row.key for row in self.listed(self.tenant or "")]
        parts = (keys[a : a + 16] for a in range(0, len(keys), 16))
        return [record.segment for part in parts for record in self.get_records(part).values()]

    def listed(self, tenant: str) -> Iterator[Listed]:
        """What is kept of a tenant's, in the order of keys: each once, whatever others use, put or evict meanwhile."""
        after = ""
        while True:
            reply, _ = self.call(tenant, p.List(after, p.MAX_LISTED))
            with self.understood():
                page = [Listed(*row) for row in reply["segments"]]
            if not page:
                return
            yield from page
            after = page[-1].key

    def stats(self) -> StoreStats:
        """Hits and misses are this client's; objects and bytes the server's, of all its clients."""
        memory = self.call(self.tenant or "", p.Stats())[0]["tiers"]["memory"]
        return self._counts.stats(memory["objects"], memory["nbytes"], memory["limit_bytes"])

    def check_integrity(self) -> None:
        with self._lock:
            for held in self._held.values():
                for key, record in held.items():
                    record.verify(key)

    def close(self) -> None:
        """Nothing is asked any more: every later call raises CacheFault. What was read stays readable."""
        with self._lock:
            self._closed = True
            self._held.clear()
            for connection in self._connections.values():
                connection.close()
            self._connections.clear()
            self._holdings.close()

    # -- for the index and the pool of anchors ----------------------------------------------------------------------------

    def call(self, tenant: str, request: p.Request, deadline_s: float | None = None) -> tuple[dict[str, Any], Bytes | None]:
        """One request on behalf of a tenant. Raises CacheFault where the server does not answer it."""
        connection = self._connection(tenant)
        with self._guarded():
            return connection.call(request, deadline_s=deadline_s)

    def find(self, tenant: str, request: p.Find) -> tuple[dict[str, Any], dict[str, Record]]:
        """The reply and the records that came with it: verified, and held for `get_many` until the flight's `drop`. Where KV is
        not read, their headers alone are, and may be all that came.
        """
        connection = self._connection(tenant)
        with self._guarded():
            answer = connection.ask(request, deadline_s=connection.deadline_s + request.wait_ms / 1e3)
        found, reply = self._received(connection, answer, whole=self.reads_kv), answer.fields
        with self._lock, self.understood():
            self._held[reply["flight"]] = dict(found)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return reply, found

    def ms_per_mib(self) -> float | None:
        """What receiving takes, where it comes over a network, for the server to judge whether it is worth it. One time in 20
        None: the network may have become fast.
        """
        self._finds += 1
        return None if self._finds % RETRY == 0 else self._holdings.network.predicted_ms(1 << 20)

    def drop(self, flight: int) -> None:
        """What was found for this prompt is not needed any more."""
        with self._lock:
            self._held.pop(flight, None)

    def let_go(self, key: str) -> None:
        """This record is not needed any more, whatever it was found for."""
        with self._lock:
            for held in self._held.values():
                held.pop(key, None)

    def belong(self, keys: Iterable[str], tenant: str) -> None:
        """Whose these are, for `get` and `get_many`, which are not told: of what this store found or put it knows."""
        with self._lock:
            self._remember(keys, tenant)

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Around what reads a reply: one that is not what was asked for is a fault of the server."""
        try:
            yield
        except (LookupError, TypeError, ValueError, MemoryError) as fault:
            self._counts.fault("malformed")
            raise Unreachable("malformed", f"{self.address} replies something else: {fault!r}") from fault

    def holds(self, key: str) -> bool:
        """Is it leased for a prompt now? Asks nobody."""
        return bool(self._held_of([key]))

    # -- below ------------------------------------------------------------------------------------------------------------

    def _put(self, source: Draft | Record) -> Kept:
        key, segment = source.key, source.segment
        connection = self._connection(segment.tenant)
        with self._guarded():
            if not connection.shares_memory:
                record = source if isinstance(source, Record) else source.write(empty(source.nbytes))
                reply, _ = connection.call(p.Put(key), record.data, deadline_s=_patience(connection, record.nbytes))
            else:
                reply = self._written(connection, source)
        self.belong([key], segment.tenant)
        if reply["stored"]:
            return Kept(stored=True)
        return self._counts.refused(str(reply["reason"]))

    def _written(self, connection: Connection, source: Draft | Record) -> dict[str, Any]:
        """Reserve, write, commit."""
        reserved = connection.ask(p.Reserve(source.key, source.nbytes, source.segment.cost_ms))
        if "stored" in reserved.fields:
            return reserved.fields
        assert reserved.window is not None
        number = reserved.fields["number"]
        try:
            target = reserved.window.write(reserved.fields["offset"], source.nbytes)
            if isinstance(source, Draft):
                source.write(target)
            else:
                target[:] = source.data
            answer = connection.ask(p.Commit(number), deadline_s=_patience(connection, source.nbytes), epoch=reserved.epoch)
            return answer.fields
        except BaseException:
            connection.let_go(reserved.epoch, number)
            raise

    def _received(self, connection: Connection, answer: Answer, *, whole: bool) -> dict[str, Record]:
        """The records of a reply, verified; the server is told of those that are damaged. `whole`: with their tensors."""
        found: dict[str, Record] = {}
        damaged: list[str] = []
        with self.understood():
            for key, record in self._pieces(connection, answer):
                if self._counts.sound(record, key, whole=whole):
                    found[key] = record
                else:
                    damaged.append(key)
        with self._lock:
            self._remember(found, connection.tenant)
        if damaged:
            with self._guarded():
                connection.call(p.Remove(damaged, damaged=True))
        return found

    def _pieces(self, connection: Connection, answer: Answer) -> Iterator[tuple[str, Record]]:
        """From memory: key, offset, bytes, number of the lease. From a body: key, bytes that came, bytes of it all, 0."""
        body, start = answer.body, 0
        for key, place, nbytes, number in answer.fields["objects"]:
            if answer.window is not None:
                # Of a memoryview, not of an array: numpy makes what is cut from this array refer to it, and not past it.
                data = np.frombuffer(answer.window.read(place, nbytes).data, np.uint8)
                weakref.finalize(data, connection.let_go, answer.epoch, number).atexit = False
                yield key, Record(data)
                continue
            if body is None or start + place > body.nbytes:
                raise Unreachable("malformed", f"{connection.address} announces more bytes than it sends")
            data = body[start : start + place]
            start += place
            if place < nbytes:
                yield key, Record.begun(data.tobytes(), nbytes)
                continue
            if data.ctypes.data % 64:
                moved = empty(nbytes)
                moved[:] = data
                data = moved
            yield key, Record(data)

    def _held_of(self, keys: Iterable[str]) -> dict[str, Record]:
        with self._lock:
            return {key: held[key] for key in keys for held in self._held.values() if key in held}

    def _connection(self, tenant: str) -> Connection:
        if self.tenant not in (None, tenant):
            raise Unreachable(
                "other-tenant", f"this store is bound to {self.tenant!r}, and {tenant!r} asks; each needs its own"
            )
        with self._lock:
            if self._closed:
                raise Unreachable("closed", f"this store of {self.address} was closed; make another one")
            connection = self._connections.get(tenant)
            if connection is None:
                token = token_of(self._tokens, tenant)
                connection = self._connections[tenant] = Connection(self.address, tenant, token=token, **self._options)
            self._connections.move_to_end(tenant)
            if len(self._connections) > CONNECTIONS:
                self._connections.popitem(last=False)[1].close()
        return connection

    def _tenant_of(self, key: str) -> str:
        return self._tenants.get(key, self.tenant or "")

    def _by_tenant(self, keys: Iterable[str]) -> dict[str, list[str]]:
        if self.tenant is not None:
            return {self.tenant: wanted} if (wanted := list(keys)) else {}
        parts: dict[str, list[str]] = {}
        for key in keys:
            parts.setdefault(self._tenants.get(key, ""), []).append(key)
        return parts

    def _remember(self, keys: Iterable[str], tenant: str) -> None:
        for key in keys:
            self._tenants[key] = tenant
            self._tenants.move_to_end(key)
        while len(self._tenants) > 1 << 16:
            self._tenants.popitem(last=False)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Inside, faults are counted; after some in a row the server is not asked for a while."""
        other: Unreachable | None = None  # the server is there, and does not do this
        try:
            with self._breaker.attempt():
                try:
                    yield
                except Unreachable as fault:
                    self._counts.fault(fault.reason)
                    if fault.reason in ("deadline", "unreachable"):
                        raise
                    other = fault
        except Open as wait:
            self._counts.fault("breaker-open")
            raise Unreachable("breaker-open", f"{self.address} failed lately; {wait}") from None
        if other is not None:
            raise other


def _patience(connection: Connection, nbytes: int) -> float:
    """Seconds for a put of so many bytes."""
    return PUTS * connection.deadline_s + nbytes / SLOWEST
