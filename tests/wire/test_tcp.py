"""Over TCP: tokens, TLS, and records that travel in bodies."""

from __future__ import annotations

import asyncio
import hmac
import json
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import msgpack
import pytest

from kvcomm import cli
from kvcomm.errors import CacheFault, InputError
from kvcomm.store.record import Record
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address
from kvcomm.wire.client import ServerStore
from kvcomm.wire.transport import Connection, Unreachable, _exactly
from tests.wire.conftest import Running, Start, equal, kv_of, segment
from tests.wire.test_client import held, until

TOKENS = {"": "none's", "a": "a's"}


def listening(running: Running, tls: ssl.SSLContext | None = None) -> Address:
    """The same server, at a port of this host too."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = Address(host="127.0.0.1", port=port, tls=tls is not None)
    asyncio.run_coroutine_threadsafe(running.server.listen(address, tls), running.loop).result(10)
    return address


@pytest.fixture
def served(start: Start) -> Running:
    return start(tokens=TOKENS)


@pytest.fixture
def address(served: Running) -> Address:
    return listening(served)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Self-made, for 127.0.0.1; and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ["-subj", "/CN=kvcomm", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_records_travel_both_ways(served: Running, address: Address) -> None:
    """What one host puts, another one gets, over the socket too; nothing is leased, no memory is mapped."""
    near = ServerStore(served.address)
    with closing(ServerStore(address, token="none's")) as far, closing(ServerStore(address, token="none's")) as other:
        kept = [segment(50 + 7 * i, 3, seed=i) for i in range(3)]
        for s in kept:
            assert far.put(s, kv_of(s))
        found = other.get_many([s.key for s in kept])
        assert all(equal(found[s.key], kv_of(s)) for s in kept)
        assert near.get(kept[0].key) is not None
        looked = other.index.look(kept[1].ids, fingerprint="f")
        assert [m.segment.key for m in looked.matches] == [kept[1].key]
        local = segment(40, seed=9)
        near.put(local, kv_of(local))
        from_near = far.get(local.key)
        assert from_near is not None
        assert equal(from_near, kv_of(local))
        assert far.remove(local.key)
    near.close()
    assert until(lambda: served.server.status()["connections"] == 0)
    slabs = served.server.library.slabs
    assert all(not slabs._book.pins(generation) or held(served)[0] for generation in slabs._kept.values())
    slabs.check_integrity()


def test_what_takes_longer_to_send_than_to_compute_stays_there(served: Running, address: Address) -> None:
    """By what receiving took lately; one time in 20 it is tried nevertheless. On the same host nothing is sent."""
    far, s = ServerStore(address, token="none's"), segment(1000)
    far.put(s, kv_of(s))
    for _ in range(5):
        far._holdings.network.observe(1 << 20, 1e5)  # 10 MB/s
    looked = [far.index.look(s.ids, fingerprint="f", ms_per_token=0.1) for _ in range(20)]
    assert [bool(found.matches) for found in looked] == [False] * 19 + [True]
    assert looked[0].declined == {"network-slower-than-computing": 1000}
    assert far.index.look(s.ids, fingerprint="f", ms_per_token=1e4).matches
    far.close()
    near = ServerStore(served.address)
    assert near.index.look(s.ids, fingerprint="f", ms_per_token=1e-6).matches
    near.close()
    slabs = served.server.library.slabs
    assert until(lambda: not any(slabs._book.pins(generation) for generation in slabs._kept.values()))


def test_who_reads_no_kv_is_sent_headers(address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler, whose workers load what it finds. If it asks for KV all the same, it gets all of it."""
    bodies: list[int] = []
    real = Connection._receive

    def noted(*given: Any) -> Any:
        reply, body = real(*given)
        bodies.append(0 if body is None else body.nbytes)
        return reply, body

    s = segment(1000)
    with closing(ServerStore(address, token="none's", reads_kv=False)) as store:
        store.put(s, kv_of(s))
        monkeypatch.setattr(Connection, "_receive", noted)
        (match,) = store.index.look(s.ids, fingerprint="f").matches
        assert match.segment.key == s.key
        assert 4 * len(s.ids) < bodies[-1] < 8 * len(s.ids)
        kv = store.get(s.key)
        assert kv is not None
        assert equal(kv, kv_of(s))
        assert bodies[-1] > kv_of(s).nbytes


