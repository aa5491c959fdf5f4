"""The pool of anchors: against a plain list as its model, under threads, with rules that refuse and listeners that fail."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.anchors import (
    Admitted,
    Anchor,
    AnchorPool,
    Eviction,
    LeastRecentlyUsed,
    LeastUsedOfOldest,
    Novel,
    PoolStats,
    SlotKey,
)
from kvcomm.anchors.admission import MALFORMED, NEAR_DUPLICATE, NON_FINITE
from kvcomm.anchors.base import DUPLICATE, OTHER_CODEC, TOO_LARGE
from kvcomm.anchors.eviction import Held
from kvcomm.codecs.base import Kind, Packed, PackedKV
from kvcomm.errors import InputError
from kvcomm.segments import Ids

CHANNELS, LAYERS = 4, 2


def ids(*values: int) -> Ids:
    return np.asarray(values, dtype=np.int32)


def packed(tokens: int, fill: float, codec: str = "fake") -> PackedKV:
    def layers() -> tuple[Packed, ...]:
        return tuple(Packed(tokens, CHANNELS, {"x": torch.full((tokens, CHANNELS), fill)}) for _ in range(LAYERS))

    return PackedKV(codec, layers(), layers())


def make(i: int, slot: str = "s", tokens: int = 1, fingerprint: str = "f", tenant: str = "") -> Anchor:
    """Anchor number i: its own text, context features and deviation; two contexts of two and three tokens."""
    return Anchor(
        slot=slot,
        ids=np.full(tokens, i, dtype=np.int32),
        base=packed(tokens, 1.0),
        deviation=packed(tokens, float(i)),
        context=torch.tensor([1.0, float(i)]),
        producer_context=ids(1, 2),
        consumer_context=ids(1, 2, 3),
        fingerprint=fingerprint,
        tenant=tenant,
    )


NBYTES = make(0).nbytes  # of an anchor of one token


def anchors(n: int) -> list[Anchor]:
    return [make(i) for i in range(n)]


def filled(n: int, **options: object) -> AnchorPool:
    pool = AnchorPool(1 << 20, **options)  # type: ignore[arg-type]  # checked by the pool's tests themselves
    for anchor in anchors(n):
        assert pool.add(anchor)
    return pool


class Log:
    """A listener that writes down what it is told; raises when told of one of `bad`."""

    def __init__(self, bad: Iterable[str] = ()) -> None:
        self.events: list[tuple[str, str]] = []
        self.bad = set(bad)

    def learn(self, anchor: Anchor) -> None:
        self._told("learn", anchor)

    def forget(self, anchor: Anchor) -> None:
        self._told("forget", anchor)

    def _told(self, event: str, anchor: Anchor) -> None:
        self.events.append((event, anchor.key))
        if anchor.key in self.bad:
            raise ValueError(event)

    def known(self) -> list[str]:
        """Keys learned and not forgotten, in order."""
        out: list[str] = []
        for event, key in self.events:
            if event == "learn":
                assert key not in out
                out.append(key)
            else:
                out.remove(key)
        return out


def test_life_of_an_anchor() -> None:
    pool, a = AnchorPool(1 << 20), make(1)
    assert pool.match("s", "f") == ()
    assert pool.add(a) == Admitted(kept=True)
    assert pool.match("s", "f") == (a,) == pool.anchors()
    assert a.key in pool
    assert pool.add(make(1)) == Admitted(kept=False, reason=DUPLICATE)
    pool.use([a.key, "gone", a.key])
    slot = SlotKey("s", "f")
    assert pool.slots() == (slot,)
    assert pool.stats() == PoolStats(1, a.nbytes, 1 << 20, {slot: 1}, admitted=1, uses=2, refused={DUPLICATE: 1})
    pool.check_integrity()
    assert pool.remove(a.key)
    assert not pool.remove(a.key)
    assert (len(pool), pool.nbytes, pool.slots(), pool.match("s", "f")) == (0, 0, (), ())
    assert pool.stats().removed == 1
    assert pool.stats().evicted == 0
    pool.check_integrity()


def test_models_tenants_and_slots_are_apart() -> None:
    """The same observation under every other identity is another anchor; no match shows what belongs elsewhere."""
    pool = AnchorPool(1 << 20, per_slot=1)
    kinds = [(s, f, t) for s in ("s", "r") for f in ("f", "g") for t in ("", "x")]
    for s, f, t in kinds:
        assert pool.add(make(1, s, fingerprint=f, tenant=t)) == Admitted(kept=True)  # nobody else's place is taken
    for s, f, t in kinds:
        (found,) = pool.match(s, f, t)
        assert (found.slot, found.fingerprint, found.tenant) == (s, f, t)
    assert set(pool.slots()) == set(kinds)
    pool.check_integrity()


def test_bounds_per_slot_and_in_bytes() -> None:
    a, b, c, d = (make(i) for i in range(4))
    pool = AnchorPool(3 * NBYTES, per_slot=2)
    pool.add(a)
    pool.add(b)
    assert pool.add(c) == Admitted(kept=True, evicted=(a.key,))
    elsewhere = [make(i, "r") for i in range(2)]
    assert pool.add(elsewhere[0]) == Admitted(kept=True)
    assert pool.add(elsewhere[1]) == Admitted(kept=True, evicted=(b.key,))  # of any slot: the bytes are shared
    assert pool.add(d) == Admitted(kept=True, evicted=(c.key,))
    assert pool.match("s", "f") == (d,)
    assert pool.nbytes == 3 * NBYTES
    large = make(9, tokens=4)
    assert pool.add(large) == Admitted(kept=False, reason=TOO_LARGE)
    assert len(pool) == 3
    wide = make(8, tokens=2)
    assert NBYTES < wide.nbytes < 2 * NBYTES
    assert pool.add(wide) == Admitted(kept=True, evicted=tuple(x.key for x in elsewhere))
    assert pool.match("s", "f") == (d, wide)
    pool.check_integrity()


def test_both_bounds_at_once_take_no_more_than_needed() -> None:
    """An anchor that its slot makes room for in number and in bytes costs nobody else's."""
    pool = AnchorPool(3 * NBYTES, per_slot=2)
    old, a, b = make(7, "r"), make(1), make(2)
    for each in (old, a, b):
        pool.add(each)
    assert pool.add(make(3)) == Admitted(kept=True, evicted=(a.key,))
    assert old.key in pool


