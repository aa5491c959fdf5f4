"""The folder of a server's disk tier, and a running server, as places that can be listed, read and written to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvcomm.errors import CacheFault, InputError
from kvcomm.store.disk import MISSING, DiskStore
from kvcomm.store.record import Record
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address
from kvcomm.wire.anchor_log import DUPLICATE, AnchorLog
from kvcomm.wire.client import ServerStore
from kvcomm.wire.listing import Row, Wanted
from kvcomm.wire.moving import HERE, Item, PackedAnchor
from kvcomm.wire.tiers import ANCHORS

__all__ = ["ANCHORS_IN_USE", "FolderPlace", "ServerPlace"]

ANCHORS_IN_USE = "anchors-in-use"  # why a folder's anchors are left out: a running server has them
WITHOUT_LIMIT = 1 << 62  # bytes: whoever only looks or moves must evict nothing
DEADLINE = 30.0  # s for a call to a server


class FolderPlace:
    """Opened read-only unless `writable`, which no running server may have at the same time."""

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        """Raises InputError for a folder that is none, or in use."""
        self.folder = folder
        self.store = DiskStore(folder, WITHOUT_LIMIT, read_only=not writable)
        self._before = Counter(self.store.stats().faults)  # what was found when opening
        self._more: Counter[str] = Counter()
        self._anchors: AnchorLog | None = None

    @property
    def faults(self) -> Counter[str]:
        """What has gone meanwhile is no fault: a server may be at work in the folder."""
        found = Counter(self.store.stats().faults) - self._before
        del found[MISSING]
        return found + self._more

    def rows(self, wanted: Wanted) -> list[Row]:
        """The next to be evicted first. Reads no object."""
        now = time.time()
        return [
            Row(e.key, e.tokens, e.tenant, e.producer, e.fingerprint, e.cost_ms, e.nbytes, e.uses, self._age(e.key, now))
            for e in self.store.entries()
            if wanted(e.tenant, e.fingerprint)
        ]

    def items(self, wanted: Wanted) -> Iterator[Item]:
        for row in self.rows(wanted):
            found: dict[str, Record] = {}
            with suppress(CacheFault):  # counted
                found = self.store.get_records([row.key])
            yield from found.values()
        if not (self.folder / ANCHORS).is_dir():
            return
        try:
            log = self._log()
        except InputError:
            self._more[ANCHORS_IN_USE] += 1
            return
        for entry, document in log.documents():
            anchor = PackedAnchor(entry, document)
            if wanted(anchor.told.tenant, anchor.told.fingerprint):
                yield anchor

    def put(self, item: Item) -> str | None:
        if isinstance(item, PackedAnchor):
            answer = self._log().add(item.told.tenant, item.entry, item.document)
            return _said(answer)
        if item.key in self.store:
            return HERE
        return self.store.put_record(item).reason

    def close(self) -> None:
        self.store.close()
        if self._anchors is not None:
            self._anchors.close()

    def _log(self) -> AnchorLog:
        if self._anchors is None:
            self._anchors = AnchorLog(self.folder / ANCHORS, WITHOUT_LIMIT, WITHOUT_LIMIT)
        return self._anchors

    def _age(self, key: str, now: float) -> float | None:
        """Seconds since an object's file was written; None where it has gone."""
        try:
            return max(0.0, now - (self.folder / "objects" / key[:2] / f"{key}.kv").stat().st_mtime)
        except OSError:
            return None


class ServerPlace:
    """A server, which shows one tenant's at a time and takes any tenant's. Every method raises CacheFault where it does not
    answer, InputError where it does not let us in.
    """

    def __init__(self, address: Address, tenant: str | None = None, tokens: Mapping[str, str] | None = None) -> None:
        """`tenant`: whose is listed and read; None: of the one without a name. `tokens`: by tenant, for a server elsewhere."""
        self.tenant, self._tokens = tenant or "", tokens or {}
        self.store = ServerStore(address, token=self._tokens, deadline_s=DEADLINE)
        self.faults: Counter[str] = Counter()

    def rows(self, wanted: Wanted) -> list[Row]:
        """In the order of keys."""
        return [
            Row(row.key, row.tokens, self.tenant, row.producer, row.fingerprint, row.cost_ms, row.nbytes)
            for row in self.store.listed(self.tenant)
            if wanted(self.tenant, row.fingerprint)
        ]

    def items(self, wanted: Wanted) -> Iterator[Item]:
        """Anchors of those models of which there is a record."""
        rows = self.rows(wanted)
        reader = ServerStore(self.store.address, tenant=self.tenant, token=self._tokens, deadline_s=DEADLINE)
        try:
            for row in rows:
                yield from reader.get_records([row.key]).values()
            self.faults.update(reader.stats().faults)
        finally:
            reader.close()
        for fingerprint in dict.fromkeys(row.fingerprint for row in rows):
            version, more = 0, True
            while more:
                page = self._call(p.Anchors(fingerprint, version))
                yield from (PackedAnchor(entry, document) for entry, document in page["added"])
                version, more = page["version"], page["more"]

    def put(self, item: Item) -> str | None:
        if isinstance(item, PackedAnchor):
            return _said(self.store.call(item.told.tenant, p.AddAnchor(item.entry, item.document))[0])
        self.store.belong([item.key], item.tenant)
        if item.key in self.store:
            return HERE
        return self.store.put_record(item).reason

    def close(self) -> None:
        self.store.close()

    def _call(self, request: p.Request) -> dict[str, Any]:
        return self.store.call(self.tenant, request)[0]


def _said(answer: dict[str, Any]) -> str | None:
    """Why an anchor was not kept."""
    return None if answer["kept"] else HERE if answer["reason"] == DUPLICATE else str(answer["reason"])
