"""Who holds what of a server's memory: leases and reservations belong to a process, and end with it, however it ends.

A connection may break while its process goes on reading leased memory; so what it holds is given back when the process has
gone (a pidfd says so), not when a socket closes. Where the system has no pidfd, it is kept for GRACE seconds instead.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvcomm.store.slabs import SlabStore

__all__ = ["Peer", "Peers"]

GRACE = 60.0  # s


@dataclass(eq=False)
class Peer:
    """One process, by any number of connections."""

    pid: int
    leases: Counter[int] = field(default_factory=Counter)  # generation -> times
    reserved: dict[int, str] = field(default_factory=dict)  # generation -> key
    connections: int = 0
    pidfd: int | None = None


class Peers:
    """All processes that are connected, or hold something still. Belongs to one thread, which runs the loop."""

    def __init__(self, slabs: SlabStore, log: Callable[[str], None] = lambda text: None) -> None:
        self._slabs, self._log = slabs, log
        self._peers: dict[int, Peer] = {}

    def connected(self, pid: int) -> Peer:
        """A connection of process `pid` (0: unknown) has been made."""
        peer = self._peers.get(pid) if pid else None
        if peer is None:
            peer = Peer(pid)
            if pid:
                self._peers[pid] = peer
                self._watch(peer)
        peer.connections += 1
        return peer

    def left(self, peer: Peer) -> None:
        """One of its connections has ended."""
        peer.connections -= 1
        if not peer.connections and peer.pidfd is None:
            asyncio.get_running_loop().call_later(GRACE, lambda: None if peer.connections else self._gone(peer))

    def lease(self, peer: Peer, generation: int) -> None:
        """It was handed out to the peer."""
        peer.leases[generation] += 1

    def release(self, peer: Peer, generation: int) -> None:
        """The peer does not need it any more; one that it does not hold is ignored."""
        if peer.leases[generation] > 0:
            peer.leases[generation] -= 1
            self._slabs.unpin(generation)
        if not peer.leases[generation]:
            del peer.leases[generation]

    @property
    def leases(self) -> int:
        """Handed out now, to all."""
        return sum(peer.leases.total() for peer in self._peers.values())

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
        self._peers.pop(peer.pid, None)
        if peer.leases or peer.reserved:
            self._log(
                f"process {peer.pid} has gone: {peer.leases.total()} leases, {len(peer.reserved)} reservations given back"
            )
        for generation, times in peer.leases.items():
            for _ in range(times):
                self._slabs.unpin(generation)
        for generation in peer.reserved:
            self._slabs.abort(generation)
        peer.leases.clear()
        peer.reserved.clear()
