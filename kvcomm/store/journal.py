"""An append-only file of msgpack entries that survives being cut, torn and damaged. Knows nothing of what the entries mean.

| head 24: magic 8, version 4, 0 4, seed 8 | digest 8 | frame | frame | ...        frame: mark 4, bytes 4, digest 8, entry

A frame's digest (XXH3, 64 bits) covers its entry and is seeded by its length and the file's random `seed`: bytes that only look
like a frame, inside an entry or left over from another file, are none. One process at a time may write a journal.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import xxhash

from kvcomm.errors import CacheFault, InputError

__all__ = ["Contents", "Journal", "read"]

VERSION = 1
_MAGIC = b"KVJOURNL"
_HEAD = struct.Struct("<8sIIQ")
_MARK = b"\xc1KVE"  # c1: msgpack never writes it
_FRAME = struct.Struct("<4sIQ")
_START = _HEAD.size + 8


@dataclass(frozen=True)
class Contents:
    """What a journal's file holds."""

    entries: list[Any]  # in the order of writing
    end: int = 0  # bytes up to the end of the last sound entry; 0 when not even the head is sound
    damaged: int = 0  # places before `end` where entries are lost; 1 for a damaged head, which loses them all
    torn: int = 0  # bytes behind `end`: of a writer that was killed, or damaged
    seed: int = 0


def read(path: Path) -> Contents:
    """Everything in it that is sound; nothing where there is no file. Changes nothing.

    Raises InputError for a journal of another version, OSError where it cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Contents([])
    if len(data) < _START or xxhash.xxh3_64_digest(data[: _HEAD.size]) != data[_HEAD.size : _START]:
        return Contents([], damaged=int(bool(data)), torn=len(data))
    magic, version, _, seed = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        return Contents([], damaged=1, torn=len(data))
    if version != VERSION:
        raise InputError(
            f"{path} is of format {version}, this kvcomm reads format {VERSION}: name another folder or remove this one"
        )
    entries: list[Any] = []
    at, end, damaged = _START, _START, 0
    view = memoryview(data)
    while at < len(data):
        stop = _frame_end(view, at, seed)
        if stop is None:  # to the next place where a frame may begin
            at = data.find(_MARK, at + 1)
            if at < 0:
                break
            continue
        damaged += at != end
        entries.append(msgpack.unpackb(view[at + _FRAME.size : stop], use_list=False))
        at = end = stop
    return Contents(entries, end, damaged, len(data) - end, seed)


class Journal:
    """A journal that this process writes. Not thread safe: whoever owns it takes turns."""

    def __init__(self, path: Path, contents: Contents) -> None:
        """Goes on behind `contents`, just read from `path`; what is torn is cut off. Raises OSError."""
        self.path = path
        self._file = -1
        if contents.end:
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            self._seed, self._end, self.count = contents.seed, contents.end, len(contents.entries)
            self._cut()
        else:
            self.replace([])

    count: int  # entries in the file; a caller replaces them when most do not matter any more

    @property
    def nbytes(self) -> int:
        return self._end

    def append(self, entries: Iterable[Any]) -> None:
        """Add entries. Raises OSError (a full disk, ...): then the file is as it was. Of a process that is killed meanwhile it
        holds the first few.
        """
        frames = [_frame(entry, self._seed) for entry in entries]
        if os.fstat(self._file).st_size != self._end:  # what an earlier append could not take back
            self._cut()
        try:
            _write(self._file, b"".join(frames), self._end)
        except BaseException:
            with suppress(OSError):
                self._cut()
            raise
        self._end += sum(map(len, frames))
        self.count += len(frames)

    def replace(self, entries: Iterable[Any]) -> None:
        """Make these all there are: a reader finds the old ones or the new ones. Raises OSError: then the old ones stay."""
        seed = int.from_bytes(os.urandom(8), "little")
        head = _HEAD.pack(_MAGIC, VERSION, 0, seed)
        parts = [head, xxhash.xxh3_64_digest(head), *(_frame(entry, seed) for entry in entries)]
        beside = self.path.with_name(self.path.name + ".new")
        file = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _write(file, b"".join(parts), 0)
            os.replace(beside, self.path)
        except BaseException:
            os.close(file)
            with suppress(OSError):
                os.unlink(beside)
            raise
        self.close()
        self._file, self._seed, self.count = file, seed, len(parts) - 2
        self._end = sum(map(len, parts))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _cut(self) -> None:
        os.ftruncate(self._file, self._end)


def _frame(entry: Any, seed: int) -> bytes:
    body: bytes = msgpack.packb(entry)
    if len(body) >> 32:
        raise CacheFault(f"an entry of {len(body)} bytes is too long for a journal")
    return _FRAME.pack(_MARK, len(body), xxhash.xxh3_64_intdigest(body, seed ^ len(body))) + body


def _frame_end(view: memoryview, at: int, seed: int) -> int | None:
    """Where the frame at `at` ends; None where there is no sound one."""
    if at + _FRAME.size > len(view):
        return None
    mark, size, digest = _FRAME.unpack_from(view, at)
    stop = at + _FRAME.size + size
    if mark != _MARK or stop > len(view):
        return None
    return stop if xxhash.xxh3_64_intdigest(view[at + _FRAME.size : stop], seed ^ size) == digest else None


def _write(file: int, data: bytes, at: int) -> None:
    """All of it: the system may take a part at a time."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written
