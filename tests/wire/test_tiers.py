"""What a server makes known of its disk after a start, beside what its clients put meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Event

import pytest

from kvcomm.matching import TextIndex
from kvcomm.segments import Segment
from kvcomm.store.disk import DiskStore
from kvcomm.store.record import Record
from kvcomm.store.slabs import SlabStore
from kvcomm.wire.anchor_log import AnchorLog
from kvcomm.wire.library import Library
from kvcomm.wire.tiers import Tiers
from tests.wire.conftest import kv_of, segment

KEPT = [segment(80, seed=i) for i in range(5)]


def record(s: Segment) -> Record:
    return Record.of(s, kv_of(s))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Of what is `KEPT`, what was used last leaves last."""
    with closing(DiskStore(tmp_path, 1 << 30)) as store:
        for s in KEPT:
            assert store.put_record(record(s))
    return tmp_path


@pytest.fixture
def tiers(disk: Path) -> Iterator[Tiers]:
    """With room for the text of four segments."""
    store = DiskStore(disk, 1 << 30)
    tiers = Tiers(Library(SlabStore(1 << 20), store, TextIndex(max_windows=40)), store, AnchorLog())
    with closing(tiers.library), closing(tiers.anchors):
        yield tiers


def test_what_clients_put_stays_known(tiers: Tiers, caplog: pytest.LogCaptureFixture) -> None:
    """Of the disk what leaves it last is known, as far as there is room; it is what leaves the index first."""
    library = tiers.library
    put = [segment(80, seed=10 + i) for i in range(4)]
    for s in put[:2]:
        assert library.put("", record(s))
    with caplog.at_level(logging.WARNING):
        assert tiers.restore(Event()) == 4, "with those that are known already"
    assert "no room for the text of more than 4 objects" in caplog.text
    assert [s.key in library.index for s in (*put[:2], *KEPT)] == [True, True, False, False, False, True, True]
    for s in put[2:]:
        assert library.put("", record(s))
    assert [s.key in library.index for s in (*put, *KEPT)] == [True] * 4 + [False] * 5
    assert library.slabs.has(s.key for s in put) == {s.key for s in put}


def test_it_ends_when_it_should(tiers: Tiers) -> None:
    stop = Event()
    stop.set()
    assert tiers.restore(stop) == 0
    assert not any(s.key in tiers.library.index for s in KEPT)
