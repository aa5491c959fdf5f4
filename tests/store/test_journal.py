"""The journal against a plain list of what was written, cut and altered at every byte, and on a disk that is full."""

from __future__ import annotations

import errno
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcomm.errors import InputError
from kvcomm.store.journal import Contents, Journal, read

ENTRIES: list[Any] = [("+", "a" * 32, 2**40, None), ("-", "b" * 32), ("u", "\xc1KVE", 1.5), ("+", b"\xc1KVE" * 8, (), True), ()]
HEAD = 32  # bytes before the first entry


def opened(path: Path) -> Journal:
    return Journal(path, read(path))


def written(path: Path, entries: list[Any] = ENTRIES) -> list[int]:
    """A journal of `entries`; where each of them ends."""
    journal = opened(path)
    ends = []
    for entry in entries:
        journal.append([entry])
        ends.append(path.stat().st_size)
    journal.close()
    return ends


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The system writes no file of this process beyond `nbytes`: what fits is written, then it says EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_nothing_is_read_where_there_is_no_file(tmp_path: Path) -> None:
    assert read(tmp_path / "journal") == Contents([])
    assert not list(tmp_path.iterdir())


entries = st.recursive(st.none() | st.integers(-(2**60), 2**60) | st.text() | st.binary(), lambda e: st.lists(e).map(tuple))


@given(steps=st.lists(st.tuples(st.sampled_from(["append", "replace", "reopen"]), st.lists(entries, max_size=4)), max_size=12))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_list_as_its_model(tmp_path: Path, steps: list[tuple[str, list[Any]]]) -> None:
    path = tmp_path / "journal"
    path.unlink(missing_ok=True)
    journal, model = opened(path), list[Any]()
    for step, more in steps:
        if step == "append":
            journal.append(more)
            model += more
        elif step == "replace":
            journal.replace(iter(more))
            model = more
        else:
            journal.close()
            journal = opened(path)
        contents = read(path)
        assert contents.entries == model
        assert journal.count == len(model)
        assert journal.nbytes == contents.end == path.stat().st_size
        assert contents.damaged == contents.torn == 0
    journal.close()
    assert os.listdir(tmp_path) == ["journal"]


def test_cut_anywhere_the_entries_before_it_are_read(tmp_path: Path) -> None:
    """And what is left of the next one is cut off when it is opened."""
    path = tmp_path / "journal"
    ends = written(path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        contents = read(path)
        assert contents.entries == ENTRIES[:whole]
        assert contents.damaged == (0 < size < HEAD)
        assert path.stat().st_size == size  # reading changes nothing
        journal = opened(path)
        journal.append(["more"])
        journal.close()
        again = read(path)
        assert (again.entries, again.damaged, again.torn) == ([*ENTRIES[:whole], "more"], 0, 0)


@pytest.mark.parametrize("change", [0x01, 0x80, 0xFF])
def test_any_byte_altered_costs_its_own_entry_and_is_counted(tmp_path: Path, change: int) -> None:
    path = tmp_path / "journal"
    ends = written(path)
    data = bytearray(path.read_bytes())
    for at in range(len(data)):
        data[at] ^= change
        path.write_bytes(data)
        contents = read(path)
        hit = sum(end <= at for end in ends)  # whose byte it is
        if at < HEAD:
            assert (contents.entries, contents.end, contents.damaged) == ([], 0, 1)
        else:
            assert contents.entries == [e for i, e in enumerate(ENTRIES) if i != hit]
            last = hit == len(ENTRIES) - 1
            assert (contents.damaged, contents.torn > 0) == (int(not last), last)
        data[at] ^= change


def test_several_entries_in_a_row_are_one_place(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    ends = written(path)
    data = bytearray(path.read_bytes())
    data[ends[0] : ends[2]] = bytes(ends[2] - ends[0])  # as a power failure leaves it
    path.write_bytes(data)
    contents = read(path)
    assert contents.entries == [ENTRIES[0], *ENTRIES[3:]]
    assert (contents.damaged, contents.torn) == (1, 0)
    journal = opened(path)  # goes on behind the last
    journal.append(["more"])
    assert read(path).entries == [ENTRIES[0], *ENTRIES[3:], "more"]
    journal.close()


def test_frames_of_another_journal_inside_an_entry_are_no_entries(tmp_path: Path) -> None:
    """What a user's text holds is not read as entries when the entry around it is damaged."""
    other, path = tmp_path / "other", tmp_path / "journal"
    written(other)
    written(path, ["before", other.read_bytes(), "after"])
    data = bytearray(path.read_bytes())
    data[data.index(b"before") + len("before") + 5] ^= 1  # in the frame's head of the second entry
    path.write_bytes(data)
    assert read(path).entries == ["before", "after"]


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path)
    data = path.read_bytes()
    head = data[:8] + struct.pack("<I", 2) + data[12:24]
    path.write_bytes(head + xxhash.xxh3_64_digest(head) + data[32:])
    with pytest.raises(InputError, match=r"journal is of format 2.*reads format 1.*remove"):
        read(path)


def test_another_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    head = b"ANOTHER!" + bytes(16)
    for data in (b"x", b"x" * 1000, head + xxhash.xxh3_64_digest(head)):
        path.write_bytes(data)
        assert read(path) == Contents([], damaged=1, torn=len(data))


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_a_full_disk_takes_all_or_nothing(tmp_path: Path, room: int) -> None:
    """With room for a part of what is appended, and then again with room for it."""
    path = tmp_path / "journal"
    written(path, ["before"])
    journal = opened(path)
    more = ["x" * 20, "y" * 20]
    with largest_file(path.stat().st_size + room), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        journal.append(more)
    assert read(path) == Contents(["before"], path.stat().st_size, seed=read(path).seed)
    assert journal.count == 1
    journal.append(more)
    assert read(path).entries == ["before", *more]
    with largest_file(50), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        journal.replace(["z" * 30])
    journal.append(["after"])
    assert read(path).entries == ["before", *more, "after"]
    assert os.listdir(tmp_path) == ["journal"]
    journal.close()


def test_what_a_failed_append_left_is_cut_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = opened(path)
    journal.append(["before"])
    cut = os.ftruncate

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "not now")

    monkeypatch.setattr(os, "ftruncate", refuse)
    with largest_file(path.stat().st_size + 3), pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        journal.append(["lost"])
    assert read(path).torn == 3
    with pytest.raises(OSError, match="not now"):
        journal.append(["lost"])
    monkeypatch.setattr(os, "ftruncate", cut)
    journal.append(["after"])
    journal.close()
    assert read(path).entries == ["before", "after"]
    assert read(path).damaged == read(path).torn == 0


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    written(tmp_path / "journal")
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600
