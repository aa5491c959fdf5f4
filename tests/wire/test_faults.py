"""What goes wrong around a server, under load from client processes: no request fails, no wrong byte is served, all that a
client was told is kept can be read afterwards, and nothing is left of it when all have gone. Each test says what it counted.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import msgpack
import pytest

from kvcomm.errors import CacheFault
from kvcomm.store.disk import DISK_FULL, DiskStore
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address
from kvcomm.wire.client import ServerStore
from kvcomm.wire.protocol import FD
from kvcomm.wire.server import CONNECTIONS
from kvcomm.wire.status import ask
from kvcomm.wire.transport import Connection, Unreachable
from tests.services import MooncakeMaster, RedisServer, Service, ended
from tests.wire import load
from tests.wire.load import Engine, Seen, Watched, acknowledged, record, stored

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(sys.platform != "linux", reason="processes and their memory are looked at in /proc"),
]

MEMORY = 64 << 20
KILLS = 50
LONGEST = 8.0  # s: a prompt asks the server up to five times, each with a deadline of 1 s, and waits for others for 1 s at most

Say = Callable[[str], None]
Serve = Callable[..., "Served"]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Prints a line in a normal run."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n  {line}")

    return say


# -- processes -------------------------------------------------------------------------------------------------------------


class Served:
    """`kvcomm server` as a user runs it, at `folder / "s"`; it goes on in the same disk folder when it is started again."""

    def __init__(self, folder: Path, *flags: object, env: dict[str, str] | None = None) -> None:
        self.folder, self.path, self.log = folder, folder / "s", folder / "log"
        self.inodes: set[int] = set()  # of the shared memory of every start
        self.starts = 0
        self._argv = [sys.executable, "-m", "kvcomm", "server", "--socket", str(self.path), "--memory", "64M", *map(str, flags)]
        self._env = {**os.environ, **(env or {})}
        self._asking = Connection(self.address, "", deadline_s=20.0)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> Address:
        return Address(path=self.path)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def begin(self) -> socket.socket:
        """Started; the socket hears when it is ready."""
        self.starts += 1
        heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = self.folder / f"ready{self.starts}"
        heard.bind(str(name))
        with self.log.open("ab") as log:
            env = {**self._env, "NOTIFY_SOCKET": str(name)}
            self.process = subprocess.Popen(self._argv, stdin=subprocess.DEVNULL, stderr=log, env=env)
        return heard

    def ready(self, heard: socket.socket) -> None:
        heard.settimeout(60.0)
        with heard:
            assert heard.recv(100) == b"READY=1", self.said()
        (self.folder / f"ready{self.starts}").unlink()
        self.inodes |= _memory_of(self.pid)

    def start(self) -> Self:
        self.ready(self.begin())
        return self

    def kill(self) -> None:
        """As kill -9, and gone when this returns."""
        if self.process is not None:
            self.inodes |= _memory_of(self.pid)
            self.process.kill()
            self.process.wait()
            self.process = None

    def end(self) -> None:
        """In good order."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(30) == 0, self.said()
        self.process = None

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def status(self) -> dict[str, Any]:
        """Over a connection that stays open."""
        return self._asking.call(p.Stats())[0]

    def requests(self) -> int:
        """Prompts and records that it has been asked for, by all clients."""
        counts = self.status()["counters"]["requests"]
        return int(sum(count for kind, count in counts.items() if kind in ("find", "get", "commit")))

    def answers(self) -> bool:
        """Somebody who comes now?"""
        try:
            return bool(ask(self.address))
        except Unreachable:
            return False

    def close(self) -> None:
        self.kill()
        self._asking.close()

    def store(self) -> ServerStore:
        """Of a patient client."""
        return ServerStore(self.address, deadline_s=20.0)


