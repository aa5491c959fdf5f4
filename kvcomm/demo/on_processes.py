"""The demo's team as processes: each agent's calls go to a process of its own, with its own model, and all share one server.

    dense      one engine in this process, nothing is reused
    shared     one engine in this process, its store in its own memory
    processes  an engine per agent, each in a process of its own; KV is found and kept in the server of one more process

Whatever happens here, every process ends and the socket goes: they end when this process closes its end of their pipe, or dies.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from statistics import median
from threading import Lock
from time import perf_counter
from typing import Any, TypeVar

import torch

from kvcomm.agents.team import Generator, Team
from kvcomm.backends.base import Backend
from kvcomm.demo import runner
from kvcomm.demo.prefills import Reader
from kvcomm.demo.worker import Answer, Ask, EngineJob, Failed, Job, Ready, ServerJob
from kvcomm.engine import Output, Rule
from kvcomm.errors import CacheFault, KVCommError
from kvcomm.wire import protocol
from kvcomm.wire.address import Address
from kvcomm.wire.client import ServerStore

__all__ = ["Child", "ChildFailed", "Processes", "Tally", "arms", "private_folder", "running"]

LAST_S = 3.0  # for a process to end by itself
ROOM = 80  # bytes of a folder whose files may be sockets
T = TypeVar("T")


class ChildFailed(KVCommError):
    """A process of the demo has ended, or could not do what it was asked; the text names whose it is."""


class Child:
    """A process of our own that does `job`, from now on; `ready` waits until it has begun. Errors call it `whose`."""

    def __init__(self, whose: str, job: Job) -> None:
        self.whose = whose
        self._pipe, theirs = Pipe()
        self._lock = Lock()  # a pipe carries one call at a time
        code = f"from kvcomm.demo.worker import main; main({theirs.fileno()})"
        with theirs:  # a session of its own: Ctrl-C in a terminal is for us, and we close the pipe
            self.process = subprocess.Popen(
                [sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        self._send(job)

    def ready(self) -> None:
        """Raises ChildFailed where it could not begin."""
        with self._lock:
            self._receive(Ready)

    def ask(self, ask: Ask) -> Answer:
        """Raises ChildFailed where it could not answer, or is no more."""
        with self._lock:
            self._send(ask)
            return self._receive(Answer)

    def hang_up(self) -> None:
        """It ends when it has done what it is doing."""
        self._pipe.close()

    def wait(self) -> None:
        """After `hang_up`: until it has ended; after a bound it is killed."""
        try:
            self.process.wait(LAST_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _send(self, message: Job | Ask) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise self._ended() from None

    def _receive(self, kind: type[T]) -> T:
        try:
            reply = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(reply, Failed):
            raise ChildFailed(f"{self.whose} (process {self.process.pid}): {reply.text}")
        assert isinstance(reply, kind), f"{reply!r} in place of a {kind.__name__}"
        return reply

    def _ended(self) -> ChildFailed:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_S)
        code = self.process.returncode
        how = f"was ended by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        return ChildFailed(f"{self.whose} (process {self.process.pid}) {how}, without having answered; run the demo again")


@dataclass(frozen=True)
class Tally:
    """What happened in all processes since `begin`, beyond what each call's report says."""

    agents: int  # that have a process each
    calls: int
    pipe_ms: float | None  # median of what a call takes longer here than in its process
    faults: dict[str, int]  # of all engines, by kind
    requests: dict[str, int] | None  # to the server, by kind; None where it could not be asked
    finds_per_call: float | None  # prompts that were searched for
    server: dict[str, Any] | None  # its other counters and its memory, as `kvcomm server status` tells them


