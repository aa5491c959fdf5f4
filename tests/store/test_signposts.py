"""Text found through a noticeboard: winnowing against brute force, hosts that share nothing but a fake board and store."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcomm.errors import CacheFault, InputError
from kvcomm.matching import Found, Index, TextIndex
from kvcomm.segments import Ids, Segment, SegmentKV
from kvcomm.store.leads import TOO_MANY, Leads
from kvcomm.store.quiet import Quiet
from kvcomm.store.record import Record
from kvcomm.store.sighting import SIGHTINGS, Sighting, digest, note_names, pack, unpack
from kvcomm.store.signposts import Signposts
from kvcomm.store.slabs import SlabStore
from kvcomm.store.tiered import Tiered
from kvcomm.store.winnowing import minima

REACH = 40


def text(seed: int, tokens: int) -> Ids:
    return np.random.default_rng(seed).integers(1, 50_000, tokens).astype(np.int32)


def record(ids: Ids, context: Ids | None = None, fingerprint: str = "f", tenant: str = "", *, exact: bool = True) -> Record:
    context = ids[:0] if context is None else context
    s = Segment(ids, context, fingerprint, tenant, exact=exact)
    t = torch.ones(1, len(ids), 2)
    return Record.of(s, SegmentKV((t,), (t,), s.start, s.start + len(ids)))


class Remote:
    """A board and a store that hosts share. `down`: all of it raises CacheFault; `slow`: keys that no price pays for."""

    def __init__(self) -> None:
        self.notes: dict[str, bytes] = {}
        self.records: dict[str, Record] = {}
        self.asked: list[list[str]] = []
        self.loads: list[dict[str, float]] = []
        self.sizes: list[Mapping[str, int]] = []
        self.down = False
        self.ms = 0.0  # that every record takes

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        self.check()
        self.notes.update(notes)

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        self.check()
        self.asked.append(list(names))
        return {name: self.notes[name] for name in names if name in self.notes}

    def get_worth(
        self, prices: Mapping[str, float], sizes: Mapping[str, int] | None = None
    ) -> tuple[dict[str, Record], dict[str, str]]:
        self.check()
        self.loads.append(dict(prices))
        self.sizes.append(sizes or {})
        why = {key: "fake-slower-than-computing" for key, price in prices.items() if price < self.ms}
        return {key: self.records[key] for key in prices if key in self.records and key not in why}, why

    def size(self, key: str) -> int | None:
        return self.records[key].nbytes if key in self.records else None

    def check(self) -> None:
        if self.down:
            raise CacheFault("no answer")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def host(remote: Remote, **options: object) -> Signposts:
    return Signposts(TextIndex(), remote, remote, **options)  # type: ignore[arg-type]


def keep(where: Signposts, r: Record) -> None:
    """As a host does with what it computed."""
    assert isinstance(where.board, Remote)
    where.board.records[r.key] = r
    assert where.add(r.segment) == ()


def look(where: Signposts, ids: Ids, fingerprint: str = "f", tenant: str = "", ms_per_token: float | None = None) -> Found:
    return where.look(ids, fingerprint=fingerprint, tenant=tenant, ms_per_token=ms_per_token)


def covered(found: Found) -> list[tuple[int, int]]:
    return [(match.start, match.end) for match in found.matches]


# --- winnowing --------------------------------------------------------------------------------------------------------------

PIECES = [text(seed, n).tolist() for seed, n in [(1, 5), (2, 17), (3, 40), (4, 41), (5, 70)]] + [[7] * 60, [7, 8, 9] * 20]
pieces = st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(lambda parts: [t for part in parts for t in part])
reaches = st.integers(16, 60)


@settings(max_examples=150, deadline=None)
@given(pieces, pieces, reaches)
def test_every_common_run_of_reach_tokens_shares_a_hash(a: list[int], b: list[int], reach: int) -> None:
    """Runs by comparing all pairs of positions; and without a common window of 8 there is no common hash."""
    ours, theirs = (np.asarray(ids, dtype=np.int32) for ids in (a, b))
    mine, other = minima(ours, reach), minima(theirs, reach)
    assert len(mine) == max(len(a) - reach + 1, 0)
    shared = set(mine.tolist()) & set(other.tolist())
    runs = {tuple(a[i : i + reach]) for i in range(len(a) - reach + 1)}
    for j in range(len(b) - reach + 1):
        if tuple(b[j : j + reach]) in runs:
            i = next(i for i in range(len(a)) if a[i : i + reach] == b[j : j + reach])
            assert mine[i] == other[j]
            assert int(mine[i]) in shared
    windows = {tuple(a[i : i + 8]) for i in range(len(a) - 7)} & {tuple(b[i : i + 8]) for i in range(len(b) - 7)}
    assert bool(windows) or not shared


@given(pieces, reaches)
def test_minima_are_those_of_a_loop(ids: list[int], reach: int) -> None:
    """`minima` against the smallest of hashes taken one window at a time."""
    array = np.asarray(ids, dtype=np.int32)
    alone = [int(minima(array[i : i + 8], 8)[0]) for i in range(len(ids) - 7)]
    expected = [min(alone[i : i + reach - 7]) for i in range(len(ids) - reach + 1)]
    assert minima(array, reach).tolist() == expected


def test_hashes_never_change() -> None:
    """Hosts of several versions exchange them."""
    assert minima(np.arange(8, dtype=np.int32), 8).tolist() == [15202096989039870922]
    assert list(note_names("f", "t", [15202096989039870922])) == ["5e250ea3dfc0d2e993794b867fd65db9"]


def test_few_hashes_are_kept() -> None:
    assert 180 < len(np.unique(minima(text(1, 4000), REACH))) < 300  # 2 / 34 of 4,000 are 235


# --- hosts that share a remote ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 7, 50, 333])
@pytest.mark.parametrize("offset", [0, 3, 100])
@pytest.mark.parametrize("tokens", [REACH, REACH + 1, 200])
def test_two_hosts_find_each_others_text_at_any_offset(at: int, offset: int, tokens: int) -> None:
    remote = Remote()
    one, two = host(remote), host(remote)
    known = text(1, 400)
    r = record(known)
    keep(one, r)
    prompt = np.concatenate([text(2, at), known[offset : offset + tokens], text(3, 60)])
    found = look(two, prompt)
    assert covered(found) == [(at, at + tokens)]
    assert found.matches[0].segment.key == r.key
    assert found.matches[0].exact == (at == offset == 0)
    assert found.declined == {}
    assert remote.sizes == [{r.key: r.nbytes}]
    assert len(remote.asked) == 2  # to announce, to look
    assert two.stats().announced == 0
    keep(two, record(text(4, 100)))
    assert covered(look(one, text(4, 100))) == [(0, 100)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_one_host_knows_another_one_finds(data: st.DataObject) -> None:
    """Runs of at least `reach` tokens that one index of all segments finds, and that lie in no other segment's run as well, are
    covered by a host that knew nothing; what it covers is equal to the prompt's text."""
    remote = Remote()
    hosts = [host(remote) for _ in range(2)]
    prompt: list[int] = []
    planted = []
    for i in range(data.draw(st.integers(1, 5))):
        body = text(100 + i, data.draw(st.integers(REACH, 150)))
        start = data.draw(st.integers(0, len(body) - REACH))
        end = data.draw(st.integers(start + REACH, len(body)))
        keep(hosts[i % 2], record(body, text(200 + i, data.draw(st.integers(0, 30)))))
        prompt += text(300 + i, data.draw(st.integers(0, 50))).tolist()
        planted.append((len(prompt), len(prompt) + end - start))
        prompt += body[start:end].tolist()
    found = look(host(remote), np.asarray(prompt, dtype=np.int32))
    assert covered(found) == planted
    for match in found.matches:
        assert match.segment.ids[match.offset : match.offset + match.tokens].tolist() == prompt[match.start : match.end]


