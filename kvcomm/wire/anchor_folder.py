"""The anchors of a server on its disk: what is committed survives the death of the process. Knows nothing of limits or tenants.

folder/                 0700
  lock                  held by the one process that may write
  journal               the log's epoch, and every change since it was last rewritten
  documents/<number>    one anchor's document each, never written to once it has its name

A change is committed by one entry of the journal, when its document has its name. Nothing is synced: after a crash of the whole
machine the last seconds may be missing, and what is there is told from what is not by its checksum.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvcomm.errors import InputError
from kvcomm.store.journal import Journal, read

__all__ = ["AnchorFolder", "Change", "History"]

FORMAT = 1
_DOCUMENT = re.compile(r"[0-9a-f]{12}(\.part)?", re.ASCII)


@dataclass(frozen=True)
class Change:
    """Anchors that left and the one that came, all at once; each of these events has a number, in this order."""

    first: int  # number of the first event
    gone: tuple[int, ...] = ()  # numbers under which those that left had come
    entry: bytes = b""  # of the one that came; empty where none did

    @property
    def last(self) -> int:
        """Number of the last event; the one that came is known by it."""
        return self.first + len(self.gone) - (not self.entry)


@dataclass(frozen=True)
class History:
    """What a journal says, in the order of writing."""

    epoch: int  # of the log that wrote it; 0 where readers of that log may know what is lost here
    number: int  # of the last event that was summed up when the journal was last rewritten
    changes: tuple[Change, ...]
    damaged: int  # places where entries are lost


class AnchorFolder:
    """Not thread safe: its owner takes turns. Every method raises OSError where the disk refuses."""

    def __init__(self, path: Path) -> None:
        """Makes what is missing, takes the lock and reads `history`; `begin` is to be called next. Raises InputError where
        another process has it, or another version of kvcomm wrote it.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (path / "documents").mkdir(mode=0o700, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as fault:
            raise InputError(f"{path} is a file; a server keeps its anchors in a folder") from fault
        self._path = path
        self._lock = _locked(path)
        try:
            self._contents = read(path / "journal")
            self.history = _history(self._contents.entries, self._contents.damaged, self._contents.torn)
        except BaseException:
            os.close(self._lock)
            raise
        self._journal: Journal | None = None

    def begin(self, epoch: int, number: int, kept: Iterable[Change]) -> None:
        """Go on: in the journal as it is where its epoch goes on, else in a new one that says `kept` and nothing else."""
        self._journal = Journal(self._path / "journal", self._contents)
        if epoch != self.history.epoch:
            self.rewrite(epoch, number, kept)

    def rewrite(self, epoch: int, number: int, kept: Iterable[Change]) -> None:
        """Sum up: `kept` is all there is, after event `number`. Killed meanwhile, the journal is as it was."""
        self._writer.replace([("anchors", FORMAT, epoch, number, _boot()), *map(_packed, kept)])

    @property
    def count(self) -> int:
        """Entries in the journal."""
        return self._writer.count

    def read(self, number: int) -> bytes:
        """The document of the anchor that came with event `number`; raises FileNotFoundError."""
        return self._document(number).read_bytes()

    def commit(self, change: Change, document: bytes = b"") -> None:
        """From here on the change is made, whenever the process is killed; where this raises OSError it is not."""
        path = self._document(change.last)
        part = path.with_name(f"{path.name}.part")
        try:
            if change.entry:
                part.write_bytes(document)
                os.replace(part, path)
            self._writer.append([_packed(change)])
        except BaseException:
            _unlink(part, path)
            raise
        _unlink(*map(self._document, change.gone))

    def clean(self, numbers: Iterable[int]) -> None:
        """Remove documents of any but these."""
        keep = {self._document(number).name for number in numbers}
        for name in os.listdir(self._path / "documents"):
            if _DOCUMENT.fullmatch(name) and name not in keep:
                _unlink(self._path / "documents" / name)

    def close(self) -> None:
        """Another process may have the folder."""
        if self._journal is not None:
            self._journal.close()
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    @property
    def _writer(self) -> Journal:
        assert self._journal is not None, "begin has not been called"
        return self._journal

    def _document(self, number: int) -> Path:
        return self._path / "documents" / f"{number:012x}"


def _unlink(*paths: Path) -> None:
    """What cannot be removed now, the next start removes."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _packed(change: Change) -> tuple[int, tuple[int, ...], bytes]:
    return change.first, change.gone, change.entry


def _history(entries: list[object], damaged: int, torn: int) -> History:
    """Raises InputError for another version's."""
    epoch = number = 0
    changes: list[Change] = []
    for at, entry in enumerate(entries):
        match entry:
            case ("anchors", int(version), int(found), int(counted), str(boot)) if at == 0:
                if version != FORMAT:
                    raise InputError(f"anchors of format {version}; this kvcomm reads {FORMAT}: name another folder")
                epoch, number = (found if boot and boot == _boot() else 0), counted
            case (int(first), tuple(gone), bytes(came)) if gone or came:
                changes.append(Change(first, gone, came))
            case _:
                damaged += 1
    return History(0 if damaged or torn else epoch, number, tuple(changes), damaged)


def _boot() -> str:
    """Another one after each start of the machine, which may forget what a process had written; "" where nobody knows."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _locked(folder: Path) -> int:
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as taken:
        os.close(file)
        raise InputError(f"{folder} is in use by another server: stop it, or give this one another folder") from taken
    return file
