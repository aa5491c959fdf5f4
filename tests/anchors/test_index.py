"""Both indexes against a brute-force reference written here, the recall of the lists, the files, and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvcomm.anchors.arrays_file import read_arrays, write_arrays
from kvcomm.anchors.faiss_index import FaissIndex, Sizing
from kvcomm.anchors.index import ExactIndex, Found, Index
from kvcomm.anchors.lists import Lists
from kvcomm.anchors.rows import Rows
from kvcomm.errors import CacheFault, InputError

Array = npt.NDArray[Any]
Make = Callable[[int], Index]

ALL = Sizing(flat_limit=40, recall=1.0)  # lists from 41 rows on, all of them searched: exact at any size


def divided(dim: int) -> FaissIndex:
    return FaissIndex(dim, ALL)


MAKES = pytest.mark.parametrize("make", [ExactIndex, FaissIndex, divided], ids=["exact", "flat", "lists"])


def clustered(rows: int, dim: int, clusters: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dim))
    return (centres[rng.integers(0, clusters, rows)] + 0.5 * rng.standard_normal((rows, dim))).astype(np.float32)


def nearby(rows: Array, count: int, seed: int = 1) -> Array:
    """Perturbed copies of some rows."""
    rng = np.random.default_rng(seed)
    some = rows[rng.choice(len(rows), count)]
    return (some + 0.1 * rng.standard_normal(some.shape)).astype(np.float32)


def expect(found: Found, known: dict[int, Array], queries: Array, k: int) -> None:
    """`found` against every difference in float64: distances, and ids wherever no other row is as near."""
    ids = np.array(sorted(known), dtype=np.int64)
    count = min(k, len(ids))
    assert found.ids.shape == found.distances.shape == (len(queries), k)
    assert found.ids.dtype == np.int64
    assert found.distances.dtype == np.float32
    assert (found.ids[:, count:] == -1).all()
    assert np.isposinf(found.distances[:, count:]).all()
    if not count or not len(queries):
        return
    rows = np.stack([known[i] for i in ids.tolist()]).astype(np.float64)
    apart = np.square(queries.astype(np.float64)[:, None] - rows).sum(-1)
    np.testing.assert_allclose(found.distances[:, :count], np.sort(apart, axis=1)[:, :count], rtol=1e-4, atol=1e-12)
    for own, names, distances in zip(apart, found.ids[:, :count], found.distances, strict=True):
        assert len(set(names.tolist())) == count
        at = np.searchsorted(ids, names)
        assert (ids[at] == names).all()
        np.testing.assert_allclose(distances[:count], own[at], rtol=1e-4, atol=1e-12)


# --- one index ---------------------------------------------------------------------------------------------------------------


@MAKES
def test_empty(make: Make) -> None:
    index = make(3)
    assert (len(index), index.dim) == (0, 3)
    index.add(np.empty(0, dtype=np.int64), np.empty((0, 3)))
    assert index.remove([4]) == 0
    expect(index.search(np.ones((2, 3)), 4), {}, np.ones((2, 3)), 4)
    assert index.search(np.empty((0, 3)), 4).ids.shape == (0, 4)
    index.check_integrity()


@MAKES
@pytest.mark.parametrize("rows", [1, 7, 41, 300])
@pytest.mark.parametrize("k", [1, 8, 400])
def test_agrees_with_the_reference(make: Make, rows: int, k: int) -> None:
    """Also for k above the number of rows, and ids in no order."""
    data, index = clustered(rows, 12, 5), make(12)
    ids = np.random.default_rng(2).permutation(10 * rows)[:rows]
    index.add(ids, data)
    queries = np.concatenate([nearby(data, 30), data[:2]])
    expect(index.search(queries, k), dict(zip(ids.tolist(), data, strict=True)), queries, k)
    index.check_integrity()


@MAKES
@pytest.mark.parametrize("seed", range(6))
def test_any_sequence_of_changes(make: Make, seed: int) -> None:
    rng = np.random.default_rng(seed)
    index, known = make(6), dict[int, Array]()
    for step in range(40):
        if rng.random() < (0.65 if step < 25 else 0.3):
            fresh = np.setdiff1d(rng.integers(0, 2000, rng.integers(0, 60)), np.array(sorted(known), dtype=np.int64))
            rows = clustered(len(fresh), 6, 4, seed=int(rng.integers(1000)))
            index.add(fresh, rows)
            known |= zip(fresh.tolist(), rows, strict=True)
        else:
            gone = rng.choice(np.array([*known, 5000, 5001]), int(rng.integers(0, len(known) + 3)))
            assert index.remove(gone) == len(known.keys() & set(gone.tolist()))
            known = {i: row for i, row in known.items() if i not in set(gone.tolist())}
        assert len(index) == len(known)
        index.check_integrity()
        queries = clustered(5, 6, 4, seed=step)
        expect(index.search(queries, 5), known, queries, 5)


@MAKES
def test_equal_rows(make: Make) -> None:
    """At distance 0, the smallest ids first as far as the index chooses; also where k-means has nothing to tell apart."""
    index, row = make(4), np.array([3.0, -2.0, 0.0, 1e3])
    index.add(range(8), np.tile(row, (8, 1)))
    assert index.search(row[None], 10).ids.tolist() == [[*range(8), -1, -1]]
    index.add(range(8, 200), np.tile(row, (192, 1)))
    found = index.search(row[None], 5)
    assert found.distances.tolist() == [[0.0] * 5]
    assert len(set(found.ids[0].tolist())) == 5
    index.check_integrity()


@MAKES
@pytest.mark.parametrize(("offset", "unit"), [(1e3, 1.0), (0.0, 1e-6), (0.0, 1e6), (1e6, 1e3)])
def test_precise_far_from_the_origin_and_in_any_unit(make: Make, offset: float, unit: float) -> None:
    data = (clustered(500, 16, 8) * unit + offset).astype(np.float32)
    index = make(16)
    index.add(range(500), data)
    queries = (data[::50] + 0.1 * unit).astype(np.float32)
    expect(index.search(queries, 6), dict(enumerate(data)), queries, 6)


@MAKES
def test_huge_rows_do_not_blind_it_for_others(make: Make) -> None:
    data = clustered(500, 16, 8)
    data[::100] *= 1e12
    index = make(16)
    index.add(range(500), data)
    queries = nearby(data[1:100], 30)
    expect(index.search(queries, 4), dict(enumerate(data)), queries, 4)


@MAKES
@pytest.mark.parametrize("rows", [600, 17_000])
def test_nearly_equal_rows_far_from_each_others_centre(make: Make, rows: int) -> None:
    """Where |q|**2 + |r|**2 - 2qr has no correct digit left; more of them than candidates, and in two blocks."""
    rng = np.random.default_rng(4)
    centres = 30 * rng.standard_normal((6, 16))
    data = (centres[rng.integers(0, 6, rows)] + 1e-4 * rng.standard_normal((rows, 16))).astype(np.float32)
    index = make(16)
    index.add(range(rows), data)
    expect(index.search(data[:40], 5), dict(enumerate(data)), data[:40], 5)


@MAKES
def test_rows_are_copied(make: Make) -> None:
    data = clustered(100, 4, 3)
    index = make(4)
    index.add(range(100), data)
    before = index.search(data[:3].copy(), 2)
    queries = data[:3].copy()
    data[:] = 0
    after = index.search(queries, 2)
    assert np.array_equal(before.ids, after.ids)
    index.check_integrity()


@MAKES
@pytest.mark.parametrize(
    ("ids", "rows", "said"),
    [
        ([7], np.zeros((1, 3)), r"shape \[1, 3\].*\[n, 4\]"),
        ([7], np.zeros(4), r"shape \[4\]"),
        ([7], [[0, 1, np.nan, 2]], "row 0 of the rows holds nan"),
        ([7, 8], [[0, 1, 1, 2], [0, np.inf, 1, 1]], "row 1 of the rows holds inf"),
        ([7], [[0, 1e200, 0, 0]], "holds inf"),
        ([7], [[0, 1e25, 0, 0]], "holds 1e.25;"),
        ([7, 8], np.zeros((1, 4)), r"\[2\] ids for 1 rows"),
        ([-3], np.zeros((1, 4)), "id -3 is negative"),
        ([8, 7, 8], np.zeros((3, 4)), "id 8 is given twice"),
        ([9, 1], np.zeros((2, 4)), "id 1 is known already"),
        ([0.5], np.zeros((1, 4)), "float64"),
        (np.array([2**63], dtype=np.uint64), np.zeros((1, 4)), "9223372036854775808 is too large"),
    ],
)
def test_unusable_rows_change_nothing(make: Make, ids: Any, rows: Any, said: str) -> None:
    index = make(4)
    index.add([1, 2], np.eye(4)[:2])
    with pytest.raises(InputError, match=said):
        index.add(ids, rows)
    assert len(index) == 2
    assert index.search(np.eye(4)[:1], 3).ids.tolist() == [[1, 2, -1]]
    index.check_integrity()


@MAKES
def test_unusable_questions(make: Make) -> None:
    index = make(4)
    with pytest.raises(InputError, match=r"queries have shape \[2, 5\]"):
        index.search(np.zeros((2, 5)), 1)
    with pytest.raises(InputError, match="row 1 of the queries holds nan"):
        index.search([[0.0] * 4, [np.nan] * 4], 1)
    with pytest.raises(InputError, match="k is 0"):
        index.search(np.zeros((2, 4)), 0)
    with pytest.raises(InputError, match="dim is 0"):
        make(0)


# --- structure ---------------------------------------------------------------------------------------------------------------


def recall(index: Index, exact: Index, queries: Array) -> float:
    a, b = index.search(queries, 8).ids, exact.search(queries, 8).ids
    return sum(len(np.intersect1d(x, y)) for x, y in zip(a, b, strict=True)) / b.size


def test_structure_follows_size_and_lists_are_quick_to_read_and_find() -> None:
    """30,000 rows: far fewer lists are read than there are, and recall@8 is 0.95 or more, also of rows that are new."""
    data = clustered(30_000, 32, 300)
    index, exact = FaissIndex(32), ExactIndex(32)
    for start in range(0, 30_000, 5000):
        assert index.structure == "flat" or start > 20_000
        for each in (index, exact):
            each.add(range(start, start + 5000), data[start : start + 5000])
    count, read = (int("".join(filter(str.isdigit, part))) for part in index.structure.split(","))
    assert count > 400
    assert read < count / 20
    assert recall(index, exact, nearby(data, 256)) >= 0.95
    assert recall(index, exact, clustered(30_256, 32, 300)[-256:]) >= 0.95
    index.check_integrity()

    other = clustered(12_000, 32, 100, seed=9) * 3 + 2  # a topic that the lists were not learned from
    gone = np.random.default_rng(3).choice(30_000, 12_000, replace=False)
    for each in (index, exact):
        assert each.remove(gone) == 12_000
        each.add(range(30_000, 42_000), other)
    index.check_integrity()
    assert recall(index, exact, nearby(other, 256)) >= 0.95
    index.remove(np.arange(9_000, 42_000))
    assert index.structure == "flat"
    assert index.nbytes < exact.nbytes
    index.check_integrity()


def test_lists_are_learned_anew_when_the_pool_has_turned_over(monkeypatch: pytest.MonkeyPatch) -> None:
    learned: list[int] = []
    learn = Lists.learn.__func__  # type: ignore[attr-defined]  # of a class method

    def counted(cls: type[Lists], matrix: Array, sizing: Sizing) -> Lists:
        learned.append(len(matrix))
        return learn(cls, matrix, sizing)  # type: ignore[no-any-return]  # as above

    monkeypatch.setattr(Lists, "learn", classmethod(counted))
    index, data = divided(6), clustered(4000, 6, 5)
    for start in range(0, 800, 10):
        index.add(range(start, start + 10), data[start : start + 10])
    assert learned == [50, 100, 200, 400, 800], "as often as the size doubles"
    for start in range(800, 2400, 100):  # the size stays, the rows go
        index.remove(range(start - 800, start - 700))
        index.add(range(start, start + 100), data[start : start + 100])
    assert len(learned) == 9, "3200 changes of 800 rows"
    index.check_integrity()


def test_a_failing_change_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether lists are learned or only filled when memory runs out, the add has not happened."""
    index, data = divided(6), clustered(200, 6, 5)
    index.add(range(60), data[:60])

    def full(*_: object) -> None:
        raise MemoryError

    for method in ("put", "learn"):
        with monkeypatch.context() as patch:
            patch.setattr(Lists, method, full)
            with pytest.raises(MemoryError):
                index.add(range(60, 70), data[60:70])
        assert len(index) == 60
        index.check_integrity()
        expect(index.search(data[:9], 5), dict(enumerate(data[:60])), data[:9], 5)
    index.add(range(60, 200), data[60:])
    assert index.structure != "flat"
    expect(index.search(data[:9], 5), dict(enumerate(data)), data[:9], 5)


