"""`Book` against a plain dict with Cherkasova's formula written out, in which the least is looked for among all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.errors import InputError
from kvcomm.store.base import TOO_LARGE
from kvcomm.store.eviction import MOST_MS, MS_PER_BYTE, OVER_QUOTA, Book, Quotas

MIB = 1 << 20


def room(book: Book[str], nbytes: int, tenant: str = "") -> list[str]:
    """Makes room and says who left."""
    victims = book.victims(nbytes, tenant)
    assert victims is not None
    for key in victims:
        book.evict(key)
    return victims


def test_priority_is_clock_plus_uses_times_cost_by_size() -> None:
    """By hand: the ms per byte are a 1, b 2, c 4 and c leaves last; then the clock carries what is new."""
    book: Book[str] = Book(30)
    book.add("a", 10, cost_ms=10.0)
    book.add("b", 10, cost_ms=20.0)
    book.add("c", 10, cost_ms=40.0)
    assert book.order() == ["a", "b", "c"]
    book.use("a")
    book.use("a")  # 3 * 1 > 2
    assert book.order() == ["b", "a", "c"]
    assert room(book, 10) == ["b"]
    book.add("d", 10, cost_ms=15.0)  # clock 2, and 1.5: 3.5
    assert book.order() == ["a", "d", "c"]
    assert room(book, 20) == ["a", "d"]  # the clock is 3.5 now
    book.add("e", 10, cost_ms=4.0)  # 3.9
    book.add("f", 10, cost_ms=6.0)  # 4.1
    assert book.order() == ["e", "c", "f"], "what was dear long ago is passed by what is new"


def test_removing_is_not_evicting() -> None:
    book: Book[str] = Book(30)
    for key in "ab":
        book.add(key, 10, cost_ms=10.0)
    book.remove("a")
    book.add("c", 10, cost_ms=5.0)
    assert book.order() == ["c", "b"], "the clock did not move"


def test_what_was_not_measured_costs_what_others_cost_per_byte() -> None:
    book: Book[str] = Book(100 * MIB)
    book.add("first", MIB)
    assert book.loss("first") == MS_PER_BYTE * MIB
    book.add("fast", 3 * MIB, cost_ms=2.0)
    book.add("slow", MIB, cost_ms=6.0)
    book.add("late", 10 * MIB)
    assert book.loss("late") == 20.0


@pytest.mark.parametrize("cost_ms", [math.nan, math.inf, -math.inf, -1.0])
def test_a_cost_that_is_none_counts_as_not_measured(cost_ms: float) -> None:
    book: Book[str] = Book(10)
    book.add("a", 10, cost_ms=cost_ms)
    assert book.loss("a") == 10 * MS_PER_BYTE
    book.check_integrity()


def test_an_absurd_cost_does_not_end_the_order_of_the_rest() -> None:
    book: Book[str] = Book(2 * MIB)
    book.add("absurd", MIB, cost_ms=1e300)
    assert book.loss("absurd") == MOST_MS
    assert room(book, 2 * MIB) == ["absurd"]
    book.add("dear", MIB, cost_ms=1.5)
    book.add("cheap", MIB, cost_ms=1.0)
    assert book.order() == ["cheap", "dear"]


def test_quotas_first_then_the_limit() -> None:
    book: Book[str] = Book(100, Quotas(default=60, tenants={"small": 20, "large": 100}))
    for key, tenant, cost_ms in (("s1", "small", 9.0), ("s2", "small", 8.0), ("o1", "other", 1.0), ("o2", "other", 2.0)):
        book.add(key, 10, tenant, cost_ms)
    assert book.victims(10, "small") == ["s2"], "its own, though others are worth less"
    assert book.victims(21, "small") is None
    assert (book.refusal(21, "small"), book.refusal(101, "large"), book.refusal(20, "small")) == (OVER_QUOTA, TOO_LARGE, None)
    assert book.victims(61, "new") is None
    assert book.victims(60, "large") == []
    assert book.victims(75, "large") == ["o1", "o2"]
    book.add("l", 60, "large", 0.0)
    assert book.victims(20, "small") == ["s2", "s1"], "its own make room for the limit as well"
    assert book.victims(10, "large") == ["l"]


def test_pinned_never_leaves() -> None:
    book: Book[str] = Book(30, Quotas(tenants={"t": 10}))
    book.add("a", 10, "t")
    book.add("b", 10, pinned=True)
    book.pin("a")
    book.pin("a")
    book.unpin("a")
    assert book.victims(10, "t") is None, "its quota is pinned"
    assert book.victims(20) is None
    assert book.victims(10) == []
    assert book.loss("a") == math.inf
    book.unpin("a")
    assert book.victims(20) == ["a"]
    assert (book.pins("a"), book.pins("b"), book.pins("c")) == (0, 1, 0)
    book.check_integrity()


def test_what_is_pinned_and_unpinned_leaves_no_garbage() -> None:
    book: Book[int] = Book(10)
    for key in range(10):
        book.add(key, 1)
    for i in range(1000):
        book.pin(i % 10)
        book.unpin(i % 10)
    book.check_integrity()
    assert book.first(10) == list(range(10))


@pytest.mark.parametrize("make", [lambda: Book(-1), lambda: Quotas(default=-1), lambda: Quotas(tenants={"x": -1})])
def test_negative_limits_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(InputError, match="-1"):
        make()


@dataclass
class Row:
    nbytes: int
    tenant: str
    value: float
    uses: int = 1
    priority: float = 0.0
    used: int = 0
    pins: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        return self.priority, self.used


class BookModel(RuleBasedStateMachine):
    """`Book` beside a dict of rows. Costs and sizes are few, so that priorities are often equal."""

    quotas = Quotas(default=40, tenants={"a": 16, "b": 64})

    def __init__(self) -> None:
        super().__init__()
        self.book: Book[int] = Book(64, self.quotas)
        self.rows: dict[int, Row] = {}
        self.clock, self.now, self.made = 0.0, 0, 0
        self.measured: list[tuple[float, int]] = []

    def touch(self, row: Row) -> None:
        self.now += 1
        row.used = self.now
        row.priority = self.clock + row.uses * row.value

    def tenant_bytes(self, tenant: str) -> int:
        return sum(row.nbytes for row in self.rows.values() if row.tenant == tenant)

    def expected(self, nbytes: int, tenant: str) -> list[int] | None:
        """Who leaves, one at a time."""
        left = {key: row for key, row in self.rows.items() if not row.pins}
        gone: list[int] = []
        own, all_bytes, quota = self.tenant_bytes(tenant), sum(row.nbytes for row in self.rows.values()), self.quotas.of(tenant)
        assert quota is not None
        while own + nbytes > quota or all_bytes + nbytes > 64:
            over = own + nbytes > quota
            among = [key for key, row in left.items() if not over or row.tenant == tenant]
            if not among:
                return None
            gone.append(min(among, key=lambda key: left[key].rank))
            row = left.pop(gone[-1])
            all_bytes -= row.nbytes
            own -= row.nbytes if row.tenant == tenant else 0
        return gone

    @rule(
        nbytes=st.sampled_from([1, 2, 4, 8, 16, 32]),
        tenant=st.sampled_from("abc"),
        cost_ms=st.sampled_from([None, 0.0, 1.0, 2.0, 8.0]),
        pinned=st.booleans(),
    )
    def add(self, nbytes: int, tenant: str, cost_ms: float | None, pinned: bool) -> None:
        victims = self.book.victims(nbytes, tenant)
        assert victims == self.expected(nbytes, tenant)
        if victims is None:
            return
        for key in victims:
            self.book.evict(key)
            self.clock = max(self.clock, self.rows.pop(key).priority)
        total = sum(n for _, n in self.measured)
        if cost_ms is None:
            value = sum(ms for ms, _ in self.measured) / total if total else MS_PER_BYTE
        else:
            value = cost_ms / nbytes
            self.measured.append((cost_ms, nbytes))
        self.made += 1
        self.book.add(self.made, nbytes, tenant, cost_ms, pinned=pinned)
        self.rows[self.made] = Row(nbytes, tenant, value, pins=int(pinned))
        self.touch(self.rows[self.made])

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), what=st.sampled_from(["use", "use", "use", "pin", "unpin", "unpin", "remove", "evict"]))
    def change(self, data: st.DataObject, what: str) -> None:
        key = data.draw(st.sampled_from(sorted(self.rows)))
        row = self.rows[key]
        if what == "use":
            row.uses += 1
            self.touch(row)
        elif what == "pin":
            row.pins += 1
        elif what == "unpin":
            if not row.pins:
                return
            row.pins -= 1
        else:
            if what == "evict":
                self.clock = max(self.clock, row.priority)
            del self.rows[key]
        getattr(self.book, what)(key)

    @invariant()
    def agrees(self) -> None:
        self.book.check_integrity()
        order = sorted(self.rows, key=lambda key: (self.rows[key].pins > 0, self.rows[key].rank))
        assert self.book.order() == order
        assert self.book.first(3) == [key for key in order if not self.rows[key].pins][:3]
        assert len(self.book) == len(self.rows)
        assert self.book.nbytes == sum(row.nbytes for row in self.rows.values())
        assert all(self.book.pins(key) == row.pins and key in self.book for key, row in self.rows.items())


TestBookModel = BookModel.TestCase
TestBookModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
