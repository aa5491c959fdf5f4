"""Inverted lists on faiss: which rows may be near a query, without comparing them all. Knows nothing of ids and threads.

Why lists of fp16: rows really leave them, and they fill as rows come. HNSW of faiss cannot remove, and at 100,000 rows takes
three times as long to fill and, at equal recall, to search. 8-bit codes are no faster to read and clip what a new topic
brings; 4-bit products need eight times the candidates, re-ranked, for 96 bytes a row less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite, sqrt
from typing import Any, Self

import faiss
import numpy as np

from kvcomm.anchors.arrays_file import Arrays
from kvcomm.anchors.flat import compare
from kvcomm.anchors.rows import Matrix, Rows, Slots, apart_from, usable
from kvcomm.errors import InputError

__all__ = ["Lists", "Sizing"]

_BLOCK = 1 << 16  # rows encoded at a time
_LIMIT = 30_000.0  # of a scaled value: the difference of two fits into fp16


@dataclass(frozen=True)
class Sizing:
    """When and how a `FaissIndex` is divided into lists. Raises InputError for values that cannot be."""

    flat_limit: int = 20_000  # rows up to which every row is compared
    lists_per_root: float = 3.0  # lists = this * sqrt(rows)
    sample: int = 32  # rows per list that the centroids are learned from
    iterations: int = 8  # of k-means
    recall: float = 0.99  # share of true neighbours in the lists that are searched; 1: all lists are searched
    neighbours: int = 8  # the k that `recall` is for
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lists_per_root", "sample", "iterations", "neighbours"):
            if not (getattr(self, name) > 0 and isfinite(getattr(self, name))):
                raise InputError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.flat_limit < 0:
            raise InputError(f"flat_limit is {self.flat_limit}; it must be at least 0")
        if not 0 < self.recall <= 1:
            raise InputError(f"recall is {self.recall}; it must be above 0 and at most 1")


class Lists:
    """Slots in inverted lists, by the nearest centroid. Not thread safe.

    Codes are fp16 of `scale` * (row - centroid): their precision does not depend on a common offset or on the unit of the rows.
    """

    def __init__(self, centroids: Matrix, scale: float, probes: int, learned: int, changes: int = 0) -> None:
        self.count, dim = centroids.shape  # of scaled centroids
        self.scale, self.probes, self.learned, self.changes = scale, probes, learned, changes
        self._centroids = faiss.IndexFlatL2(dim)
        self._centroids.add(centroids)
        fp16 = faiss.ScalarQuantizer.QT_fp16
        self._ivf: Any = faiss.IndexIVFScalarQuantizer(self._centroids, dim, self.count, fp16, faiss.METRIC_L2, True)
        self._ivf.is_trained = True  # the centroids are all there is to learn

    @classmethod
    def learn(cls, matrix: Matrix, sizing: Sizing) -> Self:
        """Lists of all rows, after k-means on a sample of them."""
        rows, dim = matrix.shape
        count = max(1, min(int(sizing.lists_per_root * sqrt(rows)), rows))
        rng = np.random.default_rng(sizing.seed)
        sample = matrix[np.sort(rng.choice(rows, min(sizing.sample * count, rows), replace=False))]
        usual = float(np.median(np.sqrt(np.square(sample).mean(axis=1))))  # of rows, so that a few huge ones do not count
        scale = 1 / usual if usual > 1e-30 else 1.0
        kmeans: Any = faiss.Clustering(dim, count)
        kmeans.niter, kmeans.seed, kmeans.min_points_per_centroid, kmeans.max_points_per_centroid = (
            sizing.iterations, sizing.seed + 1, 1, sizing.sample,
        )  # fmt: skip
        kmeans.train(_scaled(sample, scale), faiss.IndexFlatL2(dim))
        lists = cls(faiss.vector_to_array(kmeans.centroids).reshape(count, dim), scale, count, rows)
        homes = lists.homes(matrix)
        lists.add(0, matrix, homes)
        lists.changes = 0
        if sizing.recall < 1:
            lists.probes = lists._probes_for(matrix, homes, rng.choice(rows, min(256, rows), replace=False), sizing)
        return lists

    @classmethod
    def restored(cls, rows: Rows, facts: Mapping[str, Any], arrays: Arrays) -> Self:
        """What `state` described. Raises KeyError, TypeError or ValueError when the parts do not fit together."""
        centroids, homes = arrays["centroids"], arrays["homes"]
        lists = cls(usable(centroids, rows.dim, "centroids"), *(facts[n] for n in ("scale", "probes", "learned", "changes")))
        if homes.shape != (len(rows),) or homes.dtype != np.int32 or not ((homes >= 0) & (homes < lists.count)).all():
            raise ValueError(f"{len(rows)} rows, {homes.shape} {homes.dtype} homes in {lists.count} lists")
        lists.put(np.arange(len(rows)), rows.matrix, homes.astype(np.int64))
        return lists

    def state(self, rows: int) -> tuple[dict[str, float], Arrays]:
        homes = np.empty(rows, dtype=np.int32)
        for number in range(self.count):
            homes[self._slots_in(number)] = number
        centroids = faiss.rev_swig_ptr(self._centroids.get_xb(), self.count * self._ivf.d).reshape(self.count, -1)
        facts = {"scale": self.scale, "probes": self.probes, "learned": self.learned, "changes": self.changes}
        return facts, {"centroids": centroids, "homes": homes}

    @property
    def nbytes(self) -> int:
        """Without the slack of lists that grow."""
        return int(self._ivf.ntotal * (self._ivf.code_size + 8) + self.count * self._ivf.d * 4)

    def homes(self, matrix: Matrix) -> Slots:
        """[n]: the list of each row, which is that of the nearest centroid. Changes nothing."""
        parts = [np.empty(0, dtype=np.int64)]
        for start in range(0, len(matrix), _BLOCK):
            parts.append(self._centroids.search(_scaled(matrix[start : start + _BLOCK], self.scale), 1)[1][:, 0])
        return np.concatenate(parts)

    def add(self, start: int, matrix: Matrix, homes: Slots) -> None:
        """Rows that are new, in slots from `start` on."""
        self.put(np.arange(start, start + len(matrix)), matrix, homes)
        self.changes += len(matrix)

    def put(self, slots: Slots, matrix: Matrix, homes: Slots) -> None:
        for start in range(0, len(matrix), _BLOCK):
            block = _scaled(matrix[start : start + _BLOCK], self.scale)
            end = start + len(block)
            pointers = [faiss.swig_ptr(a) for a in (block, slots[start:end], homes[start:end])]
            self._ivf.add_core(len(block), *pointers)

    def remove(self, slots: Slots, rows: int) -> None:
        """`rows`: of all slots. Linear in them, at one bit each."""
        bits = np.zeros(rows, dtype=bool)
        bits[slots] = True
        bitmap = np.packbits(bits, bitorder="little")
        self._ivf.remove_ids(faiss.IDSelectorBitmap(rows, faiss.swig_ptr(bitmap)))

    def candidates(self, queries: Matrix, k: int) -> Slots:
        """[queries, k] slots, -1 for none, from the lists nearest to each query."""
        reading: Any = faiss.SearchParametersIVF()
        reading.nprobe = self.probes
        found: Slots
        _, found = self._ivf.search(_scaled(queries, self.scale), k, params=reading)
        return found

    def check_integrity(self, matrix: Matrix) -> None:
        assert self._ivf.ntotal == len(matrix)
        assert 1 <= self.probes <= self.count
        numbers = np.repeat(np.arange(self.count), [len(self._slots_in(number)) for number in range(self.count)])
        slots = np.concatenate([self._slots_in(number) for number in range(self.count)])
        assert np.array_equal(np.sort(slots), np.arange(len(matrix)))
        codes = np.empty((len(slots), self._ivf.code_size), dtype=np.uint8)
        rows = _scaled(matrix[slots], self.scale)
        self._ivf.encode_vectors(len(slots), *(faiss.swig_ptr(a) for a in (rows, numbers, codes)))
        kept = [
            faiss.rev_swig_ptr(self._ivf.invlists.get_codes(n), self._length(n) * self._ivf.code_size)
            for n in range(self.count)
        ]
        assert np.array_equal(np.concatenate(kept), codes.reshape(-1)), "a code is not that of its row"

    def _probes_for(self, matrix: Matrix, homes: Slots, sample: Slots, sizing: Sizing) -> int:
        """How many lists hold `sizing.recall` of the neighbours of the sampled rows, themselves left out.

        A neighbour is found when its list is read, so the rank of its list among those of the query is all that counts.
        """
        queries = matrix[sample]
        slots = compare(queries, matrix, sizing.neighbours + 1)
        apart = np.where(slots == sample[:, None], np.float32(np.inf), apart_from(queries, matrix, slots))
        k = min(sizing.neighbours, len(matrix) - 1)
        near = np.take_along_axis(slots, np.argsort(apart, axis=1)[:, :k], 1)
        _, nearest_lists = self._centroids.search(_scaled(queries, self.scale), self.count)
        ranks = np.sort(np.take_along_axis(np.argsort(nearest_lists, axis=1), homes[near], 1), axis=None)
        return int(ranks[ceil(sizing.recall * len(ranks)) - 1]) + 1 if len(ranks) else 1

    def _length(self, number: int) -> int:
        return int(self._ivf.invlists.list_size(number))

    def _slots_in(self, number: int) -> Slots:
        length = self._length(number)
        return faiss.rev_swig_ptr(self._ivf.invlists.get_ids(number), length) if length else np.empty(0, dtype=np.int64)


def _scaled(matrix: Matrix, scale: float) -> Matrix:
    """A copy. Values far above the usual are cut off: they only guide the search, and the rows themselves decide."""
    with np.errstate(over="ignore"):
        scaled: Matrix = np.clip(matrix * np.float32(scale), -_LIMIT, _LIMIT)
    return scaled
