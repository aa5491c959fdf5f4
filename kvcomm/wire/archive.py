"""A tar file as a place: `<key>.kv` for each record and `<key>.anchor` for each anchor, to be moved between hosts.

Written and read one at a time. A tar's own checksums cover names alone; all that is read is verified.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from kvcomm.errors import CacheFault, InputError
from kvcomm.store.record import DAMAGED, Bytes, Record, Unreadable, empty
from kvcomm.wire.anchor_entry import MAX_DOCUMENT, MAX_ENTRY
from kvcomm.wire.listing import Wanted
from kvcomm.wire.moving import HERE, Item, PackedAnchor, reason_of, sound, sound_anchor

__all__ = ["CUT_SHORT", "TarSource", "TarTarget"]

CUT_SHORT = "archive-cut-short"  # what follows in the file cannot be read


class TarTarget:
    """A new file, for its owner alone; at `path`, in place of what was there, once it is whole."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._path, self._part = path, path.with_name(f".{path.name}.{os.getpid()}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(file, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w")  # noqa: SIM115  # closed by `keep` or `close`
        self._names: set[str] = set()

    def put(self, item: Item) -> str | None:
        if isinstance(item, Record):
            name, data = f"{item.key}.kv", item.data
        else:
            name, data = f"{item.told.key}.anchor", np.frombuffer(msgpack.packb([item.entry, item.document]), np.uint8)
        if name in self._names:
            return HERE
        info = tarfile.TarInfo(name)
        info.size, info.mode = data.nbytes, 0o400
        self._tar.addfile(info, io.BufferedReader(_Reader(data), 1 << 20))
        self._tar.members.clear()  # type: ignore[attr-defined]  # else they add up
        self._names.add(name)
        return None

    def keep(self) -> None:
        """It is whole."""
        self._tar.close()
        self._file.close()
        self._part.replace(self._path)

    def close(self) -> None:
        """What was not kept is removed."""
        self._file.close()
        self._part.unlink(missing_ok=True)


class TarSource:
    """A file that `TarTarget` wrote, or any other tar; members with other names are left out."""

    def __init__(self, path: Path) -> None:
        """Raises InputError for what is no tar."""
        self.faults: Counter[str] = Counter()
        try:
            self._file = open(path, "rb")  # noqa: SIM115  # closed by `close`
            try:
                self._tar = tarfile.open(fileobj=self._file, mode="r:")  # noqa: SIM115  # holds nothing but the file
            except BaseException:
                self._file.close()
                raise
        except (OSError, tarfile.TarError) as fault:
            raise InputError(f"{path} is no tar that can be read: {fault}; give what `kvcomm store export` wrote") from fault

    def items(self, wanted: Wanted) -> Iterator[Item]:
        try:
            for name, size in self._members(os.fstat(self._file.fileno()).st_size):
                data = empty(size)
                self._file.readinto(data.data)
                try:
                    item = _record(name, data) if name.suffix == ".kv" else _anchor(name, data)
                except CacheFault as fault:
                    self.faults[reason_of(fault)] += 1
                    continue
                about = item if isinstance(item, Record) else item.told
                if wanted(about.tenant, about.fingerprint):
                    yield item
        except (OSError, OverflowError, ValueError, tarfile.TarError):
            self.faults[CUT_SHORT] += 1

    def close(self) -> None:
        self._file.close()

    def _members(self, nbytes: int) -> Iterator[tuple[Path, int]]:
        """Name and bytes of each item, where the file is read from next. Raises TarError where the archive of `nbytes` ends
        otherwise than it should.
        """
        at = -1
        while (member := self._tar.next()) is not None:
            self._tar.members.clear()  # type: ignore[attr-defined]  # else they add up
            if member.offset_data + member.size > nbytes or not at < member.offset_data <= self._tar.offset:
                raise tarfile.ReadError(f"{member.name} does not end in it")
            at, name = member.offset_data, Path(member.name)
            if member.isreg() and not member.issparse() and name.suffix in (".kv", ".anchor"):
                self._file.seek(at)
                yield name, member.size
        self._file.seek(self._tar.offset)
        if self._file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end is marked")


def _record(name: Path, data: Bytes) -> Record:
    return sound(Record(data), name.stem)


def _anchor(name: Path, data: Bytes) -> PackedAnchor:
    if data.nbytes > MAX_DOCUMENT + MAX_ENTRY + 64:
        raise Unreadable(DAMAGED, f"{name} is larger than an anchor")
    try:
        entry, document = msgpack.unpackb(data.tobytes())
        anchor = sound_anchor(PackedAnchor(bytes(entry), bytes(document)))
    except (TypeError, ValueError, msgpack.UnpackException) as fault:
        raise Unreadable(DAMAGED, f"{name} holds no anchor: {fault!r}") from fault
    if anchor.told.key != name.stem:
        raise Unreadable(DAMAGED, f"{name} holds {anchor.told.key}")
    return anchor


class _Reader(io.RawIOBase):
    """Bytes as a file, without a copy of them all."""

    def __init__(self, data: Bytes) -> None:
        self._rest = data.data

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        target = memoryview(into).cast("B")
        count = min(len(target), len(self._rest))
        target[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
