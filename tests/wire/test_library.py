"""What a server's tiers, its index and a service that hosts share do together: when others hear of a record, who loses one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from time import sleep

import numpy as np
import pytest

from kvcomm.matching import TextIndex
from kvcomm.segments import Segment
from kvcomm.store.base import Kept
from kvcomm.store.record import Draft, Record, empty
from kvcomm.store.remote import Census, RemoteStore
from kvcomm.store.sighting import unpack
from kvcomm.store.slabs import SlabStore
from kvcomm.store.tiered import Tiered
from kvcomm.wire.library import NOT_FOUND_AGAIN, Library
from tests.wire.conftest import kv_of, segment


class Far(RemoteStore):
    """A service, in this process; `events` has what reached it, in order."""

    name = "far"

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Record] = {}
        self.notes: dict[str, bytes] = {}
        self.events: list[str] = []

    def put_record(self, record: Record) -> Kept:
        self.events.append("record")
        data = empty(record.nbytes)
        data[:] = record.data
        self.records[record.key] = Record(data)
        return Kept(stored=True)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        return {key: self.records[key] for key in keys if key in self.records}

    def has(self, keys: Iterable[str]) -> set[str]:
        return self.records.keys() & set(keys)

    def remove(self, key: str) -> bool:
        return self.records.pop(key, None) is not None

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        self.events.append("notes")
        self.notes |= notes

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        return {name: self.notes[name] for name in names if name in self.notes}

    def segments(self) -> list[Segment]:
        return [record.segment for record in self.records.values()]

    def census(self) -> Census:
        return Census(len(self.records), sum(record.nbytes for record in self.records.values()), 0)


def host(far: Far, index: TextIndex | None = None, memory: int = 1 << 20) -> Library:
    """As a server with `--remote` puts it together."""
    return Library(SlabStore(memory), far, index, board=far)


def put(library: Library, s: Segment) -> Kept:
    """As a client of this host does: reserve, write, commit."""
    draft = Draft(s, kv_of(s))
    slot = library.reserve(s.tenant, s.key, draft.nbytes, None)
    assert not isinstance(slot, Kept)
    draft.write(library.slabs.arena.view(slot.offset, slot.nbytes))
    return library.commit(s.tenant, s.key, slot.generation)


def test_others_hear_of_a_record_when_the_service_has_it_and_how_large_it_is() -> None:
    """Else they look in vain, and leave the text alone for a while."""
    far = Far()
    library, s = host(far), segment(100)
    assert put(library, s)
    assert far.events == ["record", "notes"]
    (note, *_) = far.notes.values()
    assert [(seen.key, seen.nbytes) for seen in unpack(note)] == [(s.key, far.records[s.key].nbytes)]
    library.close()


def test_what_one_host_can_no_longer_find_stays_with_the_others() -> None:
    """Its index is full: the record leaves its memory, and not the service that hosts share."""
    far = Far()
    library = host(far, TextIndex(max_windows=20))
    old, new = segment(100), segment(100, seed=1)
    assert put(library, old)
    assert put(library, new)
    assert library.slabs.has([old.key, new.key]) == {new.key}
    assert far.records.keys() == {old.key, new.key}
    too_short = segment(10)
    assert put(library, too_short) == Kept(stored=False, reason=NOT_FOUND_AGAIN)
    assert not library.slabs.has([too_short.key])
    library.close()


def test_what_others_evict_before_it_is_pinned_is_brought_again(monkeypatch: pytest.MonkeyPatch) -> None:
    library, s = Library(SlabStore(1 << 20), SlabStore(1 << 20)), segment(100)
    assert put(library, s)
    library.slabs.remove(s.key)
    real, evictions = library.stack.get_records, [1, 2]

    def and_evicted(keys: Iterable[str]) -> dict[str, Record]:
        found = real(keys)
        if evictions:
            evictions.pop()
            library.slabs.remove(s.key)
        return found

    monkeypatch.setattr(library.stack, "get_records", and_evicted)
    (slot,) = library.get("", [s.key])
    assert slot.key == s.key
    library.unpin([slot])
    library.close()


def test_another_copy_of_what_a_slow_tier_has_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest one of two is not worth loading; the other one is in memory."""
    disk = SlabStore(1 << 20)
    library, near = Library(SlabStore(1 << 20), disk), segment(100, start=20)
    far = Segment(near.ids, segment(30, seed=1).ids, "f")
    assert put(library, near)
    assert put(library, far)
    real = disk.get_records

    def slowly(keys: Iterable[str]) -> dict[str, Record]:
        sleep(0.2)
        return real(keys)

    monkeypatch.setattr(disk, "get_records", slowly)
    for _ in range(3):  # two to measure it
        library.slabs.remove(near.key)
        found = library.find("", "f", np.concatenate([near.context, near.ids, near.ids[:40]]), ms_per_token=0.1)
        library.unpin(found.slots)
    assert [(m.start, m.end, m.segment.key) for m in found.matches] == [(20, 120, far.key), (120, 160, far.key)]
    assert found.declined == {}
    assert not any(library.slabs._book.pins(generation) for generation in library.slabs._kept.values())
    library.remove("", [far.key])
    found = library.find("", "f", near.ids, ms_per_token=0.1)
    assert (found.matches, found.declined) == ([], {"memory-slower-than-computing": 100})
    library.close()


def test_alone_on_a_host_it_leaves_every_tier() -> None:
    disk = SlabStore(1 << 20)  # as good as one
    library = Library(SlabStore(1 << 20), disk, TextIndex(max_windows=20))
    for seed in range(2):
        assert put(library, segment(100, seed=seed))
    assert [s.key for s in disk.segments()] == [segment(100, seed=1).key]
    library.close()


def test_what_waits_for_the_disk_leaves_most_of_the_memory_free() -> None:
    library = Library(SlabStore(1 << 20), SlabStore(1 << 20), write="back")
    assert isinstance(library.stack, Tiered)
    assert library.stack._queue is not None
    assert library.stack._queue.limit_bytes == 1 << 18
    library.close()
