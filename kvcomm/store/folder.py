"""The files of the disk tier: each is whole under its name or not there. Knows nothing of limits, tenants and who leaves first.

folder/                   0700
  lock                    held by the one process that may write
  journal                 what `DiskStore` knows of the objects
  objects/<2>/<key>.kv    one record each, never written to once it has its name
  writing/                files that are not whole yet
  damaged/                the latest that could not be read, at most `KEPT_FILES` and `KEPT_BYTES` of them
Whatever else lies there is left alone.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from kvcomm.errors import InputError
from kvcomm.segments import KEY
from kvcomm.store.record import DAMAGED, PREFIX, Bytes, Record, Unreadable, header_end

__all__ = ["KEPT_BYTES", "KEPT_FILES", "Folder"]

KEPT_FILES, KEPT_BYTES = 16, 256 << 20  # of what was damaged, for whoever wants to look at it

_OBJECT = re.compile(r"[0-9a-f]{32}\.kv", re.ASCII)
_PART = re.compile(r"[0-9]+\.part", re.ASCII)
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_POPULATE_READ = 22  # Linux 5.14: all pages now, and what cannot be read is an error
_MAPPED: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}  # before, a mapping keeps its file open


class Folder:
    """One disk tier's folder. Keys are checked before they become names. Thread safe: no method relies on what another did.

    Every method raises OSError when the disk refuses; the constructor raises InputError.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        """Makes what is missing and takes the lock; `read_only` does neither."""
        self.path = path
        self._lock = -1
        self._names = count()
        self._writing: set[str] = set()
        if read_only:
            if not (path / "objects").is_dir():
                raise InputError(f"{path} holds no stored KV: no folder `objects` is in it")
            return
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
        if mode & 0o022:
            raise InputError(
                f"{path} can be written to by other users (mode {stat.S_IMODE(mode):o}), who could replace stored KV: "
                f"`chmod 700` it, or name a new folder inside of it"
            )
        self._lock = _locked(path)
        for name in ("objects", "writing", "damaged"):
            (path / name).mkdir(mode=0o700, exist_ok=True)

    def keys(self) -> set[str]:
        """Of every object; one look at 256 folders, none at the files."""
        found: set[str] = set()
        for part in self._parts():
            with suppress(FileNotFoundError), os.scandir(part) as files:
                here = os.path.basename(part)
                found.update(
                    f.name[:32]
                    for f in files
                    if f.name[:2] == here and _OBJECT.fullmatch(f.name) and f.is_file(follow_symlinks=False)
                )
        return found

    def write(self, data: Bytes) -> Path:
        """A new file that holds `data`, still without a name that a reader would look for."""
        path = self.path / "writing" / f"{next(self._names)}.part"
        self._writing.add(path.name)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o400)
            try:
                view = data.data
                while view:
                    view = view[os.write(file, view) :]
            finally:
                os.close(file)
        except BaseException:
            self.abandon(path)
            raise
        return path

    def abandon(self, written: Path) -> None:
        """Forget what `write` returned."""
        with suppress(OSError):
            written.unlink()
        self._writing.discard(written.name)

    def publish(self, written: Path, key: str) -> None:
        """Give what `write` returned its name, in place of what had it."""
        path = self._object(key)
        try:
            os.replace(written, path)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.replace(written, path)
        self._writing.discard(written.name)

    def look(self, key: str) -> Record:
        """The record, for its header, which alone is read. Raises FileNotFoundError, OSError where the disk or the memory is at
        fault, and Unreadable for what is no file with bytes.
        """
        with self._opened(key) as (file, nbytes):  # not mapped: what the disk cannot read would be a signal
            try:
                end = header_end(os.pread(file, PREFIX, 0))
                return Record.begun(os.pread(file, min(end, nbytes), 0), nbytes)
            except MemoryError as fault:
                raise OSError(errno.ENOMEM, f"no memory for {nbytes} bytes") from fault

    def load(self, key: str) -> Record:
        """The record, mapped and in memory; deleting or replacing the file does not touch it. As `look`, but what the disk
        cannot read is Unreadable, and no signal later.
        """
        with self._opened(key) as (file, nbytes):
            mapped = mmap.mmap(file, nbytes, access=mmap.ACCESS_READ, **_MAPPED)
        if sys.platform == "linux":
            try:
                mapped.madvise(_POPULATE_READ)
            except OSError as fault:
                if fault.errno == errno.EFAULT:
                    raise Unreadable(DAMAGED, f"the disk cannot read all of {key}") from fault
        return Record(np.frombuffer(mapped, np.uint8))

    def nbytes(self, key: str) -> int:
        """Of the file, as it is."""
        return os.lstat(self._object(key)).st_size

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._object(key).unlink()

    def set_aside(self, key: str) -> None:
        """Move a damaged object out of the way, the oldest of those before it out of the folder."""
        path = self._object(key)
        aside = self.path / "damaged" / path.name
        aside.unlink(missing_ok=True)  # ext4 flushes a file that replaces another
        with suppress(FileNotFoundError):
            os.replace(path, aside)
        files = sorted(self._damaged(), key=lambda f: f[1].st_ctime_ns)
        while len(files) > KEPT_FILES or sum(facts.st_size for _, facts in files) > KEPT_BYTES:
            with suppress(FileNotFoundError):
                files.pop(0)[0].unlink()

    def clear_damaged(self) -> tuple[int, int]:
        """Remove what was set aside: files and bytes."""
        files = self._damaged()
        for path, _ in files:
            path.unlink(missing_ok=True)
        return len(files), sum(facts.st_size for _, facts in files)

    def clear_writing(self) -> tuple[int, int]:
        """Remove what writers left that were killed: files and bytes."""
        files = _files(self.path / "writing", _PART)
        files = [(path, facts) for path, facts in files if path.name not in self._writing]
        for path, _ in files:
            path.unlink(missing_ok=True)
        (self.path / "journal.new").unlink(missing_ok=True)
        return len(files), sum(facts.st_size for _, facts in files)

    def close(self) -> None:
        """Another process may have the folder."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def _parts(self) -> Iterator[str]:
        with os.scandir(self.path / "objects") as folders:
            yield from sorted(f.path for f in folders if len(f.name) == 2 and f.is_dir(follow_symlinks=False))

    def _object(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise Unreadable(DAMAGED, f"{key!r} is no key: 32 digits of 0-9a-f were expected")
        return self.path / "objects" / key[:2] / f"{key}.kv"

    @contextmanager
    def _opened(self, key: str) -> Iterator[tuple[int, int]]:
        """The object's file, and how many bytes it has."""
        path = self._object(key)
        try:
            file = os.open(path, _READ)
        except OSError as fault:
            if fault.errno == errno.ELOOP:
                raise Unreadable(DAMAGED, f"{path} is a link") from fault
            raise
        try:
            facts = os.fstat(file)
            if not stat.S_ISREG(facts.st_mode) or not facts.st_size:
                raise Unreadable(DAMAGED, f"{path} is no file, or an empty one")
            yield file, facts.st_size
        finally:
            os.close(file)

    def _damaged(self) -> list[tuple[Path, os.stat_result]]:
        return _files(self.path / "damaged", _OBJECT)


def _files(folder: Path, names: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    with os.scandir(folder) as files:
        return [(Path(f.path), f.stat(follow_symlinks=False)) for f in files if names.fullmatch(f.name)]


def _locked(folder: Path) -> int:
    """A file whose lock this process holds for as long as it is open."""
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(OSError):  # a full disk: it is for people only
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
    except BlockingIOError as taken:
        owner = os.pread(file, 20, 0).decode("ascii", "replace")
        os.close(file)
        raise InputError(
            f"{folder} is in use by process {owner or '?'}: give this one another folder, stop that one, or open it read-only"
        ) from taken
    return file