def with_part(anchor: Anchor, value: float, dtype: torch.dtype = torch.float32) -> Anchor:
    """`anchor` with `value` in one element of the last layer's packed values."""
    x = torch.ones(anchor.tokens, CHANNELS)
    x[-1, -1] = value
    last = Packed(anchor.tokens, CHANNELS, {"x": x.to(dtype)})
    return replace(anchor, deviation=replace(anchor.deviation, values=(anchor.deviation.values[0], last)))


def unsound() -> dict[str, tuple[Anchor, str]]:
    a = make(1, tokens=2)
    return {
        "NaN": (with_part(a, float("nan")), NON_FINITE),
        "infinity": (with_part(a, float("-inf")), NON_FINITE),
        "NaN in half precision": (with_part(a, float("nan"), torch.bfloat16), NON_FINITE),
        "NaN in 8 bits": (with_part(a, float("nan"), torch.float8_e4m3fn), NON_FINITE),
        "NaN in the base": (replace(a, base=with_part(a, float("nan")).deviation), NON_FINITE),
        "NaN in the context": (replace(a, context=torch.tensor([0.0, float("nan")])), NON_FINITE),
        "no tokens": (make(1, tokens=0), MALFORMED),
        "base of other tokens": (replace(a, base=packed(3, 1.0)), MALFORMED),
        "deviation of other tokens": (replace(a, deviation=packed(1, 1.0)), MALFORMED),
        "layers missing": (replace(a, base=replace(a.base, values=a.base.values[:1])), MALFORMED),
        "no layers": (replace(a, base=PackedKV("fake", (), ()), deviation=PackedKV("fake", (), ())), MALFORMED),
    }


@pytest.mark.parametrize("name", unsound())
def test_unsound_anchors_are_refused(name: str) -> None:
    anchor, reason = unsound()[name]
    pool = AnchorPool(1 << 20)
    assert pool.add(anchor) == Admitted(kept=False, reason=reason)
    assert len(pool) == 0
    assert pool.stats().refused == {reason: 1}
    pool.check_integrity()


