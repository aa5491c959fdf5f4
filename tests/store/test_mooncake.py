"""The Mooncake tier on a real master: the contract of stores, damage, dead peers and masters, processes that hang or crash."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvcomm.errors import CacheFault, InputError
from kvcomm.store.base import Kept
from kvcomm.store.mooncake import MooncakeStore
from kvcomm.store.record import DAMAGED, Record
from kvcomm.store.remote import FULL, PEER_LOST, RemoteFault

pytestmark = pytest.mark.once

if TYPE_CHECKING:
    from tests.services import MooncakeMaster

Made = Callable[..., Record]
Opens = Callable[..., MooncakeStore]
MIB = 1 << 20
names = (f"t{i}" for i in itertools.count())


def opened(master: MooncakeMaster, **options: Any) -> MooncakeStore:
    """A client on loopback with a small segment, patient enough for a busy machine."""
    return MooncakeStore(f"127.0.0.1:{master.port}", **{"segment_bytes": 32 * MIB, "timeout_s": 10.0, **options})


@pytest.fixture
def opens() -> Iterator[Opens]:
    """`opened`, and closed after the test however that ends."""
    stores: list[MooncakeStore] = []

    def new(*args: Any, **options: Any) -> MooncakeStore:
        stores.append(opened(*args, **options))
        return stores[-1]

    yield new
    for store in stores:
        if store._child.pid is not None:
            os.kill(store._child.pid, signal.SIGKILL)  # to give its segment back takes two seconds
        store.close()


@pytest.fixture(scope="module")
def client(mooncake_master: MooncakeMaster) -> Iterator[MooncakeStore]:
    """The one that contributes memory."""
    store = opened(mooncake_master)
    yield store
    store.close()


@pytest.fixture
def store(client: MooncakeStore, monkeypatch: pytest.MonkeyPatch) -> MooncakeStore:
    """`client`, as if it were new: in a namespace of its own, with fresh counts."""
    monkeypatch.setattr(client, "_prefix", f"kvcomm:1:{next(names)}")
    client.counts.__init__()  # type: ignore[misc]
    client._seen.clear()
    client._seen_tokens = 0
    return client


def same(a: Record, b: Record) -> bool:
    return a.data.tobytes() == b.data.tobytes()


@pytest.mark.parametrize("sizes", [{}, {"tokens": 2000, "dim": 64}], ids=["1 KB", "4 MB"])
def test_contract(store: MooncakeStore, record: Made, sizes: dict[str, int]) -> None:
    a = record(0, **sizes)
    assert store.get_records([a.key, "f" * 32]) == {}
    assert a.key not in store
    assert store.put_record(a) == Kept(stored=True)
    assert store.put_record(a) == Kept(stored=True)
    assert store.has([a.key, "f" * 32]) == {a.key}
    found = store.get_records(["f" * 32, a.key, a.key])
    assert list(found) == [a.key]
    assert same(found[a.key], a)
    assert found[a.key].data.ctypes.data % 64 == 0
    assert [s.key for s in store.segments()] == [a.key]
    stats = store.stats()
    assert (stats.objects, stats.nbytes, stats.hits, stats.misses, stats.limit_bytes) == (1, a.nbytes, 1, 3, 32 * MIB)
    store.check_integrity()
    assert store.remove(a.key)  # although it is leased to whoever read it
    assert not store.remove(a.key)
    assert store.nbytes == 0
    assert store.segments() == []
    assert (store.has([]), store.get_records([]), store.get_notes([])) == (set(), {}, {})


def test_tensors_come_back_as_they_were_put(store: MooncakeStore, made: Any) -> None:
    segment, kv = made(1, tokens=50)
    assert store.put(segment, kv)
    found = store.get(segment.key)
    assert found is not None
    assert (found.start, found.length) == (kv.start, kv.length)
    assert all(bool((a == b).all()) for a, b in zip((*found.keys, *found.values), (*kv.keys, *kv.values), strict=True))
    kv.values[1][0, 0, 0] = float("nan")
    with pytest.raises(CacheFault, match="NaN"):
        store.put(segment, kv)


def test_every_flipped_bit_is_a_miss(store: MooncakeStore, record: Made) -> None:
    """In 60 places, the prefix's among them; and values that are cut, longer, or another record's."""
    a, b = record(0), record(1)
    rng = np.random.default_rng(0)
    damaged = [b.data, a.data[:-1], a.data[:20], np.append(a.data, np.zeros(64, np.uint8))]
    for n in range(60):
        data = a.data.copy()
        data[n if n < 32 else int(rng.integers(32, a.nbytes))] ^= 1 << int(rng.integers(0, 8))
        damaged.append(data)
    store.put_record(b)
    for n, data in enumerate(damaged, start=1):
        assert store._put({store._name(a.key): data}, replace=True) == [0]
        found = store.get_records([a.key, b.key])
        assert set(found) == {b.key}
        assert a.key not in store
        assert sum(store.counts.stats(0, 0, 0).faults.values()) == n
    assert store.put_record(a)
    assert same(store.get_records([a.key])[a.key], a)


def test_two_clients_see_each_other(opens: Opens, mooncake_master: MooncakeMaster, store: MooncakeStore, record: Made) -> None:
    """The second contributes nothing: what it puts lies with the first."""
    other = opens(mooncake_master, segment_bytes=0, namespace=store._prefix.rpartition(":")[2])
    a, b = record(0, tokens=3000, dim=64), record(1)
    store.put_record(a)
    assert other.put_record(b)
    for of in (store, other):
        found = of.get_records([a.key, b.key])
        assert same(found[a.key], a)
        assert same(found[b.key], b)
    assert {s.key for s in other.segments()} == {a.key, b.key}
    assert other.remove(a.key)
    assert a.key not in store
    other.put_notes({"ab": b"1"})
    assert store.get_notes(["ab", "cd"]) == {"ab": b"1"}
    store.put_notes({"ab": b"another, longer"})
    assert other.get_notes(["ab"]) == {"ab": b"another, longer"}


def test_notes(store: MooncakeStore) -> None:
    """Hundreds in a call, of 0 bytes to 64 KiB; the last put of a name holds; altered ones are left out."""
    rng = np.random.default_rng(0)
    notes = {f"{i:x}": rng.bytes(int(n)) for i, n in enumerate([0, 1, 65536, *rng.integers(0, 300, 400)])}
    store.put_notes(notes)
    assert store.get_notes([*notes, "ffffff", "0"]) == notes
    newer = {name: rng.bytes(int(rng.integers(0, 300))) for name in list(notes)[:100]}
    store.put_notes(newer)
    assert store.get_notes(list(notes)) == {**notes, **newer}
    store._put({f"{store._prefix}:n:1": b"anything but that"}, replace=True)
    assert store.get_notes(["1", "2"]) == {"2": newer["2"]}
    assert store.counts.stats(0, 0, 0).faults == {DAMAGED: 1}
    assert store.segments() == []


def test_full(opens: Opens, services: ModuleType, tmp_path: Path, record: Made) -> None:
    """Of 16 MiB, records of 1 MB: others leave, or a put is refused by reason; what is found is right. Too large: refused."""
    with services.MooncakeMaster(tmp_path, "--default_kv_lease_ttl=100") as master:
        store = opens(master, segment_bytes=16 * MIB)
        assert store.put_record(record(99, tokens=10_000, dim=64)) == Kept(stored=False, reason=FULL)
        records = [record(i, tokens=1000, dim=32) for i in range(40)]
        kept = [store.put_record(r) for r in records]
        assert set(kept) <= {Kept(stored=True), Kept(stored=False, reason=FULL)}
        found = store.get_records([r.key for r in records])
        assert all(same(found[r.key], r) for r in records if r.key in found)
        assert 5 < len(found) < 17
        assert store.stats().refused[FULL] == 41 - sum(map(bool, kept))
        store.check_integrity()


def calls(store: MooncakeStore, r: Record) -> list[Callable[[], object]]:
    return [
        lambda: store.put_record(r),
        lambda: store.get_records([r.key]),
        lambda: store.has([r.key]),
        lambda: store.remove(r.key),
        lambda: store.put_notes({"ab": b"1"}),
        lambda: store.get_notes(["ab"]),
        store.segments,
        store.stats,
    ]


def works_again(store: MooncakeStore, r: Record, seconds: float = 40) -> None:
    """As soon as it does: Mooncake brings its segment back to a new master within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if store.put_record(r):
                assert same(store.get_records([r.key])[r.key], r)
                return
        except RemoteFault:
            pass
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s")


