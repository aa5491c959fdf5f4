"""The pool that processes share: through a real server, beside its log under random changes and outages, and under engines.

Run as a script with a socket and a folder, this file is a server that is killed: see `serve`.
"""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from kvcomm.anchors import Admitted, Anchor, AnchorPool, Everything
from kvcomm.anchors.admission import NEAR_DUPLICATE, NON_FINITE
from kvcomm.anchors.base import DUPLICATE, OTHER_CODEC, TOO_LARGE
from kvcomm.anchors.parts import tensors
from kvcomm.anchors.record import encode
from kvcomm.codecs import codec
from kvcomm.codecs.base import Packed, PackedKV
from kvcomm.config import Config
from kvcomm.errors import InputError
from kvcomm.wire import anchor_log, anchor_shelf
from kvcomm.wire import pool as pool_module
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address
from kvcomm.wire.anchor_entry import MAX_DOCUMENT, pack_entry, unpack_entry
from kvcomm.wire.anchor_log import AnchorLog
from kvcomm.wire.anchor_moving import export_anchors, import_anchors
from kvcomm.wire.client import ServerStore
from kvcomm.wire.pool import SharedPool
from kvcomm.wire.transport import Unreachable

LIMIT = 1 << 24


def make(i: int, slot: str = "s", fingerprint: str = "f", tenant: str = "", channels: int = 4) -> Anchor:
    """Anchor number i: its own text, context features and deviation."""

    def packed(fill: float) -> PackedKV:
        layers = tuple(Packed(2, channels, {"x": torch.full((2, channels), fill)}) for _ in range(2))
        return PackedKV("fake", layers, layers)

    return Anchor(
        slot=slot,
        ids=np.full(2, i, dtype=np.int32),
        base=packed(1.0),
        deviation=packed(float(i)),
        context=torch.tensor([1.0, float(i)]),
        producer_context=np.arange(2, dtype=np.int32),
        consumer_context=np.arange(3, dtype=np.int32),
        fingerprint=fingerprint,
        tenant=tenant,
    )


def keys(pool: AnchorPool) -> set[str]:
    return {anchor.key for anchor in pool.anchors()}


def kept(log: AnchorLog, fingerprint: str = "f", tenant: str = "") -> set[str]:
    told = (unpack_entry(entry) for entry, _ in log.documents())
    return {entry.key for entry in told if (entry.fingerprint, entry.tenant) == (fingerprint, tenant)}


