"""The contract of stores, by every implementation; the memory store against a plain list of rows as its model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store import Kept, MemoryStore, NullStore, Quotas, Store, StoreStats
from kvcomm.store.base import ALTERED, TOO_LARGE
from kvcomm.store.eviction import OVER_QUOTA

LAYERS, HEADS, DIM = 2, 2, 4
TOKEN_BYTES = LAYERS * 2 * HEADS * DIM * 4


def segment(tokens: int, start: int = 0, *, seed: int = 0, tenant: str = "", cost_ms: float | None = None) -> Segment:
    ids = np.random.default_rng(seed).integers(1, 1000, start + tokens).astype(np.int32)
    return Segment(ids[start:], ids[:start], "f", tenant, cost_ms=cost_ms)


def kv_of(s: Segment, fill: float | None = None) -> SegmentKV:
    """KV of the right shape; `fill` in every element, else random."""

    def tensor() -> torch.Tensor:
        t = torch.randn(HEADS, len(s.ids), DIM)
        return t if fill is None else t.fill_(fill)

    keys = tuple(tensor() for _ in range(LAYERS))
    return SegmentKV(keys, tuple(tensor() for _ in range(LAYERS)), s.start, s.start + len(s.ids))


def equal(a: SegmentKV, b: SegmentKV) -> bool:
    tensors = zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    return (a.start, a.length) == (b.start, b.length) and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture(params=[MemoryStore, NullStore])
def store(request: pytest.FixtureRequest) -> Store:
    """A new store of every kind."""
    return MemoryStore(1 << 20) if request.param is MemoryStore else NullStore()


def test_contract(store: Store) -> None:
    """What the protocol promises whatever the limit: put, get, remove, membership, bytes and counts agree."""
    s = segment(5, 3)
    kv = kv_of(s)
    assert store.get(s.key) is None
    kept = store.put(s, kv)
    assert bool(kept) == kept.stored == (s.key in store) == (store.nbytes == kv.nbytes) == bool(store.segments())
    assert (kept.reason is None) == kept.stored
    found = store.get(s.key)
    assert (found is not None) == kept.stored
    assert found is None or equal(found, kv)
    store.check_integrity()
    assert store.remove(s.key) == kept.stored
    assert not store.remove(s.key)
    assert s.key not in store
    assert store.nbytes == 0
    assert store.segments() == []
    assert store.stats().objects == 0
    assert store.stats().misses == (1 if kept else 2)


def broken() -> dict[str, tuple[Segment, SegmentKV]]:
    s = segment(5, 3)
    kv = kv_of(s)

    def with_element(value: float) -> SegmentKV:
        values = tuple(v.clone() for v in kv.values)
        values[1][1, 4, 3] = value
        return replace(kv, values=values)

    other_heads = (kv.values[0], kv.values[1][:1])
    return {
        "NaN": (s, with_element(float("nan"))),
        "infinity": (s, with_element(float("-inf"))),
        r"keys are \[2, 6, 4\].*5 tokens": (s, replace(kv, keys=kv_of(segment(6)).keys)),
        r"values are \[1, 2, 5, 4\]": (s, replace(kv, values=tuple(v[None] for v in kv.values))),
        "2 layers of keys and 1 of values": (s, replace(kv, values=kv.values[:1])),
        "0 layers": (s, replace(kv, keys=(), values=())),
        "2 heads of keys and 1 of values": (s, replace(kv, values=other_heads)),
        "torch.int64": (s, replace(kv, keys=tuple(k.long() for k in kv.keys))),
        "starts at position 4, the segment at 3": (s, replace(kv, start=4)),
        "7 tokens cannot end at position 8": (s, replace(kv, length=7)),
        "no tokens": (segment(0), kv),
    }


@pytest.mark.parametrize("says", broken())
def test_unusable_kv_is_refused(store: Store, says: str) -> None:
    s, kv = broken()[says]
    with pytest.raises(CacheFault, match=says):
        store.put(s, kv)
    assert s.key not in store
    store.check_integrity()


def test_what_is_used_as_often_leaves_in_the_order_of_last_use() -> None:
    a, b, c, d = (segment(10, seed=i) for i in range(4))
    store = MemoryStore(30 * TOKEN_BYTES)
    for s in (a, b, c):
        assert store.put(s, kv_of(s)) == Kept(stored=True)
    store.get(b.key)
    assert store.put(a, kv_of(a)) == Kept(stored=True)  # kept already: used again
    assert c.key in store  # looking is not using
    assert [s.key for s in store.segments()] == [c.key, b.key, a.key]
    assert store.put(d, kv_of(d)) == Kept(stored=True, evicted=(c.key,))
    assert [s.key for s in store.segments()] == [b.key, a.key, d.key], "d is worth as much: the clock moved on by one use"
    large = segment(30, seed=9)
    assert store.put(large, kv_of(large)) == Kept(stored=True, evicted=(b.key, a.key, d.key))
    assert store.stats().evicted == 4
    store.check_integrity()


def test_what_saves_most_per_byte_stays() -> None:
    dear, cheap = segment(5, seed=1, cost_ms=50.0), segment(5, seed=2, cost_ms=5.0)
    store = MemoryStore(10 * TOKEN_BYTES)
    store.put(dear, kv_of(dear))
    store.put(cheap, kv_of(cheap))
    store.get(cheap.key)
    other = segment(5, seed=3, cost_ms=5.0)
    assert store.put(other, kv_of(other)).evicted == (cheap.key,), "two uses of 5 ms are less than one of 50"


def test_a_tenant_over_its_quota_evicts_its_own() -> None:
    store = MemoryStore(100 * TOKEN_BYTES, Quotas(default=20 * TOKEN_BYTES))
    mine, others = ([segment(10, seed=i, tenant=tenant) for i in range(3)] for tenant in ("me", "other"))
    for s in (*others[:2], *mine[:2]):
        assert store.put(s, kv_of(s)) == Kept(stored=True)
    assert store.put(mine[2], kv_of(mine[2])) == Kept(stored=True, evicted=(mine[0].key,))
    large = segment(21, tenant="me")
    assert store.put(large, kv_of(large)) == Kept(stored=False, reason=OVER_QUOTA)
    assert store.stats().refused == {OVER_QUOTA: 1}
    assert store.stats().objects == 4
    store.check_integrity()


def test_too_large_is_refused_for_a_named_reason_and_evicts_nothing() -> None:
    a, large = segment(10), segment(11, seed=1)
    store = MemoryStore(10 * TOKEN_BYTES)
    store.put(a, kv_of(a))
    assert store.put(large, kv_of(large)) == Kept(stored=False, reason=TOO_LARGE)
    assert [s.key for s in store.segments()] == [a.key]
    limit = 10 * TOKEN_BYTES
    assert store.stats() == StoreStats(objects=1, nbytes=limit, limit_bytes=limit, refused={TOO_LARGE: 1})


def test_equal_text_behind_other_text_is_another_object() -> None:
    s = segment(5, 3)
    elsewhere = Segment(s.ids, s.context[::-1].copy(), s.fingerprint)
    store = MemoryStore(1 << 20)
    store.put(s, kv_of(s, 1.0))
    assert elsewhere.key not in store
    store.put(elsewhere, kv_of(elsewhere, 2.0))
    found = store.get(s.key)
    assert found is not None
    assert equal(found, kv_of(s, 1.0))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_kv_that_was_written_to_is_a_miss(layer: int) -> None:
    """Through a kept view of the tensor that was put, and through what get returned."""
    s = segment(5)
    for through_get in (False, True):
        store = MemoryStore(1 << 20)
        kv = kv_of(s)
        store.put(s, kv)
        found = store.get(s.key)
        assert found is not None
        (found if through_get else kv).values[layer][0, 1] = float("nan")
        assert store.get(s.key) is None
        assert s.key not in store
        assert store.stats().faults == {ALTERED: 1}
        assert store.put(s, kv_of(s))
        store.check_integrity()


def test_the_bound_holds_for_views_into_larger_memory() -> None:
    """A slice of a cache is copied: it neither keeps the cache alive nor changes with it. Whole tensors are not copied."""
    s = segment(5)
    cache = torch.randn(2 * LAYERS, HEADS, 1000, DIM)
    parts = [layer[:, 10:15] for layer in cache]
    before = [part.clone() for part in parts]
    store = MemoryStore(1 << 20)
    store.put(s, SegmentKV(tuple(parts[:LAYERS]), tuple(parts[LAYERS:]), 0, 5))
    cache.zero_()
    found = store.get(s.key)
    assert found is not None
    assert all(torch.equal(a, b) for a, b in zip((*found.keys, *found.values), before, strict=True))
    store.check_integrity()  # compares the bytes that are held with the bytes that are counted
    whole, kv = segment(6), kv_of(segment(6))
    store.put(whole, kv)
    kept = store.get(whole.key)
    assert kept is not None
    assert [t.data_ptr() for t in kept.keys] == [t.data_ptr() for t in kv.keys]


def test_kv_made_under_inference_mode_is_kept() -> None:
    s = segment(5)
    with torch.inference_mode():
        kv = kv_of(s)
    store = MemoryStore(1 << 20)
    assert store.put(s, kv)
    assert store.get(s.key) is not None


def test_negative_limit_is_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        MemoryStore(-1)


def test_threads_see_whole_objects() -> None:
    """Four threads put and get eight segments in a store for five: every object read is the one that was put under its key."""
    segments = [segment(10, seed=i) for i in range(8)]
    store = MemoryStore(50 * TOKEN_BYTES)
    wrong: list[object] = []

    def work(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 8, 300):
            store.put(segments[i], kv_of(segments[i], float(i)))
            found = store.get(segments[(i * 5 + seed) % 8].key)
            if found is not None and found.keys[0][0, 0, 0] != (i * 5 + seed) % 8:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    store.check_integrity()
    assert store.stats().hits > 0
    assert store.stats().evicted > 0


@dataclass
class Row:
    """What the model knows of one object."""

    segment: Segment
    cost_ms: float
    uses: int
    priority: float
    used: int


class MemoryStoreModel(RuleBasedStateMachine):
    """`MemoryStore` beside a list of rows; the least (priority, last use) is looked for among all of them."""

    segments = [segment(t, seed=t, tenant="ab"[t % 2], cost_ms=float(c)) for t, c in enumerate((8, 1, 2, 2, 9, 0, 30, 3), 1)]  # noqa: RUF012  # never written
    quota = 9  # tokens of tenant a

    def __init__(self) -> None:
        super().__init__()
        self.store = MemoryStore(14 * TOKEN_BYTES, Quotas(tenants={"a": self.quota * TOKEN_BYTES}))
        self.rows: list[Row] = []
        self.clock = 0.0
        self.now = 0

    def used(self, row: Row) -> None:
        self.now += 1
        row.uses, row.used = row.uses + 1, self.now
        row.priority = self.clock + row.uses * (row.cost_ms / (len(row.segment.ids) * TOKEN_BYTES))

    def row(self, s: Segment) -> Row | None:
        return next((row for row in self.rows if row.segment is s), None)

    def leave(self, rows: list[Row]) -> str:
        least = min(rows, key=lambda row: (row.priority, row.used))
        self.rows.remove(least)
        self.clock = max(self.clock, least.priority)
        return least.segment.key

    def tokens(self, tenant: str) -> int:
        return sum(len(row.segment.ids) for row in self.rows if row.segment.tenant in tenant)

    @rule(s=st.sampled_from(segments))
    def put(self, s: Segment) -> None:
        kept = self.store.put(s, kv_of(s, float(len(s.ids))))
        if (row := self.row(s)) is not None:
            self.used(row)
            assert kept == Kept(stored=True)
            return
        gone = []
        while s.tenant == "a" and self.tokens("a") + len(s.ids) > self.quota:
            gone.append(self.leave([row for row in self.rows if row.segment.tenant == "a"]))
        while self.tokens("ab") + len(s.ids) > 14:
            gone.append(self.leave(self.rows))
        self.rows.append(Row(s, s.cost_ms or 0.0, 0, 0.0, 0))
        self.used(self.rows[-1])
        assert kept == Kept(stored=True, evicted=tuple(gone))

    @rule(s=st.sampled_from(segments))
    def get(self, s: Segment) -> None:
        found, row = self.store.get(s.key), self.row(s)
        assert (found is not None) == (row is not None)
        if found is not None and row is not None:
            assert equal(found, kv_of(s, float(len(s.ids))))
            self.used(row)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        assert self.store.remove(row.segment.key)
        self.rows.remove(row)

    @invariant()
    def agrees(self) -> None:
        self.store.check_integrity()
        order = sorted(self.rows, key=lambda row: (row.priority, row.used))
        assert [s.key for s in self.store.segments()] == [row.segment.key for row in order]
        assert self.store.nbytes == TOKEN_BYTES * self.tokens("ab")


TestMemoryStoreModel = MemoryStoreModel.TestCase
TestMemoryStoreModel.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
