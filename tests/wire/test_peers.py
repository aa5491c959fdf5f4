"""Leases by process, against a plain count of pins; without sockets."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcomm.store.record import Record
from kvcomm.store.slabs import SlabStore, Slot
from kvcomm.wire import peers as peers_module
from kvcomm.wire.peers import Handed, Peers
from tests.wire.conftest import kv_of, segment


class PeersModel(RuleBasedStateMachine):
    """Two processes that are not seen. The model is a list of what is handed out: (process, number, generation)."""

    def __init__(self) -> None:
        super().__init__()
        self.slabs = SlabStore(1 << 20)
        for seed in range(3):
            s = segment(50, seed=seed)
            self.slabs.put_record(Record.of(s, kv_of(s)))
        self.keys = [s.key for s in self.slabs.segments()]
        self.peers = Peers(self.slabs)
        self.made = [self.peers.connected(0, "a", 1), self.peers.connected(0, "b", 2)]
        self.held: list[tuple[int, int, int]] = []
        self.numbers: set[int] = set()

    @rule(who=st.sampled_from([0, 1]), which=st.integers(0, 2))
    def lease(self, who: int, which: int) -> None:
        slot = self.slabs.pin(self.keys[which])
        assert slot is not None
        number = self.peers.lease(self.made[who], slot)
        assert number not in self.numbers
        self.numbers.add(number)
        self.held.append((who, number, slot.generation))

    @rule(who=st.sampled_from([0, 1]), numbers=st.lists(st.integers(1, 12), max_size=3))
    def release(self, who: int, numbers: list[int]) -> None:
        self.peers.release(self.made[who], numbers)
        self.held = [row for row in self.held if row[0] != who or row[1] not in numbers]

    @rule(who=st.sampled_from([0, 1]))
    def gone(self, who: int) -> None:
        self.peers._gone(self.made[who])
        self.made[who] = self.peers.connected(0, "ab"[who], 1)
        self.held = [row for row in self.held if row[0] != who]

    @invariant()
    def agrees(self) -> None:
        pins = Counter(generation for _, _, generation in self.held)
        for generation in self.slabs._kept.values():
            assert self.slabs._book.pins(generation) == pins[generation]
        assert (self.peers.leases, len(self.peers)) == (len(self.held), 2)
        self.slabs.check_integrity()


TestPeersModel = PeersModel.TestCase
TestPeersModel.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)


@pytest.fixture
def slabs() -> Iterator[SlabStore]:
    made = SlabStore(1 << 20)
    yield made
    made.close()


def reserved(slabs: SlabStore) -> Slot:
    slot = slabs.reserve("0" * 32, 5000)
    assert isinstance(slot, Slot)
    return slot


def test_a_process_that_ends_is_noticed(slabs: SlabStore) -> None:
    async def run(child: subprocess.Popen[bytes]) -> None:
        peers = Peers(slabs)
        peer = peers.connected(child.pid, "a", 1)
        assert peers.connected(child.pid, "b", 2) is peer
        peers.reserve(peer, reserved(slabs))
        for connection in (1, 2):
            peers.left(peer, connection, Handed())
        await asyncio.sleep(0.05)
        assert peers.reservations == 1, "its connections are gone, it is not"
        child.kill()
        async with asyncio.timeout(10):
            while len(peers):
                await asyncio.sleep(0.005)
        assert slabs.arena.used == 0
        peers.close()

    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as child:
        asyncio.run(run(child))


def test_who_is_not_seen_is_known_by_its_name(slabs: SlabStore) -> None:
    """All connections of a client are one peer, which holds what it has as long as one of them is open."""

    async def run() -> None:
        peers = Peers(slabs)
        peer = peers.connected(0, "a", 1)
        assert peers.connected(0, "a", 2) is peer
        assert peers.connected(0, "b", 3) is not peer
        peers.reserve(peer, reserved(slabs))
        assert (len(peers), peers.reservations) == (2, 1)
        for connection in (1, 2):
            assert peer.grace is None, "one of its connections is open"
            peers.left(peer, connection, Handed())
        assert peer.grace is not None
        assert peers.connected(0, "a", 4) is peer
        assert peer.grace.cancelled()
        peers.close()

    asyncio.run(run())


def test_without_pidfds_what_is_held_is_kept_for_a_while(slabs: SlabStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the last time that a connection ended; one made meanwhile keeps it."""

    def none(pid: int) -> int:
        raise OSError("no such call")

    async def run() -> None:
        peers = Peers(slabs)
        peer = peers.connected(os.getpid(), "a", 1)
        peers.reserve(peer, reserved(slabs))
        peers.left(peer, 1, Handed())
        await asyncio.sleep(0.15)
        assert peers.connected(os.getpid(), "a", 2) is peer
        peers.left(peer, 2, Handed())
        await asyncio.sleep(0.1)
        assert slabs.arena.used > 0, "the first grace has passed, the second has not"
        async with asyncio.timeout(10):
            while slabs.arena.used:
                await asyncio.sleep(0.005)
        peers.close()

    monkeypatch.setattr(os, "pidfd_open", none)
    monkeypatch.setattr(peers_module, "GRACE", 0.2)
    asyncio.run(run())