class Direct:
    """A log, asked as a server is, without a server; `down`: nobody answers."""

    def __init__(self, log: AnchorLog) -> None:
        self.log, self.down = log, False
        self.asked: list[p.Request] = []
        self.alter: Callable[[dict[str, Any]], object] = lambda reply: None

    def call(self, tenant: str, request: p.Request) -> tuple[dict[str, Any], None]:
        self.asked.append(request)
        if self.down:
            raise Unreachable("unreachable", "down")
        match p.request_of(p.pack_request(request)):
            case p.AddAnchor(entry, document):
                reply = self.log.add(tenant, entry, document)
            case p.Anchors(fingerprint, version):
                reply = self.log.since(tenant, fingerprint, version)
            case other:
                raise AssertionError(other)
        reply = p.reply_of(msgpack.packb(reply))
        self.alter(reply)
        return reply, None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Told:
    """A listener that writes down what it is told."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def learn(self, anchor: Anchor) -> None:
        self.known.append(anchor.key)

    def forget(self, anchor: Anchor) -> None:
        self.known.remove(anchor.key)


def same(a: Anchor, b: Anchor) -> bool:
    parts = tensors(a), tensors(b)
    return (a.key, parts[0].keys()) == (b.key, parts[1].keys()) and all(
        torch.equal(parts[0][name], parts[1][name]) for name in parts[0]
    )


# --- through a server --------------------------------------------------------------------------------------------------------


class Served:
    """A server with a log, and stores of it that are closed in the end."""

    def __init__(self, running: Any) -> None:
        self._running = running
        self.stores: list[ServerStore] = []
        self.log = AnchorLog()

    @property
    def log(self) -> AnchorLog:
        return self._log

    @log.setter
    def log(self, log: AnchorLog) -> None:
        self._log = vars(self._running.server)["anchors"] = log

    def store(self, **options: Any) -> ServerStore:
        self.stores.append(self._running.store(**options))
        return self.stores[-1]

    def pool(self, **options: Any) -> SharedPool:
        return SharedPool(self.store(), LIMIT, **options)


@pytest.fixture
def server(start: Any) -> Iterator[Served]:
    served = Served(start())
    yield served
    for store in served.stores:
        store.close()


def test_what_one_learns_each_learns(server: Served) -> None:
    """Bit by bit, with its listeners, within one sync; also what the server forgets."""
    one, two = server.pool(), server.pool()
    told = Told()
    two.subscribe(told)
    anchors = [make(i, slot="ab"[i % 2]) for i in range(6)]
    for anchor in anchors:
        assert one.add(anchor) == Admitted(kept=True)
    assert two.sync("f")
    assert told.known == [anchor.key for anchor in anchors]
    for slot in "ab":
        theirs = two.match(slot, "f")
        assert all(map(same, theirs, one.match(slot, "f")))
        assert len(theirs) == 3
    assert server.log.remove("", "f", anchors[2].key)
    assert two.sync("f")
    assert one.sync("f")
    assert keys(one) == keys(two) == set(told.known) == kept(server.log)
    assert two.add(make(9))
    assert one.sync("f")
    assert make(9).key in one
    for pool in (one, two):
        pool.check_integrity()
        assert not pool.stats().faults
        assert not pool.unsent


def test_a_reader_follows_by_itself(server: Served) -> None:
    clock = Clock()
    one, two = server.pool(), server.pool(clock=clock)
    assert two.match("s", "f") == ()
    one.add(make(1))
    assert two.match("s", "f") == (), "it has asked a moment ago"
    clock.now += 0.2
    assert [anchor.key for anchor in two.match("s", "f")] == [make(1).key]


def test_nothing_crosses_tenants_and_models(server: Served) -> None:
    one, two = server.pool(), server.pool()
    rooms = [(fingerprint, tenant) for fingerprint in "fg" for tenant in ("", "t")]
    for fingerprint, tenant in rooms:
        one.add(make(1, fingerprint=fingerprint, tenant=tenant))
    for n, (fingerprint, tenant) in enumerate(rooms, 1):
        assert two.sync(fingerprint, tenant)
        assert len(two) == n
        assert [(a.fingerprint, a.tenant) for a in two.match("s", fingerprint, tenant)] == [(fingerprint, tenant)]
    bound = SharedPool(server.store(tenant="t"), LIMIT)
    assert not bound.sync("f", "")
    assert len(bound) == 0
    assert bound.stats().faults == {"sync: other-tenant": 1}
    assert bound.sync("f", "t")


def test_many_anchors_come_in_pages(server: Served) -> None:
    one, two = server.pool(), server.pool()
    for i in range(12):
        one.add(make(i, channels=10_000))  # 640 kB
    assert two.sync("f")
    assert keys(two) == keys(one) == kept(server.log)


def test_whoever_was_away_gets_a_snapshot(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_shelf, "REMEMBERED", 2)
    log = server.log = AnchorLog(per_slot=4)
    one, away = server.pool(), server.pool()
    one.add(make(0))
    away.sync("f")
    for i in range(1, 20):
        one.add(make(i))
    before = away.stats()
    assert away.sync("f")
    assert keys(away) == kept(log) == {make(i).key for i in range(16, 20)}
    assert (before.anchors, away.stats().removed) == (1, 1)
    one.sync("f")
    assert keys(one) == keys(away)


def test_engines_of_many_threads_agree_in_the_end(server: Served) -> None:
    pools = [server.pool(every_s=0.0) for _ in range(3)]

    def work(pool: SharedPool, seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 40, 30):
            pool.add(make(int(i), slot=str(i % 3)))
            pool.match(str(i % 3), "f")

    threads = [threading.Thread(target=work, args=(pool, seed)) for seed in range(2) for pool in pools]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pool in pools:
        assert pool.sync("f")
        assert keys(pool) == kept(server.log)
        pool.check_integrity()
        assert not pool.stats().faults
    server.log.check_integrity()


# --- a server that is gone ---------------------------------------------------------------------------------------------------


def serve(socket: Path, folder: Path) -> None:
    """Until it is killed."""
    from kvcomm.store.slabs import SlabStore
    from kvcomm.wire.library import Library
    from kvcomm.wire.server import Server

    async def forever() -> None:
        server = Server(Library(SlabStore(1 << 20)))
        vars(server)["anchors"] = AnchorLog(folder)
        await server.listen(Address(path=socket))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.Event().wait()

    asyncio.run(forever())


def test_a_killed_server_has_all_that_it_acknowledged(folder: Path) -> None:
    """Replicas go on while it is away, send what they learned meanwhile, and go on with increments."""
    command = [sys.executable, __file__, str(folder / "s"), str(folder / "anchors")]

    def started() -> subprocess.Popen[str]:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        return child

    def killed(child: subprocess.Popen[str]) -> None:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()

    child = started()
    stores = [ServerStore(Address(path=folder / "s"), deadline_s=10.0) for _ in range(2)]
    try:
        one, two = (SharedPool(store, LIMIT, every_s=0.0) for store in stores)
        for i in range(10):
            assert one.add(make(i))
        assert two.sync("f")
        assert one.add(make(10))
        killed(child)
        assert len(two.match("s", "f")) == 10
        assert not two.sync("f")
        assert two.add(make(11)) == Admitted(kept=True)
        assert (two.unsent, one.unsent) == (1, 0)
        assert two.stats().faults == {"sync: unreachable": 3}
        child = started()
        for pool in (two, one):
            patience = time.monotonic() + 30
            while not pool.sync("f"):  # a store leaves a server alone for a second that failed three times
                assert time.monotonic() < patience
                time.sleep(0.05)
        assert not two.unsent
        assert keys(one) == keys(two) == {make(i).key for i in range(12)}
        assert (one.stats().removed, two.stats().removed) == (0, 0)
    finally:
        killed(child)
        for store in stores:
            store.close()
    log = AnchorLog(folder / "anchors")
    assert kept(log) == {make(i).key for i in range(12)}
    assert not log.stats().faults
    log.close()


def test_a_server_that_does_not_answer_costs_nothing_but_its_news() -> None:
    clock, log = Clock(), AnchorLog()
    direct = Direct(log)
    pool = SharedPool(direct, LIMIT, clock=clock)
    pool.add(make(1))
    direct.down = True
    clock.now += 1
    asked = len(direct.asked)
    for _ in range(5):
        assert len(pool.match("s", "f")) == 1
    assert len(direct.asked) == asked + 1, "it is left alone for a while, too"
    assert pool.stats().faults == {"sync: unreachable": 1}
    for i in range(2, 5):
        assert pool.add(make(i))
    assert pool.unsent == 3
    log.remove("", "f", make(1).key)
    direct.down = False
    clock.now += 1
    assert {anchor.key for anchor in pool.match("s", "f")} == {make(i).key for i in (2, 3, 4)} == kept(log)
    assert not pool.unsent


def test_what_was_never_sent_survives_a_snapshot() -> None:
    """Also of a server that has forgotten everything."""
    direct = Direct(AnchorLog())
    pool = SharedPool(direct, LIMIT)
    assert pool.sync("f")
    direct.down = True
    pool.add(make(1))
    direct.down, direct.log = False, AnchorLog()
    assert pool.sync("f")
    assert keys(pool) == kept(direct.log) == {make(1).key}


def test_what_waits_to_be_sent_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "UNSENT", 3)
    direct = Direct(AnchorLog())
    direct.down = True
    pool = SharedPool(direct, LIMIT)
    for i in range(8):
        assert pool.add(make(i))
    assert (pool.unsent, len(pool)) == (3, 8)
    direct.down = False
    assert pool.sync("f")
    assert kept(direct.log) == {make(i).key for i in range(5, 8)}


def test_a_server_s_full_disk_stops_nobody_from_learning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    direct = Direct(AnchorLog(tmp_path))
    pool = SharedPool(direct, LIMIT)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        assert pool.add(make(1))
    assert pool.stats().faults == {"add: disk": 1}
    assert pool.sync("f")
    assert kept(direct.log) == {make(1).key}
    direct.log.close()


# --- what is taken in --------------------------------------------------------------------------------------------------------


def test_who_adds_decides_what_is_new() -> None:
    """What one process thinks worth keeping, others take as it is; and nobody is asked about what is not sound or is known."""
    direct = Direct(AnchorLog())
    wide = SharedPool(direct, LIMIT, admission=Everything())
    near = make(1)
    again = make(1)
    object.__setattr__(again, "consumer_context", np.arange(4, dtype=np.int32))
    assert wide.add(near)
    assert wide.add(again)
    strict = SharedPool(direct, LIMIT)
    assert strict.sync("f")
    assert len(strict) == 2
    direct.asked.clear()
    third = make(1)
    object.__setattr__(third, "consumer_context", np.arange(5, dtype=np.int32))
    assert strict.add(third) == Admitted(kept=False, reason=NEAR_DUPLICATE)
    assert strict.add(make(1)) == Admitted(kept=False, reason=DUPLICATE)
    broken = make(7)
    broken.context[0] = float("nan")
    assert strict.add(broken) == Admitted(kept=False, reason=NON_FINITE)
    assert not any(isinstance(request, p.AddAnchor) for request in direct.asked)
    assert strict.stats().refused == {NEAR_DUPLICATE: 1, DUPLICATE: 1, NON_FINITE: 1}


def test_what_the_server_refuses_is_not_taken() -> None:
    pool = SharedPool(Direct(AnchorLog(limit_bytes=100)), LIMIT)
    assert pool.add(make(1)) == Admitted(kept=False, reason=TOO_LARGE)
    direct = Direct(AnchorLog())
    pool = SharedPool(direct, 1 << 30)
    assert pool.add(make(1, channels=MAX_DOCUMENT // 16)) == Admitted(kept=False, reason=TOO_LARGE)
    assert not any(isinstance(request, p.AddAnchor) for request in direct.asked), "it would not even be read"
    assert not len(pool)


def test_what_the_server_has_already_is_taken() -> None:
    """Two processes that learn the same at the same time both have it."""
    direct = Direct(AnchorLog())
    one, two = SharedPool(direct, LIMIT), SharedPool(direct, LIMIT, every_s=1e9)
    two.sync("f")
    assert one.add(make(1))
    assert two.add(make(1)) == Admitted(kept=True)
    assert two.sync("f")
    assert keys(two) == {make(1).key}


def test_limits_of_a_replica_are_its_own() -> None:
    direct = Direct(AnchorLog())
    one = SharedPool(direct, LIMIT)
    small = SharedPool(direct, LIMIT, per_slot=2)
    other = SharedPool(direct, LIMIT, codec=codec("raw"))
    for i in range(5):
        one.add(make(i))
    assert small.sync("f")
    assert keys(small) == {make(3).key, make(4).key}
    assert other.sync("f")
    assert not len(other)
    assert other.stats().refused == {OTHER_CODEC: 5}
    small.check_integrity()


def test_a_damaged_document_costs_its_anchor() -> None:
    direct = Direct(AnchorLog())
    one, two = SharedPool(direct, LIMIT), SharedPool(direct, LIMIT)
    for i in range(4):
        one.add(make(i))

    def damage(reply: dict[str, Any]) -> None:
        document = bytearray(reply["added"][1][1])
        document[-1] ^= 1
        reply["added"][1][1] = bytes(document)
        reply["added"][2][0] = b"no entry"

    direct.alter = damage
    assert two.sync("f")
    assert keys(two) == {make(0).key, make(3).key}
    assert two.stats().faults == {"decode: CacheFault": 2}


def test_anchors_of_another_room_are_left_out() -> None:
    """Whatever a server answers."""
    direct = Direct(AnchorLog())
    pool = SharedPool(direct, LIMIT)
    pool.add(make(1, tenant="t"))
    strange = [make(2, tenant="u"), make(3, fingerprint="g", tenant="t")]

    def cross(reply: dict[str, Any]) -> None:
        reply["added"] = [[pack_entry(entry), document] for entry, document in map(encode, strange)]
        reply["keys"], reply["snapshot"], reply["removed"] = [], True, [make(1, tenant="t").key]

    direct.alter = cross
    assert pool.sync("f", "v")
    assert keys(pool) == {make(1, tenant="t").key}
    assert pool.stats().faults == {"decode: CacheFault": 2}
    direct.alter = lambda reply: reply.update(snapshot=False, removed=[make(1, tenant="t").key])
    assert pool.sync("f", "v")
    assert keys(pool) == {make(1, tenant="t").key}


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 63) | st.binary(max_size=4) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(st.sampled_from(["snapshot", "keys", "removed", "added", "version", "more", "kept", "reason"]), JUNK),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_no_answer_raises(junk: dict[str, Any], instead: bool) -> None:
    direct = Direct(AnchorLog())
    pool = SharedPool(direct, LIMIT, every_s=0.0)

    def alter(reply: dict[str, Any]) -> None:
        if instead:
            reply.clear()
        if sum(not isinstance(request, p.AddAnchor) for request in direct.asked) < 20:
            reply.update(junk)

    direct.alter = alter
    pool.add(make(1))
    pool.sync("f")
    pool.match("s", "f")
    pool.check_integrity()
    direct.alter, direct.log = lambda reply: None, AnchorLog()
    direct.log.add("", pack_entry(encode(make(2))[0]), encode(make(2))[1])
    assert pool.sync("f")
    assert {make(2).key} <= keys(pool) == kept(direct.log), "what was a lie is over with the next snapshot"


def test_a_reader_is_held_up_for_a_moment_only() -> None:
    """A long snapshot comes in parts, one per reader, and the replica is right in the end."""
    clock, direct = Clock(), Direct(AnchorLog())
    one = SharedPool(direct, LIMIT)
    for i in range(12):
        one.add(make(i, channels=10_000))
    two = SharedPool(direct, LIMIT, clock=clock)

    def slow(reply: dict[str, Any]) -> None:
        clock.now += 0.15

    direct.alter = slow
    seen = [len(two.match("s", "f")) for _ in range(5)]
    assert seen == [3, 6, 9, 12, 12]


@pytest.mark.parametrize("every_s", [-1.0, float("nan")])
def test_unusable_interval(every_s: float) -> None:
    with pytest.raises(InputError, match="every_s"):
        SharedPool(Direct(AnchorLog()), LIMIT, every_s=every_s)


def test_a_pool_as_config_bounds_it() -> None:
    config = Config(anchor_bytes=1234, anchors_per_slot=7, anchor_codec="raw")
    pool = SharedPool.of(Direct(AnchorLog()), config)
    assert (pool.limit_bytes, pool.per_slot) == (1234, 7)
    assert pool.codec is not None
    assert pool.codec.name == "raw"


# --- listeners ---------------------------------------------------------------------------------------------------------------


def test_a_listener_may_read_and_must_not_change() -> None:
    """Whoever told it: a neighbour, this process, or the removal of an anchor. Nobody waits for ever."""
    direct = Direct(AnchorLog())
    pool = SharedPool(direct, LIMIT, every_s=0.0)
    seen: list[int] = []

    class Reader:
        def learn(self, anchor: Anchor) -> None:
            seen.append(len(pool.match("s", "f")))

        forget = learn

    class Meddler:
        def learn(self, anchor: Anchor) -> None:
            pool.add(make(99))

        def forget(self, anchor: Anchor) -> None:
            pool.sync("f")

    pool.subscribe(Reader())
    pool.subscribe(Meddler())
    pool.add(make(1))
    SharedPool(direct, LIMIT).add(make(2))
    pool.sync("f")
    pool.remove(make(1).key)
    assert seen == [1, 2, 1]
    assert pool.stats().faults == {"learn: InputError": 2, "forget: InputError": 1}
    assert make(99).key not in kept(direct.log)
    pool.check_integrity()


def test_readers_do_not_wait_for_one_who_asks() -> None:
    direct, inside, go_on = Direct(AnchorLog()), threading.Event(), threading.Event()
    pool = SharedPool(direct, LIMIT, every_s=0.0)
    pool.add(make(1))

    def hang(reply: dict[str, Any]) -> None:
        inside.set()
        assert go_on.wait(30)

    direct.alter = hang
    asking = threading.Thread(target=pool.sync, args=("f",))
    asking.start()
    assert inside.wait(30)
    assert len(pool.match("s", "f")) == 1  # would hang otherwise, and the test with it
    go_on.set()
    asking.join()


# --- moved between hosts -----------------------------------------------------------------------------------------------------


def test_a_snapshot_s_folder_feeds_a_server_and_comes_from_one(server: Served, tmp_path: Path) -> None:
    """Pool -> folder -> log on disk -> folder -> server, through a pool: bit by bit the same, of all tenants and models."""
    pool = AnchorPool(LIMIT)
    for i in range(5):
        pool.add(make(i, slot="ab"[i % 2], tenant="tu"[i % 2], fingerprint="fgh"[i % 3]))
    assert export_anchors(pool, tmp_path / "one").anchors == 5
    log = AnchorLog(tmp_path / "log")
    assert import_anchors(log, tmp_path / "one").anchors == 5
    assert import_anchors(log, tmp_path / "one").dropped == {DUPLICATE: 5}
    log.check_integrity()
    assert export_anchors(log, tmp_path / "two").anchors == 5
    log.close()
    target = server.pool()
    loaded = import_anchors(target, tmp_path / "two", "f")
    assert (loaded.anchors, loaded.dropped) == (2, {"other-fingerprint": 3})
    other = server.pool()
    for tenant in "tu":
        assert other.sync("f", tenant)
    originals = {anchor.key: anchor for anchor in pool.anchors()}
    assert len(other) == 2
    assert all(same(anchor, originals[anchor.key]) for anchor in other.anchors())


def test_a_damaged_snapshot_is_told(tmp_path: Path) -> None:
    pool = AnchorPool(LIMIT)
    for i in range(3):
        pool.add(make(i))
    export_anchors(pool, tmp_path)
    victim = min(tmp_path.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    loaded = import_anchors(AnchorLog(limit_bytes=1 << 20), tmp_path)
    assert (loaded.anchors, loaded.dropped) == (2, {"damaged": 1})


# --- against the log ---------------------------------------------------------------------------------------------------------


class SharedPoolModel(RuleBasedStateMachine):
    """Three pools over one log that restarts, forgets and is away at times: whoever syncs holds what the log holds."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(anchor_shelf, "REMEMBERED", 3)
        self.patch.setattr(anchor_shelf, "PAGE", 2500)
        self.patch.setattr(anchor_log, "SUMMED_UP", 2)
        self.folder = tempfile.TemporaryDirectory()
        self.direct = Direct(self.opened())
        self.pools = [SharedPool(self.direct, LIMIT, every_s=0.0) for _ in range(3)]
        self.told = [Told() for _ in self.pools]
        for pool, told in zip(self.pools, self.told, strict=True):
            pool.subscribe(told)

    def opened(self) -> AnchorLog:
        return AnchorLog(Path(self.folder.name), limit_bytes=14_000, per_slot=3)

    def teardown(self) -> None:
        self.direct.log.close()
        self.folder.cleanup()
        self.patch.undo()

    @rule(
        n=st.integers(0, 2),
        i=st.integers(0, 9),
        slot=st.sampled_from("xy"),
        fingerprint=st.sampled_from("ffg"),
        tenant=st.sampled_from("aab"),
    )
    def add(self, n: int, i: int, slot: str, fingerprint: str, tenant: str) -> None:
        anchor = make(i, slot, fingerprint, tenant)
        added = self.pools[n].add(anchor)
        assert added.kept or added.reason == DUPLICATE
        assert anchor.key in self.pools[n]

    @rule(down=st.booleans())
    def away(self, down: bool) -> None:
        self.direct.down = down

    @rule()
    def restart(self) -> None:
        self.direct.log.close()
        self.direct.log = self.opened()

    @precondition(lambda self: self.direct.log.stats().anchors)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        told = unpack_entry(data.draw(st.sampled_from([entry for entry, _ in self.direct.log.documents()])))
        assert self.direct.log.remove(told.tenant, told.fingerprint, told.key)

    @rule(n=st.integers(0, 2), slot=st.sampled_from("xy"))
    def read(self, n: int, slot: str) -> None:
        anchors = self.pools[n].match(slot, "f", "a")
        assert {(anchor.slot, anchor.fingerprint, anchor.tenant) for anchor in anchors} <= {(slot, "f", "a")}

    @rule(n=st.integers(0, 2), fingerprint=st.sampled_from("ffg"), tenant=st.sampled_from("aab"))
    def sync(self, n: int, fingerprint: str, tenant: str) -> None:
        pool = self.pools[n]
        done = pool.sync(fingerprint, tenant)
        assert done == (not self.direct.down)
        pool.check_integrity()
        assert set(self.told[n].known) == keys(pool)
        if done:
            pool.sync(fingerprint, tenant)  # what was unsent may have pushed others out
            room = {a.key for a in pool.anchors() if (a.fingerprint, a.tenant) == (fingerprint, tenant)}
            assert room == kept(self.direct.log, fingerprint, tenant)


