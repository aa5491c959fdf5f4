"""What a server keeps, put together from its settings: memory over a disk over a remote service, an index, and anchors."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Literal

from kvcomm.errors import InputError
from kvcomm.report import machine
from kvcomm.store.disk import DiskStore
from kvcomm.store.eviction import Quotas
from kvcomm.store.opening import open_remote
from kvcomm.store.records import RecordStore
from kvcomm.store.slabs import SlabStore
from kvcomm.store.tiered import Tiered
from kvcomm.wire.anchor_log import AnchorLog
from kvcomm.wire.library import Library, queue_bytes

__all__ = ["ANCHORS", "Settings", "Tiers"]

ANCHORS = "anchors"  # the folder of anchors, inside of the disk tier's
LEAST = 1 << 20  # bytes of memory, and of disk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Sizes in bytes."""

    memory: int = 4 << 30
    disk: Path | None = None
    disk_bytes: int = 50 << 30
    remote: str | None = None  # redis://... or mooncake://...
    write: Literal["through", "back"] = "through"
    quotas: Quotas = field(default_factory=Quotas)  # in each tier of this host
    anchors_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        there = machine()["memory_bytes"]
        if self.memory < LEAST or (there is not None and self.memory > there):
            raise InputError(f"--memory is {self.memory} bytes; it must be from {LEAST} to the {there} of this machine")
        if self.disk_bytes < LEAST:
            raise InputError(f"--disk-bytes is {self.disk_bytes}; it must be at least {LEAST}")


@dataclass(frozen=True)
class Tiers:
    """All of it, opened; a server closes it."""

    library: Library
    disk: DiskStore | None
    anchors: AnchorLog

    @classmethod
    def open(cls, settings: Settings) -> Tiers:
        """Raises InputError for what cannot be opened; then nothing stays open."""
        with ExitStack() as opened:
            disk = remote = None
            if settings.disk is not None:
                disk = DiskStore(settings.disk, settings.disk_bytes, settings.quotas)
                opened.callback(disk.close)
            if settings.remote is not None:
                remote = open_remote(settings.remote)
                opened.callback(remote.close)
            folder = None if settings.disk is None else settings.disk / ANCHORS
            anchors = AnchorLog(folder, settings.anchors_bytes)
            opened.callback(anchors.close)
            slabs = SlabStore(settings.memory, settings.quotas)
            lower: RecordStore | None = remote if disk is None else disk
            if disk is not None and remote is not None:
                lower = Tiered(disk, remote, write=settings.write, queue_bytes=queue_bytes(slabs))
            library = Library(slabs, lower, write=settings.write, board=remote)
            opened.pop_all()
        return cls(library, disk, anchors)

    def restore(self, stop: Event) -> int:
        """Makes the text known that the disk has kept since the last time, until `stop`; how many there are. Takes long. What
        clients put meanwhile is newer: it does not leave the index for this.
        """
        if self.disk is None:
            return 0
        known, count = self.library.texts, 0  # other hosts were told of it when it was put
        for segment in self.disk.texts():
            if stop.is_set():
                break
            if not known.has_room(segment):
                log.warning("there is no room for the text of more than %d objects of the disk; others are not found", count)
                break
            count += known.add_oldest(segment)
        return count
