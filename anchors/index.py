"""The contract of an index over anchor tokens, and the exact one: every row compared, in numpy.

A row is what one anchor token looks like, its id is the caller's. Knows nothing of anchors, KV or models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from threading import Lock
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from kvcomm.anchors.arrays_file import Arrays, read_arrays, write_arrays
from kvcomm.anchors.rows import Ids, Matrix, Rows, Slots, usable
from kvcomm.errors import CacheFault, InputError

__all__ = ["ExactIndex", "Found", "Index", "read_index", "searchable"]

KIND = "kvcomm.anchors.index"  # what an index file says it is

_BLOCK = 8192  # rows compared at a time
_QUERIES = 512  # and queries


@dataclass(frozen=True, eq=False)
class Found:
    """The nearest rows of each query, nearest first."""

    ids: Ids  # [queries, k]; -1 where there are fewer than k rows
    distances: Matrix  # [queries, k]; squared L2, inf where there is no row


class Index(Protocol):
    """Rows by id, found by distance. Every method may be called from any thread; a search sees every `add` that returned."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The index that `save` wrote, of this class or another one. Raises as `read_index` does."""
        ...

    @property
    def dim(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        ...

    def __len__(self) -> int: ...

    def add(self, ids: npt.ArrayLike, rows: npt.ArrayLike) -> None:
        """Take in rows [n, dim] under ids [n]; they are copied.

        Raises InputError, and changes nothing, for another shape, a value that is not finite, an id that is known already,
        given twice or negative.
        """
        ...

    def remove(self, ids: npt.ArrayLike) -> int:
        """Forget these rows; returns how many were known. Unknown ids are no error."""
        ...

    def search(self, queries: npt.ArrayLike, k: int) -> Found:
        """The k nearest rows to each of [m, dim]; equally near ones by id. Exact, or as exact as the class says.

        Raises InputError for another shape, a value that is not finite, or k < 1.
        """
        ...

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it to one file, atomically; changes wait meanwhile. Raises OSError."""
        ...

    def check_integrity(self) -> None:
        """Raise AssertionError when its parts contradict each other. Slow; for tests."""
        ...


class ExactIndex:
    """An `Index` that compares every row with every query, in float64: the reference, and enough for some thousand rows.

    One lock, held for the length of a call.
    """

    def __init__(self, dim: int) -> None:
        self._rows = Rows(dim)
        self._lock = Lock()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        rows, _, _ = read_index(path)
        index = cls(rows.dim)
        index._rows = rows
        return index

    @property
    def dim(self) -> int:
        return self._rows.dim

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._rows.nbytes

    def __len__(self) -> int:
        with self._lock:
            return len(self._rows)

    def add(self, ids: npt.ArrayLike, rows: npt.ArrayLike) -> None:
        matrix = usable(rows, self.dim, "rows")
        with self._lock:
            self._rows.append(self._rows.new_ids(ids, len(matrix)), matrix)

    def remove(self, ids: npt.ArrayLike) -> int:
        with self._lock:
            slots = self._rows.find(ids)
            self._rows.drop(slots)
            return len(slots)

    def search(self, queries: npt.ArrayLike, k: int) -> Found:
        matrix = searchable(queries, self.dim, k)
        with self._lock:
            parts = [self._nearest(matrix[at : at + _QUERIES], k) for at in range(0, max(len(matrix), 1), _QUERIES)]
        return Found(*map(np.concatenate, zip(*parts, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        with self._lock:
            write_arrays(path, {"kind": KIND}, {"ids": self._rows.ids, "rows": self._rows.matrix})

    def check_integrity(self) -> None:
        with self._lock:
            self._rows.check_integrity()

    def _nearest(self, queries: Matrix, k: int) -> tuple[Ids, Matrix]:
        double = queries.astype(np.float64)
        slots: Slots = np.empty((len(queries), 0), dtype=np.int64)
        near = np.empty((len(queries), 0))
        for start in range(0, len(self._rows), _BLOCK):
            block = self._rows.matrix[start : start + _BLOCK].astype(np.float64)
            apart = np.einsum("nd,nd->n", block, block) - 2 * double @ block.T  # without |query|**2: it orders alike
            near = np.concatenate([near, apart], axis=1)
            here = np.broadcast_to(np.arange(start, start + len(block)), apart.shape)
            slots = np.concatenate([slots, here], axis=1)
            if near.shape[1] > k:
                best = np.argpartition(near, k - 1, axis=1)[:, :k]
                near, slots = np.take_along_axis(near, best, 1), np.take_along_axis(slots, best, 1)
        return self._rows.nearest_of(queries, slots, k)


def searchable(queries: npt.ArrayLike, dim: int, k: int) -> Matrix:
    """The queries as float32 [m, dim], or InputError."""
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1")
    return usable(queries, dim, "queries")


def read_index(path: str | os.PathLike[str]) -> tuple[Rows, dict[str, object], Arrays]:
    """The rows of an index file, and whatever else its class wrote: facts and arrays.

    Raises InputError when there is no readable file, CacheFault when it is no whole, unaltered index of this version.
    """
    facts, arrays = read_arrays(path)
    ids, matrix = arrays.get("ids"), arrays.get("rows")
    if facts.get("kind") != KIND or ids is None or matrix is None or matrix.ndim != 2:
        raise CacheFault(f"{os.fspath(path)} holds no index: it is {facts.get('kind', 'of no kind')!r}")
    try:
        rows = Rows(matrix.shape[1])
        rows.append(rows.new_ids(ids, len(matrix)), usable(matrix, rows.dim, "rows"))
    except InputError as e:
        raise CacheFault(f"{os.fspath(path)} holds no usable index: {e}") from e
    return rows, facts, arrays