def test_integer_parts_are_sound() -> None:
    a = with_part(make(1, tokens=2), 3.0, torch.uint8)
    assert AnchorPool(1 << 20).add(a)


class FakeCodec:
    name = "fake"

    def pack(self, x: torch.Tensor, kind: Kind) -> Packed:
        return Packed(x.shape[0], x.shape[1], {"x": x.clone()})

    def unpack(self, packed: Packed) -> torch.Tensor:
        return packed.parts["x"]


def test_a_pool_with_a_codec_takes_no_other() -> None:
    pool = AnchorPool(1 << 20, codec=FakeCodec())
    assert pool.add(make(1))
    assert pool.add(replace(make(2), base=packed(1, 1.0, "int4"))) == Admitted(kept=False, reason=OTHER_CODEC)
    assert pool.add(replace(make(2), deviation=packed(1, 1.0, "int4"))).reason == OTHER_CODEC


def test_novel_refuses_what_is_nearly_known() -> None:
    """Only the same text over the same base, behind nearly the same context."""
    pool = AnchorPool(1 << 20, admission=Novel(distance=0.1))
    a = replace(make(1), context=torch.tensor([10.0, 0.0]))
    assert pool.add(a)
    near = replace(a, consumer_context=ids(4), context=torch.tensor([10.0, 0.9]))
    assert pool.add(near) == Admitted(kept=False, reason=NEAR_DUPLICATE)
    assert pool.add(replace(near, context=torch.tensor([10.0, 1.2])))
    assert pool.add(replace(near, ids=ids(2)))
    assert pool.add(replace(near, producer_context=ids(5)))
    assert pool.add(replace(near, slot="r"))
    assert pool.add(replace(near, consumer_context=ids(6), context=torch.tensor([10.0])))  # other features: not comparable
    zero = replace(make(3), context=torch.zeros(2))
    assert pool.add(zero)
    assert pool.add(replace(zero, consumer_context=ids(4))).reason == NEAR_DUPLICATE
    pool.check_integrity()


def test_least_used_of_the_oldest() -> None:
    pool = filled(4, per_slot=4, eviction=LeastUsedOfOldest(3))
    a, b, c, d = pool.anchors()
    pool.use([a.key, a.key, b.key, c.key])
    assert pool.add(make(4)).evicted == (b.key,)  # d is unused, but not among the oldest three; c is as used, but newer
    pool.use([c.key, c.key, d.key, d.key, d.key])
    assert pool.add(make(5)).evicted == (a.key,)


def test_least_recently_used() -> None:
    pool = filled(3, per_slot=3, eviction=LeastRecentlyUsed())
    a, b, c = pool.anchors()
    pool.use([b.key, a.key])
    assert pool.add(make(3)).evicted == (c.key,)
    assert pool.add(make(4)).evicted == (b.key,)
    assert pool.match("s", "f")[0] is a  # uses change who leaves, not the order


class Stubborn:
    """Chooses what it was not offered."""

    def victim(self, held: Iterable[Held]) -> Held:
        return Held(make(99), uses=0, used_at=0)