class Nursery:
    """Forks clients, whose process ids stay theirs until it ends: it does not ask how they ended."""

    def __init__(self, env: dict[str, str] | None = None) -> None:
        argv = [sys.executable, load.__file__]
        environment = {**os.environ, **(env or {})}
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            env=environment,
        )

    def fork(self, kind: str, served: Served, number: int) -> int:
        """Its process id."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{kind} {served.path} {served.folder} {number}\n")
        return int(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


class Load:
    """Client processes, each at work already. Ends them; `seen` has what they saw."""

    def __init__(self, nursery: Nursery, served: Served, kinds: Sequence[str]) -> None:
        self.served, self.kinds, self.seen = served, kinds, list[Seen]()
        self._nursery, self._folder = nursery, served.folder
        self._pids: list[int] = []

    def __enter__(self) -> Self:
        try:
            self._pids = [self._nursery.fork(kind, self.served, number) for number, kind in enumerate(self.kinds)]
            self._wait_for("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def finish(self) -> Seen:
        """The sum of what all of them saw."""
        (self._folder / "stop").touch()
        self._wait_for("seen")
        self.seen = [Seen(**json.loads((self._folder / f"seen-{n}").read_text())) for n in range(len(self.kinds))]
        return _sum(self.seen)

    def _wait_for(self, name: str) -> None:
        paths = [self._folder / f"{name}-{number}" for number in range(len(self.kinds))]
        until(lambda: all(path.exists() or dead(pid) for path, pid in zip(paths, self._pids, strict=True)), 60.0)
        log = self._folder / "clients"
        assert all(path.exists() for path in paths), log.read_text(errors="replace")[-4000:]

    def __exit__(self, *_: object) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        assert until(lambda: all(dead(pid) for pid in self._pids))


def dead(pid: int) -> bool:
    """Has it ended, whether or not somebody has asked how?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _sum(parts: Sequence[Seen]) -> Seen:
    whole = Seen()
    for part in parts:
        for field in fields(Seen):
            mine, theirs = getattr(whole, field.name), getattr(part, field.name)
            if field.name in ("longest_s", "slowest"):
                continue
            if isinstance(mine, dict):
                mine = dict(Counter(mine) + Counter(theirs))
            else:
                mine += theirs
            setattr(whole, field.name, mine)
        whole.took(part.longest_s, part.slowest)
    return whole


def told(seen: Seen) -> str:
    """For the line that a test prints."""
    faults = ", ".join(f"{reason} {count}" for reason, count in sorted(seen.faults.items())) or "none"
    return (
        f"{seen.requests} requests, {len(seen.failed)} failed, {len(seen.wrong)} wrong ({seen.exact} answers compared with "
        f"dense ones, {seen.moved} with the same plan on sound KV), {seen.hits} hits, {seen.put} put, "
        f"longest {seen.longest_s:.2f} s; "
        f"without the server: {faults}"
    )


def check(seen: Seen) -> None:
    """No request failed, and nothing wrong was served."""
    assert not seen.failed, seen.failed[:3]
    assert not seen.wrong, seen.wrong[:3]


def hits(engine: Engine) -> bool:
    """Does its next prompt find something?"""
    before = engine.seen.hits
    engine.step()
    return engine.seen.hits > before


def engines(running: Load) -> Seen:
    """What the engines alone saw."""
    return _sum([seen for seen, kind in zip(running.seen, running.kinds, strict=True) if kind == "engine"])


# -- what is left ----------------------------------------------------------------------------------------------------------


def _memory_of(pid: int | str) -> set[int]:
    """Inodes of servers' shared memory that a process has open or mapped."""
    found = set[int]()
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(fd).startswith("/memfd:kvcomm"):
                    found.add(os.stat(fd).st_ino)
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if "/memfd:kvcomm" in line:
                found.add(int(line.split(maxsplit=5)[4]))
    return found


