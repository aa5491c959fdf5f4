"""An index on faiss whose structure follows its size: every row compared up to some thousands, inverted lists above.

search of lists | the lists whose centroids are nearest to a query -> a few more than k slots, by fp16 residuals
                | the float32 rows in those slots -> exact distances, by difference -> the k nearest
"""

from __future__ import annotations

import os
from threading import Lock
from typing import Self

import numpy as np
import numpy.typing as npt

from kvcomm.anchors.arrays_file import write_arrays
from kvcomm.anchors.flat import SPARE, compare
from kvcomm.anchors.index import KIND, Found, read_index, searchable
from kvcomm.anchors.lists import Lists, Sizing
from kvcomm.anchors.rows import Ids, Matrix, Rows, usable
from kvcomm.errors import CacheFault

__all__ = ["FaissIndex", "Sizing"]

_QUERIES = 1 << 12  # queries at a time


class FaissIndex:
    """An `Index` that is exact up to `sizing.flat_limit` rows and finds about `sizing.recall` of the true neighbours above.

    How many lists a search reads is set when they are learned, from the rows themselves: so many that this share of the
    neighbours of sampled rows lies in them. Lists are learned anew after as many changes as there were rows then, and when
    half of those are gone, so that adding costs the same at any size, on average, and a pool that drifts is followed.

    Two locks: changes exclude each other, and a search waits for the short part of a change only; while lists are learned
    (seconds, at a million rows) searches use the old ones. Memory: `Rows`, and above the limit 2 * dim + 8 bytes a row more
    (up to twice that while lists grow).
    """

    def __init__(self, dim: int, sizing: Sizing | None = None) -> None:
        self.sizing = sizing or Sizing()
        self._rows = Rows(dim)
        self._lists: Lists | None = None
        self._lock = Lock()  # of rows and lists
        self._changing = Lock()  # held by whoever changes them; taken before `_lock`

    @classmethod
    def load(cls, path: str | os.PathLike[str], sizing: Sizing | None = None) -> Self:
        rows, facts, arrays = read_index(path)
        index = cls(rows.dim, sizing)
        index._rows = rows
        if "centroids" in arrays and len(rows) > index.sizing.flat_limit // 2:
            try:
                index._lists = Lists.restored(rows, facts, arrays)
            except (KeyError, TypeError, ValueError) as e:
                raise CacheFault(f"{os.fspath(path)} holds rows but no usable lists: {e!r}") from e
        if index._stale():
            index._divide()
        return index

    @property
    def dim(self) -> int:
        return self._rows.dim

    @property
    def structure(self) -> str:
        """`flat`, or how many lists there are and how many of them a search reads."""
        with self._lock:
            return "flat" if self._lists is None else f"ivf{self._lists.count}, {self._lists.probes} read"

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._rows.nbytes + (self._lists.nbytes if self._lists else 0)

    def __len__(self) -> int:
        with self._lock:
            return len(self._rows)

    def add(self, ids: npt.ArrayLike, rows: npt.ArrayLike) -> None:
        matrix = usable(rows, self.dim, "rows")
        with self._changing:
            names = self._rows.new_ids(ids, len(matrix))
            before = len(self._rows)
            try:
                if self._stale(more=len(matrix)):
                    with self._lock:
                        self._rows.append(names, matrix)
                    self._divide()
                else:
                    homes = self._lists.homes(matrix) if self._lists else None  # most of the work, and searches go on
                    with self._lock:
                        start = self._rows.append(names, matrix)
                        if self._lists and homes is not None:
                            self._lists.add(start, matrix, homes)
            except BaseException:  # all or nothing, for the want of memory too
                with self._lock:
                    self._rows.drop(np.arange(before, len(self._rows)))
                    self._lists = None  # exact and slow, until the next change
                raise

    def remove(self, ids: npt.ArrayLike) -> int:
        with self._changing:
            slots = self._rows.find(ids)
            source, target = self._rows.moves(slots)
            moved = self._rows.matrix[source]
            homes = self._lists.homes(moved) if self._lists else None
            with self._lock:
                if self._lists and homes is not None:
                    self._lists.remove(np.concatenate([slots, source]), len(self._rows))
                    self._lists.put(target, moved, homes)
                    self._lists.changes += len(slots)
                self._rows.drop(slots)
            if self._stale():
                self._divide()
            return len(slots)

    def search(self, queries: npt.ArrayLike, k: int) -> Found:
        matrix = searchable(queries, self.dim, k)
        with self._lock:
            parts = [self._nearest(matrix[at : at + _QUERIES], k) for at in range(0, max(len(matrix), 1), _QUERIES)]
        return Found(*map(np.concatenate, zip(*parts, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        with self._changing:
            facts, arrays = self._lists.state(len(self._rows)) if self._lists else ({}, {})
            write_arrays(path, {"kind": KIND, **facts}, {"ids": self._rows.ids, "rows": self._rows.matrix, **arrays})

    def check_integrity(self) -> None:
        with self._changing:
            self._rows.check_integrity()
            if self._lists:
                self._lists.check_integrity(self._rows.matrix)

    def _stale(self, more: int = 0) -> bool:
        """Is there another structure to be had, with `more` rows?"""
        rows, lists = len(self._rows) + more, self._lists
        if lists is None:
            return rows > self.sizing.flat_limit
        return rows < self.sizing.flat_limit // 2 or lists.changes + more >= lists.learned or 2 * rows < lists.learned

    def _divide(self) -> None:
        """The structure for this size, learned from the rows as they are."""
        lists = Lists.learn(self._rows.matrix, self.sizing) if len(self._rows) > self.sizing.flat_limit // 2 else None
        with self._lock:
            self._lists = lists

    def _nearest(self, queries: Matrix, k: int) -> tuple[Ids, Matrix]:
        rows = self._rows
        if self._lists is None:
            return rows.nearest_of(queries, compare(queries, rows.matrix, k), k)
        ids, distances = rows.nearest_of(queries, self._lists.candidates(queries, k + SPARE), k)
        short = ids[:, min(k, len(rows)) - 1] < 0  # the lists read hold fewer than k rows
        if short.any():
            slots = compare(queries[short], rows.matrix, k)
            ids[short], distances[short] = rows.nearest_of(queries[short], slots, k)
        return ids, distances