def test_killed_and_restarted_master(opens: Opens, services: ModuleType, tmp_path: Path, record: Made) -> None:
    """Without a master all calls fail within their time, though Mooncake tries for 4 s; with a new one the store is empty."""
    with services.MooncakeMaster(tmp_path) as master:
        store = opens(master, timeout_s=0.4)
        a, b = record(0), record(1)
        works_again(store, a)
        master.kill()
        for call in calls(store, b):
            began = time.monotonic()
            with pytest.raises(RemoteFault) as caught:
                call()
            assert caught.value.reason in {"unreachable", "timeout"}
            assert str(caught.value).startswith("mooncake: ")
            assert time.monotonic() - began < 1.5
        master.start()
        works_again(store, b)
        assert store.get_records([a.key]) == {}


def test_no_master_at_first(opens: Opens, services: ModuleType, tmp_path: Path, record: Made) -> None:
    """Where Mooncake's setup would stop everything for a minute and a half."""
    master = services.MooncakeMaster(tmp_path)
    store = opens(master, timeout_s=2.0)
    for _ in range(2):
        with pytest.raises(RemoteFault, match=r"unreachable.*refused"):
            store.has(["ab"])
    with master:
        works_again(store, record(0))


def test_frozen_master(opens: Opens, services: ModuleType, tmp_path: Path, record: Made) -> None:
    """Its calls take half a minute: ours are given up in time, and much later the process is replaced."""
    with services.MooncakeMaster(tmp_path) as master:
        store = opens(master, timeout_s=0.4)
        a, b = record(0), record(1)
        works_again(store, a)
        pid = store._child.pid
        assert pid is not None
        master.freeze()
        for call in calls(store, b):
            began = time.monotonic()
            with pytest.raises(RemoteFault) as caught:
                call()
            assert caught.value.reason == "timeout"
            assert time.monotonic() - began < 1.5
        assert store._child.pid == pid
        store._child._clock = lambda: time.monotonic() + 100
        with pytest.raises(RemoteFault):
            store.has([a.key])
        assert store._child.pid != pid
        assert services.ended(pid)
        store._child._clock = time.monotonic
        master.thaw()
        works_again(store, b)


