"""A pool of anchors that all processes of a server share: what one of them learns, each learns from.

    store = ServerStore()
    comm = KVComm.from_pretrained(model, store=store, anchors=SharedPool.of(store, config))

What is here is a replica: it answers by itself, follows the server's changes while it is read, and goes on as it is where the
server cannot be asked. What was learned meanwhile is sent when it can be. Limits of the replica are its own.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from threading import RLock
from time import monotonic
from typing import Any, Protocol

from kvcomm.anchors.admission import Admission, Everything, Novel, flaw
from kvcomm.anchors.anchor import Anchor
from kvcomm.anchors.base import DUPLICATE, TOO_LARGE, Admitted, slot_of
from kvcomm.anchors.eviction import Eviction
from kvcomm.anchors.pool import AnchorPool
from kvcomm.anchors.record import decode, encode
from kvcomm.codecs import codec as codec_of
from kvcomm.codecs.base import Codec
from kvcomm.config import Config
from kvcomm.errors import CacheFault, InputError, KVCommError
from kvcomm.wire import protocol as p
from kvcomm.wire.anchor_entry import MAX_DOCUMENT, pack_entry, unpack_entry
from kvcomm.wire.anchor_log import DISK
from kvcomm.wire.anchor_shelf import Room
from kvcomm.wire.transport import Unreachable

__all__ = ["Caller", "SharedPool"]

ROOMS = 1024  # tenants' models that are followed; the one not read for longest is told all of it again
UNSENT = 256  # anchors that wait for a server that cannot be asked; of more, the oldest stay in this process
log = logging.getLogger(__name__)
MOMENT = 0.1  # s that a reader may spend on following; what is left then is left to the next


class Caller(Protocol):
    """What a pool needs of a `ServerStore`."""

    def call(self, tenant: str, request: p.Request) -> tuple[dict[str, Any], Any]:
        """One request on behalf of a tenant. Raises CacheFault where the server does not answer it."""
        ...


@dataclass(frozen=True)
class _Page:
    """A reply to `Anchors`, its fields of their types."""

    version: int
    more: bool
    keys: frozenset[str] | None  # all that there is; None: what is removed is said instead
    removed: tuple[str, ...]
    added: tuple[tuple[bytes, bytes], ...]

    @classmethod
    def of(cls, reply: Mapping[str, Any]) -> _Page:
        """Raises Unreachable for what is none."""
        try:
            version, more, snapshot = reply["version"], reply["more"], reply["snapshot"]
            keys, removed = frozenset(reply["keys"]), tuple(reply["removed"])
            added = tuple((entry, document) for entry, document in reply["added"])
        except (KeyError, TypeError, ValueError) as fault:
            raise Unreachable("malformed", f"the server's answer says nothing of anchors ({fault!r})") from fault
        sound = type(version) is int and 0 <= version < 1 << 63 and isinstance(more, bool) and isinstance(snapshot, bool)
        texts, parts = all(isinstance(key, str) for key in (*keys, *removed)), chain.from_iterable(added)
        if not (sound and texts and all(isinstance(part, bytes) for part in parts)):
            raise Unreachable("malformed", "the server's answer has fields of other types")
        page = cls(version, more, keys if snapshot else None, removed, added)
        if page.more and not added:
            raise Unreachable("malformed", "the server's answer leads nowhere")
        return page


@dataclass(frozen=True)
class _Followed:
    version: int = 0  # of the server, that is here
    due: float = -math.inf  # when a reader asks again


class SharedPool(AnchorPool):
    """An `AnchorPool` whose anchors are a server's. Listeners hear of all of them; of another model or tenant, nobody does.

    `add` waits for the server, and `match` for its changes, at most once in `every_s` seconds; neither raises where it cannot
    be asked: that is counted in `stats().faults`. `remove` forgets an anchor in this process alone.
    """

    def __init__(
        self,
        server: Caller,
        limit_bytes: int,
        per_slot: int = 50,
        codec: Codec | None = None,
        admission: Admission | None = None,  # Novel(); of what this process learns: others decided for theirs
        eviction: Eviction | None = None,
        *,
        every_s: float = 0.2,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if not every_s >= 0:
            raise InputError(f"every_s is {every_s}; it must be at least 0")
        super().__init__(limit_bytes, per_slot, codec, Everything(), eviction)
        self.every_s = every_s
        self._server, self._own, self._clock = server, admission or Novel(), clock
        self._followed: OrderedDict[Room, _Followed] = OrderedDict()
        self._unsent: OrderedDict[str, Room] = OrderedDict()  # key -> room, the oldest first
        self._turn = RLock()  # held while the server is asked and its answer applied; taken before _writer

    @classmethod
    def of(cls, server: Caller, config: Config | None = None) -> SharedPool:
        """A replica as `config` bounds it (None: as the environment says, like an engine's)."""
        config = config or Config.from_env()
        return cls(server, config.anchor_bytes, config.anchors_per_slot, codec_of(config.anchor_codec))

    def add(self, anchor: Anchor) -> Admitted:
        """As `AnchorPool.add`, where the server takes it too; where that cannot be asked, it is asked later."""
        self._no_listener()
        room = room_of(anchor)
        with self._turn:
            answers = self._follow(room)
            with self._writing():
                kept = super().match(*slot_of(anchor))
                reason = flaw(anchor) or self._refusal(anchor) or self._own.refusal(anchor, kept)
            if reason is None and answers:
                try:
                    reason = self._send(anchor)
                except KVCommError as fault:
                    self._count("add", fault)
                    answers = False
            if reason is not None:
                self._refuse(reason)
                return Admitted(kept=False, reason=reason)
            if not answers:
                self._later(anchor)
            return super().add(anchor)

    def match(self, slot: str, fingerprint: str, tenant: str = "") -> tuple[Anchor, ...]:
        """As `AnchorPool.match`, of what the server had lately. While another thread asks it, nobody waits."""
        if not self._busy and self._turn.acquire(blocking=False):  # busy: perhaps with a listener, who may read
            try:
                self._follow((tenant, fingerprint))
            finally:
                self._turn.release()
        return super().match(slot, fingerprint, tenant)

    def sync(self, fingerprint: str, tenant: str = "") -> bool:
        """Make what is here of a tenant's model what the server has now, and send what is unsent; False where that cannot be.
        Never raises.
        """
        self._no_listener()
        with self._turn:
            return self._pull((tenant, fingerprint), until=math.inf)

    @property
    def unsent(self) -> int:
        """Anchors that the server does not have yet."""
        return len(self._unsent)

    # -- below, with _turn ------------------------------------------------------------------------------------------------

    def _follow(self, room: Room) -> bool:
        """If it is due, and for a moment only. False where the server was asked and did not answer."""
        now = self._clock()
        return now < self._followed.get(room, _Followed()).due or self._pull(room, until=now + MOMENT)

    def _pull(self, room: Room, until: float) -> bool:
        """Make what is here what the server has, as far as one comes until then; False where it does not answer."""
        version, due = self._followed.pop(room, _Followed()).version, None
        try:
            more = True
            while more and due is None:
                page = _Page.of(self._call(room[0], p.Anchors(room[1], version)))
                self._apply(room, page)
                version, more = page.version, page.more
                if more and self._clock() >= until:
                    due = -math.inf
            self._send_again(room)
        except KVCommError as fault:
            self._count("sync", fault)
            return False
        finally:
            self._followed[room] = _Followed(version, self._clock() + self.every_s if due is None else due)
            if len(self._followed) > ROOMS:
                self._followed.popitem(last=False)
        return True

    def _apply(self, room: Room, page: _Page) -> None:
        """What is gone goes first: what has come back since is among what is added."""
        here = {anchor.key for anchor in self.anchors() if room_of(anchor) == room}
        gone = here & set(page.removed) if page.keys is None else here - page.keys - self._unsent.keys()
        for key in gone:
            self.remove(key)
        for entry, document in page.added:
            try:
                told = unpack_entry(entry)
                if (told.tenant, told.fingerprint) != room:
                    raise CacheFault("an anchor of another tenant or model")
                if told.key not in self:
                    super().add(decode(told, document))
            except Exception as fault:  # whatever a document holds, it costs its anchor and nothing else
                log.warning("an anchor of another process is left out", exc_info=True)
                self._count("decode", fault)

    def _send_again(self, room: Room) -> None:
        for key in [key for key, of in self._unsent.items() if of == room]:
            held = self._shelf.held.get(key)
            self._unsent.move_to_end(key)  # should it fail, others come first the next time
            reason = None if held is None else self._send(held.anchor)
            del self._unsent[key]
            if reason is not None:
                self._refuse(reason)
                self.remove(key)

    def _later(self, anchor: Anchor) -> None:
        """It is sent when the server answers again."""
        self._unsent[anchor.key] = room_of(anchor)
        if len(self._unsent) > UNSENT:
            self._unsent.popitem(last=False)

    def _send(self, anchor: Anchor) -> str | None:
        """Why the server will not have it; None where it has it now. Raises as `ServerStore.call`."""
        entry, document = encode(anchor)
        if len(document) > MAX_DOCUMENT:
            return TOO_LARGE
        answer = self._call(anchor.tenant, p.AddAnchor(pack_entry(entry), document))
        reason = answer.get("reason")
        if answer.get("kept") is True or reason == DUPLICATE:
            return None
        if reason in (None, DISK):
            raise Unreachable(DISK if reason else "malformed", "the server did not keep an anchor")
        return str(reason)

    def _call(self, tenant: str, request: p.Request) -> dict[str, Any]:
        return self._server.call(tenant, request)[0]

    def _no_listener(self) -> None:
        """Raises InputError where a listener of this pool is told of something in this thread."""
        with self._writing():
            pass

    def _refuse(self, reason: str) -> None:
        with self._state:
            self._refused[reason] += 1

    def _count(self, event: str, fault: Exception) -> None:
        reason = fault.reason if isinstance(fault, Unreachable) else type(fault).__name__
        with self._state:
            self._faults[f"{event}: {reason}"] += 1


def room_of(anchor: Anchor) -> Room:
    return anchor.tenant, anchor.fingerprint
