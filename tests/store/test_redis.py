"""The Redis tier on a real server: the contract of stores, damage, eviction, faults in bounded time; a dict as its model."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvcomm.errors import CacheFault, InputError
from kvcomm.store.base import Kept
from kvcomm.store.deadline import DEADLINE
from kvcomm.store.guarded import Guarded
from kvcomm.store.record import DAMAGED, OTHER_KEY, Record
from kvcomm.store.redis import RedisStore
from kvcomm.store.remote import FULL, INCOMPLETE, RemoteFault

pytestmark = pytest.mark.once

if TYPE_CHECKING:
    from tests.services import RedisServer

Made = Callable[..., Record]
CHUNK = 1024
LARGE = {"tokens": 40}  # about 5.5 KB: six chunks of 1024 bytes
names = (f"t{i}" for i in itertools.count())


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[RedisStore]:
    """In a namespace of its own, with small chunks."""
    made = RedisStore(redis_server.url, chunk_bytes=CHUNK, namespace=next(names))
    yield made
    made.close()


@pytest.fixture
def raw(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """What a bystander sees of the server."""
    with redis.Redis(port=redis_server.port, protocol=2) as client:
        yield client


def keys_of(raw: redis.Redis, store: RedisStore) -> set[str]:
    found: Any = raw.keys(f"{store._prefix}:*")
    return {key.decode() for key in found}


def value_of(raw: redis.Redis, key: str) -> bytes:
    value: Any = raw.get(key)
    return bytes(value)


def ttl(raw: redis.Redis, key: str) -> int:
    seconds: Any = raw.ttl(key)
    return int(seconds)


def same(a: Record, b: Record) -> bool:
    return a.data.tobytes() == b.data.tobytes()


@pytest.mark.parametrize("sizes", [{}, LARGE, {"tokens": 400, "dim": 64}], ids=["one chunk", "chunks", "many"])
def test_contract(store: RedisStore, record: Made, sizes: dict[str, int]) -> None:
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
    assert (stats.objects, stats.nbytes, stats.hits, stats.misses) == (1, a.nbytes, 1, 3)
    assert stats.limit_bytes > 0
    store.check_integrity()
    assert store.remove(a.key)
    assert not store.remove(a.key)
    assert store.nbytes == 0
    assert store.segments() == []


def test_tensors_come_back_as_they_were_put(store: RedisStore, made: Any) -> None:
    segment, kv = made(1, tokens=50)
    assert store.put(segment, kv)
    found = store.get(segment.key)
    assert found is not None
    assert (found.start, found.length) == (kv.start, kv.length)
    assert all(bool((a == b).all()) for a, b in zip((*found.keys, *found.values), (*kv.keys, *kv.values), strict=True))
    kv.values[1][0, 0, 0] = float("nan")
    with pytest.raises(CacheFault, match="NaN"):
        store.put(segment, kv)


def test_nothing_stays_behind(store: RedisStore, raw: redis.Redis, record: Made) -> None:
    """Neither of a removed record nor of one that was put twice."""
    a = record(0, **LARGE)
    store.put_record(a)
    once = len(keys_of(raw, store))
    assert once == -(-a.nbytes // CHUNK)
    store.put_record(a)
    assert len(keys_of(raw, store)) == once
    store.remove(a.key)
    assert keys_of(raw, store) == set()


def test_two_clients_see_each_other(redis_server: RedisServer, store: RedisStore, record: Made) -> None:
    """With other chunk sizes: how a record is cut is said by its head."""
    other = RedisStore(redis_server.url, chunk_bytes=3000, namespace=store._prefix.rpartition(":")[2])
    elsewhere = RedisStore(redis_server.url, namespace="elsewhere")
    a, b = record(0, **LARGE), record(1, **LARGE)
    store.put_record(a)
    other.put_record(b)
    for of in (store, other):
        found = of.get_records([a.key, b.key])
        assert same(found[a.key], a)
        assert same(found[b.key], b)
    assert elsewhere.get_records([a.key, b.key]) == {}
    assert other.remove(a.key)
    assert a.key not in store
    other.close()
    elsewhere.close()


@pytest.mark.parametrize("chunk", range(6))
def test_every_flipped_bit_is_a_miss(store: RedisStore, raw: redis.Redis, record: Made, chunk: int) -> None:
    """In 40 places of every chunk, the first of which bears the head: counted, removed, and can be put again."""
    a = record(0, **LARGE)
    rng = np.random.default_rng(chunk)
    for n in range(40):
        store.put_record(a)
        name = next(k for k in keys_of(raw, store) if (":r:" in k) == (chunk == 0) and (chunk == 0 or k.endswith(f":{chunk}")))
        value = bytearray(value_of(raw, name))
        at = n if n < 32 else int(rng.integers(0, len(value)))
        value[at % len(value)] ^= 1 << int(rng.integers(0, 8))
        raw.set(name, bytes(value))
        assert store.get_records([a.key]) == {}
        assert a.key not in store
        faults = store.counts.stats(0, 0, 0).faults
        assert sum(faults.values()) == n + 1
        assert set(faults) <= {DAMAGED, OTHER_KEY, INCOMPLETE, "other-version"}
        assert store.put_record(a)
    assert same(store.get_records([a.key])[a.key], a)


def test_cut_and_foreign_values_are_misses(store: RedisStore, raw: redis.Redis, record: Made) -> None:
    a, b = record(0, **LARGE), record(1, **LARGE)
    head = store._name(a.key)
    for damage in (
        lambda: raw.setrange(head, 4000, b"x"),  # longer
        lambda: raw.set(head, value_of(raw, head)[:100]),
        lambda: raw.set(head, b""),
        lambda: raw.set(head, b"anything at all, and more than a head has"),
        lambda: raw.set(head, value_of(raw, store._name(b.key))),  # another record
        lambda: (raw.delete(head), raw.hset(head, "a", "b")),
    ):
        store.put_record(a)
        store.put_record(b)
        damage()
        found = store.get_records([a.key, b.key])
        assert set(found) == {b.key}
        assert same(found[b.key], b)
        assert not raw.exists(head)
    assert store.counts.stats(0, 0, 0).faults == {DAMAGED: 6}


def test_missing_chunk(store: RedisStore, raw: redis.Redis, record: Made) -> None:
    """Each one: a miss, counted, removed. Where a put finds it first, it writes all of the record again."""
    a = record(0, **LARGE)
    for i in range(1, 6):
        store.put_record(a)
        raw.delete(next(k for k in keys_of(raw, store) if k.endswith(f":{i}")))
        assert store.get_records([a.key]) == {}
        assert keys_of(raw, store) == set()
        assert store.counts.stats(0, 0, 0).faults == {INCOMPLETE: i}
        store.put_record(a)
        raw.delete(next(k for k in keys_of(raw, store) if k.endswith(f":{i}")))
        assert store.put_record(a) == Kept(stored=True)
        assert same(store.get_records([a.key])[a.key], a)
        assert len(keys_of(raw, store)) == 6
        store.remove(a.key)


def test_a_writer_killed_anywhere(
    redis_server: RedisServer, raw: redis.Redis, record: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of its round trips: a reader finds nothing, or all of it; a later put completes it."""
    a = record(0, **LARGE)
    seen = set()
    for after in range(1, 9):
        store, reader = (RedisStore(redis_server.url, chunk_bytes=CHUNK, namespace=f"killed{after}") for _ in range(2))
        send, calls = store._send, itertools.count(1)

        def dying(commands: Any, send: Any = send, calls: Any = calls, after: int = after) -> Any:
            if next(calls) > after:
                raise KeyboardInterrupt
            return send(commands)

        monkeypatch.setattr(store, "_send", dying)
        try:
            store.put_record(a)
        except KeyboardInterrupt:
            assert reader.has([a.key]) == set()
            assert reader.get_records([a.key]) == {}
            assert all(0 < ttl(raw, key) <= 86_400 for key in keys_of(raw, store))
            seen.add("nothing")
        else:
            seen.add("all")
        assert reader.put_record(a)
        assert same(reader.get_records([a.key])[a.key], a)
        store.close()
        reader.close()
    assert seen == {"nothing", "all"}