class Processes:
    """A generator for `Team.run`: `children` by the names of the agents whose calls each answers."""

    def __init__(self, children: Mapping[str, Child], server: ServerStore, reader: Reader) -> None:
        self._children, self._server, self.reader = children, server, reader
        self._pipe_ms: list[float] = []
        self._faults: dict[str, dict[str, int]] = {}  # whose -> kind -> count so far
        self._before = self._counts()

    def generate(self, messages: Sequence[Mapping[str, str]], *, agent: str, rule: Rule, max_new_tokens: int) -> Output:
        """Raises ChildFailed, which names the agent."""
        child = self._children[agent]
        options = {"agent": agent, "rule": rule, "max_new_tokens": max_new_tokens, "do_sample": False}
        began = perf_counter()
        answer = child.ask(Ask(tuple(messages), options))
        self._pipe_ms.append((perf_counter() - began) * 1e3 - answer.wall_ms)
        self._faults[child.whose] = answer.faults
        return answer.output

    def begin(self) -> None:
        """What happened until now belongs to no measurement."""
        self._pipe_ms.clear()
        self._before = self._counts()

    def tally(self) -> Tally:
        faults, asked, server = self._counts()
        faults_before, asked_before, _ = self._before
        calls = len(self._pipe_ms)
        requests = None if asked is None or asked_before is None else asked - asked_before
        return Tally(
            len({child.whose for child in self._children.values()}),
            calls,
            median(self._pipe_ms) if calls else None,
            dict(faults - faults_before),
            None if requests is None else dict(requests),
            requests[protocol.Find.op] / calls if requests is not None and calls else None,
            server,
        )

    def _counts(self) -> tuple[Counter[str], Counter[str] | None, dict[str, Any] | None]:
        """Faults and the server's requests so far, by kind, and what else the server says."""
        faults = sum((Counter(f) for f in self._faults.values()), Counter[str]())
        try:
            status, _ = self._server.call("", protocol.Stats())
        except CacheFault:
            return faults, None, None
        counters = dict(status["counters"])
        asked: Counter[str] = Counter(counters.pop("requests"))
        del asked[protocol.Stats.op], asked[protocol.Hello.op]  # ours
        return faults, asked, {**counters, "memory": status["tiers"]["memory"]}


@contextmanager
def arms(
    backend: Backend, model: str, dtype: str, teams: Mapping[str, Team], store_bytes: int = runner.STORE_BYTES
) -> Iterator[dict[str, Generator]]:
    """As long as the processes run. The i-th agents of all teams are one process. Raises ChildFailed where one cannot begin."""
    here = runner.arms(backend)
    numbers: dict[str, int] = {}  # of agents, by name
    for team in teams.values():
        for number, agent in enumerate(team.agents, 1):
            numbers.setdefault(agent.name, number)
    with private_folder() as folder:
        socket = folder / "s"
        jobs: dict[str, Job] = {"the server": ServerJob(socket, store_bytes)}
        places = sorted(set(numbers.values()))
        for number in places:
            names = ", ".join(name for name in numbers if numbers[name] == number)
            jobs[f"agent {number} ({names})"] = EngineJob(model, dtype, torch.get_num_threads(), socket)
        with running(jobs) as children, closing(ServerStore(Address(path=socket))) as server:
            engines = dict(zip(places, children[1:], strict=True))
            yield {
                "dense": here["dense"],
                "shared": here["shared"],
                "processes": Processes({name: engines[n] for name, n in numbers.items()}, server, Reader(backend.tokenizer)),
            }


@contextmanager
def running(jobs: Mapping[str, Job]) -> Iterator[list[Child]]:
    """A process per job, named by its key, when all have begun; all end with the block. Raises ChildFailed."""
    children: list[Child] = []
    try:
        for whose, job in jobs.items():
            children.append(Child(whose, job))
        for child in children:
            child.ready()
        yield children
    finally:
        for child in children:
            child.hang_up()
        for child in children:
            child.wait()


@contextmanager
def private_folder() -> Iterator[Path]:
    """For sockets, whose paths must be short; gone at the end."""
    usual = tempfile.gettempdir()
    place = usual if len(os.fsencode(usual)) <= ROOM else "/tmp"
    with tempfile.TemporaryDirectory(prefix="kvcomm-", dir=place, ignore_cleanup_errors=True) as name:
        yield Path(name)
