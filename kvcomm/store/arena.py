"""One region of memory that processes share, and who may use which part of it. Knows nothing of what lies there.

The region is mapped once per process and its parts are used again and again: a fresh mapping costs a page fault for every
4 KiB that is touched (7 GB/s), pages that were touched before are read at the speed of memory. Pages never written cost
nothing. Nothing of it outlives the processes that have it open, however they end.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from bisect import bisect_left, insort
from weakref import finalize

import numpy as np
import numpy.typing as npt

from kvcomm.errors import CacheFault

__all__ = ["PAGE", "Arena", "Extents", "Window", "whole_pages"]

PAGE = 4096  # bytes; extents begin at multiples of it and are multiples of it

Bytes = npt.NDArray[np.uint8]


def whole_pages(nbytes: int) -> int:
    """What an extent for `nbytes` takes, in bytes."""
    return max(-(-nbytes // PAGE), 1) * PAGE


class Extents:
    """Parts of [0, capacity) that are taken, and that are free; two free ones never touch. Not thread safe.

    |  taken  |  free  |  taken  | taken |      free      |
    """

    def __init__(self, capacity: int) -> None:
        """Whole pages of it are used."""
        self.capacity = capacity // PAGE * PAGE
        self.used = 0  # bytes
        self._taken: dict[int, int] = {}  # offset -> size
        self._free: dict[int, int] = {}  # offset -> size
        self._free_ends: dict[int, int] = {}  # end -> offset
        self._sizes: list[int] = []  # of free extents, each once, ascending
        self._by_size: dict[int, dict[int, None]] = {}  # size -> offsets, the last that was freed at the end
        if self.capacity:
            self._add(0, self.capacity)

    @property
    def largest(self) -> int:
        """Bytes of the largest free extent."""
        return self._sizes[-1] if self._sizes else 0

    def allocate(self, nbytes: int) -> int | None:
        """Where `whole_pages(nbytes)` are taken from now on: in the smallest free extent that has them, the one freed last
        where several do (its pages are there already). None where none has.
        """
        size = whole_pages(nbytes)
        at = bisect_left(self._sizes, size)
        if at == len(self._sizes):
            return None
        found = self._sizes[at]
        offset = next(reversed(self._by_size[found]))
        self._drop(offset)
        if found > size:
            self._add(offset + size, found - size)
        self._taken[offset] = size
        self.used += size
        return offset

    def free(self, offset: int) -> None:
        """Give back what `allocate` returned."""
        size = self._taken.pop(offset)
        self.used -= size
        end = offset + size
        if end in self._free:
            end += self._drop(end)
        if offset in self._free_ends:
            offset = self._free_ends[offset]
            self._drop(offset)
        self._add(offset, end - offset)

    def window(self, offset: int, nbytes: int) -> list[int] | None:
        """The taken extents that would have to be freed, from `offset` on, for one of `nbytes`; the free one in front of it
        counts. None where the region ends too early. `offset` is where an extent begins.
        """
        begin = self._free_ends.get(offset, offset)
        at, taken = offset, []
        while at - begin < nbytes:
            if at in self._free:
                at += self._free[at]
            elif at in self._taken:
                taken.append(at)
                at += self._taken[at]
            else:
                return None
        return taken

    def check_integrity(self) -> None:
        """Raise AssertionError where the extents do not fill the region, or contradict each other."""
        at, before = 0, "taken"
        for offset, size, kind in sorted(
            [(*e, "taken") for e in self._taken.items()] + [(*e, "free") for e in self._free.items()]
        ):
            assert offset == at, f"{at} to {offset} is nobody's, or two extents'"
            assert size > 0 and size % PAGE == 0
            assert (kind, before) != ("free", "free"), f"free extents touch at {offset}"
            at, before = offset + size, kind
        assert at == self.capacity
        assert self.used == sum(self._taken.values())
        assert self._free_ends == {offset + size: offset for offset, size in self._free.items()}
        assert self._sizes == sorted(set(self._free.values()))
        assert {(o, size) for size, offsets in self._by_size.items() for o in offsets} == set(self._free.items())
        assert all(self._by_size.values())

    def _add(self, offset: int, size: int) -> None:
        self._free[offset] = size
        self._free_ends[offset + size] = offset
        if size not in self._by_size:
            insort(self._sizes, size)
            self._by_size[size] = {}
        self._by_size[size][offset] = None

    def _drop(self, offset: int) -> int:
        """Its size; it is neither free nor taken."""
        size = self._free.pop(offset)
        del self._free_ends[offset + size], self._by_size[size][offset]
        if not self._by_size[size]:
            del self._by_size[size], self._sizes[bisect_left(self._sizes, size)]
        return size


class Arena(Extents):
    """A region of this process's own making. Others get its `fd` over a Unix socket, and make a `Window` of it."""

    def __init__(self, capacity: int) -> None:
        """Raises OSError where the system has no such memory to give: its address space is asked for, not its pages."""
        super().__init__(capacity)
        self.fd = _anonymous(max(self.capacity, PAGE))
        try:
            self._memory = memoryview(mmap.mmap(self.fd, max(self.capacity, PAGE)))
        except BaseException:
            os.close(self.fd)
            raise
        self._close_fd = finalize(self, os.close, self.fd)

    def view(self, offset: int, nbytes: int) -> Bytes:
        """This part of the region, writable. The array's base is no array: whatever is derived of it keeps it alive."""
        assert 0 <= offset < offset + nbytes <= self.capacity, f"{nbytes} bytes at {offset} of {self.capacity}"
        return np.frombuffer(self._memory[offset : offset + nbytes], np.uint8)

    def close(self) -> None:
        """Give the descriptor back. The memory goes with the last array that looks at it, and the last process that maps it."""
        self._close_fd()
        self._memory = memoryview(b"")


