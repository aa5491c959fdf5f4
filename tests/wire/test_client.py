"""The client against a real server: the contract of stores, what it leases and gives back, and what it does in trouble."""

from __future__ import annotations

import gc
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from kvcomm import KVComm
from kvcomm.errors import CacheFault
from kvcomm.matching import TextIndex
from kvcomm.store.disk import DiskStore
from kvcomm.store.record import Record
from kvcomm.store.tiered import Tiered
from kvcomm.testing import tiny_random
from kvcomm.tiny import tokenizer
from kvcomm.wire import protocol as p
from kvcomm.wire.client import ServerStore
from kvcomm.wire.transport import Connection, Unreachable
from tests.store.test_tiered import DictStore
from tests.wire.conftest import Running, Start, equal, kv_of, segment

T = TypeVar("T")
FOUR = 4 * (4 << 12)  # bytes of a server that has room for four segments of 50 tokens


def until(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Does it, before so long?"""
    deadline = monotonic() + seconds
    while not holds():
        if monotonic() > deadline:
            return False
        sleep(0.005)
    return True


def patient(call: Callable[[], T]) -> T:
    """Its result, as soon as the breaker lets it through."""
    while True:
        try:
            return call()
        except Unreachable as fault:
            if fault.reason != "breaker-open":
                raise
            sleep(0.01)


def status(running: Running) -> dict[str, Any]:
    return running.server.status()


def held(running: Running) -> tuple[int, int]:
    """Leases and reservations."""
    return running.server.peers.leases, running.server.peers.reservations


def fill(store: ServerStore, count: int, *, seed: int = 100) -> None:
    """Put so many others, all of them read back at once."""
    for i in range(seed, seed + count):
        s = segment(50, seed=i)
        if store.put(s, kv_of(s, seed=i)):
            found = store.get(s.key)
            assert found is None or equal(found, kv_of(s, seed=i))


PROCESS = """
import os, sys
from kvcomm.wire import protocol as p
from kvcomm.wire.client import ServerStore
from tests.wire.conftest import equal, kv_of, segment
store = ServerStore(sys.argv[1], deadline_s=10.0)
s = segment(50)
"""


@contextmanager
def process(running: Running, code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another client, that runs `code` and is killed at the end."""
    command = [sys.executable, "-W", "error", "-c", PROCESS + code, str(running.address), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        try:
            yield made
        finally:
            made.kill()
            made.communicate()


def line(made: subprocess.Popen[str]) -> str:
    assert made.stdout is not None
    return made.stdout.readline().strip()


# -- the contract -----------------------------------------------------------------------------------------------------------


def test_contract(start: Start) -> None:
    running = start()
    store, s = running.store(), segment(40, 3)
    assert store.get(s.key) is None
    assert s.key not in store
    assert store.put(s, kv_of(s)).stored
    assert store.put(s, kv_of(s)).stored
    assert s.key in store
    found = store.get(s.key)
    assert found is not None
    assert equal(found, kv_of(s))
    assert [(t.key, t.start) for t in store.segments()] == [(s.key, 3)]
    assert store.has([s.key, "0" * 32]) == {s.key}
    stats = store.stats()
    assert (stats.objects, stats.hits, stats.misses) == (1, 2, 1)
    assert store.remove(s.key)
    assert not store.remove(s.key)
    assert s.key not in store
    assert store.get(s.key) is None
    store.check_integrity()
    store.close()


def test_what_other_tenants_keep_is_not_told(start: Start) -> None:
    """Not even to who guesses their text: each tenant hears of its own."""
    store, ours, theirs = start().store(), segment(40), segment(40, tenant="b")
    for s in (ours, theirs):
        store.put(s, kv_of(s))
    assert store.has([ours.key, theirs.key]) == {ours.key, theirs.key}
    for tenant, s in (("", ours), ("b", theirs)):
        with closing(ServerStore(store.address, tenant=tenant)) as bound:
            assert bound.has([ours.key, theirs.key]) == {s.key}
    store.close()


def test_an_interrupted_call_leaves_no_reply_for_the_next(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a reply is awaited: the next call must not get it for its own."""
    store, s, t = start().store(), segment(50), segment(4000, seed=1)
    store.put(s, kv_of(s))
    receive = Connection._receive

    def interrupted(*given: Any) -> Any:
        monkeypatch.setattr(Connection, "_receive", receive)
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.put(segment(50, seed=2), kv_of(segment(50, seed=2)))
    assert store.put(t, kv_of(t))
    for known in (s, t):
        found = store.get(known.key)
        assert found is not None
        assert equal(found, kv_of(known))
    store.close()


def test_text_that_another_process_has_prefilled_is_not_computed_again(start: Start) -> None:
    running, model = start(), tiny_random("llama", vocab_size=768)
    text = " city is oslo . pet is dog . the old river waits slowly . food is rice . the young sailor sings loudly ."
    with closing(running.store()) as one, closing(running.store()) as two:
        first, second = (KVComm.from_model(model, tokenizer.build(), store=store) for store in (one, two))
        assert first.prefill(text) > 0
        assert second.prefill(text) == 0
        assert first.prefill(text) == 0


def test_what_has_left_the_memory_is_put_again(start: Start, folder: Path) -> None:
    """A disk that is slower than computing must not keep what was computed again from the memory."""
    running = start(FOUR, DiskStore(folder / "disk", 1 << 30))
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    assert s.key in store
    fill(store, 8)
    assert running.server.library.stack.has([s.key])
    assert store.wants(s.key)
    assert store.put(s, kv_of(s))
    assert not store.wants(s.key)
    store.close()


def test_a_list_is_whole_whatever_is_used_meanwhile(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of three, of what is in memory, on the disk and elsewhere; between any two rows some are read and one is put."""
    monkeypatch.setattr(p, "MAX_LISTED", 3)
    elsewhere = DictStore(1 << 30)
    running = start(FOUR, Tiered(DiskStore(folder / "disk", 1 << 30), elsewhere))
    store = running.store()
    records = {(s := segment(50, seed=i)).key: Record.of(s, kv_of(s)) for i in range(12)}
    foreign, alone = (Record.of(s, kv_of(s)) for s in (segment(50, tenant="t"), segment(50, seed=12)))
    for record in (*records.values(), foreign):
        assert store.put_record(record)
    assert elsewhere.put_record(alone)
    sizes: dict[str, int | None] = {key: record.nbytes for key, record in records.items()}
    listed: dict[str, int | None] = {}
    for n, row in enumerate(store.listed("")):
        assert row.key not in listed
        assert (row.tokens, row.fingerprint, row.key > max(listed, default="")) == (50, "f", True)
        listed[row.key] = row.nbytes
        assert len(store.get_many(list(records)[n % 5 :: 3])) >= 2
        fill(store, 1, seed=200 + n)
    assert listed.items() >= {**sizes, alone.key: None}.items()
    assert [row.key for row in store.listed("t")] == [foreign.key]
    elsewhere.down = True
    assert {row.key for row in store.listed("")} >= sizes.keys()
    store.close()
    with closing(running.store(tenant="t")) as theirs:
        assert {s.key for s in theirs.segments()} == {foreign.key}


def test_a_closed_store_holds_nothing(start: Start) -> None:
    """Though its process goes on: what it read last is given back as it closes."""
    running = start()
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    assert store.get(s.key) is not None
    assert store.index.look(s.ids, fingerprint="f").matches
    store.close()
    assert until(lambda: held(running) == (0, 0))


def test_a_put_may_take_longer_than_a_question(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has tiers that are far."""
    running = start()
    library, store, s = running.server.library, running.store(deadline_s=1.0), segment(50)
    real = library.commit

    def slow(*given: Any) -> Any:
        sleep(1.3)
        return real(*given)

    monkeypatch.setattr(library, "commit", slow)
    assert store.put(s, kv_of(s))
    store.close()


def test_a_closed_store_asks_nobody(start: Start) -> None:
    running = start()
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    kv = store.get(s.key)
    store.close()
    store.close()
    for call in (lambda: store.get(s.key), lambda: store.put(s, kv_of(s)), lambda: s.key in store):
        with pytest.raises(Unreachable, match="closed"):
            call()
    assert kv is not None
    assert equal(kv, kv_of(s))
    assert until(lambda: status(running)["connections"] == 0)


def test_a_prompt_costs_one_round_trip_and_a_landing(start: Start) -> None:
    running = start()
    store, s = running.store(), segment(64)
    store.put(s, kv_of(s))
    before = dict(running.server.counters.requests)
    prompt = np.concatenate([segment(20, seed=9).ids, s.ids[8:56]])
    found = store.index.look(prompt, fingerprint="f")
    (match,) = found.matches
    assert (match.start, match.end, match.offset, match.segment.key, match.exact) == (20, 68, 8, s.key, False)
    kv = store.get(s.key)
    assert kv is not None
    assert equal(kv, kv_of(s))
    assert found.flight is not None
    store.index.land(found.flight)
    running.settle()
    after = running.server.counters.requests
    assert {op: after[op] - before.get(op, 0) for op in after if after[op] != before.get(op, 0)} == {"find": 1, "land": 1}
    del kv, match, found
    store.has([s.key])
    assert until(lambda: held(running) == (0, 0))
    store.close()


def test_finds_what_an_index_of_its_own_would(start: Start) -> None:
    """The server's answer beside `TextIndex` in this process, on prompts cut from the same segments."""
    running, index = start(), TextIndex()
    store, rng = running.store(), np.random.default_rng(3)
    kept = [segment(int(rng.integers(20, 120)), int(rng.integers(0, 30)), seed=i) for i in range(20)]
    for s in kept:
        store.put(s, kv_of(s))
        index.add(s)
    for _ in range(30):
        parts = [s.ids[int(rng.integers(0, 5)) :] for s in rng.choice(np.array(kept, dtype=object), 3)]
        prompt = np.concatenate([kept[0].context, kept[0].ids, *parts]).astype(np.int32)
        ours, theirs = index.look(prompt, fingerprint="f"), store.index.look(prompt, fingerprint="f")
        assert [(m.start, m.end, m.segment.key, m.offset, m.exact) for m in ours.matches] == [
            (m.start, m.end, m.segment.key, m.offset, m.exact) for m in theirs.matches
        ]
        assert theirs.flight is not None
        store.index.land(theirs.flight)
    store.close()


def test_tenants_see_nothing_of_each_other(start: Start) -> None:
    running = start()
    mine, theirs = running.store(tenant="a"), running.store(tenant="b")
    s = segment(50, tenant="a")
    assert mine.put(s, kv_of(s))
    assert theirs.get(s.key) is None
    assert not theirs.remove(s.key)
    assert theirs.index.look(s.ids, fingerprint="f", tenant="b").matches == []
    assert theirs.segments() == []
    with pytest.raises(CacheFault, match="other-tenant"):
        theirs.put(s, kv_of(s))
    anyone = running.store()
    kept = anyone._written(anyone._connection("b"), Record.of(s, kv_of(s)))  # a client that is bound to b, and lies
    assert kept["stored"]  # it is there already, under its own tenant
    other = segment(50, seed=5, tenant="a")
    kept = anyone._written(anyone._connection("b"), Record.of(other, kv_of(other)))
    assert not kept["stored"]
    assert mine.get(other.key) is None
    assert mine.get(s.key) is not None
    running.server.library.slabs.check_integrity()
    for store in (mine, theirs, anyone):
        store.close()


# -- leases -----------------------------------------------------------------------------------------------------------------


def test_what_a_client_looks_at_is_not_reused(start: Start) -> None:
    """In a server with room for four, while it is kept and after it was removed; then its memory comes back."""
    running = start(FOUR)
    store, s = running.store(), segment(50)
    assert store.put(s, kv_of(s))
    found = store.get(s.key)
    assert found is not None
    fill(store, 12)
    assert equal(found, kv_of(s)), "evicted under a client's eyes"
    with closing(running.store()) as another:
        assert another.remove(s.key)
    fill(store, 12, seed=200)
    assert equal(found, kv_of(s)), "reused under a client's eyes"
    one_layer = found.keys[1][:, 3:9]
    del found
    gc.collect()
    fill(store, 12, seed=300)
    assert bool((one_layer == kv_of(s).keys[1][:, 3:9]).all()), "a view is enough to keep it"
    store.has([s.key])  # what was let go is told with the next call
    assert until(lambda: held(running) == (1, 0))
    assert running.server.library.slabs.arena.used > running.server.library.slabs.nbytes
    del one_layer
    store.has([s.key])
    assert until(lambda: held(running) == (0, 0))
    fill(store, 12, seed=400)
    assert status(running)["tiers"]["memory"]["objects"] == 4
    running.server.library.slabs.check_integrity()
    store.close()


def test_an_engine_asks_as_the_tenant_that_its_store_is_bound_to(start: Start) -> None:
    """Without saying so in each call; another tenant's call shares nothing."""
    running = start()
    model: Any = tiny_random("llama")  # transformers leaves `generate` loosely typed
    stores = [running.store(tenant="alice") for _ in range(2)]
    first, second = (KVComm.from_model(model, store=store) for store in stores)
    prompt = torch.arange(3, 103)[None]
    for comm in (first, second):
        with comm.attach(agent="a"):
            model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert second.reports[-1].reused_tokens > 90
    with second.acting(tenant="bob"), second.attach():
        model.generate(prompt, max_new_tokens=2, do_sample=False)
    assert "bound to 'alice', and 'bob' asks" in str(second.reports[-1].fallback)
    for store in stores:
        store.close()


def test_a_lease_outlives_its_connection(start: Start) -> None:
    running = start(FOUR)
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    found = store.get(s.key)
    hang_up(running)
    assert store.has([s.key]) == {s.key}, "by a new connection"
    fill(store, 12)
    assert found is not None
    assert equal(found, kv_of(s))
    assert held(running)[0] >= 1
    del found
    gc.collect()
    store.has([s.key])
    assert until(lambda: held(running) == (0, 0))
    store.close()


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sees no client's process, as between containers."""
    monkeypatch.setattr("kvcomm.wire.server.other_end", lambda connection: (0, os.getuid()))


@pytest.mark.usefixtures("unseen")
def test_a_lease_outlives_its_connection_where_no_process_is_seen(start: Start) -> None:
    running = start(FOUR)
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    found = store.get(s.key)
    hang_up(running)
    assert store.has([s.key]) == {s.key}, "by a new connection"
    (peer,) = running.server.peers._peers.values()
    assert peer.grace is not None
    assert peer.grace.cancelled(), "what it reads would be given back although it is there"
    fill(store, 12)
    assert found is not None
    assert equal(found, kv_of(s))
    del found
    gc.collect()
    store.has([s.key])
    assert until(lambda: held(running) == (0, 0))
    store.close()


@pytest.mark.usefixtures("unseen")
def test_a_lease_is_released_over_any_connection_of_its_client(start: Start) -> None:
    """Each tenant has a connection of its own."""
    running = start()
    store, s = running.store(), segment(50, tenant="a")
    store.put(s, kv_of(s))
    found = store.get(s.key)
    assert found is not None
    assert held(running) == (1, 0)
    del found
    gc.collect()
    store.call("b", p.Has([]))
    assert (status(running)["processes"], held(running)) == (1, (0, 0))
    store.close()


def hang_up(running: Running) -> None:
    """The server closes every connection."""
    known = running.server.status()["connections"]
    assert known
    for task in list(running.server._sessions):
        running.loop.call_soon_threadsafe(task.cancel)
    assert until(lambda: not running.server._sessions)


def test_a_release_that_was_not_heard_is_said_again(start: Start) -> None:
    running = start()
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    found = store.get(s.key)
    assert found is not None
    del found
    gc.collect()  # to be told with the next call, whose connection is gone
    hang_up(running)
    store.has([s.key])
    assert until(lambda: held(running) == (0, 0))
    store.close()


@pytest.mark.parametrize("what", ["get", "reserve"])
def test_what_a_lost_reply_handed_out_is_given_back(start: Start, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The client's deadline passes while the server works; what it hands out then nobody has heard of."""
    running, go = start(), threading.Event()
    library, store = running.server.library, running.store(deadline_s=0.3)
    s, t = segment(50), segment(50, seed=1)
    store.put(s, kv_of(s))
    real = getattr(library, what)

    def slow(*arguments: Any) -> Any:
        assert go.wait(10)
        return real(*arguments)

    monkeypatch.setattr(library, what, slow)
    call = (lambda: store.get(s.key)) if what == "get" else (lambda: store.put(t, kv_of(t)))
    with pytest.raises(Unreachable, match="deadline"):
        call()
    go.set()
    assert until(lambda: held(running) == ((1, 0) if what == "get" else (0, 1)))
    assert patient(lambda: store.put(t, kv_of(t)))  # the next call tells
    assert until(lambda: held(running) == (0, 0))
    library.slabs.check_integrity()
    store.close()


def test_what_a_killed_process_held_is_given_back(start: Start) -> None:
    running = start()
    code = """
assert store.put(s, kv_of(s))
found = store.get(s.key)
store.call("", p.Reserve("0" * 32, 5000, None))
store.index.look(segment(90, seed=8).ids, fingerprint="f")
print("holds", flush=True)
sys.stdin.read()
"""
    with process(running, code) as made:
        assert line(made) == "holds"
        assert held(running) == (1, 1)
        assert status(running)["flights"] == 1
        used = running.server.library.slabs.arena.used
        made.kill()
        assert until(lambda: held(running) == (0, 0))
        assert until(lambda: status(running)["flights"] == 0)
    assert running.server.library.slabs.arena.used < used
    assert until(lambda: status(running)["processes"] == 0)
    running.server.library.slabs.check_integrity()


@pytest.mark.parametrize("seen", [True, False])
def test_a_fork_leases_for_itself(start: Start, monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    """It has what its parent had leased; to let go of that must not let go of a lease of its own, nor of its parent's."""
    if not seen:
        monkeypatch.setattr("kvcomm.wire.server.other_end", lambda connection: (0, os.getuid()))
        monkeypatch.setattr("kvcomm.wire.peers.GRACE", 0.1)
    running = start()
    code = """
import gc
assert store.put(s, kv_of(s))
found = store.get_records([s.key])
said = found[s.key].data.tobytes()
child = os.fork()
if not child:
    own = store.get_records([s.key])
    del found
    gc.collect()
    store.has(["0" * 32])
    print("child", own[s.key].data.tobytes() == said, flush=True)
    os._exit(0)
_, ended = os.waitpid(child, 0)
again = store.get_records([s.key])
print("parent", again[s.key].data.tobytes() == said, flush=True)
sys.stdin.read()
"""
    with process(running, code) as made:
        assert line(made) == "child True"
        assert line(made) == "parent True"
        assert until(lambda: held(running) == (2, 0)), "the child's are given back, the parent's two are not"
        (parent,) = running.server.peers._peers.values()
        assert [*parent.leases] == [2, 4]  # after the reservation, and before and after the child's
    assert until(lambda: held(running) == (0, 0))


# -- faults -----------------------------------------------------------------------------------------------------------------


def test_a_server_that_says_nothing_costs_the_deadline_and_is_then_left_alone(folder: Path) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen(16)
        store = ServerStore(f"unix:{path}", deadline_s=0.2)
        began = monotonic()
        with pytest.raises(Unreachable, match="deadline"):
            store.has(["0" * 32])
        assert 0.15 < monotonic() - began < 2.0
        began = monotonic()
        with pytest.raises(Unreachable, match="breaker-open"):
            store.has(["0" * 32])
        assert monotonic() - began < 0.1
        assert not store._breaker.closed
    store.close()


def test_a_server_that_comes_back_is_found_again(start: Start) -> None:
    first = start(name="s")
    store, s = first.store(deadline_s=2.0), segment(50)
    store.put(s, kv_of(s))
    found = store.get(s.key)
    first.path.rename(first.path.with_name("old"))  # it is gone for who looks for it
    hang_up(first)
    second = start(name="s2")
    with pytest.raises(Unreachable):
        store.has([s.key])
    second.path.rename(first.path)

    def reached() -> bool:
        try:
            return store.has([s.key]) == set()
        except Unreachable:
            return False

    assert until(reached)
    assert store._breaker.closed
    t = segment(50, seed=1)
    assert store.put(t, kv_of(t))
    again = store.get(t.key)
    assert held(second) == (1, 0)
    assert found is not None
    assert equal(found, kv_of(s)), "what was read from the first one is readable still"
    numbers = {*next(iter(second.server.peers._peers.values())).leases}
    assert numbers == {2}  # after the reservation; the first server gave out the same
    del found
    gc.collect()
    store.has([t.key])
    second.settle()
    assert held(second) == (1, 0), "a lease of the first server's released one of the second's"
    assert again is not None
    assert equal(again, kv_of(t))
    store.close()


def test_a_write_is_not_committed_to_another_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is made anew between reserving and committing."""
    first, s = start(name="s"), segment(50)
    store = first.store(deadline_s=2.0)
    store.has([s.key])
    second = start(name="s2")
    real = Record.of(s, kv_of(s))

    class Slow(Record):
        @property
        def nbytes(self) -> int:
            return real.nbytes

    moved: list[bool] = []
    ask = store._connection("").ask

    def asked(request: p.Request, *arguments: Any, **options: Any) -> Any:
        if isinstance(request, p.Commit):
            first.path.unlink()
            second.path.rename(first.path)
            store._connection("").close()
            moved.append(True)
        return ask(request, *arguments, **options)

    monkeypatch.setattr(store._connection(""), "ask", asked)
    with pytest.raises(Unreachable, match="made-anew"):
        store.put(s, kv_of(s))
    assert moved
    assert held(second) == (0, 0)
    assert status(second)["tiers"]["memory"]["objects"] == 0
    store.close()


@pytest.mark.parametrize("place", [0.0, 0.001, 0.01, 0.3, 0.6, 0.999999])
def test_a_flipped_byte_is_a_miss(start: Start, place: float) -> None:
    """Anywhere in the record: prefix, header, tensors."""
    running = start()
    store, s = running.store(), segment(50)
    assert store.put(s, kv_of(s))
    slabs = running.server.library.slabs
    slot = slabs.pin(s.key)
    assert slot is not None
    slabs.unpin(slot.generation)
    slabs.arena.view(slot.offset, slot.nbytes)[int(place * slot.nbytes)] ^= 0x40
    assert store.index.look(s.ids, fingerprint="f").matches == []
    assert sum(store._counts.stats(0, 0, 0).faults.values()) == 1
    assert running.server.counters.damaged == 1
    assert store.get(s.key) is None
    assert s.key not in store
    assert slabs.has([s.key]) == set(), "the server has it still"
    assert store.put(s, kv_of(s))
    found = store.get(s.key)
    assert found is not None
    assert equal(found, kv_of(s))
    del found
    store.has([s.key])
    assert until(lambda: held(running) == (0, 0))
    slabs.check_integrity()
    store.close()


def _as_is(reply: dict[str, Any]) -> None: ...


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another key": lambda reply: [m.__setitem__(2, "0" * 32) for m in reply["matches"]],
    "another offset": lambda reply: [m.__setitem__(3, m[3] + 1) for m in reply["matches"]],
    "a negative offset": lambda reply: [m.__setitem__(3, m[3] - 50) for m in reply["matches"]],
    "another range": lambda reply: [m.__setitem__(0, m[0] + 1) for m in reply["matches"]],
    "a range behind the end": lambda reply: [m.__setitem__(1, m[1] + 5) for m in reply["matches"]],
    "a range before the beginning": lambda reply: [m.__setitem__(0, -3) for m in reply["matches"]],
    "an empty range": lambda reply: [m.__setitem__(1, m[0]) for m in reply["matches"]],
    "numbers that are none": lambda reply: [m.__setitem__(0, 1.5) for m in reply["matches"]],
    "offsets that are none": lambda reply: [m.__setitem__(3, None) for m in reply["matches"]],
    "matches twice": lambda reply: reply["matches"].extend(reply["matches"]),
    "matches that are none": lambda reply: reply.__setitem__("matches", [[1, 2]]),
    "no matches": lambda reply: reply.pop("matches"),
    "no objects": lambda reply: reply.__setitem__("objects", []),
    "objects that are none": lambda reply: reply.__setitem__("objects", [["a"]]),
    "another place": lambda reply: [o.__setitem__(1, o[1] + 64) for o in reply["objects"]],
    "a place outside": lambda reply: [o.__setitem__(1, 1 << 40) for o in reply["objects"]],
    "a size outside": lambda reply: [o.__setitem__(2, 1 << 40) for o in reply["objects"]],
    "a negative size": lambda reply: [o.__setitem__(2, -1) for o in reply["objects"]],
    "another record's place": lambda reply: reply["objects"][0].__setitem__(slice(1, 3), reply["objects"][1][1:3]),
    "no flight": lambda reply: reply.pop("flight"),
    "a flight that is none": lambda reply: reply.__setitem__("flight", []),
    "no list of what is declined": lambda reply: reply.__setitem__("declined", 3),
    "said to be exact": lambda reply: [m.__setitem__(4, True) for m in reply["matches"]],
    "nothing": dict.clear,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_server_is_not_believed(start: Start, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    """Whatever it says: matches are true, disjoint and in order, or there are none; nothing but CacheFault is raised."""
    running = start()
    store, kept = running.store(), [segment(50, 7, seed=1), segment(60, 0, seed=2)]
    for s in kept:
        store.put(s, kv_of(s))
    prompt = np.concatenate([segment(20, seed=9).ids, kept[0].ids, kept[1].ids])
    real = p.reply_of

    def lying(payload: bytes) -> dict[str, Any]:
        reply = real(payload)
        if "matches" in reply:
            assert len(reply["matches"]) == len(reply["objects"]) == 2
            LIES[lie](reply)
        return reply

    monkeypatch.setattr(p, "reply_of", lying)
    try:
        found = store.index.look(prompt, fingerprint="f")
    except CacheFault:
        found = None
    monkeypatch.undo()
    end = 0
    for match in found.matches if found else ():
        assert end <= match.start < match.end <= len(prompt)
        end = match.end
        assert 0 <= match.offset <= len(match.segment.ids) - match.tokens
        assert np.array_equal(match.segment.ids[match.offset : match.offset + match.tokens], prompt[match.start : match.end])
        assert not match.exact
        kv = store.get(match.segment.key)
        (s,) = (s for s in kept if s.key == match.segment.key)
        assert kv is not None
        assert equal(kv, kv_of(s))
    store.close()


def test_records_of_another_model_or_tenant_are_not_taken(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers with what is known of another fingerprint: the text is the same, the KV is not."""
    running = start()
    store, s = running.store(), segment(50)
    store.put(s, kv_of(s))
    library = running.server.library
    real = library.find_now
    monkeypatch.setattr(library, "find_now", lambda tenant, fingerprint, ids: real("", "f", ids))
    assert store.index.look(s.ids, fingerprint="f").matches
    for fingerprint, tenant in (("another", ""), ("f", "another")):
        with pytest.raises(CacheFault, match="malformed"):
            store.index.look(s.ids, fingerprint=fingerprint, tenant=tenant)
    store.close()


def test_another_protocol_is_refused_with_both_versions(start: Start) -> None:
    code = """
hello = p.Hello
p.Hello = lambda version, *rest: hello(9, *rest)
try:
    store.has([s.key])
except ValueError as refusal:
    print(type(refusal).__name__, refusal)
"""
    with process(start(), code) as made:
        assert re.search("InputError .* protocol 9; this server speaks 1", line(made))


def test_threads_share_a_client(start: Start) -> None:
    """Four threads put, get and look through one client into a server for four; whatever is read is what was put."""
    running, wrong = start(FOUR), list[object]()
    store, kept = running.store(deadline_s=10.0), [segment(50, seed=i) for i in range(8)]

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i in rng.integers(0, 8, 60):
            try:
                store.put(kept[i], kv_of(kept[i], seed=int(i)))
                j = int(rng.integers(0, 8))
                found = store.get(kept[j].key)
                if found is not None and not equal(found, kv_of(kept[j], seed=j)):
                    wrong.append(j)
                looked = store.index.look(kept[j].ids, fingerprint="f")
                assert looked.flight is not None
                store.index.land(looked.flight)
            except Exception as fault:  # noqa: BLE001  # of a thread
                wrong.append(fault)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    store.has([kept[0].key])
    assert until(lambda: held(running) == (0, 0))
    running.server.library.slabs.check_integrity()
    store.close()
