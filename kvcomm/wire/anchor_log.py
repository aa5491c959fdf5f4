"""The anchors that all processes of a host share: one writer, who numbers every change, and any number of replicas.

Documents are opaque here (`kvcomm.anchors.record` reads them): the server never looks into KV. It does not see how anchors are
used either, so where a slot is full its oldest leaves, and where the bytes are, the oldest of the tenant that has the most.

A replica asks for what came and left after the version that it has. Where that is not known any more, or is of another epoch of
the log, it gets a snapshot: the keys of all there is, and the documents that it lacks. A version is epoch and number in one.
"""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from kvcomm.anchors.entry import Entry, checksum
from kvcomm.errors import CacheFault, InputError
from kvcomm.wire.anchor_entry import MAX_DOCUMENT, unpack_entry
from kvcomm.wire.anchor_folder import AnchorFolder, Change
from kvcomm.wire.anchor_shelf import Kept, Shelf

__all__ = [
    "DAMAGED",
    "DISK",
    "DUPLICATE",
    "JOURNAL",
    "MALFORMED",
    "MISSING",
    "OTHER_TENANT",
    "TOO_LARGE",
    "AnchorLog",
    "LogStats",
]

DAMAGED = "damaged"  # the document is not the one that its entry describes
DISK = "disk"  # the disk refused it
DUPLICATE = "duplicate"  # kept already; this and TOO_LARGE as in `kvcomm.anchors.base`, which needs torch
JOURNAL = "journal"  # a place in the journal that cannot be read
MALFORMED = "malformed"  # no entry
MISSING = "missing"  # committed, and its document is not there any more
OTHER_TENANT = "other-tenant"  # not of the tenant that the client is bound to
TOO_LARGE = "larger-than-pool"  # or than what a reply may hold

SUMMED_UP = 1 << 10  # entries of the journal that do not matter any more, before it is rewritten
NUMBERS = 40  # bits of a version that count; the 22 above them are the epoch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogStats:
    """A log's state and history, at one moment."""

    anchors: int
    nbytes: int
    limit_bytes: int
    version: int
    added: int = 0  # since it was opened, as what follows
    evicted: int = 0
    removed: int = 0  # by `remove`
    refused: dict[str, int] = field(default_factory=dict)  # reason -> times that `add` kept nothing
    faults: dict[str, int] = field(default_factory=dict)  # reason -> anchors lost, or times that the disk refused