class Window:
    """Another process's region, seen from this one."""

    def __init__(self, fd: int, capacity: int) -> None:
        """`fd` stays the caller's and may be closed afterwards. Raises CacheFault where it is no such region."""
        self.capacity = capacity
        try:
            if capacity <= 0 or os.fstat(fd).st_size < capacity:
                raise CacheFault(f"a region of {os.fstat(fd).st_size} bytes was announced as one of {capacity}")
            self._memory = memoryview(mmap.mmap(fd, capacity, access=mmap.ACCESS_READ))
            self._fd = os.dup(fd)
        except OSError as error:
            raise CacheFault(f"descriptor {fd} cannot be mapped: {error}") from error
        self._writable: memoryview | None = None
        self._close_fd = finalize(self, os.close, self._fd)

    def read(self, offset: int, nbytes: int) -> Bytes:
        """This part of the region, which cannot be written through it. Raises CacheFault outside of the region."""
        return self._part(self._memory, offset, nbytes)

    def write(self, offset: int, nbytes: int) -> Bytes:
        """As `read`, writable; the first call maps the region a second time."""
        if self._writable is None:
            try:
                self._writable = memoryview(mmap.mmap(self._fd, self.capacity))
            except OSError as error:
                raise CacheFault(f"the region cannot be mapped for writing: {error}") from error
        return self._part(self._writable, offset, nbytes)

    def close(self) -> None:
        """The memory goes with the last array that looks at it."""
        self._close_fd()
        self._memory, self._writable = memoryview(b""), None

    def _part(self, memory: memoryview, offset: int, nbytes: int) -> Bytes:
        if not 0 <= offset < offset + nbytes <= self.capacity:
            raise CacheFault(f"{nbytes} bytes at {offset} are outside of a region of {self.capacity}")
        return np.frombuffer(memory[offset : offset + nbytes], np.uint8)


def _anonymous(nbytes: int) -> int:
    """A file without a name. Where the system can, it is memory, and of fixed size: whoever reads behind an end is killed."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("kvcomm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, nbytes)
        if hasattr(os, "memfd_create"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
