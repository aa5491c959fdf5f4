"""What a child process of `kvcomm demo --processes` does: an engine that answers one agent's calls, or the server between them.

It hears and answers through one end of a pipe, and ends when the other end is closed, however that happens: a parent that is
killed leaves no process, no socket and no folder behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a server needs no torch
    from kvcomm.engine import KVComm, Output

__all__ = ["Answer", "Ask", "EngineJob", "Failed", "Job", "Ready", "ServerJob", "main"]


@dataclass(frozen=True)
class EngineJob:
    """Load a model of your own and answer calls; KV is the server's at `socket`."""

    model: str
    dtype: str
    threads: int
    socket: Path
    wait_ms: float = 1000.0  # for text that another process is computing, at most


@dataclass(frozen=True)
class ServerJob:
    """Keep KV for the processes that connect to `socket`, which lies in a folder of its own."""

    socket: Path
    limit_bytes: int


Job = EngineJob | ServerJob


@dataclass(frozen=True)
class Ready:
    """The job has begun."""


@dataclass(frozen=True)
class Ask:
    """One call of an agent; `options` are those of `KVComm.generate`."""

    messages: Sequence[Mapping[str, str]]
    options: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    output: Output
    wall_ms: float  # of the whole call, in this process
    faults: dict[str, int]  # of this engine so far, by kind


@dataclass(frozen=True)
class Failed:
    """The job could not begin, or the call could not be answered."""

    text: str


def main(descriptor: int) -> None:
    """Takes a job from this end of a pipe and does it until the other end is closed."""
    with suppress(EOFError, ConnectionError), Connection(descriptor) as pipe:  # the parent has gone
        job: Job = pipe.recv()
        try:
            if isinstance(job, EngineJob):
                _answer(job, pipe)
            else:
                asyncio.run(_serve(job, pipe))
        except (EOFError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001  # raised in the parent
            pipe.send(Failed(_told(error)))


def _answer(job: EngineJob, pipe: Connection) -> None:
    """Calls, until the parent hangs up."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from kvcomm.backends.loading import dtype_named, load
    from kvcomm.config import Config
    from kvcomm.engine import KVComm
    from kvcomm.wire.address import Address
    from kvcomm.wire.client import ServerStore

    disable_progress_bar()  # the parent has its own
    torch.set_num_threads(job.threads)
    with closing(ServerStore(Address(path=job.socket), wait_ms=job.wait_ms)) as store:
        comm = KVComm(load(job.model, dtype=dtype_named(job.dtype)), config=Config(), store=store)
        pipe.send(Ready())
        while True:
            pipe.send(_answered(comm, pipe.recv()))


def _answered(comm: KVComm, ask: Ask) -> Answer | Failed:
    began = perf_counter()
    try:
        output = comm.generate(ask.messages, **ask.options)
    except Exception as error:  # noqa: BLE001  # raised in the parent
        return Failed(_told(error))
    return Answer(output, (perf_counter() - began) * 1e3, comm.counters.counts()["faults"])


async def _serve(job: ServerJob, pipe: Connection) -> None:
    from kvcomm.store.slabs import SlabStore
    from kvcomm.wire.library import Library
    from kvcomm.wire.local import until_hung_up

    try:
        await until_hung_up(Library(SlabStore(job.limit_bytes)), job.socket, pipe, Ready())
    finally:
        with suppress(OSError):
            job.socket.parent.rmdir()  # left to us where the parent was killed


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