def test_what_stops_coming_is_not_waited_for() -> None:
    """However long all of it may take."""
    here, there = socket.socketpair()
    with here, there:
        there.sendall(b"12345")
        with pytest.raises(TimeoutError):
            _exactly(here, 10, monotonic() + 1000, 0.05)


def test_a_large_record_travels(served: Running, address: Address) -> None:
    s = segment(2000)
    kv = kv_of(s, layers=4, dim=64)
    assert kv.nbytes > 4 << 20  # several pieces
    with closing(ServerStore(address, token="none's", deadline_s=20.0)) as far:
        assert far.put(s, kv)
        found = far.get(s.key)
    assert found is not None
    assert equal(found, kv)


@pytest.mark.parametrize(
    ("tenant", "token", "enters"),
    [("", "none's", True), ("a", "a's", True), ("", "a's", False), ("a", "none's", False), ("a", "", False),
     ("b", "a's", False), ("b", "", False),
     ("", "none'", False), ("", "\N{GREEK SMALL LETTER ALPHA}", False), ("*", "", False)],
)  # fmt: skip
def test_tokens(served: Running, address: Address, tenant: str, token: str, enters: bool) -> None:
    with closing(ServerStore(address, tenant=tenant, token=token)) as store:
        if enters:
            assert store.has(["0" * 32]) == set()
        else:
            with pytest.raises(InputError, match="token"):
                store.has(["0" * 32])
            assert "has" not in served.server.counters.requests


def test_a_token_for_each_tenant(served: Running, address: Address) -> None:
    """Of a store that serves several; it has none for the third."""
    kept = [segment(50, tenant=tenant) for tenant in ("", "a", "b")]
    with closing(ServerStore(address, token={"a": "a's", "*": "none's"})) as store:
        for s in kept[:2]:
            assert store.put(s, kv_of(s))
        with pytest.raises(InputError, match="'b'"):
            store.put(kept[2], kv_of(kept[2]))
    assert len(served.server.library.slabs.segments()) == 2


