"""Snapshots of a pool: bit-exact, incremental, verified, and whole whenever their writer is killed.

Run as a script with a folder as its argument, this file is that writer: see `crash`.
"""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor

from kvcomm.anchors import Anchor, AnchorPool
from kvcomm.anchors.parts import tensors
from kvcomm.anchors.record import checksum
from kvcomm.anchors.snapshot import DAMAGED, MANIFEST, MISSING, OTHER_FINGERPRINT, Loaded, Saved, load, save
from kvcomm.codecs.base import Packed, PackedKV
from kvcomm.errors import CacheFault, InputError

LIMIT = 1 << 24


def packed(i: int, tokens: int, codec: str) -> PackedKV:
    """Two layers with other channels for keys than for values, in parts of many types."""
    rng = torch.Generator().manual_seed(i)

    def layer(channels: int) -> Packed:
        x = torch.randn(tokens, channels, generator=rng)
        parts: dict[str, Tensor] = {
            "x": x.to(torch.bfloat16),
            "q.low": (x * 20).to(torch.int8),
            "scale": x.amax(0),
            "nothing": x[:0],
            "eight": x.to(torch.float8_e4m3fn),
        }
        return Packed(tokens, channels, parts)

    return PackedKV(codec, (layer(4), layer(6)), (layer(2), layer(3)))


def make(i: int, slot: str = "s", fingerprint: str = "f", tenant: str = "", codec: str = "fake") -> Anchor:
    tokens = 1 + i % 5
    return Anchor(
        slot=slot,
        ids=np.full(tokens, i, dtype=np.int32),
        base=packed(2 * i, tokens, codec),
        deviation=packed(2 * i + 1, tokens, codec),
        context=torch.arange(3) + i / 7,
        producer_context=np.arange(i % 3, dtype=np.int32),  # sometimes empty
        consumer_context=np.arange(4, dtype=np.int32),
        fingerprint=fingerprint,
        tenant=tenant,
    )


def pool_of(*anchors: Anchor) -> AnchorPool:
    pool = AnchorPool(LIMIT)
    for anchor in anchors:
        assert pool.add(anchor)
    return pool


def keys(pool: AnchorPool) -> list[str]:
    return [anchor.key for anchor in pool.anchors()]


def loaded(folder: Path) -> list[str]:
    """Keys of what a new pool finds, which must all be sound."""
    pool = AnchorPool(LIMIT)
    found = load(pool, folder)
    assert found == Loaded(len(pool))
    pool.check_integrity()
    return keys(pool)


def same(a: Anchor, b: Anchor) -> bool:
    """Equal bit for bit: names, types, shapes, bytes and what they mean."""

    def shape(kv: PackedKV) -> Any:
        return kv.codec, [(p.tokens, p.channels, set(p.parts)) for p in (*kv.keys, *kv.values)], len(kv.keys)

    def raw(t: Tensor) -> Any:
        return t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes() if t.numel() else b""

    plain = all(getattr(a, name) == getattr(b, name) for name in ("key", "slot", "fingerprint", "tenant", "nbytes"))
    arrays = ((getattr(a, n), getattr(b, n)) for n in ("ids", "producer_context", "consumer_context"))
    x, y = tensors(a), tensors(b)
    return (
        plain
        and all(np.array_equal(p, q) and p.dtype == q.dtype for p, q in arrays)
        and shape(a.base) == shape(b.base)
        and shape(a.deviation) == shape(b.deviation)
        and x.keys() == y.keys()
        and all(raw(x[name]) == raw(y[name]) for name in x)
    )


def documents(folder: Path) -> set[Path]:
    return set(folder.glob("*.safetensors"))


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    anchors = [
        *(make(i) for i in range(6)),
        make(1, slot="naïve/../slot\0"),
        make(1, fingerprint="g", tenant="x"),
        replace(make(9), base=packed(1, 5, "int4:32")),
    ]
    pool = pool_of(*anchors)
    saved = save(pool, tmp_path)
    assert (saved.anchors, saved.written) == (9, 9)
    assert saved.written_bytes == sum(file.stat().st_size for file in documents(tmp_path))
    restored = AnchorPool(LIMIT)
    assert load(restored, tmp_path) == Loaded(9)
    assert all(same(a, b) for a, b in zip(pool.anchors(), restored.anchors(), strict=True))
    assert restored.nbytes == pool.nbytes
    restored.check_integrity()
    assert save(restored, tmp_path) == Saved(9, 0, 0)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    a = make(3)
    shared = replace(a, deviation=replace(a.deviation, keys=a.base.keys))
    save(pool_of(shared), tmp_path)
    pool = AnchorPool(LIMIT)
    load(pool, tmp_path)
    assert same(pool.anchors()[0], shared)


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    pool = pool_of(*(make(i) for i in range(4)))
    save(pool, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in documents(tmp_path)}
    pool.add(make(4))
    pool.remove(make(0).key)
    saved = save(pool, tmp_path)
    assert (saved.anchors, saved.written) == (4, 1)
    after = {file: file.stat().st_mtime_ns for file in documents(tmp_path)}
    assert len(before.items() & after.items()) == 3
    assert len(after) == 4
    assert loaded(tmp_path) == keys(pool)


