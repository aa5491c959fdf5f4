"""Rows by id, dense in memory: what every index keeps. Knows nothing of searching and nothing of threads."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt

from kvcomm.errors import InputError

__all__ = ["Ids", "Matrix", "Rows", "Slots", "apart_from", "usable"]

Ids = npt.NDArray[np.int64]  # the caller's, 0 or larger
Slots = npt.NDArray[np.int64]  # places in a `Rows`, -1 for none
Matrix = npt.NDArray[np.float32]  # [rows, dim]

_LARGEST = 2.0**120  # of a squared norm: what is computed from it stays finite in float32
_ENTRY = 64  # bytes of the two integers of an entry of the dict


def usable(rows: npt.ArrayLike, dim: int, what: str) -> Matrix:
    """`rows` as contiguous float32 [n, dim], not copied where they are that already. InputError for a shape or value."""
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes infinite, and is refused below
        matrix = np.ascontiguousarray(rows, dtype=np.float32)
        squares = np.einsum("...d,...d->...", matrix, matrix)
    if matrix.ndim != 2 or matrix.shape[1] != dim:
        raise InputError(f"{what} have shape {list(matrix.shape)}; this index takes [n, {dim}]")
    if not (squares < _LARGEST).all():
        bad = int(np.argmin(squares < _LARGEST))
        value = matrix[bad][np.argmax(np.where(np.isnan(matrix[bad]), np.inf, np.abs(matrix[bad])))]
        raise InputError(f"row {bad} of the {what} holds {value:g}; values must be finite and a squared norm below 2**120")
    return matrix


def apart_from(queries: Matrix, matrix: Matrix, slots: Slots) -> Matrix:
    """[m, any]: squared distances of each query to its own slots; inf for slot -1.

    Of differences, not of products, so that equal rows are at 0 and a common offset costs no precision.
    """
    difference = matrix[np.maximum(slots, 0)]  # of slot -1 too: row 0, overruled below; never what lies behind the rows
    difference -= queries[:, None]
    return np.where(slots < 0, np.float32(np.inf), np.einsum("mcd,mcd->mc", difference, difference))


class Rows:
    """Rows of `dim` float32 under distinct ids, without gaps: slots 0 to len - 1. Not thread safe: its index locks.

    Memory: 4 * dim + 8 bytes a row, up to a quarter more while it grows, and about 110 bytes a row for finding ids.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise InputError(f"dim is {dim}; it must be at least 1")
        self.dim = dim
        self._matrix: Matrix = np.empty((0, dim), dtype=np.float32)
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._slot_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def matrix(self) -> Matrix:
        """[len, dim], a view: valid until the next change."""
        return self._matrix[: len(self)]

    @property
    def ids(self) -> Ids:
        """[len], a view: valid until the next change."""
        return self._ids[: len(self)]

    @property
    def nbytes(self) -> int:
        return self._matrix.nbytes + self._ids.nbytes + sys.getsizeof(self._slot_of) + _ENTRY * len(self)

    def new_ids(self, ids: npt.ArrayLike, count: int) -> Ids:
        """`ids` as int64 [count], each of them unknown and given once; else InputError."""
        given = _integers(ids)
        if given.shape != (count,):
            raise InputError(f"{list(given.shape)} ids for {count} rows; each row needs one")
        if count and given.min() < 0:
            raise InputError(f"id {given.min()} is negative; ids must be at least 0")
        seen: set[int] = set()
        for i in given.tolist():
            if i in self._slot_of or i in seen:
                raise InputError(f"id {i} is {'given twice' if i in seen else 'known already'}; remove it first")
            seen.add(i)
        return given

    def append(self, ids: Ids, rows: Matrix) -> int:
        """Returns the slot of the first; the others follow. `ids` are `new_ids`."""
        start, end = len(self), len(self) + len(ids)
        if end > len(self._ids):
            self._resize(end + end // 4)
        self._matrix[start:end] = rows
        self._ids[start:end] = ids
        self._slot_of.update(zip(ids.tolist(), range(start, end), strict=True))
        return start

    def find(self, ids: npt.ArrayLike) -> Slots:
        """Slots of those ids that are known, each once, ascending."""
        found = {self._slot_of.get(i, -1) for i in _integers(ids).reshape(-1).tolist()} - {-1}
        return np.array(sorted(found), dtype=np.int64)

    def moves(self, slots: Slots) -> tuple[Slots, Slots]:
        """Which rows `drop(slots)` moves, from where to where: the last ones, into the gaps."""
        kept = len(self) - len(slots)
        gaps = slots[slots < kept]
        return np.setdiff1d(np.arange(kept, len(self)), slots, assume_unique=True), gaps

    def drop(self, slots: Slots) -> None:
        """Take out what `find` found."""
        source, target = self.moves(slots)
        for i in self._ids[slots].tolist():
            del self._slot_of[i]
        self._matrix[target] = self._matrix[source]
        self._ids[target] = self._ids[source]
        self._slot_of.update(zip(self._ids[target].tolist(), target.tolist(), strict=True))
        if len(self) < len(self._ids) // 2:
            self._resize(len(self))

    def nearest_of(self, queries: Matrix, slots: Slots, k: int) -> tuple[Ids, Matrix]:
        """Of each query's candidates [m, any] the k nearest: ids and squared distances [m, k], by (distance, id)."""
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        distances = np.full((len(queries), k), np.inf, dtype=np.float32)
        if slots.size:
            apart, names = apart_from(queries, self._matrix, slots), np.where(slots < 0, -1, self._ids[slots])
            order = np.lexsort((names, apart))[:, :k]
            ids[:, : order.shape[1]] = np.take_along_axis(names, order, 1)
            distances[:, : order.shape[1]] = np.take_along_axis(apart, order, 1)
        return ids, distances

    def check_integrity(self) -> None:
        """Raise AssertionError when ids, slots and rows contradict each other. Slow; for tests."""
        assert len(self._ids) == len(self._matrix) >= len(self)
        assert self._slot_of == {i: slot for slot, i in enumerate(self.ids.tolist())}
        assert len(usable(self.matrix, self.dim, "rows")) == len(self)

    def _resize(self, capacity: int) -> None:
        kept = min(capacity, len(self))
        matrix, ids = np.empty((capacity, self.dim), dtype=np.float32), np.empty(capacity, dtype=np.int64)
        matrix[:kept], ids[:kept] = self._matrix[:kept], self._ids[:kept]
        self._matrix, self._ids = matrix, ids


def _integers(ids: npt.ArrayLike) -> Ids:
    given = np.asarray(ids)
    if given.size and given.dtype.kind not in "iu":
        raise InputError(f"ids are of type {given.dtype}; they must be integers")
    if given.size and given.dtype.kind == "u" and given.max() > np.iinfo(np.int64).max:
        raise InputError(f"id {given.max()} is too large; ids are int64")
    return given.astype(np.int64, copy=False)