def test_use_renews_the_time_to_live(redis_server: RedisServer, raw: redis.Redis, record: Made) -> None:
    store = RedisStore(redis_server.url, chunk_bytes=CHUNK, namespace="ttl", ttl_s=500)
    a = record(0, **LARGE)
    uses: tuple[Callable[[], object], ...] = (lambda: store.get_records([a.key]), lambda: store.put_record(a))
    store.put_record(a)
    store.put_notes({"ab": b"1"})
    every: tuple[Callable[[], object], ...] = (*uses, lambda: store.get_notes(["ab"]))
    for use in every:
        for key in keys_of(raw, store):
            raw.expire(key, 100)
        store.has([a.key])
        assert {ttl(raw, key) for key in keys_of(raw, store)} <= {99, 100}
        use()
        renewed = {key for key in keys_of(raw, store) if ttl(raw, key) > 400}
        assert renewed == {key for key in keys_of(raw, store) if (":n:" in key) == (use not in uses)}
    store.close()


def test_gone_when_its_time_is_up(redis_server: RedisServer, raw: redis.Redis, record: Made) -> None:
    store = RedisStore(redis_server.url, chunk_bytes=CHUNK, namespace="short", ttl_s=1)
    a = record(0, **LARGE)
    store.put_record(a)
    store.put_notes({"ab": b"1"})
    assert keys_of(raw, store)
    until = time.monotonic() + 20
    while keys_of(raw, store) and time.monotonic() < until:
        time.sleep(0.1)  # the server's clock cannot be moved
    assert store.get_records([a.key]) == {}
    assert store.get_notes(["ab"]) == {}
    store.close()