def test_two_hosts_with_stacks_over_one_store() -> None:
    """A far store that both have behind their own memory; the found record is in the second host's memory afterwards."""
    remote, far = Remote(), SlabStore(1 << 20)
    stacks = [Tiered(SlabStore(1 << 20), far) for _ in range(2)]
    one, two = (Signposts(TextIndex(), remote, stack) for stack in stacks)
    known = text(1, 300)
    r = record(known)
    assert stacks[0].put_record(r)
    one.add(r.segment)
    assert unpack(next(iter(remote.notes.values())))[0].nbytes == r.nbytes
    assert not stacks[1].front.has([r.key])
    assert covered(look(two, known[20:], ms_per_token=1.0)) == [(0, 280)]
    assert stacks[1].front.has([r.key])
    assert stacks[1].get_records([r.key])[r.key].data.tobytes() == r.data.tobytes()


def test_what_becomes_known_meanwhile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start, texts of the disk are made known while prompts are searched."""
    remote, known = Remote(), text(1, 100)
    r = record(known)
    keep(host(remote), r)
    here, real = host(remote), remote.get_notes

    def late(names: Sequence[str]) -> dict[str, bytes]:
        here.local.add(r.segment)
        return real(names)

    monkeypatch.setattr(remote, "get_notes", late)
    assert covered(look(here, known)) == [(0, 100)]


def test_what_is_known_here_asks_nobody() -> None:
    remote = Remote()
    one = host(remote)
    known = text(1, 300)
    keep(one, record(known))
    remote.down = True
    prompt = np.concatenate([known, text(2, REACH - 1)])
    assert covered(look(one, prompt)) == [(0, 300)]
    assert one.stats().faults == {}
    assert one.add(record(known).segment) == ()  # nor is it announced again
    assert one.stats().announced == 1


def test_neither_tenant_nor_model_is_crossed() -> None:
    remote = Remote()
    one, two = host(remote), host(remote)
    known = text(1, 100)
    for fingerprint, tenant in [("f", "a"), ("g", "b")]:
        keep(one, record(known, None, fingerprint, tenant))
    for fingerprint, tenant in [("f", "b"), ("g", "a"), ("f", ""), ("fa", ""), ("", "fa")]:
        assert look(two, known, fingerprint, tenant).matches == []
    assert remote.loads == []
    assert two.stats().notes == 0
    assert covered(look(two, known, "f", "a")) == [(0, 100)]
    assert covered(look(two, known, "g", "b")) == [(0, 100)]


@pytest.mark.parametrize("identity", [("f", "other"), ("g", "")])
def test_a_note_that_names_a_foreign_record_leads_nowhere(identity: tuple[str, str]) -> None:
    """Written by somebody else under our name: the record is sound, and not ours."""
    remote = Remote()
    known = text(1, 100)
    foreign = record(known, None, *identity)
    remote.records[foreign.key] = foreign
    sighting = Sighting.of(foreign.segment, foreign.nbytes)
    remote.notes = {name: pack([sighting]) for name in note_names("f", "", np.unique(minima(known, REACH)).tolist())}
    two = host(remote)
    assert look(two, known).matches == []
    assert look(two, known, *identity).matches == []  # its own notes do not exist
    assert foreign.key not in two
    assert two.stats().foreign == 1


@pytest.mark.parametrize("order", [1, -1])
def test_a_segment_behind_the_same_text_is_preferred(order: int) -> None:
    remote = Remote()
    system, body = text(1, 50), text(2, 200)
    wanted = record(body, system)
    for r in (
        record(np.concatenate([body, text(9, 50)])),
        wanted,
        record(body, system, exact=False),
        record(body),  # as exact as can be, and at the beginning of a prompt only
    )[::order]:
        keep(host(remote), r)
    two = host(remote, most=1)
    (match,) = look(two, np.concatenate([system, body, text(4, 50)])).matches
    assert match.segment.key == wanted.key
    assert match.exact


# --- what is asked in vain ---------------------------------------------------------------------------------------------------


def test_missing_records_are_not_asked_for_again_for_a_while() -> None:
    remote, clock = Remote(), Clock()
    known = text(1, 300)
    r = record(known)
    keep(host(remote), r)
    del remote.records[r.key]
    two = host(remote, clock=clock, quiet_s=30.0)
    assert look(two, known[:150]).matches == []
    assert (len(remote.asked), len(remote.loads), two.stats().missing) == (2, 1, 1)
    assert look(two, known[:150]).declined == {}
    assert len(remote.asked) == 2  # not even notes
    look(two, known)
    assert len(remote.asked) == 3  # of the other half, which name the same key
    assert not set(remote.asked[2]) & set(remote.asked[1])
    assert two.stats().notes == len(remote.notes)
    assert len(remote.loads) == 1
    remote.records[r.key] = r
    clock.now += 29
    assert look(two, known).matches == []
    clock.now += 2
    assert covered(look(two, known)) == [(0, 300)]


def test_another_segment_of_the_same_text_is_tried() -> None:
    remote = Remote()
    known = text(1, 300)
    gone, here = record(known, text(2, 9)), record(known[:250], text(3, 9))
    keep(host(remote), here)
    keep(host(remote), gone)
    del remote.records[gone.key]
    assert covered(look(host(remote), known)) == [(0, 250)]
    assert [set(load) for load in remote.loads] == [{gone.key}, {here.key}]


def test_loads_are_bounded_and_what_is_left_is_told() -> None:
    remote = Remote()
    bodies = [text(10 + i, 100 * (i + 1)) for i in range(5)]
    for body in bodies:
        keep(host(remote), record(body))
    prompt = np.concatenate(bodies)
    two = host(remote, most=3)
    found = look(two, prompt)
    assert len(remote.loads[0]) == 3
    assert [match.tokens for match in found.matches] == [100, 400, 500]  # the exact one, then the most
    assert 440 < found.declined[TOO_MANY] < 560  # 200 and 300
    assert covered(look(two, prompt))[-1][1] == len(prompt)  # the rest is loaded next time
    assert len(look(two, prompt).matches) == 5


def test_prices_are_those_of_the_covered_tokens() -> None:
    remote = Remote()
    one, two = host(remote), host(remote)
    known = text(1, 1000)
    r = record(known)
    keep(one, r)
    prompt = np.concatenate([text(2, 100), known[100:500]])
    remote.ms = 100.0
    found = look(two, prompt, ms_per_token=0.2)
    assert found.matches == []
    assert 300 < remote.loads[0][r.key] / 0.2 < 450  # tokens that it would cover: 400
    assert list(found.declined) == ["fake-slower-than-computing"]
    assert 300 < found.declined["fake-slower-than-computing"] < 450
    assert covered(look(two, prompt, ms_per_token=0.5)) == [(100, 500)]  # it is worth it to a slower model
    assert covered(look(two, prompt, ms_per_token=0.2)) == [(100, 500)]
    assert two.stats().loaded == 1
    assert look(host(remote), prompt).matches  # no price: all is worth it
    assert remote.loads[-1] == {r.key: math.inf}


# --- faults -----------------------------------------------------------------------------------------------------------------


def test_a_remote_that_is_down_leaves_the_local_answer() -> None:
    remote = Remote()
    one = host(remote)
    known, more = text(1, 100), text(2, 100)
    keep(one, record(known))
    remote.down = True
    keep(one, record(more))
    assert covered(look(one, np.concatenate([more, text(3, 50)]))) == [(0, 100)]
    assert one.stats().faults == {"announcing-fault": 1, "notes-fault": 1}
    remote.down = False
    assert covered(look(host(remote), known)) == [(0, 100)]


def test_records_that_cannot_be_reached_are_asked_for_again() -> None:
    remote = Remote()
    known = text(1, 100)
    keep(host(remote), record(known))
    two = host(remote)
    good, remote.get_worth = remote.get_worth, unreachable  # type: ignore[method-assign,assignment]
    assert list(look(two, known).declined) == ["fault"]
    assert two.stats().faults == {"records-fault": 1}
    remote.get_worth = good  # type: ignore[method-assign]
    assert covered(look(two, known)) == [(0, 100)]


def unreachable(prices: Mapping[str, float], sizes: Mapping[str, int] | None = None) -> None:
    raise CacheFault("no answer")


BROKEN = [
    b"",
    b"\xc1",
    b"\x93\x01",
    b"text" * 9,
    msgpack.packb([1, 2]),
    msgpack.packb({"a": 1}),
    msgpack.packb([(b"\0" * 16, 1, 1, 1, None, 5)]),
    msgpack.packb([(b"\0" * 16, 1, 1)]),
    msgpack.packb([(b"\0" * 15, 1, 1, 1, None)]),
    msgpack.packb([("\0" * 16, 1, 1, 1, None)]),
    msgpack.packb([(b"\0" * 16, -1, 1, 1, None)]),
    msgpack.packb([(b"\0" * 16, 1.5, 1, 1, None)]),
    msgpack.packb([(b"\0" * 16, 1, 1, 1, "x")]),
    msgpack.packb([(b"\0" * 16, True, 1, 1, None)]),
    msgpack.packb([(b"\0" * 16, 1, 1, 1, None)] * (SIGHTINGS + 1)),
    msgpack.packb(7),
    b"\x91" * 5000,
]


@pytest.mark.parametrize("note", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_note_is_counted_and_replaced(note: bytes) -> None:
    with pytest.raises(CacheFault, match=f"{len(note)} bytes"):
        unpack(note)
    remote = Remote()
    known = text(1, REACH)
    (name,) = note_names("f", "", minima(known, REACH).tolist())
    remote.notes[name] = note
    one = host(remote)
    assert look(one, known).matches == []
    keep(one, record(known))
    assert one.stats().faults == {"note-fault": 2}
    assert [s.key for s in unpack(remote.notes[name])] == [record(known).key]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_note_or_a_fault(note: bytes) -> None:
    with contextlib.suppress(CacheFault):
        assert unpack(pack(unpack(note))) == unpack(note)


def test_a_board_that_answers_more_than_was_asked() -> None:
    remote = Remote()
    known = text(1, 100)
    keep(host(remote), record(known))
    remote.get_notes = lambda names: dict(remote.notes)  # type: ignore[method-assign]
    assert look(host(remote), text(2, 100)).matches == []
    assert remote.loads == []


# --- parts ------------------------------------------------------------------------------------------------------------------


def test_a_note_keeps_the_newest_few() -> None:
    remote = Remote()
    known = text(1, REACH)
    records = [record(known, text(i, i)) for i in range(1, SIGHTINGS + 3)]
    for r in records:
        keep(host(remote), r)
    keep(host(remote), records[3])  # it was the third newest
    (note,) = remote.notes.values()
    newest = [records[i].key for i in (3, 5, 4, 2)]
    assert [s.key for s in unpack(note)] == newest
    assert unpack(note)[0] == Sighting(
        records[3].key, records[3].nbytes, REACH, 4, digest(np.concatenate([text(4, 4), known[:8]]))
    )


def test_what_the_local_index_drops_for_others_is_told_with_the_next_add() -> None:
    remote = Remote()
    bodies = [text(i, 80) for i in range(3)]
    keep(host(remote), record(bodies[0]))
    two = Signposts(TextIndex(max_windows=20), remote, remote)
    keep(two, record(bodies[1]))
    keep(two, record(bodies[2]))
    assert covered(look(two, bodies[0])) == [(0, 80)]
    short = record(text(9, 5)).segment
    assert two.add(short) == (short.key, record(bodies[1]).key)
    assert record(bodies[0]).key in two
    assert two.remove(record(bodies[0]).key)
    assert record(bodies[0]).key not in two


def test_quiet_is_bounded_and_ends() -> None:
    clock = Clock()
    quiet = Quiet(10.0, limit=2, clock=clock)
    quiet.add(["a", "b"])
    clock.now += 5
    quiet.add(["a", "c"])
    assert [name in quiet for name in "abc"] == [True, False, True]
    assert len(quiet) == 2
    clock.now += 9
    assert "a" in quiet
    clock.now += 1
    assert "a" not in quiet


def test_leads_without_notes_are_settled() -> None:
    leads = Leads(text(1, 50), {"a": 3, "b": 4}, {})
    assert leads.pick(5) == {}
    assert leads.settled() == ["a", "b"]
    assert not leads.declined()


@pytest.mark.parametrize("options", [{"reach": 15}, {"most": 0}])
def test_options_are_checked(options: dict[str, int]) -> None:
    with pytest.raises(InputError, match=str(next(iter(options.values())))):
        host(Remote(), **options)


def test_looking_costs_little() -> None:
    """4,000 unknown tokens, by the best of several runs: generous limits, for machines that are busy."""
    remote = Remote()
    one = host(remote, quiet_s=0.0)
    prompt = text(1, 4000)
    best = min(_seconds(one, prompt) for _ in range(5))
    alone = min(_seconds(one.local, prompt) for _ in range(5))
    assert best - alone < 0.020


def _seconds(index: Index, prompt: Ids) -> float:
    began = time.perf_counter()
    index.look(prompt, fingerprint="f")
    return time.perf_counter() - began