def test_a_wrong_rule_changes_nothing() -> None:
    pool = filled(2, per_slot=2, eviction=Stubborn())
    with pytest.raises(AssertionError, match="not offered"):
        pool.add(make(2))
    assert len(pool) == 2
    pool.check_integrity()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: AnchorPool(-1), "limit_bytes is -1"),
        (lambda: AnchorPool(1, per_slot=0), "per_slot is 0"),
        (lambda: LeastUsedOfOldest(0), "n is 0"),
        (lambda: Novel(float("nan")), "distance is nan"),
    ],
)
def test_unusable_options_are_named(call: type, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()


def test_listeners_are_told_in_order() -> None:
    """What is kept when they come, then every change; those that leave before the one that they make room for."""
    early, late = Log(), Log()
    pool = AnchorPool(1 << 20, per_slot=2)
    pool.subscribe(early)
    a, b, c, d = anchors(4)
    for each in (a, b, c):
        pool.add(each)
    pool.subscribe(late)
    pool.add(c)
    pool.remove(b.key)
    pool.add(d)
    expected = [("learn", a.key), ("learn", b.key), ("forget", a.key), ("learn", c.key), ("forget", b.key), ("learn", d.key)]
    assert early.events == expected
    assert late.events == [("learn", b.key), ("learn", c.key), ("forget", b.key), ("learn", d.key)]
    assert early.known() == late.known() == [c.key, d.key] == [x.key for x in pool.anchors()]


def test_a_failing_listener_harms_nobody() -> None:
    a, b, c = anchors(3)
    pool = AnchorPool(1 << 20, per_slot=2)
    bad, good = Log(bad=[a.key]), Log()
    pool.subscribe(bad)
    pool.subscribe(good)
    for each in (a, b):
        assert pool.add(each) == Admitted(kept=True)
    assert pool.add(c) == Admitted(kept=True, evicted=(a.key,))
    assert bad.events == good.events  # told to forget what it failed to learn
    assert pool.stats().faults == {"learn: ValueError": 1, "forget: ValueError": 1}
    assert [x.key for x in pool.anchors()] == [b.key, c.key]
    pool.check_integrity()
    pool.subscribe(Log(bad=[b.key]))
    assert pool.stats().faults == {"learn: ValueError": 2, "forget: ValueError": 1}


def test_a_listener_may_read_the_pool_but_not_change_it() -> None:
    pool, seen = AnchorPool(1 << 20), []

    class Meddler:
        def learn(self, anchor: Anchor) -> None:
            assert pool.match("s", "f") == (anchor,)
            pool.use([anchor.key])
            seen.append(pool.stats().anchors)
            pool.remove(anchor.key)

        def forget(self, anchor: Anchor) -> None:
            seen.append(-1)

    pool.subscribe(Meddler())
    assert pool.add(make(1))
    assert seen == [1]
    assert pool.stats().faults == {"learn: InputError": 1}
    assert pool.remove(make(1).key)  # and the pool goes on
    pool.check_integrity()


def test_the_bound_holds_for_views_into_larger_memory() -> None:
    """A column block of a large matrix is copied; it neither keeps the matrix alive nor changes with it."""
    large, features = torch.ones(3, 1000), torch.ones(50, 2)
    column = Packed(3, CHANNELS, {"x": large[:, 10 : 10 + CHANNELS]})
    anchor = replace(make(1, tokens=3), context=features[7])
    anchor = replace(anchor, base=PackedKV("fake", (column,) * LAYERS, (column,) * LAYERS))
    pool = AnchorPool(1 << 20)
    pool.add(anchor)
    large.zero_()
    features.zero_()
    (kept,) = pool.match("s", "f")
    assert kept.key == anchor.key
    assert torch.equal(kept.base.keys[0].parts["x"], torch.ones(3, CHANNELS))
    assert torch.equal(kept.context, torch.ones(2))
    pool.check_integrity()  # compares the bytes that are held with the bytes that are counted
    assert pool.nbytes == anchor.nbytes


def test_readers_see_one_moment_while_another_writes() -> None:
    """Anchors come in by number: every match is an unbroken run of numbers, never empty, and in bounds."""
    pool, known = AnchorPool(1 << 20, per_slot=4, eviction=LeastUsedOfOldest(1)), Log()
    pool.subscribe(known)
    pool.add(make(0))
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            found = pool.match("s", "f")
            numbers = [int(anchor.ids[0]) for anchor in found]
            if not 1 <= len(numbers) <= 4 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                wrong.append(numbers)
            pool.use(anchor.key for anchor in found)
            if pool.nbytes > 4 * NBYTES or len(pool.stats().per_slot) > 1:
                wrong.append([-1])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for thread in readers:
        thread.start()
    for i in range(1, 300):
        pool.add(make(i))
    done.set()
    for thread in readers:
        thread.join()
    assert wrong == []
    assert known.known() == [anchor.key for anchor in pool.anchors()]
    pool.check_integrity()


def test_readers_do_not_wait_for_a_slow_listener() -> None:
    pool, busy, go_on = filled(1), threading.Event(), threading.Event()

    class Slow(Log):
        def learn(self, anchor: Anchor) -> None:
            if int(anchor.ids[0]) == 1:
                busy.set()
                assert go_on.wait(10)

    pool.subscribe(Slow())
    writer = threading.Thread(target=pool.add, args=(make(1),))
    writer.start()
    assert busy.wait(10)
    assert len(pool.match("s", "f")) == 2
    pool.use([make(0).key])
    assert pool.stats().uses == 1
    assert len(pool.anchors()) == 2
    go_on.set()
    writer.join()


def test_writers_take_turns() -> None:
    """Four threads add and remove; the listener, called without a lock of its own, ends up with what the pool holds."""
    pool, known = AnchorPool(9 * NBYTES, per_slot=5), Log()
    pool.subscribe(known)

    def write(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, 12, 100):
            pool.add(make(int(i), slot="sr"[int(i) % 2]))
            pool.remove(make(int(i + seed) % 12, slot="sr"[int(i + seed) % 2]).key)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert known.known() == [anchor.key for anchor in pool.anchors()]
    assert pool.stats().faults == {}
    pool.check_integrity()


class PoolModel(RuleBasedStateMachine):
    """`AnchorPool` beside a list of [anchor, uses, used at], the oldest first; three slots, one of another tenant."""

    known = [  # noqa: RUF012  # never written
        make(i, "sr"[i % 2], tokens=1 + i % 3, tenant="x" if i % 5 == 0 else "") for i in range(12)
    ]
    limit = sum(anchor.nbytes for anchor in known) // 2

    def __init__(self) -> None:
        super().__init__()
        self.model: list[tuple[Anchor, int, int]] = []
        self.now = 0
        self.log = Log()
        self.pool = AnchorPool(self.limit, per_slot=3, eviction=self.eviction())
        self.pool.subscribe(self.log)

    def eviction(self) -> Eviction:
        return LeastUsedOfOldest(2)

    def victim(self, offered: list[tuple[Anchor, int, int]]) -> tuple[Anchor, int, int]:
        return min(offered[:2], key=lambda h: h[1])

    @rule(i=st.integers(0, 11))
    def add(self, i: int) -> None:
        new = self.known[i]
        did = self.pool.add(new)
        if new in (held[0] for held in self.model):
            assert did == Admitted(kept=False, reason=DUPLICATE)
            return
        gone = []
        same = [held for held in self.model if (held[0].slot, held[0].tenant) == (new.slot, new.tenant)]
        if len(same) == 3:
            gone.append(self.victim(same))
            self.model.remove(gone[-1])
        while sum(held[0].nbytes for held in self.model) + new.nbytes > self.limit:
            gone.append(self.victim(self.model))
            self.model.remove(gone[-1])
        self.now += 1
        self.model.append((new, 0, self.now))
        assert did == Admitted(kept=True, evicted=tuple(held[0].key for held in gone))

    @rule(some=st.lists(st.integers(0, 11), max_size=4))
    def use(self, some: list[int]) -> None:
        self.pool.use(self.known[i].key for i in some)
        for i in some:
            for at, (anchor, uses, _) in enumerate(self.model):
                if anchor is self.known[i]:
                    self.now += 1
                    self.model[at] = (anchor, uses + 1, self.now)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        held = data.draw(st.sampled_from(self.model))
        assert self.pool.remove(held[0].key)
        self.model.remove(held)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.anchors() == tuple(held[0] for held in self.model)
        assert self.log.known() == [held[0].key for held in self.model]
        for slot, tenant in (("s", ""), ("r", ""), ("s", "x"), ("r", "x")):
            expected = tuple(held[0] for held in self.model if (held[0].slot, held[0].tenant) == (slot, tenant))
            assert self.pool.match(slot, "f", tenant) == expected


class RecentModel(PoolModel):
    """The same with the least recently used leaving."""

    def eviction(self) -> Eviction:
        return LeastRecentlyUsed()

    def victim(self, offered: list[tuple[Anchor, int, int]]) -> tuple[Anchor, int, int]:
        return min(offered, key=lambda h: h[2])


TestPoolModel = PoolModel.TestCase
TestRecentModel = RecentModel.TestCase
TestPoolModel.settings = TestRecentModel.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
