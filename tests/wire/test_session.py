"""Conversations with a real server, request by request, below the client."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from kvcomm.store.base import TOO_LARGE
from kvcomm.store.record import Draft, Record
from kvcomm.store.slabs import SlabStore
from kvcomm.wire import protocol as p
from kvcomm.wire import server as server_module
from kvcomm.wire.transport import Answer, Connection, Unreachable
from tests.wire.conftest import Running, Start, kv_of, segment
from tests.wire.test_client import held, line, process, until
from tests.wire.test_tcp import said

S = segment(50)


@pytest.fixture
def served(start: Start) -> Running:
    return start(8 << 20)


@pytest.fixture
def made(served: Running) -> Iterator[Connection]:
    with closing(Connection(served.address, "")) as connection:
        yield connection


def written(made: Connection, record: Record) -> Answer:
    """Reserved, and filled with this record."""
    answer = made.ask(p.Reserve(record.key, record.nbytes, None))
    assert answer.window is not None
    answer.window.write(answer.fields["offset"], record.nbytes)[:] = record.data
    return answer


def test_reserve_write_commit_get(served: Running, made: Connection) -> None:
    record = Record.of(S, kv_of(S))
    reserved = written(made, record)
    assert held(served) == (0, 1)
    assert made.call(p.Has([S.key]))[0] == {"keys": []}, "what is being written is not there"
    assert made.call(p.Get([S.key]))[0] == {"objects": []}
    assert made.call(p.Commit(reserved.fields["number"]))[0] == {"stored": True, "reason": None}
    assert made.call(p.Reserve(S.key, record.nbytes, None))[0] == {"stored": True, "reason": None}, "it is kept already"
    answer = made.ask(p.Get([S.key, "0" * 32]))
    ((key, offset, nbytes, number),) = answer.fields["objects"]
    assert key == S.key
    assert answer.window is not None
    assert np.array_equal(answer.window.read(offset, nbytes), record.data)
    assert held(served) == (1, 0)
    made.call(p.Release([number, number, 12345], []))
    made.call(p.Release([number], []))
    made.call(p.Has([]))
    assert held(served) == (0, 0)
    listed, _ = made.call(p.List("", 10))
    assert listed == {"segments": [[S.key, 50, "", "f", None, record.nbytes]]}
    assert made.call(p.List(S.key, 10))[0] == {"segments": []}
    assert made.call(p.Remove([S.key, "0" * 32], damaged=False))[0] == {"removed": 1}
    served.server.library.slabs.check_integrity()


def test_each_lease_is_released_for_itself(served: Running, made: Connection) -> None:
    """The same record, leased twice by one process: the memory stays until both are let go, however often one is released."""
    made.call(p.Commit(written(made, Record.of(S, kv_of(S))).fields["number"]))
    first, second = (made.call(p.Get([S.key]))[0]["objects"][0][3] for _ in range(2))
    assert first != second
    made.call(p.Remove([S.key], damaged=False))
    for _ in range(3):
        made.call(p.Release([first], []))
    made.call(p.Has([]))
    assert held(served) == (1, 0)
    assert served.server.library.slabs.arena.used > 0
    made.call(p.Release([second], []))
    made.call(p.Has([]))
    assert served.server.library.slabs.arena.used == 0


def test_what_is_committed_must_be_the_record_that_was_reserved_for(served: Running, made: Connection) -> None:
    """No record, another record, one of another tenant, a damaged header: refused, and the memory is free again."""
    good, other, foreign = (Record.of(s, kv_of(s)) for s in (S, segment(50, seed=1), segment(50, tenant="b")))
    damaged = good.data.copy()
    damaged[70] ^= 1
    for key, data in (
        (S.key, np.zeros(good.nbytes, np.uint8)),
        (S.key, np.frombuffer(np.random.default_rng(0).bytes(good.nbytes), np.uint8)),
        (S.key, other.data),
        (S.key, damaged),
        (foreign.key, foreign.data),
    ):
        answer = made.ask(p.Reserve(key, len(data), None))
        assert answer.window is not None
        answer.window.write(answer.fields["offset"], len(data))[:] = data
        reply, _ = made.call(p.Commit(answer.fields["number"]))
        assert reply["stored"] is False
        assert reply["reason"]
        assert made.call(p.Has([key]))[0] == {"keys": []}
        assert (held(served), served.server.library.slabs.arena.used) == ((0, 0), 0)
    assert served.server.counters.faults == 0
    served.server.library.slabs.check_integrity()


def test_a_reservation_is_its_process_s(served: Running, made: Connection) -> None:
    number = written(made, Record.of(S, kv_of(S))).fields["number"]
    code = """
from kvcomm.wire.transport import Unreachable
try:
    store.call("", p.Commit(int(sys.argv[2])))
except Unreachable as refusal:
    print(refusal.reason)
