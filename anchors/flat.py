"""Every row compared, on faiss: the nearest rows for certain, at the speed of a matrix product. Knows nothing of ids."""

from __future__ import annotations

import faiss
import numpy as np

from kvcomm.anchors.rows import Matrix, Slots, apart_from

__all__ = ["SPARE", "compare"]

SPARE = 8  # candidates beyond k, to be re-ranked by difference

_ROWS, _QUERIES = 1 << 14, 512  # multiplied at a time: 32 MB
_FEW = 16  # queries that every faiss compares by difference


def compare(queries: Matrix, matrix: Matrix, k: int) -> Slots:
    """[queries, k + SPARE] slots, fewer only where there are fewer rows; the k nearest of all rows are among them."""
    parts = [_compare(queries[at : at + _QUERIES], matrix, k) for at in range(0, max(len(queries), 1), _QUERIES)]
    return np.concatenate(parts)


def _compare(queries: Matrix, matrix: Matrix, k: int) -> Slots:
    """By |q|**2 + |r|**2 - 2qr, three times as fast as by difference but not as precise: candidates, and a proof.

    A row that is no candidate is at least as far as the last candidate seems, less the error that either may have. Where the
    k-th candidate is not nearer than that in truth, the query is compared again, by difference.
    """
    rows, dim = matrix.shape
    count = min(k + SPARE, rows)
    seem, slots = np.empty((len(queries), 0), dtype=np.float32), np.empty((len(queries), 0), dtype=np.int64)
    error = np.zeros(len(queries), dtype=np.float32)
    for start in range(0, rows, _ROWS):
        block = matrix[start : start + _ROWS]
        origin = block.mean(axis=0)  # so that a common offset costs no precision
        q, r = queries - origin, block - origin
        near, at = faiss.kmin(faiss.pairwise_distances(q, r), min(count, len(r)))
        seem, slots = np.concatenate([seem, near], axis=1), np.concatenate([slots, at + start], axis=1)
        best = np.argsort(seem, axis=1)[:, :count]
        seem, slots = np.take_along_axis(seem, best, 1), np.take_along_axis(slots, best, 1)
        squares = np.einsum("md,md->m", q, q) + np.einsum("nd,nd->n", r, r).max()
        np.maximum(error, (dim + 8) * np.finfo(np.float32).eps * squares, out=error)
    if count == rows:
        return slots
    kth = np.partition(apart_from(queries, matrix, slots), k - 1, axis=1)[:, k - 1]
    unsure = np.flatnonzero(kth > seem[:, -1] - error)
    for start in range(0, len(unsure), _FEW):
        few = unsure[start : start + _FEW]
        slots[few] = faiss.knn(queries[few], matrix, count)[1]
    return slots