def _all_memory() -> dict[int, set[str]]:
    """Every inode of shared memory that any process has, and which processes."""
    found: dict[int, set[str]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for inode in _memory_of(process.name):
                found.setdefault(inode, set()).add(process.name)
    return found


def _shmem() -> int:
    """Bytes of shared memory of the whole machine."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("Shmem:"))
    return int(line.split()[1]) << 10


def until(true: Callable[[], object], seconds: float = 20.0) -> bool:
    """Does it become true? What is waited for is another process's work, of which nothing is told."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@contextmanager
def nothing_left(folder: Path, say: Say) -> Iterator[Serve]:
    """Makes servers, and checks when all have gone that they have left nothing, neither in memory nor in `folder`."""
    names, shmem, alone = set(os.listdir("/dev/shm")), _shmem(), not _all_memory()
    made: list[Served] = []

    def serve(*flags: object, env: dict[str, str] | None = None) -> Served:
        made.append(Served(folder, *flags, env=env))
        return made[-1]

    try:
        yield serve
        for served in made:
            if served.process is not None:
                served.end()
    finally:
        for served in made:
            served.close()
    ours = set[int]().union(*(served.inodes for served in made))
    assert ours, "no server had any memory"
    until(lambda: not ours & _all_memory().keys())
    held = {inode: pids for inode, pids in _all_memory().items() if inode in ours}
    assert not held, f"memory of servers that have gone is held by processes: {held}; this is {os.getpid()}"
    new = set(os.listdir("/dev/shm")) - names
    assert not [name for name in new if "kvcomm" in name], f"left in /dev/shm: {new}"
    back = until(lambda: _shmem() < shmem + (8 << 20), 5.0)
    alone = alone and not _all_memory()  # no other server of this machine has memory that comes and goes
    assert not alone or (back and not new), f"{shmem} bytes of shared memory before, {_shmem()} after; new in /dev/shm: {new}"
    assert not (folder / "s").exists(), "the socket is still there"
    if (folder / "d").exists():
        say(f"disk: {checked_disk(folder / 'd')}")


def checked_disk(folder: Path) -> str:
    """Opens what a server has left: every object is sound, and nothing else is there."""
    with closing(DiskStore(folder, 8 << 30)) as disk:
        disk.check_integrity()
        assert not any(reason for _, reason in disk.checked())
        stats = disk.stats()
    allowed = {"lock", "journal", "objects", "writing", "damaged", "anchors"}
    assert {path.name for path in folder.iterdir()} <= allowed
    assert not list((folder / "writing").iterdir())
    assert not list((folder / "damaged").iterdir())
    return f"{stats.objects} objects, {stats.nbytes >> 20} MiB, all sound; opened {disk.opened}"


@pytest.fixture
def serve(folder: Path, say: Say) -> Iterator[Serve]:
    with nothing_left(folder, say) as made:
        yield made


def read_back(served: Served, numbers: dict[int, str]) -> list[int]:
    """Of these records those that the server does not find any more. Raises AssertionError for wrong bytes, CacheFault."""
    lost = []
    with closing(served.store()) as store:
        for number, kind in numbers.items():
            r = record(number, kind)
            found = store.get_records([r.key]).get(r.key)
            if found is None:
                lost.append(number)
            else:
                assert found.data.tobytes() == r.data.tobytes(), f"other bytes for record {number}"
    return [number for number in lost if number in acknowledged(served.folder)]  # its client may have removed it meanwhile


def lost_by_engines(served: Served) -> list[str]:
    """Keys of what engines were told is kept, and the server does not find any more."""
    lost = []
    with closing(Watched(f"unix:{served.path}", served.folder, Seen(), deadline_s=20.0)) as store:
        for key in sorted(stored(served.folder)):  # one by one: all at once they need not fit in the server's memory
            found = store.get_records([key])
            lost += [] if key in found else [key]
            assert all(store.sound(r) for r in found.values())
    return lost


# -- tests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_killed_50_times_at_random_moments(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """kill -9: mostly of a server at work, each fifth time of one that starts. After each start a sample of what clients were
    told is kept is read; at the end, all of it.
    """
    served = serve("--disk", folder / "d", "--disk-bytes", "4G")
    chance = random.Random(50)
    served.start()
    took, samples, early, began = list[float](), 0, 0, time.monotonic()
    with Load(nursery, served, ("raw", "large", "engine", "engine")) as running:
        served.kill()
        for kill in range(1, KILLS):
            started = time.monotonic()
            heard = served.begin()
            if kill % 5 == 0:
                early += 1
                heard.close()
                time.sleep(chance.uniform(0, sorted(took)[len(took) // 2]))
            else:
                served.ready(heard)
                took.append(time.monotonic() - started)
                known = acknowledged(folder)
                sample = dict(chance.sample(sorted(known.items()), min(8, len(known))))
                assert read_back(served, sample) == []
                samples += len(sample)
                time.sleep(chance.uniform(0, 1.0))
            served.kill()
        lasted = time.monotonic() - began
        served.start()
        seen = running.finish()
        known = acknowledged(folder)
        assert read_back(served, known) == []
        status = served.status()
        engines_lost = lost_by_engines(served)
    start = sorted(took)[len(took) // 2]
    say(
        f"{KILLS} kills in {lasted:.0f} s, {early} of them while it started, which takes {start:.2f} s: "
        f"{told(seen)}; {samples} records read after starts, {len(known) + len(stored(folder))} at the end, 0 lost"
    )
    check(seen)
    assert seen.missing == []
    assert engines_lost == []
    assert engines(running).exact
    assert engines(running).moved
    assert status["tiers"]["disk"]["faults"] == {}
    assert status["tiers"]["disk"]["evicted"] == 0


def test_the_memory_of_a_killed_server_goes(folder: Path, serve: Serve) -> None:
    """A client that lives on holds it no longer than it looks at it, or does not know yet."""
    served = serve().start()
    with closing(ServerStore(served.address)) as store:
        r = record(0)
        assert store.put_record(r)
        found = store.get_records([r.key])[r.key]
        served.kill()
        assert _memory_of(os.getpid()) & served.inodes
        with pytest.raises(CacheFault):
            store.get_records([r.key])
        assert found.data.tobytes() == r.data.tobytes()
        del found
        assert not _memory_of(os.getpid()) & served.inodes
    served.start()


def test_socket_removed(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """It comes back; who is connected does not notice."""
    served = serve("--disk", folder / "d").start()
    away = list[float]()
    with Load(nursery, served, ("raw", "raw", "engine", "engine")) as running:
        for _ in range(10):
            before = served.requests()
            served.path.unlink()
            removed = time.monotonic()
            assert until(served.path.exists), "the socket does not come back"
            away.append(time.monotonic() - removed)
            assert until(served.answers), "nobody answers there"
            assert until(lambda: served.requests() > before + 20)  # noqa: B023  # of this round
        seen = running.finish()
    say(f"socket removed {len(away)} times, away for {max(away):.2f} s at most: {told(seen)}")
    check(seen)
    assert seen.missing == []
    assert seen.faults == {}, "all were connected already"


@contextmanager
def own_filesystem(path: Path, nbytes: int) -> Iterator[bool]:
    """At `path`, so small that it is soon full. False where this user may not mount one."""
    path.mkdir(mode=0o700)
    mounted = not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=0700", "kvcomm", path], capture_output=True, check=False
    ).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", path], check=True)  # a server that failed to end may use it


@contextmanager
def no_room(served: Served, disk: Path, *, filesystem: bool) -> Iterator[None]:
    """Of the whole filesystem, or under the limit that the system sets for one file of this process."""
    if filesystem:
        with suppress(OSError), (disk / "others").open("wb", buffering=0) as others:
            while True:
                others.write(bytes(1 << 16))
        yield
        (disk / "others").unlink(missing_ok=True)
        return
    before = resource.prlimit(served.pid, resource.RLIMIT_FSIZE, (2048, resource.RLIM_INFINITY))
    yield
    resource.prlimit(served.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("filesystem", [True, False], ids=["filesystem", "file"])
def test_disk_full(filesystem: bool, folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """Clients go on with what memory has; it is counted, and what they put afterwards is on the disk again."""
    disk = folder / "d"
    with ExitStack() as stack:
        if filesystem and not stack.enter_context(own_filesystem(disk, 256 << 20)):
            say("no filesystem can be mounted here: a full disk is tried by the limit for one file alone")
        filesystem = filesystem and os.path.ismount(disk)
        served = serve("--memory", "512M", "--disk", disk, "--disk-bytes", "4G").start()  # all of it fits in memory
        with Load(nursery, served, ("raw", "raw", "engine", "engine")) as running:
            for _ in range(3):
                refused = served.status()["tiers"]["disk"]["refused"].get(DISK_FULL, 0)
                with no_room(served, disk, filesystem=filesystem):
                    assert until(lambda: full(served) > refused + 20), served.status()  # noqa: B023  # of this round
                held = served.requests()
                assert until(lambda: served.requests() > held + 50)  # noqa: B023  # what was under way meanwhile is told
                before, held = acknowledged(folder), served.requests()
                assert until(lambda: served.requests() > held + 100)  # noqa: B023  # of this round
            seen = running.finish()
            status = served.status()
            after = {number: kind for number, kind in acknowledged(folder).items() if number not in before}
            assert read_back(served, acknowledged(folder)) == []
        served.kill()
        served.start()
        lost = read_back(served, acknowledged(folder))
        served.end()
        checked = checked_disk(disk)
    refused = status["tiers"]["disk"]["refused"][DISK_FULL]
    say(f"disk full 3 times ({'a filesystem' if filesystem else 'a limit'}), {refused} writes refused: {told(seen)}")
    say(f"  {len(after)} records put afterwards, all there after a kill; {len(lost)} of before were in memory alone; {checked}")
    check(seen)
    assert seen.missing == []
    assert seen.faults == {}
    assert after
    assert not after.keys() & set(lost)
    assert len(lost) <= refused
    assert set(status["tiers"]["disk"]["refused"]) == {DISK_FULL}
    assert status["tiers"]["disk"]["faults"] == {}


def full(served: Served) -> int:
    """Writes refused since the start, for want of room."""
    return int(served.status()["tiers"]["disk"]["refused"].get(DISK_FULL, 0))


@pytest.mark.parametrize("kind", [RedisServer, MooncakeMaster], ids=["redis", "mooncake"])
def test_a_service_below_stops_freezes_and_comes_back(
    kind: type[RedisServer | MooncakeMaster], folder: Path, serve: Serve, nursery: Nursery, say: Say
) -> None:
    """Killed and started anew, and stopped in the middle of what it does: prompts take no longer than their deadlines say."""
    with kind(folder) as service:
        options = "timeout=0.5&deadline=0.5" if kind is RedisServer else "timeout=0.5&deadline=0.5&segment=64M"
        served = serve("--memory", "8M", "--remote", f"{service.url}?{options}").start()
        children = children_of(served.pid)
        with Load(nursery, served, ("raw", "raw", "engine", "engine")) as running:
            assert until(lambda: remote(served)["hits"] > 20, 60.0), served.status()
            for _ in range(2):
                for stop, go_on in ((service.kill, service.start), (service.freeze, service.thaw)):
                    faults, held = failures(served), served.requests()
                    stop()
                    assert until(lambda: failures(served) > faults + 3), served.status()  # noqa: B023  # of this round
                    assert until(lambda: served.requests() > held + 50), served.status()  # noqa: B023
                    go_on()
                    found = remote(served)["hits"]
                    assert until(lambda: remote(served)["hits"] > found, 60.0), served.status()  # noqa: B023
            seen = running.finish()
            status = served.status()
        served.end()
    assert until(lambda: all(ended(child) for child in children)), f"the server has left processes: {children}"
    say(f"{kind.__name__} killed twice and frozen twice: {told(seen)}; faults {status['tiers'][served_name(kind)]['faults']}")
    check(seen)
    assert engines(running).longest_s < LONGEST, engines(running).slowest


def served_name(kind: type[Service]) -> str:
    return "redis" if kind is RedisServer else "mooncake"


def remote(served: Served) -> dict[str, Any]:
    """What the tier on the network says."""
    (tier,) = (tier for name, tier in served.status()["tiers"].items() if name != "memory")
    return dict(tier)


def failures(served: Served) -> int:
    """Of the tier on the network."""
    return sum(remote(served)["faults"].values())


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def test_the_server_freezes(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """In the middle of what it does: every answer comes within the deadlines, and it is used again when it goes on."""
    served = serve("--disk", folder / "d").start()
    with Load(nursery, served, ("raw", "raw", "engine", "engine")) as running:
        for _ in range(2):
            held = served.requests()
            assert until(lambda: served.requests() > held + 50)  # noqa: B023  # of this round
            os.kill(served.pid, signal.SIGSTOP)
            time.sleep(3.0)  # longer than any deadline
            os.kill(served.pid, signal.SIGCONT)
        held = served.requests()
        assert until(lambda: served.requests() > held + 100)
        seen = running.finish()
    assert read_back(served, acknowledged(folder)) == []
    say(f"the server frozen twice for 3 s: {told(seen)}")
    check(seen)
    assert seen.missing == []
    assert seen.faults["deadline"]
    assert engines(running).longest_s < LONGEST, engines(running).slowest


def test_clients_killed_while_they_write(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """What they had reserved and leased is given back, and nobody finds what they had not finished."""
    served = serve().start()
    chance = random.Random(3)
    records = [record(number, "writer") for number in load.WRITTEN]
    found = 0
    with closing(served.store()) as store:
        for _ in range(40):
            victim = nursery.fork("writer", served, 0)
            assert until(lambda: served.status()["reservations"]), "it does not write"
            time.sleep(chance.uniform(0, 0.005))
            os.kill(victim, signal.SIGKILL)
            for r in records:
                got = store.get_records([r.key]).get(r.key)
                found += got is not None
                assert got is None or got.data.tobytes() == r.data.tobytes(), "half a record"
                del got
            store.has([records[0].key])  # tells as well that we need what we have read no more
            assert until(lambda: held(served) == (0, 0)), served.status()
        assert store.stats().faults == {}
        assert store.put_record(record(load.WRITTEN.stop, "whole")), "memory is missing"
    given_back = re.findall(r"has gone: (\d+) leases, (\d+) reservations", served.said())
    writing = sum(int(reservations) for _, reservations in given_back)
    say(f"40 clients killed while they write, {writing} of them in the middle: {found} records found, each whole; none held")
    assert writing


def held(served: Served) -> tuple[int, int]:
    """Leases and reservations of all processes, now."""
    status = served.status()
    return status["leases"], status["reservations"]


JUMPS = """
import random, time
from pathlib import Path
_time, _seed = time.time, random.Random(1)
def jumping():
    Path(__file__).with_name("jumped").touch()
    return _time() + _seed.choice((-86400.0, 0.0, 86400.0))
time.time = jumping
"""


def test_the_wall_clock_jumps(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """By a day, back and forth, each time that it is read: in the server, in its clients, and over a restart."""
    (folder / "clock").mkdir()
    (folder / "clock" / "sitecustomize.py").write_text(JUMPS)
    env = {"PYTHONPATH": os.pathsep.join([str(folder / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])])}
    served = serve("--disk", folder / "d", env=env).start()
    with Nursery(env) as late, Load(late, served, ("raw", "raw", "engine", "engine")) as running:
        assert until(lambda: served.requests() > 200)
        served.kill()
        served.start()
        assert until(lambda: served.requests() > 200)
        seen = running.finish()
        uptime = served.status()["uptime_s"]
    assert read_back(served, acknowledged(folder)) == []
    say(f"clock jumps: {told(seen)}")
    assert (folder / "clock" / "jumped").exists()
    assert 0 < uptime < 600
    check(seen)
    assert seen.missing == []
    assert engines(running).longest_s < LONGEST


@contextmanager
def crowd(served: Served, count: int) -> Iterator[list[Connection]]:
    """So many connections that were made, and have been asked one thing."""
    made = [Connection(served.address, "", deadline_s=2.0) for _ in range(count)]
    try:
        yield made
    finally:
        for connection in made:
            connection.close()


@pytest.mark.parametrize("files", [True, False], ids=["open-files", "connections"])
def test_more_connections_than_there_may_be(files: bool, folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """Who has one goes on, who gets none goes on without; when the crowd has gone, all are served."""
    own, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    served = serve("--disk", folder / "d").start()
    count = 60 if files else CONNECTIONS
    allowed = len(os.listdir(f"/proc/{served.pid}/fd")) + 40 if files else 2 * CONNECTIONS
    resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (allowed, most))
    refused = 0
    try:
        with Load(nursery, served, ("raw", "engine")) as running:
            assert served.requests(), "we are connected as well"
            with crowd(served, count) as connections:
                for connection in connections:
                    try:
                        connection.call(p.Has([]))
                    except Unreachable:
                        refused += 1
                late = Engine(f"unix:{served.path}", folder, 9)
                for _ in range(3):
                    late.step()
                held = served.requests()
                assert until(lambda: served.requests() > held + 50)
            assert until(served.answers)
            assert until(lambda: hits(late))
            late.store.close()
            seen = running.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (own, most))
    seen = _sum([seen, late.seen])
    say(f"{count} connections more, {refused} of them refused: {told(seen)}")
    assert refused
    check(seen)
    assert seen.missing == []
    assert late.seen.faults


def test_a_client_that_reads_nothing(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """It asks and asks; others are served meanwhile, and the server keeps no heap of replies for it."""
    served = serve().start()
    with Load(nursery, served, ("raw", "engine")) as running, socket.socket(socket.AF_UNIX) as greedy:
        greedy.connect(str(served.path))
        greedy.sendall(p.frame(p.pack_request(p.Hello(p.VERSION, "", "", "", "0" * 32))))
        greedy.settimeout(0.5)
        asked, before, question = 0, rss(served.pid), p.frame(p.pack_request(p.Stats()))
        with suppress(TimeoutError):
            while True:
                asked += greedy.send(question * 100) // len(question)
        held = served.requests()
        assert until(lambda: served.requests() > held + 100)
        grown = rss(served.pid) - before
        seen = running.finish()
    say(f"{asked} questions of which no answer is read, {grown >> 20} MiB for them and all else: {told(seen)}")
    assert asked > 1000
    check(seen)
    assert seen.missing == []
    assert seen.faults == {}


def rss(pid: int) -> int:
    """Bytes of a process's own memory: not what it shares."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def greeting(**changed: object) -> bytes:
    fields = {"protocol": p.VERSION, "kvcomm": "9", "capacity": 1 << 20, "epoch": "e", "connection": 1, **changed}
    return FD + p.frame(msgpack.packb(fields))


RUBBISH = {
    "nothing": b"",
    "noise": random.Random(1).randbytes(4096),
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a length without end": p.PREFIX.pack(b"KV", p.VERSION, 0, 0xFFFFFFFF, 1 << 60),
    "no memory": greeting(),
    "another protocol": FD + p.frame(msgpack.packb({"error": "refused", "text": "protocol 7; this server speaks 8"})),
    "no epoch": greeting(epoch=None),
}


@contextmanager
def impostor(path: Path, says: bytes) -> Iterator[None]:
    """Another program at the server's place, which says this to everybody."""
    path.unlink(missing_ok=True)
    talks = [threading.Thread(target=lambda: None)]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def talk() -> None:
            guests = list[socket.socket]()
            with suppress(OSError):
                while True:
                    guests.append(listener.accept()[0])
                    with suppress(OSError):
                        guests[-1].sendall(says)
            for guest in guests:
                guest.close()

        talks[0] = threading.Thread(target=talk)
        talks[0].start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            talks[0].join()


def test_another_program_at_the_socket(folder: Path, serve: Serve, nursery: Nursery, say: Say) -> None:
    """Whatever it says: a dense answer, counted; and when a server is there again, its KV."""
    served = serve("--disk", folder / "d").start()
    engine = Engine(f"unix:{served.path}", folder, 1)
    for _ in range(10):
        engine.step()
    assert engine.seen.hits
    assert engine.seen.faults == {}
    served.kill()
    for what, says in RUBBISH.items():
        with impostor(served.path, says):
            other = Engine(f"unix:{served.path}", folder, 2)
            for e in (engine, other):
                before, faults = e.seen.hits, sum(e.seen.faults.values())
                for _ in range(4):
                    e.step()
                assert e.seen.hits == before, what
                assert sum(e.seen.faults.values()) == faults + 4, what
            other.store.close()
            check(other.seen)
            engine.seen.took(other.seen.longest_s, what)
    served.start()
    assert until(lambda: hits(engine))
    engine.store.close()
    say(f"{len(RUBBISH)} kinds of rubbish in place of a server: {told(engine.seen)}")
    check(engine.seen)
    assert engine.seen.longest_s < LONGEST, engine.seen.slowest