def test_a_late_answer_is_nobodys(opens: Opens, services: ModuleType, tmp_path: Path, record: Made) -> None:
    """The answer of a call that was given up comes before that of the next call, and is not taken for it; no file leaks."""
    with services.MooncakeMaster(tmp_path) as master:
        store = opens(master, timeout_s=0.4)
        a, b = record(0), record(1)
        works_again(store, a)
        works_again(store, b)
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            pid = store._child.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(RemoteFault, match="timeout"):
                store.get_records([a.key])
            os.kill(pid, signal.SIGCONT)
            assert same(store.get_records([b.key])[b.key], b)
            assert store._child.pid == pid
        assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_client_that_crashes(store: MooncakeStore, record: Made, how: signal.Signals) -> None:
    """One call is a fault at most; the next one has a new process, and a cluster without the segment of the old one."""
    a, b = record(0), record(1)
    works_again(store, a)  # the one that crashed before is still given places
    assert store._child.pid is not None
    os.kill(store._child.pid, how)
    works_again(store, b)
    try:
        found = store.get_records([a.key])
    except RemoteFault as fault:
        pytest.fail(str(fault))
    assert set(found) <= {a.key}
    assert set(store.counts.stats(0, 0, 0).faults) <= {PEER_LOST}


def test_a_peer_that_dies(opens: Opens, services: ModuleType, tmp_path: Path, record: Made) -> None:
    """What lay there is a miss at once, while the master does not know yet, and what it would give a place there is refused."""
    with services.MooncakeMaster(tmp_path, "--client_ttl=5") as master:
        holder, reader = opens(master), opens(master, segment_bytes=0)
        a = record(0)
        assert holder.put_record(a)
        assert same(reader.get_records([a.key])[a.key], a)
        assert holder._child.pid is not None
        os.kill(holder._child.pid, signal.SIGKILL)
        began = time.monotonic()
        assert reader.get_records([a.key]) == {}
        assert time.monotonic() - began < 2
        assert reader.put_record(record(1)) == Kept(stored=False, reason=PEER_LOST)
        assert reader.counts.stats(0, 0, 0).faults == {PEER_LOST: 1}
        reader.put_notes({"ab": b"1"})
        assert reader.get_notes(["ab"]) == {}