def test_an_anchor_packed_otherwise_is_written_again(tmp_path: Path) -> None:
    """Even where the tensors of both codecs are equal."""
    save(pool_of(make(1)), tmp_path)
    assert save(pool_of(make(1, codec="other")), tmp_path).written == 1
    pool = AnchorPool(LIMIT)
    load(pool, tmp_path)
    assert pool.anchors()[0].base.codec == "other"
    a = make(1)
    again = pool_of(replace(a, base=packed(7, a.tokens, "int4")))
    assert save(again, tmp_path).written == 1
    assert loaded(tmp_path) == [a.key]
    assert len(documents(tmp_path)) == 1


def test_nothing_committed_is_nothing_loaded(tmp_path: Path) -> None:
    pool = AnchorPool(LIMIT)
    assert load(pool, tmp_path / "new") == Loaded(0) == load(pool, tmp_path)
    assert not (tmp_path / "new").exists()
    assert save(pool, tmp_path / "new") == Saved(0, 0, 0)
    assert loaded(tmp_path / "new") == []
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_files_of_others_stay(tmp_path: Path) -> None:
    for name in ("model.safetensors", "notes.txt", "0123.safetensors"):
        (tmp_path / name).write_text("mine")
    garbage = [tmp_path / f"{'0' * 32}.safetensors", tmp_path / "manifest.part"]
    for file in garbage:
        file.write_text("of a killed writer")
    save(pool_of(make(1)), tmp_path)
    assert not any(file.exists() for file in garbage)
    assert {"model.safetensors", "notes.txt", "0123.safetensors"} < {file.name for file in tmp_path.iterdir()}
    assert len(loaded(tmp_path)) == 1


def test_another_models_anchors_are_dropped_and_counted(tmp_path: Path) -> None:
    save(pool_of(make(1), make(1, fingerprint="g"), make(2)), tmp_path)
    pool = AnchorPool(LIMIT)
    assert load(pool, tmp_path, fingerprint="f") == Loaded(2, {OTHER_FINGERPRINT: 1})
    assert {slot.fingerprint for slot in pool.slots()} == {"f"}


def test_what_the_pool_refuses_is_counted(tmp_path: Path) -> None:
    save(pool_of(make(1), make(2)), tmp_path)
    assert load(pool_of(make(2)), tmp_path) == Loaded(1, {"duplicate": 1})
    small = AnchorPool(make(2).nbytes)
    assert load(small, tmp_path) == Loaded(2)
    assert keys(small) == [make(2).key]  # bounded: the newest is left


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "header flipped": lambda data: bytes((data[0] ^ 1,)) + data[1:],
    "last byte flipped": lambda data: data[:-1] + bytes((data[-1] ^ 128,)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_anchor_is_dropped_and_written_anew(tmp_path: Path, damage: str) -> None:
    pool = pool_of(*(make(i) for i in range(3)))
    save(pool, tmp_path)
    file = min(documents(tmp_path))
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    restored = AnchorPool(LIMIT)
    assert load(restored, tmp_path) == Loaded(2, {DAMAGED: 1})
    assert set(keys(restored)) < set(keys(pool))
    restored.check_integrity()
    assert load(AnchorPool(LIMIT), tmp_path) == Loaded(2, {MISSING: 1})
    assert save(pool, tmp_path).written == 1
    assert loaded(tmp_path) == keys(pool)


def test_a_truncated_anchor_is_written_anew_without_a_load(tmp_path: Path) -> None:
    pool = pool_of(make(1), make(2))
    save(pool, tmp_path)
    file = min(documents(tmp_path))
    file.write_bytes(file.read_bytes()[:-1])
    assert save(pool, tmp_path).written == 1
    assert loaded(tmp_path) == keys(pool)


def test_documents_in_each_others_place_are_dropped(tmp_path: Path) -> None:
    """Equal in length, sound in themselves, and not what the manifest says."""
    save(pool_of(make(1), make(6)), tmp_path)
    a, b = documents(tmp_path)
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    assert load(AnchorPool(LIMIT), tmp_path) == Loaded(0, {DAMAGED: 2})


def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path: Path) -> None:
    save(pool_of(make(1)), tmp_path)
    manifest = tmp_path / MANIFEST
    data = manifest.read_bytes()
    for at in range(len(data)):
        manifest.write_bytes(data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :])
        with pytest.raises((CacheFault, InputError), match="folder"):  # the remedy
            load(AnchorPool(LIMIT), tmp_path)
    for length in range(0, len(data), 5):
        manifest.write_bytes(data[:length])
        with pytest.raises(CacheFault, match=r"damaged.*save a pool into this folder"):
            load(AnchorPool(LIMIT), tmp_path)
    manifest.write_bytes(data)
    assert len(loaded(tmp_path)) == 1