TestSharedPoolModel = SharedPoolModel.TestCase
TestSharedPoolModel.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


# --- engines -----------------------------------------------------------------------------------------------------------------


def test_an_engine_serves_with_what_another_one_learned(server: Served) -> None:
    """Of the embedded model, each with a store and a pool of its own: the second one has computed no request to learn from."""
    from kvcomm.bench.drift import questions
    from kvcomm.engine import KVComm, Output

    one = KVComm.from_pretrained(dtype="float32", anchors=SharedPool.of(server.store(), Config()))
    pool = SharedPool.of(server.store(), Config())
    two = KVComm(one.backend, anchors=pool)

    def served(comm: KVComm, count: int, seed: int) -> list[Output]:
        out = []
        for question in questions(count, 4, count, random.Random(seed)):
            for content in question.contents:
                comm.prefill(content)
            out.append(comm.generate(question.messages, agent=question.agent, max_new_tokens=4, do_sample=False))
        return out

    served(one, 8, 6)
    assert server.log.stats().anchors >= 20
    assert pool.sync(two.backend.fingerprint)
    learned = len(pool)
    reports = [out.report for out in served(two, 3, 5)]
    assert [report.fallback for report in reports] == [None] * 3
    assert all(report.tokens_by_rung["anchor"] > 0 for report in reports)
    assert len(pool) == learned == len(one.anchors)
    assert two.counters.total("faults") == one.counters.total("faults") == 0
    alone = KVComm(one.backend)
    assert served(alone, 1, 5)[0].report.fallback == "learning", "without a pool it would not have known"


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
