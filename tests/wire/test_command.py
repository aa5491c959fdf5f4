"""`kvcomm server` as a process: starts, answers, restores, ends in good order, is killed; and what it refuses to start with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from kvcomm import cli, doctor
from kvcomm._version import __version__
from kvcomm.anchors.record import Entry, Layout, checksum
from kvcomm.errors import KVCommError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.disk import DiskStore
from kvcomm.store.record import Record
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address, address_of, default_path
from kvcomm.wire.anchor_entry import pack_entry
from kvcomm.wire.client import ServerStore
from kvcomm.wire.status import ask
from kvcomm.wire.transport import Unreachable


class Running:
    """A server's process, which has said where it listens."""

    def __init__(self, *flags: object, env: dict[str, str] | None = None) -> None:
        argv = [sys.executable, "-m", "kvcomm", "server", "--memory", "32M", *map(str, flags)]
        environment = {**os.environ, **(env or {})}
        self.process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=environment)
        self.said: list[str] = []
        self.until("listening at")
        self.line = self.said[-1].strip()

    def until(self, words: str) -> None:
        """Reads what it says until that comes."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if words in line:
                return
        raise AssertionError("".join(self.said))

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Its exit code, and what it said after its first line."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name)


Start = Callable[..., Running]


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts servers at `folder / "s"`; none outlives the test."""
    with ExitStack() as stack:

        def run(*flags: object, at: str = "s", env: dict[str, str] | None = None) -> Running:
            running = Running("--socket", folder / at, *flags, env=env)
            stack.callback(running.stop)
            return running

        yield run


def record(seed: int, *, tenant: str = "", tokens: int = 20) -> Record:
    ids = np.random.default_rng(seed).integers(1, 1000, tokens).astype(np.int32)
    made = torch.Generator().manual_seed(seed)
    parts = tuple(torch.randn(2, tokens, 8, generator=made) for _ in range(4))
    return Record.of(Segment(ids, ids[:0], "f0", tenant), SegmentKV(parts[:2], parts[2:], 0, tokens))


def anchor(*, tenant: str) -> tuple[bytes, bytes]:
    document = b"opaque to servers"
    layout = Layout("raw", (4,), (4,))
    told = Entry("0" * 32, "slot", "f0", tenant, layout, layout, checksum(document), len(document))
    return pack_entry(told), document