def test_a_damaged_manifest_is_replaced_by_the_next_save(tmp_path: Path) -> None:
    pool = pool_of(make(1))
    save(pool, tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xc1")
    assert save(pool, tmp_path).written == 1
    assert loaded(tmp_path) == keys(pool)


def test_another_version_is_left_alone(tmp_path: Path) -> None:
    save(pool_of(make(1)), tmp_path)
    body = msgpack.packb(["of the future"])
    future = msgpack.packb({"format": "kvcomm-anchors", "version": 2, "checksum": checksum(body), "entries": body})
    (tmp_path / MANIFEST).write_bytes(future)
    for call in (save, load):
        with pytest.raises(InputError, match=r"version 2.*reads version 1; use another folder"):
            call(AnchorPool(LIMIT), tmp_path)
    assert (tmp_path / MANIFEST).read_bytes() == future
    assert len(documents(tmp_path)) == 1


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for call in (save, load):
        with pytest.raises(InputError, match="needs a folder"):
            call(AnchorPool(LIMIT), tmp_path / "file")


def test_a_full_disk_loses_nothing_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = pool_of(make(1))
    save(pool, tmp_path)
    committed = keys(pool)
    pool.add(make(2))
    pool.remove(make(1).key)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save(pool, tmp_path)
    assert loaded(tmp_path) == committed
    save(pool, tmp_path)
    assert loaded(tmp_path) == keys(pool)


def test_savers_and_loaders_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    """Two threads save different pools while a third loads: it always finds one of the two, whole."""
    pools = [pool_of(*(make(i + 10 * n) for i in range(3))) for n in range(2)]
    save(pools[0], tmp_path)

    def save_often(pool: AnchorPool) -> None:
        for _ in range(10):
            save(pool, tmp_path)

    threads = [threading.Thread(target=save_often, args=(p,)) for p in pools]
    for thread in threads:
        thread.start()
    found = [loaded(tmp_path) for _ in range(10)]
    for thread in threads:
        thread.join()
    assert all(each in [keys(p) for p in pools] for each in found)


def crash(folder: Path) -> None:
    """Kills children of its own in the middle of saving into `folder`, and checks after each what a new pool finds.

    First at every call of the system that save makes, then after random times in a loop of saves.
    """
    pool = pool_of(make(0), make(1))
    save(pool, folder)
    before, point, committed = keys(pool), 0, False
    while not committed:
        pool.add(make(2 + point))
        pool.remove(keys(pool)[0])
        point += 1
        committed = in_child(partial(save_until, pool, folder, point)) == 0
        found = loaded(folder)
        assert found in (before, keys(pool)), (point, found)
        assert not committed or found == keys(pool)
        before = found
    assert point > 8, "save makes more calls than that"
    for seed in range(8):
        os.truncate(folder / "committed", 0)
        delay = random.Random(seed).uniform(0.0, 0.05)
        in_child(partial(save_for_ever, folder, 100 * (seed + 1)), delay)
        reported = (folder / "committed").read_text().split()
        found = loaded(folder)
        assert not reported or int(reported[-1]) in (len(found), len(found) - 1), (reported, len(found))
    print(point, "points")


def in_child(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Exit status of a forked process that does `work`."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def save_until(pool: AnchorPool, folder: Path, point: int) -> None:
    """Save, killed at the given call of fsync, replace or unlink; half of what is written last is cut off then."""
    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == point:
                if original is fsync and stat.S_ISREG(os.fstat(args[0]).st_mode):
                    os.truncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    fsync = os.fsync
    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    save(pool, folder)


def save_for_ever(folder: Path, first: int) -> None:
    """One anchor more with every save; how many there are is written down after each."""
    pool = AnchorPool(LIMIT, per_slot=10_000)
    with (folder / "committed").open("w") as report:
        for i in range(10_000):
            pool.add(make(first + i))
            save(pool, folder)
            report.write(f"{i + 1} ")
            report.flush()


def test_a_killed_writer_loses_nothing_committed(tmp_path: Path) -> None:
    (tmp_path / "committed").touch()
    run = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", run, __file__, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("points\n")


if __name__ == "__main__":
    crash(Path(sys.argv[1]))