store.call("", p.Release([int(sys.argv[2])], []))
store.has([s.key])
print("released", flush=True)
"""
    with process(served, code, number) as other:
        assert line(other) == "refused"
        assert line(other) == "released"
    assert held(served) == (0, 1)
    assert made.call(p.Commit(number))[0]["stored"]


def test_a_number_is_good_for_one_commit(served: Running, made: Connection) -> None:
    number = written(made, Record.of(S, kv_of(S))).fields["number"]
    assert made.call(p.Commit(number))[0]["stored"]
    with pytest.raises(Unreachable, match="refused"):
        made.call(p.Commit(number))
    assert made.call(p.Has([S.key]))[0] == {"keys": [S.key]}, "the connection goes on"


def test_a_commit_that_finds_no_thread_may_be_said_again_or_released(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory stays the client's, who gives it back as it does after any failure."""
    running = start(8 << 20, SlabStore(8 << 20))
    with closing(Connection(running.address, "")) as made:
        for again in (True, False):
            s = segment(50, seed=again)
            number = written(made, Record.of(s, kv_of(s))).fields["number"]
            monkeypatch.setattr(server_module, "WAITING", 0)
            with pytest.raises(Unreachable, match="busy"):
                made.call(p.Commit(number))
            monkeypatch.undo()
            assert held(running) == (0, 1)
            if again:
                assert made.call(p.Commit(number))[0]["stored"]
            used = running.server.library.slabs.arena.used
        made.call(p.Release([number], []))
        made.call(p.Has([]))
        assert held(running) == (0, 0)
        assert running.server.library.slabs.arena.used < used
    running.server.library.slabs.check_integrity()


def test_what_is_released_is_not_committed(served: Running, made: Connection) -> None:
    number = written(made, Record.of(S, kv_of(S))).fields["number"]
    made.call(p.Release([number], []))
    with pytest.raises(Unreachable, match="refused"):
        made.call(p.Commit(number))
    assert served.server.library.slabs.arena.used == 0


def test_a_record_larger_than_the_server_is_refused_with_a_reason(served: Running, made: Connection) -> None:
    reply, _ = made.call(p.Reserve(S.key, 9 << 20, None))
    assert reply == {"stored": False, "reason": TOO_LARGE}


def test_what_replies_did_not_arrive_is_the_client_s_word(served: Running, made: Connection) -> None:
    """`Release.lost`: of a connection that is open still, when it ends; of one that has ended, at once; never a reply that has
    arrived; and nothing twice.
    """
    made.call(p.Commit(written(made, Record.of(S, kv_of(S))).fields["number"]))
    for ended_first in (True, False):
        with closing(Connection(served.address, "")) as other:
            other.call(p.Get([S.key]))
            number, arrived = other._number, other._replies
            assert arrived == 2  # hello, get
            made.call(p.Release([], [number, arrived]))  # heard: nothing is lost
            made.call(p.Has([]))
            assert held(served) == (1, 0)
            other.call(p.Get([S.key]))
            assert held(served) == (2, 0)
            if ended_first:
                other.close()
                assert until(lambda: served.server.status()["connections"] == 1)
            made.call(p.Release([], [number, arrived]))  # the second get's reply was not heard
            made.call(p.Has([]))
            assert held(served) == ((1, 0) if ended_first else (2, 0))
        assert until(lambda: held(served) == (1, 0))
        made.call(p.Release([], [number, arrived, number, 0]))
        made.call(p.Has([]))
        assert held(served) == (1, 0)
        (lease,) = next(iter(served.server.peers._peers.values())).leases
        made.call(p.Release([lease], []))
        made.call(p.Has([]))
        assert held(served) == (0, 0)


def test_hello_comes_first_and_once(served: Running) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(10)
        raw.connect(str(served.path))
        raw.sendall(p.frame(p.pack_request(p.Stats())))
        assert said(raw)["error"] == "malformed"
        assert raw.recv(1) == b""
    with closing(Connection(served.address, "")) as twice, pytest.raises(Unreachable, match="hello"):
        twice.call(p.Hello(p.VERSION, "0", "b", "", "0" * 32))


def test_a_fault_of_ours_costs_one_request(served: Running, made: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(keys: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(served.server.library, "has", broken)
    with pytest.raises(Unreachable, match="fault"):
        made.call(p.Has([S.key]))
    assert served.server.counters.faults == 1
    monkeypatch.undo()
    assert made.call(p.Has([S.key]))[0] == {"keys": []}


def test_stats_name_what_is_held(served: Running, made: Connection) -> None:
    draft = Draft(S, kv_of(S))
    made.call(p.Reserve(S.key, draft.nbytes, None))
    stats, _ = made.call(p.Stats())
    assert (stats["connections"], stats["processes"], stats["reservations"], stats["leases"]) == (1, 1, 1, 0)
    assert stats["counters"]["requests"] == {"reserve": 1, "stats": 1}
    assert stats["tiers"]["memory"]["limit_bytes"] == 8 << 20