class AnchorLog:
    """At most `limit_bytes` of anchors, and `per_slot` of each slot of a tenant's model. Every method may be called from any
    thread; `since` and `stats` wait for no disk.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = 256 << 20, per_slot: int = 100) -> None:
        """Restores what `folder` holds; without one, everything is forgotten with the process. Raises InputError for bounds
        that are none and for a folder that another process uses, OSError where the disk refuses.
        """
        if limit_bytes < 0:
            raise InputError(f"limit_bytes is {limit_bytes}; it must be at least 0")
        if per_slot < 1:
            raise InputError(f"per_slot is {per_slot}; it must be at least 1")
        self._shelf = Shelf(limit_bytes, per_slot)
        self._epoch = _new_epoch()
        self._added = self._evicted = self._removed = 0
        self._refused: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._writer = Lock()  # held for a whole change, the disk's part included; taken before _state
        self._state = Lock()  # held for moments
        self._folder = None if folder is None else AnchorFolder(folder)
        if self._folder is not None:
            try:
                self._restore(self._folder)
            except BaseException:
                self._folder.close()
                raise

    # -- what sessions call -----------------------------------------------------------------------------------------------

    def add(self, tenant: str, entry: bytes, document: bytes) -> dict[str, Any]:
        """Keep an anchor, others leaving if need be. `kept`, the `reason` why not, and the `version` there is now. Returns when
        it is committed: may take as long as a disk.
        """
        try:
            told = unpack_entry(entry)
        except CacheFault:
            return self._answer(MALFORMED)
        reason = self._flaw(tenant, told, entry, document)
        with self._writer:
            return self._answer(reason or self._take(told, entry, document))

    def since(self, tenant: str, fingerprint: str, version: int) -> dict[str, Any]:
        """What changed of a tenant's model after `version` (0: nothing is known). Without the keys in `removed`, and then with
        the [entry, document] in `added`, a replica is what this was at the reply's `version`; `more`: there are later ones.
        `snapshot`: what is not in `keys` is to be forgotten in place of what is `removed`.
        """
        with self._state:
            epoch, number = divmod(version, 1 << NUMBERS)
            if epoch != self._epoch or number > self._shelf.number:
                number = -1
            room = (tenant, fingerprint)
            news = self._shelf.since(room, number)
            return {
                "snapshot": news.left is None,
                "keys": list(self._shelf.rooms.get(room, ())) if news.left is None else [],
                "removed": news.left or [],
                "added": [[kept.entry, kept.document] for kept in news.came],
                "version": self._version(news.upto),
                "more": news.more,
            }

    # -- for tools and tests ----------------------------------------------------------------------------------------------

    def remove(self, tenant: str, fingerprint: str, key: str) -> bool:
        """Forget one anchor, here and in every replica; False when it was not here. Raises OSError where the disk refuses."""
        with self._writer:
            found = self._shelf.get((tenant, fingerprint), key)
            if found is None:
                return False
            self._commit([found], None)
            with self._state:
                self._removed += 1
            return True

    def documents(self) -> Iterator[tuple[bytes, bytes]]:
        """(entry, document) of all there is at one moment, the oldest first."""
        with self._state:
            kept = list(self._shelf.kept.values())
        return ((each.entry, each.document) for each in kept)

    def stats(self) -> LogStats:
        """Counts since the log was opened."""
        with self._state:
            return LogStats(
                anchors=len(self._shelf.kept),
                nbytes=self._shelf.nbytes.total(),
                limit_bytes=self._shelf.limit_bytes,
                version=self._version(self._shelf.number),
                added=self._added,
                evicted=self._evicted,
                removed=self._removed,
                refused=dict(self._refused),
                faults=dict(self._faults),
            )

    def check_integrity(self) -> None:
        """Raise AssertionError when bounds, counts and anchors contradict each other. Slow; for tests and tools."""
        with self._writer, self._state:
            self._shelf.check_integrity()
            for number, kept in self._shelf.kept.items():
                told = unpack_entry(kept.entry)
                assert (kept.key, kept.room, kept.slot) == (told.key, (told.tenant, told.fingerprint), told.slot)
                assert checksum(kept.document) == told.checksum
                assert self._folder is None or self._folder.read(number) == kept.document

    def close(self) -> None:
        """Another process may have the folder. Nothing may be called afterwards."""
        with self._writer:
            if self._folder is not None:
                self._folder.close()

    # -- below ------------------------------------------------------------------------------------------------------------

    def _flaw(self, tenant: str, told: Entry, entry: bytes, document: bytes) -> str | None:
        if told.tenant != tenant:
            return OTHER_TENANT
        if len(document) > MAX_DOCUMENT or len(entry) + len(document) > self._shelf.limit_bytes:
            return TOO_LARGE
        return None if told.nbytes == len(document) and told.checksum == checksum(document) else DAMAGED

    def _take(self, told: Entry, entry: bytes, document: bytes) -> str | None:
        """Why it was not taken in; None when it was. With _writer."""
        room = (told.tenant, told.fingerprint)
        if self._shelf.get(room, told.key) is not None:
            return DUPLICATE
        gone = self._shelf.victims(room, told.slot, len(entry) + len(document))
        number = self._shelf.number + 1 + len(gone)
        try:
            self._commit(gone, Kept(number, told.key, room, told.slot, entry, document))
        except OSError as fault:
            log.warning("an anchor was not kept: %s", fault)
            with self._state:
                self._faults[DISK] += 1
            return DISK
        with self._state:
            self._added += 1
            self._evicted += len(gone)
        return None

    def _commit(self, gone: list[Kept], new: Kept | None) -> None:
        """On the disk, and then for everybody to see: all of it, or where this raises OSError nothing. With _writer."""
        first = self._shelf.number + 1
        if self._folder is not None:
            change = Change(first, tuple(kept.number for kept in gone), b"" if new is None else new.entry)
            self._folder.commit(change, b"" if new is None else new.document)
        with self._state:
            for number, kept in enumerate(gone, first):
                self._shelf.leave(kept, number)
            if new is not None:
                self._shelf.come(new)
        if self._folder is not None and self._folder.count > 2 * len(self._shelf.kept) + SUMMED_UP:
            try:
                self._folder.rewrite(self._epoch, self._shelf.number, self._summary())
            except OSError as fault:  # the journal goes on as it is
                log.warning("the journal of anchors was not rewritten: %s", fault)

    def _restore(self, folder: AnchorFolder) -> None:
        """What was committed, less what the disk lost. With any loss a new epoch begins, so that replicas hear of it."""
        history, shelf = folder.history, self._shelf
        self._faults += Counter({JOURNAL: history.damaged})
        removed = {number for change in history.changes for number in change.gone}
        losses = 0
        for change in history.changes:
            for at, number in enumerate(change.gone, change.first):
                if number in shelf.kept:
                    shelf.leave(shelf.kept[number], at)
            if change.entry:
                reason, evicted = self._come_back(folder, change, whole=change.last not in removed)
                self._faults += Counter({reason: 1} if reason else {})
                self._evicted += evicted
                losses += evicted + bool(reason)
            shelf.number = max(shelf.number, change.last)
        shelf.summed_up(history.number)
        if history.epoch and not losses:
            self._epoch = history.epoch
        folder.begin(self._epoch, shelf.number, self._summary())
        folder.clean(shelf.kept)

    def _come_back(self, folder: AnchorFolder, change: Change, *, whole: bool) -> tuple[str | None, int]:
        """Why it is lost, and how many had to leave for it: limits may be lower than they were. Not `whole`: it left later."""
        shelf, number = self._shelf, change.last
        try:
            told = unpack_entry(change.entry)
            document = folder.read(number) if whole else b""
        except CacheFault:
            return MALFORMED, 0
        except OSError as fault:
            return MISSING if isinstance(fault, FileNotFoundError) else DISK, 0
        if whole and (reason := self._flaw(told.tenant, told, change.entry, document)) is not None:
            return reason, 0
        kept = Kept(number, told.key, (told.tenant, told.fingerprint), told.slot, change.entry, document)
        if shelf.get(kept.room, kept.key) is not None or number <= next(reversed(shelf.kept), 0):
            return JOURNAL, 0  # what led to this is lost
        gone = shelf.victims(kept.room, kept.slot, kept.nbytes)
        for each in gone:
            shelf.leave(each, number)
        shelf.come(kept)
        return None, len(gone)

    def _summary(self) -> Iterator[Change]:
        return (Change(kept.number, entry=kept.entry) for kept in self._shelf.kept.values())

    def _answer(self, reason: str | None) -> dict[str, Any]:
        with self._state:
            if reason is not None:
                self._refused[reason] += 1
            return {"kept": reason is None, "reason": reason, "version": self._version(self._shelf.number)}

    def _version(self, number: int) -> int:
        return (self._epoch << NUMBERS) + number


def _new_epoch() -> int:
    """Not 0, and hardly one that was before."""
    return secrets.randbelow((1 << 22) - 1) + 1