def test_commands_ask_servers_of_other_hosts(
    start: Start,
    certificate: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the file of tokens that the server has, and the certificates that OpenSSL is told to believe."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    tokens = {"a": "a's", "b": "b's"}
    address = listening(start(tokens=tokens), context)
    given, archive = tmp_path / "tokens", tmp_path / "all.tar"
    given.write_text("".join(f"{tenant} {token}\n" for tenant, token in tokens.items()))
    given.chmod(0o600)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    for tenant, token in tokens.items():
        s = segment(50, tenant=tenant)
        with closing(ServerStore(address, tenant=tenant, token=token)) as store:
            assert store.put(s, kv_of(s))
    there = ["--socket", str(address), "--token-file", str(given)]
    assert cli.main(["server", "status", *there, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiers"]["memory"]["objects"] == 2
    assert cli.main(["store", "ls", *there, "--tenant", "b", "--format", "json"]) == 0
    assert [row["key"] for row in json.loads(capsys.readouterr().out)["objects"]] == [s.key]
    assert cli.main(["store", "export", str(archive), *there, "--tenant", "b"]) == 0
    with closing(ServerStore(address, tenant="b", token=tokens["b"])) as store:
        assert store.remove(s.key)
        assert cli.main(["store", "import", str(archive), *there]) == 0
        found = store.get(s.key)
    assert found is not None
    assert equal(found, kv_of(s))
    capsys.readouterr()
    for command in (["server", "status"], ["store", "ls"]):
        assert cli.main([*command, "--socket", str(address)]) == 2
        assert "no token came for tenant ''" in capsys.readouterr().err
    monkeypatch.delenv("SSL_CERT_FILE")
    assert cli.main(["server", "status", *there]) == 1
    assert "certificate" in capsys.readouterr().err


def test_a_token_for_any_tenant(start: Start) -> None:
    running = start(tokens={"*": "any", "a": "a's"})
    address = listening(running)
    for tenant, token, enters in (("b", "any", True), ("a", "a's", True), ("a", "any", False)):
        assert running.server.knows(tenant, token) == enters
    with closing(ServerStore(address, tenant="b", token="any")) as store:
        assert store.has(["0" * 32]) == set()


def test_tokens_are_compared_in_constant_time(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr("kvcomm.wire.server.hmac.compare_digest", noted)
    assert not served.server.knows("a", "x")
    assert compared == [(b"a's", b"x")]


def test_no_tcp_without_tokens(start: Start) -> None:
    with pytest.raises(InputError, match="token"):
        listening(start())


def test_tls(served: Running, certificate: tuple[Path, Path]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    address = listening(served, context)
    trusting = ssl.create_default_context(cafile=certificate[0])
    s = segment(50)
    with closing(ServerStore(address, token="none's", tls=trusting, deadline_s=10.0)) as store:
        assert store.put(s, kv_of(s))
        found = store.get(s.key)
        assert found is not None
        assert equal(found, kv_of(s))
    with (
        closing(ServerStore(address, token="none's", deadline_s=10.0)) as doubting,
        pytest.raises(CacheFault, match="certificate"),
    ):
        doubting.has([s.key])
    plain = Address(host=address.host, port=address.port)
    with closing(ServerStore(plain, token="none's", deadline_s=1.0)) as store, pytest.raises(CacheFault):
        store.has([s.key])
    with closing(ServerStore(address, token="none's", tls=trusting, deadline_s=10.0)) as store:
        assert store.has([s.key]) == {s.key}


def test_no_tls_without_a_certificate(served: Running) -> None:
    with pytest.raises(InputError, match="certificate"):
        asyncio.run_coroutine_threadsafe(served.server.listen(Address(host="127.0.0.1", port=1, tls=True)), served.loop).result(
            10
        )


def greeted(address: Address) -> socket.socket:
    made = socket.create_connection((address.host, address.port), 10)
    made.sendall(p.frame(p.pack_request(p.Hello(p.VERSION, "0", "", "none's", "0" * 32))))
    assert said(made)["protocol"] == p.VERSION
    return made


def test_a_stranger_says_hello_in_few_bytes(address: Address) -> None:
    """More is not even waited for."""
    for payload in (p.MAX_HELLO + 1, p.MAX_PAYLOAD):
        with socket.create_connection((address.host, address.port), 10) as made:
            made.sendall(p.PREFIX.pack(b"KV", p.VERSION, 0, payload, 0))
            assert said(made)["error"] == "malformed"
            assert made.recv(1) == b""


def test_connections_by_tcp_leave_room_for_others(served: Running, address: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many strangers there are: who is on this host gets in, and so does the next one when they have gone."""
    monkeypatch.setattr("kvcomm.wire.server.BY_TCP", 2)
    with (
        socket.create_connection((address.host, address.port), 10),
        greeted(address),
        socket.create_connection((address.host, address.port), 10) as third,
        closing(ServerStore(served.address)) as near,
    ):
        assert third.recv(1) == b""
        assert near.has(["0" * 32]) == set()
    assert until(lambda: served.server._by_tcp == 0)
    greeted(address).close()


def test_who_connects_for_tls_and_says_nothing_is_given_up(
    served: Running, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcomm.wire.server.GREETING", 0.2)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    address = listening(served, context)
    with socket.create_connection((address.host, address.port), 10) as made:
        assert made.recv(1) == b""


def said(made: socket.socket) -> dict[str, object]:
    payload, body = p.lengths(exactly(made, p.PREFIX.size))
    assert not body
    return p.reply_of(exactly(made, payload))


def exactly(made: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = made.recv(count - len(data))
        assert piece, "hung up"
        data += piece
    return data


def test_a_body_that_ends_too_early(served: Running, address: Address) -> None:
    """Whoever hangs up in the middle of it has put nothing."""
    s = segment(50)
    record = Record.of(s, kv_of(s))
    with greeted(address) as made:
        made.sendall(p.frame(p.pack_request(p.Put(s.key)), record.nbytes) + record.data.tobytes()[:-1])
        made.shutdown(socket.SHUT_WR)
        assert made.recv(1) == b""
    with closing(ServerStore(address, token="none's")) as store:
        assert store.get(s.key) is None
    assert served.server.status()["tiers"]["memory"]["objects"] == 0
    assert served.server.library.slabs.arena.used == 0


def test_who_announces_a_body_and_sends_none_is_given_up(
    served: Running, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it announces, and however fast it began: the room is others' again."""
    monkeypatch.setattr("kvcomm.wire.session.PATIENCE", 0.2)
    monkeypatch.setattr("kvcomm.wire.session.CHUNK", 1 << 10)
    for sent in (0, 5000):
        with greeted(address) as made:
            made.sendall(p.frame(p.pack_request(p.Put("0" * 32)), 64 << 20) + bytes(sent))
            assert made.recv(1) == b""
    assert until(lambda: served.server._bodies == 0)


def test_a_body_without_room_is_refused_and_the_connection_goes_on(served: Running, address: Address) -> None:
    """The client is told, and does not take the server for gone."""
    s = segment(50)
    with closing(ServerStore(address, token="none's", deadline_s=10.0)) as store:
        with greeted(address) as other:
            other.sendall(p.frame(p.pack_request(p.Put("0" * 32)), 64 << 20) + bytes(100))
            assert until(lambda: served.server._bodies > 0)
            for _ in range(5):  # more than the breaker bears of what it takes for failures
                with pytest.raises(Unreachable, match="busy") as refusal:
                    store.put(s, kv_of(s))
                assert refusal.value.reason == "refused"
            assert store.has([s.key]) == set()
        assert until(lambda: served.server._bodies == 0)
        assert store.put(s, kv_of(s))
    assert served.server.counters.connections == 2


def test_a_body_larger_than_the_server(served: Running, address: Address) -> None:
    with greeted(address) as made:
        made.sendall(p.frame(p.pack_request(p.Put("0" * 32)), (64 << 20) + 1))
        assert said(made)["error"] == "malformed"
        assert made.recv(1) == b""


@pytest.mark.parametrize("kind", [p.Has(["0" * 32]), p.Stats(), p.Land(1)])
def test_a_body_that_nobody_asked_for(address: Address, kind: p.Request) -> None:
    with greeted(address) as made:
        made.sendall(p.frame(p.pack_request(kind), 100) + bytes(100))
        assert said(made)["error"] == "malformed"


def test_bodies_that_are_no_record_are_refused_and_the_connection_goes_on(served: Running, address: Address) -> None:
    s, other = segment(50), segment(50, seed=1, tenant="a")
    good = Record.of(s, kv_of(s)).data.tobytes()
    foreign = Record.of(other, kv_of(other)).data.tobytes()
    damaged = good[:-1] + bytes([good[-1] ^ 1])
    cut = good[:-64]
    with greeted(address) as made:
        for key, body in (
            (s.key, bytes(100)),
            (s.key, b""),
            (other.key, good),
            (s.key, cut),
            (s.key, damaged),
            (other.key, foreign),
        ):
            made.sendall(p.frame(p.pack_request(p.Put(key)), len(body)) + body)
            reply = said(made)
            assert reply.get("error") == "refused" or reply.get("stored") is False, reply
        made.sendall(p.frame(p.pack_request(p.Put(s.key)), len(good)) + good)
        assert said(made) == {"stored": True, "reason": None}
    assert served.server.counters.faults == 0
    assert served.server.status()["tiers"]["memory"]["objects"] == 1
    served.server.library.slabs.check_integrity()


def test_headers_that_clients_send_are_read_in_threads(
    served: Running, address: Address, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be as long as a prompt, and the loop is everybody's."""
    read: list[str] = []

    class Noted(Record):
        @property
        def key(self) -> str:
            read.append(threading.current_thread().name)
            return super().key

    monkeypatch.setattr("kvcomm.wire.session.Record", Noted)
    s = segment(50)
    with closing(ServerStore(address, token="none's")) as far:
        assert far.put(s, kv_of(s))
    assert read
    assert all(name.startswith("kvcomm-server") for name in read)


def test_memory_is_not_lent_over_tcp(served: Running, address: Address) -> None:
    with closing(Connection(address, "", token="none's")) as far:
        for request in (p.Reserve("0" * 32, 5000, None), p.Commit(1)):
            with pytest.raises(Unreachable, match="refused"):
                far.call(request)
        far.call(p.Release([1], [0, 0]))
        assert far.call(p.Has(["0" * 32]))[0] == {"keys": []}
    assert held(served) == (0, 0)
    assert served.server.library.slabs.arena.used == 0


def test_a_server_that_announces_more_than_it_has(folder: Path) -> None:
    """A reply of 2**63 bytes is a fault, not an attempt to make room for it."""
    with socket.socket() as lying:
        lying.bind(("127.0.0.1", 0))
        lying.listen(4)
        address = Address(host="127.0.0.1", port=lying.getsockname()[1])
        connection = Connection(address, "", deadline_s=5.0)

        def serve() -> None:
            made, _ = lying.accept()
            with made:
                made.recv(1000)
                made.sendall(p.frame(msgpack.packb({"epoch": "e", "connection": 0, "capacity": 1 << 40})))
                made.recv(1000)
                made.sendall(p.PREFIX.pack(b"KV", 1, 0, 1, 1 << 63))

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(Unreachable, match="at most"):
            connection.call(p.Stats())
        thread.join()
        connection.close()