def test_round_trips(store: RedisStore, record: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at most for thirty records, one for has and for notes: pipelines that are executed."""
    large = [record(i, **LARGE) for i in range(15)]
    small = [record(i, tokens=1) for i in range(100, 115)]
    for r in (*large, *small):
        store.put_record(r)
    notes = {f"{i:x}": bytes(100) for i in range(500)}
    count = 0
    execute = redis.client.Pipeline.execute

    def counted(self: Any, raise_on_error: bool = True) -> Any:
        nonlocal count
        count += 1
        return execute(self, raise_on_error)

    monkeypatch.setattr(redis.client.Pipeline, "execute", counted)

    def trips(work: Callable[[], object]) -> int:
        nonlocal count
        count = 0
        work()
        return count

    keys = [r.key for r in (*large, *small)]
    assert trips(lambda: store.get_records(keys)) == 2
    assert trips(lambda: store.get_records([f"{i:032x}" for i in range(30)])) == 1
    assert trips(lambda: store.has(keys)) == 1
    assert trips(lambda: store.put_notes(notes)) == 1
    assert trips(lambda: store.get_notes(list(notes))) == 1
    assert len(store.get_records(keys)) == 30
    assert store.get_notes(list(notes)) == notes


def test_the_oldest_are_listed_first_and_strangers_not_at_all(store: RedisStore, raw: redis.Redis, record: Made) -> None:
    records = [record(i, tokens=30 * i + 1, start=9000 * (i == 2)) for i in range(4)]  # one with a header over the window
    for r in records:
        store.put_record(r)
    raw.mset({f"other:{i}": b"x" for i in range(2000)})
    raw.set(f"{store._prefix}:r:stranger", b"not a record")
    for at, i in enumerate((2, 0, 3, 1)):
        for name in (k for k in keys_of(raw, store) if records[i].key in k):
            raw.expire(name, 1000 + at)
    assert [s.key for s in store.segments()] == [records[i].key for i in (2, 0, 3, 1)]
    assert store.stats().nbytes == sum(r.nbytes for r in records)
    raw.delete(*[f"other:{i}" for i in range(2000)])


def test_killed_and_restarted(services: ModuleType, tmp_path: Path, record: Made) -> None:
    """Faults at once, in all calls; afterwards the same store works again, its pool full of dead connections."""
    with services.RedisServer(tmp_path) as server:
        store = RedisStore(server.url)
        a = record(0)
        store.put_record(a)
        server.kill()
        for call in calls(store, a):
            began = time.monotonic()
            with pytest.raises(RemoteFault) as caught:
                call()
            assert caught.value.reason == "unreachable"
            assert str(caught.value).startswith("redis: unreachable: ")
            assert time.monotonic() - began < 1
        server.start()
        assert store.get_records([a.key]) == {}
        assert store.put_record(a)
        assert same(store.get_records([a.key])[a.key], a)
        store.close()


def test_frozen(services: ModuleType, tmp_path: Path, record: Made) -> None:
    """A server that answers nothing: a fault after one timeout, and the late answers are nobody's."""
    with services.RedisServer(tmp_path) as server:
        store = RedisStore(server.url, timeout_s=0.2)
        a, b = record(0), record(1)
        store.put_record(a)
        server.freeze()
        for call in calls(store, b):
            began = time.monotonic()
            with pytest.raises(RemoteFault) as caught:
                call()
            assert caught.value.reason == "timeout"
            assert time.monotonic() - began < 1
        server.thaw()
        for _ in range(3):
            assert same(store.get_records([a.key])[a.key], a)
            assert store.get_notes(["ab"]) in ({}, {"ab": b"1"})  # a put that was given up may have happened
        store.close()


def calls(store: RedisStore, r: Record) -> list[Callable[[], object]]:
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


def test_a_server_that_drips_meets_the_deadline(services: ModuleType, redis_server: RedisServer, record: Made) -> None:
    """Every piece comes within the socket's timeout, and the whole would take minutes."""
    a = record(0, tokens=2000, dim=64)
    direct = RedisStore(redis_server.url, namespace="drip")
    direct.put_record(a)
    with services.Proxy(redis_server.port) as proxy:
        store = Guarded(RedisStore(f"redis://127.0.0.1:{proxy.port}", namespace="drip"), deadline_s=0.5)
        assert store.has([a.key]) == {a.key}
        proxy.delay_s, proxy.piece = 0.2, 1000
        began = time.monotonic()
        with pytest.raises(RemoteFault) as caught:
            store.get_records([a.key])
        assert caught.value.reason == DEADLINE
        assert time.monotonic() - began < 1
        proxy.delay_s = 0
        time.sleep(1.1)  # the breaker is open for a second
        assert same(store.get_records([a.key])[a.key], a)
        store.close()
    direct.close()


@pytest.mark.parametrize("policy", ["noeviction", "allkeys-lru"])
def test_full(services: ModuleType, tmp_path: Path, record: Made, policy: str) -> None:
    """Of a server with 8 MB: puts are refused by reason and leave nothing, or others leave; what is found is right."""
    with services.RedisServer(tmp_path, "--maxmemory", "8mb", "--maxmemory-policy", policy) as server:
        store = RedisStore(server.url, chunk_bytes=100_000)
        records = [record(i, tokens=1000, dim=32) for i in range(16)]  # about 1 MB each
        kept = [store.put_record(r) for r in records]
        found = {key: r for one in reversed(records) for key, r in store.get_records([one.key]).items()}
        assert all(same(found[r.key], r) for r in records if r.key in found)
        assert 0 < len(found) < 16
        stats = store.stats()
        assert stats.limit_bytes == 8 << 20
        if policy == "noeviction":
            assert set(kept) - {Kept(stored=True)} == {Kept(stored=False, reason=FULL)}
            assert stats.refused == {FULL: kept.count(Kept(stored=False, reason=FULL))}
            assert set(found) == {r.key for r, k in zip(records, kept, strict=True) if k}
            with redis.Redis(port=server.port) as raw:
                assert raw.dbsize() == sum(-(-r.nbytes // 100_000) for r in found.values())
            assert store.remove(next(iter(found)))
            assert not store.has([next(iter(found))])
        else:
            assert all(kept)
            assert stats.misses == 16 - len(found)
            assert set(stats.faults) <= {INCOMPLETE}
        store.check_integrity()
        store.close()


def test_passwords_are_not_told(services: ModuleType, tmp_path: Path, record: Made) -> None:
    secret = "s3cret/%:@word"
    quoted = "s3cret%2F%25%3A%40word"
    with services.RedisServer(tmp_path, "--requirepass", secret) as server:
        right = RedisStore(f"redis://:{quoted}@127.0.0.1:{server.port}/0")
        assert right.put_record(record(0))
        right.close()
        for url in (f"redis://:{quoted}x@127.0.0.1:{server.port}/0", server.url):
            wrong = RedisStore(url)
            with pytest.raises(RemoteFault) as caught:
                wrong.has(["ab"])
            assert caught.value.reason == "not-permitted"
            assert "cret" not in str(caught.value)
            wrong.close()
    for bad in (
        f"redis://:{quoted}@host:port/0",
        f"http://:{quoted}@host",
        f"redis://:{quoted}@[host/0",
        f"redis://:{quoted}@host/0?decode_responses=yes",
        f"redis://host/0?password={quoted}&retry=3",
        f"redis://:{quoted}@host/zero?db=x",
    ):
        with pytest.raises(InputError) as said:
            RedisStore(bad)
        assert "cret" not in str(said.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ttl_s": 0}, "ttl_s 0"),
        ({"timeout_s": 0.0}, "timeout_s 0.0"),
        ({"timeout_s": float("nan")}, "timeout_s nan"),
        ({"connections": 0}, "connections 0"),
        ({"chunk_bytes": 1023}, "1023"),
        ({"chunk_bytes": 512 << 20}, "536870912"),
        ({"namespace": "a:*"}, r"a:\*"),
    ],
)
def test_unusable_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        RedisStore("redis://127.0.0.1:1", **options)


def test_threads_and_clients_see_whole_records(redis_server: RedisServer, record: Made) -> None:
    """Two clients, four threads, puts and removes and gets of six records of several chunks: what is found is right."""
    records = [record(i, **LARGE) for i in range(6)]
    stores = [RedisStore(redis_server.url, chunk_bytes=c, namespace="threads", timeout_s=5) for c in (CHUNK, 2000)]
    wrong: list[object] = []
    hits = [0] * 4

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        store = stores[seed % 2]
        try:
            for i, j, what in zip(*(rng.integers(0, n, 150) for n in (6, 6, 4)), strict=True):
                if what == 0:
                    store.remove(records[i].key)
                elif what == 1:
                    store.put_record(records[i])
                for key, found in store.get_records([records[i].key, records[j].key]).items():
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
    for store in stores:
        assert set(store.counts.stats(0, 0, 0).faults) <= {INCOMPLETE}
        store.close()


note_names = st.text("0123456789abcdef", min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.dictionaries(note_names, st.binary(max_size=300), max_size=20), max_size=4), st.lists(note_names, max_size=10)
)
def test_notes_are_a_dict(redis_server: RedisServer, puts: list[dict[str, bytes]], asked: list[str]) -> None:
    store = RedisStore(redis_server.url, namespace=next(names))
    model: dict[str, bytes] = {}
    for notes in puts:
        store.put_notes(notes)
        model |= notes
    wanted = [*asked, *model]
    assert store.get_notes(wanted) == {name: model[name] for name in wanted if name in model}
    store.close()


def test_altered_notes_are_left_out(store: RedisStore, raw: redis.Redis) -> None:
    store.put_notes({"aa": b"1", "bb": b"2", "cc": b"3"})
    first: Any = raw.get(f"{store._prefix}:n:aa")
    raw.set(f"{store._prefix}:n:bb", first)  # under another name
    raw.set(f"{store._prefix}:n:cc", b"short")
    assert store.get_notes(["aa", "bb", "cc"]) == {"aa": b"1"}
    assert store.counts.stats(0, 0, 0).faults == {DAMAGED: 2}
    assert store.segments() == []


class RedisModel(RuleBasedStateMachine):
    """`RedisStore` beside a dict."""

    store: RedisStore
    records: list[Record]

    def __init__(self) -> None:
        super().__init__()
        self.store = RedisStore(self.url, chunk_bytes=CHUNK, namespace=next(names))
        self.model: dict[str, Record] = {}

    @rule(i=st.integers(0, 5))
    def put(self, i: int) -> None:
        assert self.store.put_record(self.records[i]) == Kept(stored=True)
        self.model[self.records[i].key] = self.records[i]

    @rule(i=st.integers(0, 5))
    def remove(self, i: int) -> None:
        key = self.records[i].key
        assert self.store.remove(key) == (self.model.pop(key, None) is not None)

    @rule(some=st.lists(st.integers(0, 5)))
    def get(self, some: list[int]) -> None:
        keys = [self.records[i].key for i in some]
        found = self.store.get_records(keys)
        assert set(found) == set(keys) & set(self.model)
        assert all(same(found[key], self.model[key]) for key in found)
        assert self.store.has(keys) == set(found)

    @invariant()
    def agrees(self) -> None:
        assert {s.key for s in self.store.segments()} == set(self.model)
        assert self.store.nbytes == sum(r.nbytes for r in self.model.values())

    def teardown(self) -> None:
        self.store.close()

    url = ""


def test_model(redis_server: RedisServer, record: Made) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    kind = type("Bound", (RedisModel,), {"url": redis_server.url, "records": [record(i, tokens=1 + 9 * i) for i in range(6)]})
    run_state_machine_as_test(kind, settings=settings(max_examples=25, stateful_step_count=15, deadline=None))