def test_the_client_ends_with_us(services: ModuleType, tmp_path: Path) -> None:
    """After a plain end, a kill, and an end while a call hangs, where Mooncake in our own process crashes it: exit code 0."""
    code = """
import os, signal, sys, threading, time
from kvcomm.store.mooncake import MooncakeStore
store = MooncakeStore(sys.argv[1], segment_bytes=16 << 20, timeout_s=10)
store.has(["ab"])
print(store._child.pid, flush=True)
if sys.argv[2] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "hang":
    os.kill(int(sys.argv[3]), signal.SIGSTOP)
    began = threading.Event()
    threading.Thread(target=lambda: (began.set(), store.has(["ab"])), daemon=True).start()
    began.wait()
"""
    for how, expected in (("plain", 0), ("kill", -signal.SIGKILL), ("hang", 0)):
        with services.MooncakeMaster(tmp_path) as master:
            argv = [sys.executable, "-c", code, f"127.0.0.1:{master.port}", how, str(master._process.pid)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == expected, done.stderr
            until = time.monotonic() + 20  # a call to a frozen master hangs for 30 s, and cannot be ended from within
            while not services.ended(int(done.stdout)):
                assert time.monotonic() < until, f"{how}: its client is still there"
                time.sleep(0.05)


def test_nothing_after_close(opens: Opens, mooncake_master: MooncakeMaster, services: ModuleType, record: Made) -> None:
    store = opens(mooncake_master, namespace="closed")
    store.put_record(record(0))
    pid = store._child.pid
    store.close()
    store.close()
    assert pid is not None
    assert services.ended(pid)
    with pytest.raises(RemoteFault, match="closed"):
        store.has(["ab"])


def test_threads_and_clients_see_whole_records(
    opens: Opens, mooncake_master: MooncakeMaster, store: MooncakeStore, record: Made
) -> None:
    """Two clients, four threads, puts and removes and gets of six records: what is found is right."""
    other = opens(mooncake_master, segment_bytes=0, namespace=store._prefix.rpartition(":")[2])
    records = [record(i, tokens=500) for i in range(6)]
    wrong: list[object] = []
    hits = [0] * 4

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        of = (store, other)[seed % 2]
        try:
            for i, j, what in zip(*(rng.integers(0, n, 60) for n in (6, 6, 4)), strict=True):
                if what == 0:
                    of.remove(records[i].key)
                elif what == 1:
                    of.put_record(records[i])
                for key, found in of.get_records([records[i].key, records[j].key]).items():
                    hits[seed] += 1
                    if not any(same(found, r) for r in records if r.key == key):
                        wrong.append(key)
        except Exception as e:  # told below, in the test's thread
            wrong.append(e)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(hits)


class MooncakeModel(RuleBasedStateMachine):
    """`MooncakeStore` beside two dicts: records, of which the first put holds, and notes, of which the last does."""

    shared: MooncakeStore
    kept: list[Record]

    def __init__(self) -> None:
        super().__init__()
        self.store = self.shared
        self.store._prefix = f"kvcomm:1:{next(names)}"
        self.store._seen.clear()
        self.records: dict[str, Record] = {}
        self.notes: dict[str, bytes] = {}

    @rule(i=st.integers(0, 5))
    def put(self, i: int) -> None:
        assert self.store.put_record(self.kept[i]) == Kept(stored=True)
        self.records[self.kept[i].key] = self.kept[i]

    @rule(i=st.integers(0, 5))
    def remove(self, i: int) -> None:
        key = self.kept[i].key
        assert self.store.remove(key) == (self.records.pop(key, None) is not None)

    @rule(notes=st.dictionaries(st.sampled_from(["a", "b", "c"]), st.binary(max_size=100)))
    def note(self, notes: dict[str, bytes]) -> None:
        self.store.put_notes(notes)
        self.notes |= notes

    @invariant()
    def agrees(self) -> None:
        keys = [r.key for r in self.kept]
        found = self.store.get_records(keys)
        assert set(found) == set(self.records) == self.store.has(keys) == {s.key for s in self.store.segments()}
        assert all(same(found[key], self.records[key]) for key in found)
        assert self.store.nbytes == sum(r.nbytes for r in self.records.values())
        assert self.store.get_notes(["a", "b", "c"]) == self.notes


def test_model(store: MooncakeStore, record: Made) -> None:
    kind = type("Bound", (MooncakeModel,), {"shared": store, "kept": [record(i, tokens=1 + 9 * i) for i in range(6)]})
    run_state_machine_as_test(kind, settings=settings(max_examples=20, stateful_step_count=15, deadline=None))


@pytest.mark.parametrize(
    ("master", "options", "says"),
    [
        ("host", {}, "'host'; host:port"),
        ("host:0", {}, "'host:0'"),
        ("host:99999", {}, "'host:99999'"),
        (":1", {}, "':1'"),
        ("host:1", {"segment_bytes": -1}, "segment_bytes -1"),
        ("host:1", {"timeout_s": 0.0}, "timeout_s 0.0"),
        ("host:1", {"namespace": "a b"}, "'a b'"),
    ],
)
def test_unusable_options(master: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        MooncakeStore(master, **options)