def test_few_lists_read_still_give_k_rows() -> None:
    """Asked for more than the lists read hold: the rest is found by comparing."""
    index, data = FaissIndex(16, Sizing(flat_limit=100, recall=0.5)), clustered(2000, 16, 40)
    index.add(range(2000), data)
    assert int(index.structure.split(",")[1].split()[0]) < 20
    expect(index.search(data[:5], 1500), dict(enumerate(data)), data[:5], 1500)


def test_room_for_rows_to_come_is_never_read() -> None:
    """It holds whatever the memory held before; a signalling NaN would be a warning, and warnings are errors here."""
    rows = Rows(4)
    rows.append(np.arange(10), clustered(10, 4, 2))
    rows._matrix[len(rows) :].view(np.uint32)[:] = 0x7FA00000
    assert len(rows._matrix) > len(rows)
    ids, distances = rows.nearest_of(rows.matrix[:1], np.array([[3, -1, 0]]), 3)
    assert ids.tolist() == [[0, 3, -1]]
    assert distances[0, 0] == 0 < distances[0, 1] < distances[0, 2] == np.inf


@pytest.mark.parametrize(
    "wrong", [{"flat_limit": -1}, {"recall": 0.0}, {"recall": 1.1}, {"lists_per_root": 0}, {"sample": 0}, {"iterations": 0}]
)
def test_unusable_sizing(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sizing(**wrong)


# --- files -------------------------------------------------------------------------------------------------------------------


@MAKES
@pytest.mark.parametrize("rows", [0, 5, 300])
def test_saved_and_loaded(make: Make, rows: int, tmp_path: Path) -> None:
    """Any class reads any other's file; a loaded index goes on as the saved one would."""
    data, index, path = clustered(rows + 20, 8, 4), make(8), tmp_path / "index"
    index.add(range(rows), data[:rows])
    index.remove(range(0, rows, 7))
    index.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    known = {i: row for i, row in enumerate(data[:rows]) if i % 7}
    for loaded in (ExactIndex.load(path), FaissIndex.load(path), FaissIndex.load(path, ALL)):
        loaded.check_integrity()
        assert (len(loaded), loaded.dim) == (len(known), 8)
        expect(loaded.search(data, 4), known, data, 4)
        loaded.add(range(rows, rows + 20), data[rows:])
        assert loaded.remove([rows, 0]) == 1
        loaded.check_integrity()
        expect(loaded.search(data, 4), known | dict(enumerate(data[rows + 1 :], rows + 1)), data, 4)


def test_lists_are_not_learned_again_when_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizing = Sizing(flat_limit=100, recall=0.9)
    index, data = FaissIndex(8, sizing), clustered(500, 8, 9)
    index.add(range(500), data)
    index.save(tmp_path / "index")
    monkeypatch.setattr(Lists, "learn", None)
    loaded = FaissIndex.load(tmp_path / "index", sizing)
    loaded.check_integrity()
    assert loaded.structure == index.structure != "flat"
    assert loaded.nbytes <= index.nbytes
    assert np.array_equal(loaded.search(data, 3).ids, index.search(data, 3).ids)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("index") / "index"
    index = divided(4)
    index.add(range(60), clustered(60, 4, 3))
    index.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("load", [ExactIndex.load, FaissIndex.load])
def test_truncated_or_altered_files(load: Callable[[Path], Index], saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "index"
    for length in [0, 1, 8, 16, 20, 40, len(saved) // 2, len(saved) - 32, len(saved) - 1]:
        path.write_bytes(saved[:length])
        with pytest.raises(CacheFault, match=rf"{length} bytes"):
            load(path)
    for at in range(0, len(saved), 29):
        path.write_bytes(saved[:at] + bytes([saved[at] ^ 1 << at % 8]) + saved[at + 1 :])
        with pytest.raises(CacheFault, match="bytes"):
            load(path)
    path.write_bytes(saved + b"\0")
    with pytest.raises(CacheFault, match="altered"):
        load(path)
    path.write_bytes(saved)
    load(path).check_integrity()


@pytest.mark.parametrize("load", [ExactIndex.load, FaissIndex.load])
def test_files_of_something_else(load: Callable[[Path], Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rows = tmp_path / "index", np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load(path)
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path)
    write_arrays(path, {"kind": "tea"}, {"rows": rows, "ids": np.arange(2)})
    with pytest.raises(CacheFault, match="'tea'"):
        load(path)
    write_arrays(path, {"kind": "kvcomm.anchors.index"}, {"rows": rows, "ids": np.array([3, 3])})
    with pytest.raises(CacheFault, match="id 3 is given twice"):
        load(path)
    monkeypatch.setattr("kvcomm.anchors.arrays_file._VERSION", 2)
    write_arrays(path, {}, {})
    monkeypatch.undo()
    with pytest.raises(CacheFault, match="format 2; this version reads 1"):
        load(path)


def test_lists_that_do_not_fit_their_rows(tmp_path: Path) -> None:
    index, path = divided(4), tmp_path / "index"
    index.add(range(60), clustered(60, 4, 3))
    index.save(path)
    facts, arrays = read_arrays(path)
    for name, wrong in (("homes", arrays["homes"][1:]), ("homes", arrays["homes"] + 99), ("centroids", arrays["homes"])):
        write_arrays(path, facts, {**arrays, name: wrong})
        with pytest.raises(CacheFault, match="no usable lists"):
            FaissIndex.load(path, ALL)
    assert len(ExactIndex.load(path)) == 60, "the rows are all there"


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, index = tmp_path / "index", ExactIndex(4)
    index.save(path)
    index.add([3], np.ones((1, 4)))

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        index.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    assert len(ExactIndex.load(path)) == 0


# --- threads -----------------------------------------------------------------------------------------------------------------


@MAKES
def test_readers_beside_a_writer(make: Make, tmp_path: Path) -> None:
    """Rows that stay are found at distance 0 through every change; what is found is a row that was there at some time."""
    data, index, done = clustered(3000, 8, 20), make(8), threading.Event()
    index.add(range(100), data[:100])

    def read(number: int) -> int:
        searches = 0
        while not done.is_set() or not searches:
            found = index.search(data[:50], 3)
            assert found.ids[:, 0].tolist() == list(range(50))
            assert (found.distances[:, 0] == 0).all()
            apart = np.square(data[found.ids] - data[:50, None]).sum(-1)
            np.testing.assert_allclose(found.distances, apart, rtol=1e-4)
            index.save(tmp_path / f"{number}")
            searches += 1
        return searches

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read, n) for n in range(3)]
        try:
            for start in range(100, 3000, 100):
                index.add(range(start, start + 100), data[start : start + 100])
                if start > 400:
                    index.remove(range(start - 300, start - 200))
        finally:
            done.set()
        assert all(reader.result(60) for reader in readers)
    index.check_integrity()
    type(index).load(tmp_path / "0").check_integrity()
