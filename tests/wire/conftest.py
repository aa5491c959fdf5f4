"""A server in a thread of this process, with its own loop, at a socket in a short temporary folder."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.records import RecordStore
from kvcomm.store.slabs import SlabStore
from kvcomm.wire.address import Address
from kvcomm.wire.client import ServerStore
from kvcomm.wire.library import Library
from kvcomm.wire.server import Server

Start = Callable[..., "Running"]


class Running:
    """A server that answers at `path`."""

    def __init__(self, server: Server, path: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.path, self.loop = server, path, loop

    @property
    def address(self) -> Address:
        return Address(path=self.path)

    def store(self, **options: object) -> ServerStore:
        return ServerStore(self.address, **options)  # type: ignore[arg-type]  # a test's own

    def settle(self) -> None:
        """All that was sent before is done."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), self.loop).result()


@contextmanager
def running(library: Library, path: Path, **options: object) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def done(work: object) -> object:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)  # type: ignore[arg-type]  # a coroutine

    async def made() -> Server:
        server = Server(library, **options)  # type: ignore[arg-type]  # a test's own
        await server.listen(Address(path=path))
        return server

    server = done(made())
    assert isinstance(server, Server)
    try:
        yield Running(server, path, loop)
    finally:
        done(server.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short enough for a socket's path, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts servers that end with the test."""
    with ExitStack() as stack:

        def run(limit_bytes: int = 64 << 20, lower: RecordStore | None = None, name: str = "s", **options: object) -> Running:
            return stack.enter_context(running(Library(SlabStore(limit_bytes), lower), folder / name, **options))

        yield run


def segment(tokens: int, start: int = 0, *, seed: int = 0, tenant: str = "") -> Segment:
    ids = np.random.default_rng(seed).integers(1, 1000, start + tokens).astype(np.int32)
    return Segment(ids[start:], ids[:start], "f", tenant)


def kv_of(s: Segment, *, seed: int = 0, layers: int = 2, heads: int = 2, dim: int = 8) -> SegmentKV:
    made = torch.Generator().manual_seed(seed)
    keys, values = (tuple(torch.randn(heads, len(s.ids), dim, generator=made) for _ in range(layers)) for _ in range(2))
    return SegmentKV(keys, values, s.start, s.start + len(s.ids))


def equal(a: SegmentKV, b: SegmentKV) -> bool:
    tensors = zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True)
    return (a.start, a.length) == (b.start, b.length) and all(torch.equal(x, y) for x, y in tensors)
