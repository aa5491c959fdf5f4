"""Who holds what of a server's memory: leases and reservations belong to a process, and end with it, however it ends.

A connection may break while its process goes on reading leased memory; so what it holds is given back when the process has
gone (a pidfd says so), not when a socket closes. Where the system has no pidfd, or does not show us the process (it is in
another container), it is kept for GRACE seconds after the last connection instead. What the last reply on a broken connection
handed out may have arrived or not: that is the process's word.

Each lease has a number of its own, so that to release it twice, or in a fork of its process, releases nothing else.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kvcomm.store.slabs import SlabStore, Slot

__all__ = ["Handed", "Peer", "Peers"]

GRACE = 60.0  # s


@dataclass(frozen=True)
class Handed:
    """What the last reply on a connection handed out."""

    replies: int = 0  # on the connection, the last one counted
    numbers: tuple[int, ...] = ()  # of leases and reservations


@dataclass(eq=False)
class Peer:
    """One process, by any number of connections; one client of it, where we cannot see which process it is."""

    pid: int  # 0: not seen
    key: int | str  # among all peers
    leases: dict[int, int] = field(default_factory=dict)  # number -> generation
    reserved: dict[int, Slot] = field(default_factory=dict)  # by number
    connections: dict[int, int | None] = field(
        default_factory=dict
    )  # -> replies that will have arrived on it, once it is known
    doubtful: dict[int, Handed] = field(default_factory=dict)  # by connection that has ended
    pidfd: int | None = None
    grace: asyncio.TimerHandle | None = None  # until it counts as gone


class Peers:
    """All processes that are connected, or hold something still. Belongs to one thread, which runs the loop."""

    def __init__(self, slabs: SlabStore, log: Callable[[str], None] = lambda text: None) -> None:
        self._slabs, self._log = slabs, log
        self._peers: dict[int | str, Peer] = {}
        self._numbers = 0

    def connected(self, pid: int, client: str, connection: int) -> Peer:
        """A connection of process `pid` (0: not seen) has been made, by that client of it."""
        key = pid or client
        peer = self._peers.get(key)
        if peer is None:
            peer = self._peers[key] = Peer(pid, key)
            if pid:
                self._watch(peer)
        peer.connections[connection] = None
        if peer.grace is not None:
            peer.grace.cancel()
        return peer

    def left(self, peer: Peer, connection: int, handed: Handed) -> None:
        """One of its connections has ended; it has not asked again since that was handed out on it."""
        arrived = peer.connections.pop(connection)
        held = peer.leases.keys() | peer.reserved.keys()
        peer.doubtful = {c: h for c, h in peer.doubtful.items() if not held.isdisjoint(h.numbers)}
        peer.doubtful[connection] = handed
        if arrived is not None:
            self.lose(peer, connection, arrived)
        if not peer.connections and peer.pidfd is None:
            peer.grace = asyncio.get_running_loop().call_later(GRACE, self._gone, peer)

    def lease(self, peer: Peer, slot: Slot) -> int:
        """It was pinned for the peer; the lease's number."""
        self._numbers += 1
        peer.leases[self._numbers] = slot.generation
        return self._numbers

    def reserve(self, peer: Peer, slot: Slot) -> int:
        """It was reserved for the peer; the reservation's number."""
        self._numbers += 1
        peer.reserved[self._numbers] = slot
        return self._numbers

    def release(self, peer: Peer, numbers: Iterable[int]) -> None:
        """The peer does not need these leases and reservations any more; what it does not hold is ignored."""
        for number in numbers:
            if (generation := peer.leases.pop(number, None)) is not None:
                self._slabs.unpin(generation)
            elif (slot := peer.reserved.pop(number, None)) is not None:
                self._slabs.abort(slot.generation)

    def lose(self, peer: Peer, connection: int, arrived: int) -> None:
        """Of the replies on this connection so many have arrived, and no more will."""
        if connection in peer.connections:
            peer.connections[connection] = arrived
        handed = peer.doubtful.pop(connection, Handed())
        if handed.replies > arrived:
            self.release(peer, handed.numbers)

    @property
    def leases(self) -> int:
        """Handed out now, to all."""
        return sum(len(peer.leases) for peer in self._peers.values())

    @property
    def reservations(self) -> int:
        """Being written now."""
        return sum(len(peer.reserved) for peer in self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    def close(self) -> None:
        """Watch nobody any more."""
        for peer in self._peers.values():
            self._unwatch(peer)
            if peer.grace is not None:
                peer.grace.cancel()

    def _watch(self, peer: Peer) -> None:
        try:
            peer.pidfd = os.pidfd_open(peer.pid)
        except (AttributeError, OSError):  # no such call here, or no such process any more
            return
        asyncio.get_running_loop().add_reader(peer.pidfd, self._gone, peer)

    def _unwatch(self, peer: Peer) -> None:
        if peer.pidfd is not None:
            asyncio.get_running_loop().remove_reader(peer.pidfd)
            os.close(peer.pidfd)
            peer.pidfd = None

    def _gone(self, peer: Peer) -> None:
        self._unwatch(peer)
        self._peers.pop(peer.key, None)
        if peer.reserved:  # in the middle of a write; leases alone are nothing special
            self._log(f"process {peer.key} has gone: {len(peer.leases)} leases, {len(peer.reserved)} reservations given back")
        self.release(peer, [*peer.leases, *peer.reserved])
