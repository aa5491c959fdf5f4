"""KV in a folder that outlives the process: a file per object, mapped for reading, and a journal so that opening reads no file.

An object is kept when its file is in place under its name. The journal says what a list needs and which bytes were put; what it
lacks is read from the files' headers. A killed process loses nothing that was put; what a power failure takes is found by the
checksums. Opened read-only, nothing is changed and no lock is taken.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import ClassVar

from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import Segment
from kvcomm.store.base import ALTERED, Kept, StoreStats
from kvcomm.store.catalog import Catalog, Entry, digest, replayed
from kvcomm.store.eviction import Quotas
from kvcomm.store.folder import Folder
from kvcomm.store.journal import Journal, read
from kvcomm.store.record import DAMAGED, Record, Unreadable
from kvcomm.store.records import Counts, Listed, RecordStore

__all__ = [
    "DISK_FAILED",
    "DISK_FULL",
    "JOURNAL_DAMAGED",
    "MISSING",
    "READ_ONLY",
    "Collected",
    "DiskStore",
    "Opened",
]

DISK_FULL = "disk-full"  # why put kept nothing: no room, over the system's quota or its limit for one file
DISK_FAILED = "disk-failed"  # the disk refused for another reason; what CacheFault says then
READ_ONLY = "read-only"  # why put kept nothing
MISSING = "missing-file"  # somebody else removed it
JOURNAL_DAMAGED = "journal-damaged"  # lines of the journal were lost; the files' headers replaced them

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Opened:
    """What was found in the folder, and what was done about it."""

    objects: int
    adopted: int = 0  # files without an entry
    removed: int = 0  # files without an entry that are no sound records
    failed: int = 0  # files without an entry that the disk could not read, which are still there
    missing: int = 0  # entries without a file
    evicted: int = 0  # over a limit or quota that was larger when they were put
    leftovers: int = 0  # unfinished files of killed writers
    damaged: int = 0  # places of the journal where lines were lost
    torn: int = 0  # bytes cut off the journal's end


@dataclass(frozen=True)
class Collected:
    """What `gc` removed."""

    files: int
    nbytes: int
    missing: int  # entries without a file
    journal_before: int  # bytes
    journal_after: int


class DiskStore(RecordStore):
    """At most `limit_bytes` of objects in `folder`; what leaves first is for `Book` to say. On top come the objects that are
    being put, the journal (some 200 bytes for each object, at most twice) and a little that was damaged.

    One process has a folder: a second one gets InputError, as does whoever names a folder that cannot be one. A record that
    was read maps its file for as long as it lives: removing it is harmless, and only a stranger who writes into the file or
    cuts it off meanwhile can harm the reader.
    """

    name: ClassVar[str] = "disk"

    def __init__(self, folder: str | Path, limit_bytes: int, quotas: Quotas | None = None, *, read_only: bool = False) -> None:
        self._catalog = Catalog(limit_bytes, quotas)
        self._counts = Counts()
        self._lock = Lock()
        path = Path(folder)
        try:
            self._folder = Folder(path, read_only=read_only)
            try:
                with _no_collection():
                    self.opened = self._open(path / "journal", read_only=read_only)
            except BaseException:
                self._folder.close()
                raise
        except OSError as fault:
            raise InputError(f"{path} cannot hold stored KV: {fault}; name a folder that this process can write to") from fault

    def put_record(self, record: Record) -> Kept:
        entry = Entry.of(record)
        with self._lock:
            if self._catalog.journal is None:
                return self._counts.refused(READ_ONLY)
            if self._used(entry.key):
                return Kept(stored=True)
            if reason := self._catalog.room(entry).reason:
                return self._counts.refused(reason)
        try:
            written = self._folder.write(record.data)
            try:
                with self._lock:
                    return self._commit(entry, written)
            finally:
                self._folder.abandon(written)
        except OSError as fault:
            if fault.errno in _FULL:
                return self._counts.refused(DISK_FULL)
            raise self._failed(fault) from fault

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        """As promised; where the disk fails for some, the others are returned."""
        keys = list(dict.fromkeys(keys))
        found: dict[str, Record] = {}
        failed: list[CacheFault] = []
        for key in keys:
            with self._lock:
                entry = self._catalog.get(key)
            if entry is None:
                continue
            try:
                found[key] = _sound(self._folder.load(key), entry)
            except Unreadable as fault:
                self._lost(entry, fault.reason)
            except FileNotFoundError:
                self._lost(entry, MISSING)
            except OSError as fault:
                failed.append(self._failed(fault))
        self._counts.looked_up(len(found), len(keys))
        if failed and not found:
            raise failed[0]
        with self._lock:
            for key in found:
                self._used(key)
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        with self._lock:
            return {key for key in keys if key in self._catalog}

    def remove(self, key: str) -> bool:
        """As promised. Raises InputError where the folder was opened read-only."""
        with self._lock:
            self._check_writable()
            if key not in self._catalog:
                return False
            try:
                self._folder.remove(key)
            except OSError as fault:
                raise self._failed(fault) from fault
            self._catalog.remove(key)
            return True

    def segments(self) -> list[Segment]:
        """Reads the header of every file."""
        return [*self.texts()][::-1]

    def texts(self) -> Iterator[Segment]:
        """`segments` one by one, the next to be evicted last. Each file is read when it is its turn."""
        for entry in reversed(self.entries()):
            with suppress(Unreadable, OSError):
                yield self._folder.look(entry.key).segment

    def entries(self) -> list[Entry]:
        """What is kept, the next to be evicted first; reads no file."""
        with self._lock:
            return self._catalog.entries()

    def page(self, tenant: str, after: str, count: int) -> list[Listed]:
        """As promised; reads no file."""
        with self._lock:
            entries = self._catalog.page(tenant, after, count)
        return [Listed(e.key, e.tokens, e.producer, e.fingerprint, e.cost_ms, e.nbytes) for e in entries]

    def stats(self) -> StoreStats:
        with self._lock:
            book = self._catalog.book
            return self._counts.stats(len(self._catalog), book.nbytes, book.limit_bytes)

    def checked(self) -> Iterator[tuple[Entry, str | None]]:
        """Every object and why it cannot be read, or None; reads all bytes. Changes nothing: `get` removes what is damaged."""
        for entry in self.entries():
            reason = None
            try:
                _sound(self._folder.load(entry.key), entry)
            except Unreadable as fault:
                reason = fault.reason
            except OSError as fault:
                reason = MISSING if isinstance(fault, FileNotFoundError) else DISK_FAILED
            yield entry, reason

    def gc(self) -> Collected:
        """Remove what is no object: files that nobody knows, what was set aside as damaged, what killed writers left, and
        entries without a file; write the journal anew. Raises InputError where the folder was opened read-only, CacheFault.
        """
        with self._lock:
            journal = self._check_writable()
            before = journal.nbytes
            try:
                present = self._folder.keys()
                unknown, missing = present - self._catalog.keys(), self._catalog.keys() - present
                sizes = [self._folder.nbytes(key) for key in unknown]
                for key in unknown:
                    self._folder.remove(key)
                for key in missing:
                    self._catalog.remove(key)
                    self._counts.fault(MISSING)
                cleared = [(len(sizes), sum(sizes)), self._folder.clear_damaged(), self._folder.clear_writing()]
                self._catalog.compact()
            except OSError as fault:
                raise self._failed(fault) from fault
            files, nbytes = (sum(column) for column in zip(*cleared, strict=True))
            return Collected(files, nbytes, len(missing), before, journal.nbytes)

    def check_integrity(self) -> None:
        with self._lock:
            self._catalog.check_integrity()
            assert self._catalog.keys() == self._folder.keys()
            for entry in self._catalog.entries():
                assert self._folder.nbytes(entry.key) == entry.nbytes, f"{entry.key} has other bytes than its entry"

    def close(self) -> None:
        with self._lock:
            if self._catalog.journal is not None:
                self._catalog.tell_uses()
                self._catalog.journal.close()
            self._folder.close()

    def _open(self, path: Path, *, read_only: bool) -> Opened:
        leftovers = 0 if read_only else self._folder.clear_writing()[0]
        contents = read(path)
        known = list(replayed(contents.entries))
        present = self._folder.keys()
        missing = [entry.key for entry in known if entry.key not in present]
        adopted, faults, failed = self._adopted(present.difference(entry.key for entry in known))
        evicted: list[str] = []
        for entry in (*adopted, *(entry for entry in known if entry.key in present)):  # who left already leaves first
            evicted += self._catalog.admit(entry)
        if not read_only:
            for key in (*faults, *evicted):
                self._folder.remove(key)
            self._catalog.journal = Journal(path, contents)
            if contents.damaged or missing or adopted or evicted:
                with suppress(OSError):  # a full disk: the same is found at the next opening
                    self._catalog.compact()
        again = [*[MISSING] * len(missing), *[DISK_FAILED] * failed, *[JOURNAL_DAMAGED] * contents.damaged]
        for reason in (*faults.values(), *again):
            self._counts.fault(reason)
        self._counts.left(len(evicted))
        return Opened(
            len(self._catalog),
            len(adopted),
            len(faults),
            failed,
            len(missing),
            len(evicted),
            leftovers,
            contents.damaged,
            contents.torn,
        )

    def _adopted(self, keys: Iterable[str]) -> tuple[list[Entry], dict[str, str], int]:
        """Entries of files that the journal does not know, by their headers; why others have none that is sound; and how many
        the disk cannot read.
        """
        entries: list[Entry] = []
        faults: dict[str, str] = {}
        failed = 0
        for key in sorted(keys):
            try:
                entry = Entry.of(self._folder.look(key))
                if entry.key != key:
                    raise Unreadable(DAMAGED, f"{entry.key} in the file of {key}")
                entries.append(entry)
            except Unreadable as fault:
                faults[key] = fault.reason
            except FileNotFoundError:
                pass  # opened read-only: its owner is at work
            except OSError:
                failed += 1
        return entries, faults, failed

    def _commit(self, entry: Entry, written: Path) -> Kept:
        """Give a written file its name, tell the journal, then evict: whatever fails or is killed on the way, nothing else is
        lost. With the lock held.
        """
        if self._used(entry.key):  # another thread put it meanwhile
            return Kept(stored=True)
        room = self._catalog.room(entry)
        if room.reason:
            return self._counts.refused(room.reason)
        try:
            self._folder.publish(written, entry.key)
            self._catalog.put(entry, room.evicted)
        except BaseException:
            with suppress(OSError):
                self._folder.remove(entry.key)
            raise
        for key in room.evicted:
            with suppress(OSError):  # it is a file without an entry now
                self._folder.remove(key)
        self._counts.left(len(room.evicted))
        return room

    def _used(self, key: str) -> bool:
        """Is it kept? Then that was a use. With the lock held."""
        if key not in self._catalog:
            return False
        self._catalog.use(key)
        return True

    def _lost(self, entry: Entry, reason: str) -> None:
        """It cannot be read: out of the way, unless another object has its place by now."""
        with self._lock:
            if self._catalog.get(entry.key) is not entry:
                return
            self._counts.fault(reason)
            if self._catalog.journal is not None:
                with suppress(OSError):
                    self._folder.set_aside(entry.key)
                self._catalog.remove(entry.key)

    def _check_writable(self) -> Journal:
        if self._catalog.journal is None:
            raise InputError(f"{self._folder.path} was opened read-only: nothing can be removed from it")
        return self._catalog.journal

    def _failed(self, fault: OSError) -> CacheFault:
        self._counts.fault(DISK_FAILED)
        return CacheFault(f"{DISK_FAILED}: {self._folder.path}: {fault}")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector would look at the many entries that all stay again and again: half of the time of opening."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sound(record: Record, entry: Entry) -> Record:
    """Itself, when every byte of it is as it was put. Raises Unreadable."""
    record.verify(entry.key)
    if (record.nbytes, digest(record)) != (entry.nbytes, entry.digest):
        raise Unreadable(ALTERED, f"{entry.key} is another record than was put")
    return record