def found(store: ServerStore, r: Record) -> bytes | None:
    got = store.get_records([r.key]).get(r.key)
    return None if got is None else got.data.tobytes()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_starts_answers_and_ends(start: Start, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line when it is ready, status in both forms, metrics that agree with it, exit code 0 and no socket left."""
    server = start("--disk", folder / "d", "--metrics-port", 0)
    pattern = rf"kvcomm: listening at unix:{folder}/s, (http://127.0.0.1:\d+/metrics)"
    url = re.fullmatch(pattern, server.line)[1]  # type: ignore[index]  # no match fails the test as well
    r = record(1)
    with closing(ServerStore(f"unix:{folder}/s")) as store:
        assert store.put_record(r)
        assert found(store, r) == r.data.tobytes()
        assert cli.main(["server", "status", "--socket", f"{folder}/s", "--format", "json", "--output", str(folder)]) == 0
        doc = json.loads(capsys.readouterr().out)
        assert json.loads((folder / "server_status.json").read_text("utf-8")) == doc
        assert (doc["schema"], doc["address"]) == ("kvcomm.server.status/1", f"unix:{folder}/s")
        assert (doc["pid"], doc["counters"]["handed_out"]) == (server.process.pid, 1)
        assert {name: tier["objects"] for name, tier in doc["tiers"].items()} == {"memory": 1, "disk": 1}
        assert (doc["tiers"]["memory"]["limit_bytes"], doc["tiers"]["disk"]["limit_bytes"]) == (32 << 20, 50 << 30)
        assert cli.main(["server", "status", "--socket", f"{folder}/s"]) == 0
        out = capsys.readouterr().out
        assert f"process {server.process.pid}" in out
        assert re.search(r"^memory +1 ", out, re.MULTILINE)
        with urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        assert 'kvcomm_server_tier_objects{tier="disk"} 1\n' in text
        assert "kvcomm_server_handed_out_total 1\n" in text
    code, _ = server.end()
    assert code == 0
    assert not (folder / "s").exists()
    assert cli.main(["server", "status", "--socket", f"{folder}/s"]) == 1
    out, err = capsys.readouterr()
    why = f"at unix:{folder}/s ([Errno 2] No such file or directory); start one: kvcomm server"
    assert (out, err) == ("", f"kvcomm: KVCommError: no server answers {why}\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_it_kept_is_there_again(start: Start, folder: Path, number: int) -> None:
    """After an orderly end and after a kill, on the same disk and socket; found by text as well, which is restored."""
    records = [record(n, tenant="t") for n in range(5)]
    server = start("--disk", folder / "d")
    with closing(ServerStore(f"unix:{folder}/s", tenant="t")) as store:
        assert all(store.put_record(r) for r in records)
    server.end(number)
    again = start("--disk", folder / "d")
    again.until("5 objects of the disk are known")
    with closing(ServerStore(f"unix:{folder}/s", tenant="t", deadline_s=30)) as store:
        assert [found(store, r) for r in records] == [r.data.tobytes() for r in records]
        look = store.index.look(records[3].segment.ids, fingerprint="f0", tenant="t")
        assert [m.segment.key for m in look.matches] == [records[3].key]


def test_quiet_and_interrupted(folder: Path) -> None:
    argv = [sys.executable, "-m", "kvcomm", "server", "-q", "--memory", "32M", "--socket", str(folder / "s")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            try:
                ask(Address(path=folder / "s"))
                break
            except Unreachable:
                pass
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == 0


def test_systemd_is_told(start: Start, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind(str(folder / "n"))
        there.settimeout(30)
        server = start(env={"NOTIFY_SOCKET": str(folder / "n")})
        assert there.recv(100) == b"READY=1"
        assert server.end()[0] == 0
        assert there.recv(100) == b"STOPPING=1"


def test_moved_from_server_to_server(start: Start, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kvcomm store` beside running servers: listed, exported and imported as of a folder."""
    start(), start(at="s2")
    records = [record(n, tenant="t") for n in range(3)]
    other = record(9)
    with closing(ServerStore(f"unix:{folder}/s")) as store:
        assert all(store.put_record(r) for r in (*records, other))
        entry, document = anchor(tenant="t")
        assert store.call("t", p.AddAnchor(entry, document))[0]["kept"]

    def run(*argv: str) -> dict[str, Any]:
        assert cli.main(["store", *argv, "--format", "json"]) == 0
        doc: dict[str, Any] = json.loads(capsys.readouterr().out)
        return doc

    tar, here, there = (str(folder / name) for name in ("a.tar", "s", "s2"))
    assert [row["key"] for row in run("ls", "--socket", here)["objects"]] == [other.key]
    listed = run("ls", "--socket", here, "--tenant", "t")["objects"]
    assert [(row["key"], row["nbytes"]) for row in listed] == sorted((r.key, r.nbytes) for r in records)
    assert {(row["tokens"], row["uses"]) for row in listed} == {(20, None)}
    for way, socket_, expected in (("export", here, (3, 1, 0)), ("import", there, (3, 1, 0)), ("import", there, (0, 0, 4))):
        doc = run(way, tar, "--socket", socket_, "--tenant", "t")
        assert (doc["objects"], doc["anchors"], doc["here_already"]) == expected
    with closing(ServerStore(f"unix:{there}", tenant="t")) as store:
        assert [found(store, r) for r in records] == [r.data.tobytes() for r in records]
        assert store.call("t", p.Anchors("f0", 0))[0]["added"] == [[entry, document]]


def test_other_hosts(start: Start, folder: Path) -> None:
    """TLS with a token per tenant: who has it reads, who has another one or does not trust the certificate does not."""
    names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([*make, "-subj", "/CN=localhost", "-addext", names, *files], check=True, capture_output=True)
    tokens = folder / "tokens"
    tokens.write_text("# of tests\nalice secret-a\n\nbob secret-b\n", "utf-8")
    tokens.chmod(0o600)
    at, plain = f"tls://localhost:{free_port()}", f"tcp://127.0.0.1:{free_port()}"
    flags = ["--token-file", tokens, "--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem"]
    server = start("--listen", at, "--listen", plain, *flags)
    assert server.line == f"kvcomm: listening at unix:{folder}/s, {at}, {plain}"
    trusting = ssl.create_default_context(cafile=str(folder / "cert.pem"))
    r = record(1, tenant="alice")
    with closing(ServerStore(at, tenant="alice", token="secret-a", tls=trusting, deadline_s=10)) as store:
        assert store.put_record(r)
        assert found(store, r) == r.data.tobytes()
    with closing(ServerStore(plain, tenant="alice", token="secret-a", deadline_s=10)) as store:
        assert found(store, r) == r.data.tobytes()
    with closing(ServerStore(plain, tenant="bob", token="secret-b", deadline_s=10)) as store:
        assert found(store, r) is None
    for tenant, token, context in (("alice", "secret-b", trusting), ("eve", "", trusting), ("alice", "secret-a", None)):
        stranger = ServerStore(at, tenant=tenant, token=token, tls=context, deadline_s=10)
        with closing(stranger), pytest.raises(KVCommError, match=r"token|certificate verify failed"):
            stranger.call(tenant, p.Stats())
    assert server.end()[0] == 0


@pytest.fixture
def redis_url(folder: Path) -> Iterator[str]:
    """A Redis of the test's own."""
    if (command := shutil.which("redis-server")) is None:
        pytest.skip("there is no redis-server")
    port = free_port()
    argv = [command, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("Ready to accept connections" in line for line in process.stdout)
        yield f"redis://127.0.0.1:{port}/0?deadline=30&timeout=30"
        process.kill()


@pytest.mark.parametrize("disk", [True, False])
def test_two_hosts_share_what_is_remote(start: Start, folder: Path, redis_url: str, disk: bool) -> None:
    """What one server was given, the other finds by its text; and what one kept, it finds after it was killed."""
    flags = [["--remote", redis_url, *(["--disk", folder / f"d{n}"] if disk else [])] for n in range(2)]
    first, second = (start(*flags[n], at=f"s{n}") for n in range(2))
    r = record(1, tenant="t", tokens=200)
    with closing(ServerStore(f"unix:{folder}/s0", tenant="t", deadline_s=60)) as store:
        assert store.put_record(r)

    def seen(name: str) -> list[tuple[int, int, str]]:
        with closing(ServerStore(f"unix:{folder}/{name}", tenant="t", deadline_s=60)) as store:
            look = store.index.look(r.segment.ids, fingerprint="f0", tenant="t")
            assert found(store, r) == (r.data.tobytes() if look.matches else None)
            return [(m.start, m.end, m.segment.key) for m in look.matches]

    assert seen("s0") == seen("s1") == [(0, 200, r.key)]
    status = ask(Address(path=folder / "s1"))
    assert list(status["tiers"]) == (["memory", "disk", "redis"] if disk else ["memory", "redis"])
    assert second.end()[0] == 0
    first.end(signal.SIGKILL)
    start(*flags[0], at="s0")
    assert seen("s0") == [(0, 200, r.key)]


def test_a_remote_that_is_gone(start: Start, folder: Path) -> None:
    """It starts, keeps and finds what it has, counts why, and ends."""
    server = start("--remote", f"redis://127.0.0.1:{free_port()}/0")
    r = record(1, tokens=200)
    with closing(ServerStore(f"unix:{folder}/s", deadline_s=20)) as store:
        assert store.put_record(r)
        assert found(store, r) == r.data.tobytes()
    assert ask(Address(path=folder / "s"), deadline_s=60)["tiers"]["redis"]["faults"]
    assert server.end()[0] == 0


def test_quotas_hold(start: Start, folder: Path) -> None:
    server = start("--quota", "small=4K", "--quota", "*=1M", "--disk", folder / "d")
    with closing(ServerStore(f"unix:{folder}/s")) as store:
        assert store.put_record(record(1, tenant="small", tokens=200)).reason == "larger-than-quota"
        assert store.put_record(record(1, tenant="large", tokens=200))
    assert server.end()[0] == 0


# -- what cannot be started -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--memory", "many"], "many"),
        (["--memory", "0"], "--memory"),
        (["--memory", "900000G"], "--memory"),
        (["--disk-bytes", "x"], "x"),
        (["--disk-bytes", "10"], "--disk-bytes is 10"),
        (["--disk", "{folder}/file"], "file"),
        (["--quota", "alice"], "TENANT=BYTES"),
        (["--quota", "alice=x"], "x"),
        (["--socket", "relative"], "absolute"),
        (["--socket", "tls://localhost:99"], "--listen"),
        (["--socket", "/tmp/" + "x" * 200], "100 bytes"),
        (["--listen", "tcp://example.com:99", "--token-file", "{folder}/tokens"], "--insecure"),
        (["--listen", "tls://127.0.0.1:99"], "--token-file"),
        (["--listen", "tls://127.0.0.1:99", "--token-file", "{folder}/tokens"], "--tls-cert"),
        (["--listen", "tls://127.0.0.1:99", "--token-file", "{folder}/none"], "--token-file"),
        (["--listen", "tls://127.0.0.1:99", "--token-file", "{folder}/file"], "lines `tenant token`"),
        (["--tls-cert", "{folder}/none"], "--tls-cert"),
        (["--tls-cert", "{folder}/file"], "--tls-cert"),
        (["--metrics-port", "{taken}"], "--metrics-port"),
        (["--metrics-port", "-5"], "--metrics-port"),
        (["--listen", "tcp://127.0.0.1:{taken}", "--token-file", "{folder}/tokens"], "port"),
        (["--remote", "ftp://x"], "ftp"),
        (["--anchors-bytes", "x"], "x"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)  # fmt: skip
def test_unusable_input(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str) -> None:
    """Exit code 2, one line that names the value, and neither socket nor lock left behind."""
    (folder / "file").write_text("one two three\n", "utf-8")
    (folder / "tokens").write_text("* secret\n", "utf-8")
    (folder / "tokens").chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = [flag.replace("{folder}", str(folder)).replace("{taken}", port) for flag in flags]
        base = ["server", "-q", "--memory", "2M", "--socket", str(folder / "s")]
        if "--disk" not in flags:
            base += ["--disk", str(folder / "d")]
        assert cli.main([*base, *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("kvcomm: InputError: ")
    assert says in err
    assert not (folder / "s").exists()
    DiskStore(folder / "d", 1 << 30).close()


def test_two_at_one_place(start: Start, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The socket, or the disk, of one that runs; it goes on."""
    start("--disk", folder / "d")
    for flags in (["--socket", str(folder / "s")], ["--socket", str(folder / "s2"), "--disk", str(folder / "d")]):
        assert cli.main(["server", "-q", "--memory", "2M", *flags]) == 2
        err = capsys.readouterr().err
        assert str(folder) in err
        assert err.count("\n") == 1
    assert ask(Address(path=folder / "s"))["connections"] == 1


def test_two_that_start_at_once(folder: Path) -> None:
    """One of them serves, the other one says why it does not."""
    argv = [sys.executable, "-m", "kvcomm", "server", "--memory", "2M", "--socket", str(folder / "s")]
    with ExitStack() as stack:
        both = [stack.enter_context(subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)) for _ in range(2)]
        for process in both:
            stack.callback(process.kill)
        first_words = [process.stderr.readline() for process in both if process.stderr is not None]
        assert sorted("listening at" in words for words in first_words) == [False, True]
        winner, loser = sorted(both, key=lambda process: "listening at" not in first_words[both.index(process)])
        assert loser.wait(30) == 2
        assert ask(Address(path=folder / "s"))["pid"] == winner.pid
        winner.terminate()
        assert winner.wait(30) == 0


def test_the_documentation_names_every_flag(checkout: Path) -> None:
    text = (checkout / "docs" / "server.md").read_text("utf-8")
    for command in ("server", "store"):
        parser = ArgumentParser(add_help=False)
        import_module({c.words: c.module for c in cli.COMMANDS}[(command,)]).add_arguments(parser)
        for action in parser._actions:
            for name in (*action.option_strings, *(action.choices or ())):
                assert name in text, name


def test_the_unit_is_one(checkout: Path) -> None:
    """Its command is one that the server takes, and systemd has no objection, where it is here to ask."""
    unit = checkout / "docs" / "kvcomm.service"
    command = re.search(r"^ExecStart=\S+/kvcomm (server .*)$", unit.read_text("utf-8"), re.MULTILINE)
    assert command is not None
    parser = ArgumentParser()
    import_module("kvcomm.wire.command").add_arguments(parser)
    assert parser.parse_args(command[1].split()[1:]).action == "run"
    if shutil.which("systemd-analyze"):
        env = {**os.environ, "XDG_RUNTIME_DIR": "/tmp"}
        done = subprocess.run(
            ["systemd-analyze", "verify", "--user", unit], capture_output=True, text=True, env=env, check=False
        )
        assert [line for line in done.stderr.splitlines() if "is not executable" not in line] == []


def test_the_doctor_asks(start: Start, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMM_SERVER", f"{folder}/s")
    before = doctor.server()
    assert (before.usable, "kvcomm server" in before.why) == (False, True)
    start()
    assert doctor.server() == doctor.Facility("server", usable=True, why=f"kvcomm {__version__} answers at unix:{folder}/s")
    monkeypatch.setenv("KVCOMM_SERVER", "relative")
    assert not doctor.server().usable
    assert {name for name, _, _ in doctor.STORES} == {"memory", "disk", "redis", "mooncake"}


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVCOMM_SERVER", raising=False)
    assert address_of() == Address(path=default_path())
    monkeypatch.setenv("KVCOMM_SERVER", "tls://host:99")
    assert address_of() == Address(host="host", port=99, tls=True)
    assert address_of("/run/x") == Address(path=Path("/run/x"))


def test_a_file_at_the_sockets_place_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "notes.txt"
    path.write_text("mine", encoding="utf-8")
    assert cli.main(["server", "-q", "--socket", str(path)]) == 2
    assert "is no socket; choose another path" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
