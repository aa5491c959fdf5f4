"""A server that ends with who started it: in a process of its own for as long as a block runs, or behind a pipe."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvcomm.errors import KVCommError
from kvcomm.segments import Segment
from kvcomm.wire.address import Address

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from kvcomm.wire.library import Library

__all__ = ["serving", "small_segments", "until_hung_up"]

READY_S = 600.0


@contextmanager
def serving(path: Path, limit_bytes: int, *, filled: int = 0) -> Iterator[str]:
    """Its address. `filled`: so many `small_segments` are in it from the start. Raises KVCommError where it does not start."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(path, limit_bytes, filled, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(READY_S):
            raise KVCommError(f"the server at {path} did not start within {READY_S:g} s")
        said: Any = ours.recv()
        if said is not None:
            raise KVCommError(f"the server at {path} did not start: {said}")
        yield f"unix:{path}"
    except EOFError:
        raise KVCommError(f"the server at {path} ended when it started") from None
    finally:
        ours.close()  # the server hears of it, and ends
        process.join(10)
        if process.is_alive():
            process.kill()
            process.join()


async def until_hung_up(library: Library, path: Path, parent: Connection, ready: object) -> None:
    """Serves what `library` keeps at `path`, and sends `ready`, until the pipe's other end is closed. Closes the library."""
    from kvcomm.wire.server import Server

    server, loop, hung_up = Server(library), asyncio.get_running_loop(), asyncio.Event()
    try:
        await server.listen(Address(path=path))
        loop.add_reader(parent.fileno(), hung_up.set)  # nothing more is ever sent
        parent.send(ready)
        await hung_up.wait()
        loop.remove_reader(parent.fileno())
    finally:
        await server.close()


def _serve(path: Path, limit_bytes: int, filled: int, parent: Connection) -> None:
    from kvcomm.matching import TextIndex
    from kvcomm.store.slabs import SlabStore
    from kvcomm.wire.library import Library

    try:
        index = TextIndex(max_windows=max(1 << 20, 4 * filled), max_bytes=max(256 << 20, 256 * filled))
        library = Library(SlabStore(limit_bytes), texts=index)
        if filled:
            _fill(library, filled)
        asyncio.run(until_hung_up(library, path, parent, None))
    except Exception as fault:
        parent.send(repr(fault))
        raise


def small_segments(count: int) -> Iterator[Segment]:
    """16 tokens each, all different: what a server that is `filled` keeps."""
    for row in np.random.default_rng(1).integers(0, 1 << 30, (count, 16)).astype(np.int32):
        yield Segment(row, row[:0], "bench")


def _fill(library: Library, count: int) -> None:
    import torch

    from kvcomm.segments import SegmentKV
    from kvcomm.store.record import Record

    kv = SegmentKV((torch.zeros(1, 16, 4),), (torch.zeros(1, 16, 4),), 0, 16)
    for segment in small_segments(count):
        kept = library.put("", Record.of(segment, kv))
        assert kept, kept.reason
