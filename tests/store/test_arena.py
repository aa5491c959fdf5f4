"""`Extents` against a brute-force map of pages, and regions that two processes share."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.errors import CacheFault
from kvcomm.store.arena import PAGE, Arena, Extents, Window, whole_pages


def shared_bytes(fd: int) -> int:
    """Memory that a region really takes."""
    return os.fstat(fd).st_blocks * 512


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(("nbytes", "takes"), [(0, PAGE), (1, PAGE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)])
def test_whole_pages(nbytes: int, takes: int) -> None:
    assert whole_pages(nbytes) == takes
    extents = Extents(10 * PAGE + 5)
    assert extents.allocate(nbytes) == 0
    assert extents.used == takes
    assert extents.capacity == 10 * PAGE


@pytest.mark.parametrize("make", [Extents, Arena])
@pytest.mark.parametrize("capacity", [0, 1, PAGE - 1])
def test_less_than_a_page_has_room_for_nothing(make: type[Extents], capacity: int) -> None:
    extents = make(capacity)
    assert (extents.capacity, extents.largest, extents.allocate(1)) == (0, 0, None)
    extents.check_integrity()


def test_the_smallest_that_fits_and_the_warmest_of_those() -> None:
    extents = Extents(20 * PAGE)
    a, wall, b, _, c, _ = (extents.allocate(n * PAGE) for n in (3, 1, 2, 1, 2, 1))
    assert None not in (a, wall, b, c)
    for offset in (a, c, b):
        assert offset is not None
        extents.free(offset)
    assert extents.allocate(2 * PAGE) == b, "freed last"
    assert extents.allocate(2 * PAGE) == c
    assert extents.allocate(PAGE) == a, "smaller than the rest of the region"
    assert extents.allocate(2 * PAGE) == 1 * PAGE, "what remained of it"
    extents.check_integrity()


def test_freeing_twice_is_an_error_and_changes_nothing() -> None:
    extents = Extents(4 * PAGE)
    offset = extents.allocate(1)
    assert offset == 0
    extents.free(offset)
    with pytest.raises(KeyError):
        extents.free(offset)
    extents.check_integrity()


class ExtentsModel(RuleBasedStateMachine):
    """`Extents` beside a list with the owner of each page."""

    pages = 24

    def __init__(self) -> None:
        super().__init__()
        self.extents = Extents(self.pages * PAGE)
        self.owner: list[int | None] = [None] * self.pages
        self.taken: dict[int, int] = {}  # offset -> pages
        self.made = 0

    def holes(self) -> list[tuple[int, int]]:
        """(pages, first page) of each run of pages that nobody owns."""
        found, run = [], 0
        for page, owner in enumerate([*self.owner, -1]):
            if owner is None:
                run += 1
            elif run:
                found.append((run, page - run))
                run = 0
        return found

    @rule(nbytes=st.integers(1, 9 * PAGE))
    def allocate(self, nbytes: int) -> None:
        pages = -(-nbytes // PAGE)
        fitting = [(run, first) for run, first in self.holes() if run >= pages]
        offset = self.extents.allocate(nbytes)
        assert (offset is None) == (not fitting)
        if offset is None:
            return
        least = min(fitting)[0]
        assert offset in [first * PAGE for run, first in fitting if run == least]
        self.made += 1
        self.taken[offset] = pages
        self.owner[offset // PAGE : offset // PAGE + pages] = [self.made] * pages

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        pages = self.taken.pop(offset)
        self.extents.free(offset)
        self.owner[offset // PAGE : offset // PAGE + pages] = [None] * pages

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), pages=st.integers(1, 24))
    def window(self, data: st.DataObject, pages: int) -> None:
        """Freeing what it names makes a hole of that size, and without the last one it does not."""
        offset = data.draw(st.sampled_from(sorted(self.taken)))
        first = offset // PAGE
        while first and self.owner[first - 1] is None:
            first -= 1
        named = self.extents.window(offset, pages * PAGE)
        if named is None:
            assert first + pages > self.pages
            return
        reach = {self.owner[page] for page in range(first, first + pages)} - {None}
        assert [self.owner[o // PAGE] for o in named] == sorted(reach, key=self.owner.index)

    @invariant()
    def agrees(self) -> None:
        self.extents.check_integrity()
        assert self.extents.used == PAGE * sum(self.taken.values())
        assert self.extents.largest == PAGE * max([run for run, _ in self.holes()], default=0)

    def teardown(self) -> None:
        for offset in self.taken:
            self.extents.free(offset)
        assert self.extents.largest == self.extents.capacity, "all free, in one piece"
        assert self.extents.used == 0
        self.extents.check_integrity()


TestExtentsModel = ExtentsModel.TestCase
TestExtentsModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.fixture(params=["memfd", "file"])
def arena(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Arena:
    """A region of 64 pages, by either way of making one."""
    if request.param == "file":
        monkeypatch.delattr(os, "memfd_create")
    return Arena(64 * PAGE)


def test_a_region_in_two_mappings(arena: Arena) -> None:
    offset = arena.allocate(5000)
    assert offset is not None
    window = Window(arena.fd, arena.capacity)
    arena.view(offset, 5000)[:] = 7
    seen = window.read(offset, 5000)
    assert (seen == 7).all()
    window.write(offset, 1)[:] = 9
    assert (seen[0], arena.view(offset, 5000)[0]) == (9, 9)
    with pytest.raises(ValueError, match="read-only"):
        seen[:] = 0
    window.close()
    arena.close()
    assert seen[1] == 7, "an array keeps the memory"


def test_pages_cost_nothing_until_they_are_written() -> None:
    arena = Arena(1 << 40)
    assert shared_bytes(arena.fd) == 0
    offset = arena.allocate(1 << 30)
    assert offset is not None
    arena.view(offset, 1 << 30)[: 3 * PAGE] = 1
    assert 3 * PAGE <= shared_bytes(arena.fd) <= 4 << 20  # huge pages, where the system has them for such memory
    arena.close()


def test_nobody_can_shorten_a_region_under_its_readers() -> None:
    arena = Arena(64 * PAGE)
    fd = os.dup(arena.fd)  # as another process has it
    for size in (PAGE, 65 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(fd)


def test_descriptors_are_given_back(arena: Arena) -> None:
    before = descriptors()
    for close in (True, False):
        other = Arena(PAGE)
        window = Window(other.fd, PAGE)
        window.write(0, 1)
        if close:
            window.close()
            other.close()
            other.close()
        del window, other
        gc.collect()
        assert descriptors() == before
    arena.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 2), (0, 64 * PAGE + 1), (64 * PAGE, 1), (0, 0), (0, -1), (1 << 70, 1)])
def test_outside_of_the_region_is_a_fault(arena: Arena, offset: int, nbytes: int) -> None:
    window = Window(arena.fd, arena.capacity)
    for part in (window.read, window.write):
        with pytest.raises(CacheFault, match="outside"):
            part(offset, nbytes)


@pytest.mark.parametrize("capacity", [65 * PAGE, 1 << 70, 0, -1])
def test_a_region_that_is_smaller_than_announced_is_a_fault(arena: Arena, capacity: int) -> None:
    with pytest.raises(CacheFault, match=f"{64 * PAGE} bytes was announced as one of {capacity}"):
        Window(arena.fd, capacity)


def test_what_is_no_region_is_a_fault() -> None:
    with pytest.raises(CacheFault, match="cannot be mapped"):
        Window(10_000, PAGE)
    reader, writer = os.pipe()
    with pytest.raises(CacheFault):
        Window(reader, PAGE)
    os.close(reader)
    os.close(writer)


OTHER = """
import socket, sys
from kvcomm.store.arena import Window
peer = socket.socket(fileno=int(sys.argv[1]))
said, fds, _, _ = socket.recv_fds(peer, 100, 1)
capacity, offset, nbytes = map(int, said.split())
window = Window(fds[0], capacity)
peer.sendall(str(int(window.read(offset, nbytes).sum())).encode())
assert peer.recv(100) == b"write"
window.write(offset, nbytes)[:] = 3
peer.sendall(b"written")
peer.recv(100)
"""


def test_another_process_reads_writes_and_is_killed() -> None:
    """The descriptor goes over a Unix socket; what the other process wrote is here, and stays when it dies."""
    arena = Arena(1 << 30)
    offset = arena.allocate(100_000)
    assert offset is not None
    mine = arena.view(offset, 100_000)
    mine[:] = np.arange(100_000) % 251
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(60)
        root = Path(__file__).parents[2]
        args = [sys.executable, "-c", OTHER, str(theirs.fileno())]
        with subprocess.Popen(args, pass_fds=[theirs.fileno()], cwd=root) as process:
            theirs.close()
            socket.send_fds(ours, [f"{arena.capacity} {offset} 100000".encode()], [arena.fd])
            assert int(ours.recv(100)) == int(mine.sum())
            ours.sendall(b"write")
            assert ours.recv(100) == b"written"
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
    assert (mine == 3).all()
    arena.close()
