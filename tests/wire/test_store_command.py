"""`kvcomm store` against the folder it looks into: files compared byte by byte, archives cut and altered at every place."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvcomm import cli
from kvcomm.anchors.record import Entry, Layout, checksum
from kvcomm.errors import InputError
from kvcomm.segments import Segment, SegmentKV
from kvcomm.store.disk import DiskStore
from kvcomm.store.record import DAMAGED, OTHER_KEY, Record
from kvcomm.wire.anchor_entry import pack_entry
from kvcomm.wire.anchor_log import AnchorLog
from kvcomm.wire.archive import CUT_SHORT, TarSource, TarTarget
from kvcomm.wire.listing import Wanted
from kvcomm.wire.moving import PackedAnchor, move
from kvcomm.wire.places import FolderPlace

LIMIT = 1 << 30


def record(seed: int, tokens: int = 5, *, tenant: str = "", fingerprint: str = "f0", fill: float | None = None) -> Record:
    ids = np.random.default_rng(seed).integers(1, 1000, tokens + 2).astype(np.int32)
    s = Segment(ids[2:], ids[:2], fingerprint, tenant, producer=f"agent-{seed}", cost_ms=float(seed))
    made = torch.Generator().manual_seed(seed)
    parts = [torch.randn(2, tokens, 4, generator=made) if fill is None else torch.full((2, tokens, 4), fill) for _ in range(4)]
    return Record.of(s, SegmentKV(tuple(parts[:2]), tuple(parts[2:]), s.start, s.start + tokens))


def anchor(seed: int, *, tenant: str = "", fingerprint: str = "f0") -> tuple[bytes, bytes]:
    document = random.Random(seed).randbytes(100 + seed)
    layout = Layout("raw", (4,), (4,))
    told = Entry(checksum(b"%d" % seed), "slot", fingerprint, tenant, layout, layout, checksum(document), len(document))
    return pack_entry(told), document


RECORDS = [
    record(1, 5, tenant="alice"),
    record(2, 7, tenant="alice", fingerprint="f1"),
    record(3, 9, tenant="bob"),
    record(4, 11),
]
ANCHORS = [anchor(1), anchor(2, tenant="alice"), anchor(3, fingerprint="f1")]


def fill(folder: Path, *, anchors: bool = True) -> Path:
    with closing(DiskStore(folder, LIMIT)) as store:
        for r in RECORDS:
            assert store.put_record(r)
    if anchors:
        with closing(AnchorLog(folder / "anchors")) as log:
            for (entry, document), tenant in zip(ANCHORS, ("", "alice", ""), strict=True):
                assert log.add(tenant, entry, document)["kept"]
    return folder


def objects(folder: Path) -> dict[str, bytes]:
    """The files, past everything of ours."""
    return {path.stem: path.read_bytes() for path in folder.glob("objects/??/*.kv")}


def anchors_of(folder: Path) -> set[tuple[bytes, bytes]]:
    with closing(AnchorLog(folder / "anchors")) as log:
        return set(log.documents())


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return fill(tmp_path / "disk")


Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def store(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command's exit code and document."""

    def run(*argv: object) -> tuple[int, dict[str, Any]]:
        code = cli.main(["store", *map(str, argv), "--format", "json", "-q"])
        out, err = capsys.readouterr()
        assert err == ""
        return code, json.loads(out)

    return run


def test_ls_says_everything_but_the_text(store: Command, disk: Path) -> None:
    code, doc = store("ls", "--disk", disk)
    assert (code, doc["schema"]) == (0, "kvcomm.store.ls/1")
    rows = {row["key"]: row for row in doc["objects"]}
    assert rows.keys() == {r.key for r in RECORDS}
    for r in RECORDS:
        row, s = rows[r.key], r.segment
        assert (row["tokens"], row["nbytes"]) == (len(s.ids), r.nbytes)
        assert (row["tenant"], row["producer"], row["fingerprint"]) == (s.tenant, s.producer, s.fingerprint)
        assert (row["uses"], row["cost_ms"]) == (1, s.cost_ms)
        assert 0 <= row["age_s"] < 60
        assert row.keys() == {"key", "tokens", "tenant", "producer", "fingerprint", "cost_ms", "nbytes", "uses", "age_s"}


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (["--tenant", "alice"], [0, 1]),
        (["--tenant", ""], [3]),
        (["--fingerprint", "f"], [0, 1, 2, 3]),
        (["--fingerprint", "f1"], [1]),
        (["--tenant", "bob", "--fingerprint", "f1"], []),
    ],
)
def test_filters_of_every_action(store: Command, disk: Path, tmp_path: Path, flags: list[str], chosen: list[int]) -> None:
    wanted = {RECORDS[i].key for i in chosen}
    assert {row["key"] for row in store("ls", "--disk", disk, *flags)[1]["objects"]} == wanted
    stats = store("stats", "--disk", disk, *flags)[1]
    assert (stats["objects"], stats["nbytes"]) == (len(wanted), sum(RECORDS[i].nbytes for i in chosen))
    assert sum(group["objects"] for group in stats["groups"]) == len(wanted)
    assert store("verify", "--disk", disk, *flags)[1]["objects"] == len(wanted)
    for target in ("some.tar", "some"):
        assert store("export", tmp_path / target, "--disk", disk, *flags)[1]["objects"] == len(wanted)
    assert objects(tmp_path / "some").keys() == wanted
    assert store("export", tmp_path / "all.tar", "--disk", disk)[0] == 0
    assert store("import", tmp_path / "all.tar", "--disk", tmp_path / "new", *flags)[1]["objects"] == len(wanted)
    assert objects(tmp_path / "new").keys() == wanted


@pytest.mark.parametrize("name", ["all.tar", "folder"])
def test_moved_between_hosts(store: Command, disk: Path, tmp_path: Path, name: str) -> None:
    """Files and anchors over there are those from here, also when it is done twice."""
    for round_ in range(2):
        code, doc = store("export", tmp_path / name, "--disk", disk)
        again = round_ and name == "folder"
        assert (code, doc["objects"], doc["anchors"]) == (0, 0 if again else 4, 0 if again else 3)
    before = objects(disk)
    for round_ in range(2):
        code, doc = store("import", tmp_path / name, "--disk", tmp_path / "there")
        assert code == 0
        assert (doc["objects"], doc["anchors"], doc["here_already"]) == ((0, 0, 7) if round_ else (4, 3, 0))
        assert objects(tmp_path / "there") == before == {r.key: r.data.tobytes() for r in RECORDS}
        assert anchors_of(tmp_path / "there") == anchors_of(disk) == set(ANCHORS)
    assert (tmp_path / name).stat().st_mode & 0o077 == 0
    assert not list(tmp_path.glob(".*"))


def test_export_leaves_out_what_is_damaged(store: Command, disk: Path, tmp_path: Path) -> None:
    hurt(disk, RECORDS[0].key, 200)
    code, doc = store("export", tmp_path / "a.tar", "--disk", disk)
    assert (code, doc["objects"], doc["faults"]) == (1, 3, {"damaged": 1})
    assert store("import", tmp_path / "a.tar", "--disk", tmp_path / "b")[0] == 0
    assert objects(tmp_path / "b").keys() == {r.key for r in RECORDS[1:]}
    assert objects(disk).keys() == {r.key for r in RECORDS}, "reading changes nothing"


def hurt(folder: Path, key: str, at: int) -> None:
    path = folder / "objects" / key[:2] / f"{key}.kv"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 7, 20, 31, 40, 300, -1])
def test_verify_finds_a_bit(store: Command, disk: Path, at: int) -> None:
    code, doc = store("verify", "--disk", disk)
    assert (code, doc["damaged"], doc["objects"]) == (0, {}, 4)
    hurt(disk, RECORDS[2].key, at)
    code, doc = store("verify", "--disk", disk)
    assert (code, list(doc["damaged"]), doc["objects"]) == (1, [RECORDS[2].key], 4)
    assert doc["nbytes"] == sum(r.nbytes for r in RECORDS)


def test_verify_finds_a_file_that_nobody_knows(store: Command, disk: Path) -> None:
    (disk / "objects" / "ab").mkdir(exist_ok=True)
    (disk / "objects" / "ab" / f"ab{'0' * 30}.kv").write_bytes(b"nothing")
    code, doc = store("verify", "--disk", disk)
    assert (code, doc["damaged"], doc["unreadable_files"]) == (1, {}, 1)


def test_verify_tells_of_a_file_that_the_disk_cannot_read(store: Command, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "journal").unlink()
    system, inode = os.pread, next(disk.glob("objects/??/*.kv")).stat().st_ino

    def pread(file: int, size: int, at: int) -> bytes:
        if os.fstat(file).st_ino == inode:
            raise OSError(errno.EIO, "bad block")
        return system(file, size, at)

    monkeypatch.setattr(os, "pread", pread)
    code, doc = store("verify", "--disk", disk)
    assert (code, doc["objects"], doc["damaged"], doc["unreadable_files"]) == (1, 3, {}, 1)


def test_a_folder_in_use_can_be_looked_at(store: Command, disk: Path, tmp_path: Path) -> None:
    """And what its server removes meanwhile is not damaged."""
    with closing(DiskStore(disk, LIMIT)) as owner:
        assert len(store("ls", "--disk", disk)[1]["objects"]) == 4
        owner.remove(RECORDS[0].key)
        code, doc = store("verify", "--disk", disk)
        assert (code, doc["objects"]) == (0, 3)
        for argv in (["gc", "--disk", disk], ["import", disk, "--disk", disk]):
            assert cli.main(["store", *map(str, argv)]) == 2


def test_export_beside_a_server(store: Command, disk: Path, tmp_path: Path) -> None:
    """Records are exported; that anchors are not, is said."""
    with closing(DiskStore(disk, LIMIT)), closing(AnchorLog(disk / "anchors")):
        code, doc = store("export", tmp_path / "a.tar", "--disk", disk)
    assert (code, doc["objects"], doc["anchors"], doc["faults"]) == (1, 4, 0, {"anchors-in-use": 1})
    assert read(tmp_path / "a.tar") == (WHOLE, set(), {})


def test_gone_between_listing_and_reading(disk: Path) -> None:
    with closing(DiskStore(disk, LIMIT)) as owner, closing(FolderPlace(disk)) as place:
        items = place.items(Wanted(tenant="alice"))
        first = next(items)
        assert isinstance(first, Record)
        owner.remove(next(r.key for r in RECORDS[:2] if r.key != first.key))
        with pytest.raises(StopIteration):
            next(i for i in items if isinstance(i, Record))
        assert not place.faults


def test_gc(store: Command, disk: Path) -> None:
    """Freed is what the folder is smaller by; sound objects stay as they are."""
    hurt(disk, RECORDS[1].key, 150)
    (disk / "writing" / "7.part").write_bytes(bytes(1000))
    unknown = disk / "objects" / "ab" / f"ab{'0' * 30}.kv"
    unknown.parent.mkdir(exist_ok=True)
    unknown.write_bytes(bytes(500))
    (disk / "damaged" / f"ab{'1' * 30}.kv").write_bytes(bytes(300))
    before = sum(f.stat().st_size for f in disk.rglob("*") if f.is_file())
    code, doc = store("gc", "--disk", disk)
    after = sum(f.stat().st_size for f in disk.rglob("*") if f.is_file())
    assert (code, doc["files"], doc["damaged"], doc["objects_left"]) == (0, 4, 1, 3)
    assert doc["freed_bytes"] == before - after >= 1000 + 500 + 300 + RECORDS[1].nbytes - 4096
    assert objects(disk) == {r.key: r.data.tobytes() for r in RECORDS if r.key != RECORDS[1].key}
    assert store("verify", "--disk", disk)[0] == 0
    assert anchors_of(disk) == set(ANCHORS)
    assert store("gc", "--disk", disk)[1]["files"] == 0


@pytest.mark.parametrize(
    "argv",
    [
        ["ls", "--disk", "{tmp}/none"],
        ["gc", "--disk", "{tmp}/none"],
        ["export", "--disk", "{disk}"],
        ["ls", "{tmp}/x", "--disk", "{disk}"],
        ["export", "{disk}", "--disk", "{disk}"],
        ["import", "{tmp}/none.tar", "--disk", "{tmp}/new"],
        ["import", "{disk}/journal", "--disk", "{tmp}/new"],
        ["verify", "--socket", "/tmp/x"],
        ["stats", "--socket", "/tmp/x"],
        ["ls", "--socket", "relative"],
    ],
)
def test_unusable_input(capsys: pytest.CaptureFixture[str], disk: Path, tmp_path: Path, argv: list[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["store", *(word.format(tmp=tmp_path, disk=disk) for word in argv)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["store", "ls", "--socket", "/tmp/kvcomm-no-such-socket"]) == 1
    assert capsys.readouterr().err.startswith("kvcomm: Unreachable: unreachable: list at unix:/tmp/kvcomm-no-such-socket")


def test_terminal(capsys: pytest.CaptureFixture[str], disk: Path, tmp_path: Path) -> None:
    argv = ["store", "stats", "--disk", str(disk), "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].split()[0] == "4"
    assert json.loads((tmp_path / "out" / "store_stats.json").read_text("utf-8"))["objects"] == 4
    assert cli.main(["store", "ls", "--disk", str(disk)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_a_pipe_that_ends(disk: Path) -> None:
    """`kvcomm store ls | true`"""
    code = f"import os, sys; from kvcomm.cli import main; sys.exit(main(['store', 'ls', '--disk', {str(disk)!r}]))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


# -- archives ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = fill(tmp_path_factory.mktemp("disk") / "d")
    path = folder.parent / "all.tar"
    with closing(FolderPlace(folder)) as source, closing(TarTarget(path)) as target:
        move(source.items(Wanted()), source, target)
        target.keep()
    return path.read_bytes()


def read(path: Path) -> tuple[dict[str, bytes], set[tuple[bytes, bytes]], dict[str, int]]:
    records, anchors = {}, set()
    with closing(TarSource(path)) as source:
        for item in source.items(Wanted()):
            if isinstance(item, PackedAnchor):
                anchors.add((item.entry, item.document))
            else:
                records[item.key] = item.data.tobytes()
        return records, anchors, dict(source.faults)


WHOLE = {r.key: r.data.tobytes() for r in RECORDS}


def test_a_tar_holds_what_was_there(tar: bytes, tmp_path: Path) -> None:
    """By ours and by the system's tar."""
    path = tmp_path / "a.tar"
    path.write_bytes(tar)
    assert read(path) == (WHOLE, set(ANCHORS), {})
    subprocess.run(["tar", "xf", path, "-C", tmp_path], check=True)
    assert {p.stem: p.read_bytes() for p in tmp_path.glob("*.kv")} == WHOLE
    subprocess.run(["tar", "cf", path, "-C", tmp_path, "--format=gnu", *(f"{key}.kv" for key in WHOLE)], check=True)
    assert read(path) == (WHOLE, set(), {})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tar_that_is_cut_anywhere(tar: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """What is read of it is what was there, and that something is missing is said."""
    end = data.draw(st.integers(0, len(tar) - 1))
    path = tmp_path / "cut.tar"
    path.write_bytes(tar[:end])
    try:
        records, anchors, faults = read(path)
    except InputError:
        assert end < 512
        return
    assert records.items() <= WHOLE.items()
    assert anchors <= set(ANCHORS)
    if len(records) + len(anchors) < len(WHOLE) + len(ANCHORS):
        assert faults == {CUT_SHORT: 1}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_tar_that_is_altered_anywhere(tar: bytes, tmp_path: Path, data: st.DataObject) -> None:
    """No altered byte comes through, and what is missing is counted."""
    altered = bytearray(tar)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(tar) - 1))
        altered[at : at + data.draw(st.sampled_from([1, 8, 600]))] = data.draw(st.binary(min_size=1, max_size=600))
    path = tmp_path / "altered.tar"
    path.write_bytes(altered)
    try:
        records, anchors, faults = read(path)
    except InputError:
        assert altered[:512] != tar[:512]
        return
    assert records.items() <= WHOLE.items()
    assert anchors <= set(ANCHORS)
    assert faults or len(records) + len(anchors) >= 7 - members_renamed(tar, bytes(altered))


def members_renamed(tar: bytes, altered: bytes) -> int:
    """Headers that are others now: what they name may be passed over as a file of somebody else's."""
    return sum(
        tar[at : at + 512] != altered[at : at + 512] for at in range(0, len(tar), 512) if tar[at + 257 : at + 262] == b"ustar"
    )


def test_kv_that_no_store_would_take(tmp_path: Path) -> None:
    """Sound bytes of NaN, records under names that are not theirs, and members of other kinds."""
    path = tmp_path / "odd.tar"
    members = {
        f"{record(8).key}.kv": record(8, fill=float("nan")).data.tobytes(),
        f"{RECORDS[1].key}.kv": RECORDS[0].data.tobytes(),
        f"{'0' * 32}.anchor": msgpack.packb(ANCHORS[0]),
        "1.anchor": b"\xc1",
        "empty.kv": b"",
        "readme.txt": b"hello",
        f"folder/{RECORDS[2].key}.kv": RECORDS[2].data.tobytes(),
    }
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("link.kv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    faults = {"unusable": 1, OTHER_KEY: 1, DAMAGED: 3}
    assert read(path) == ({RECORDS[2].key: RECORDS[2].data.tobytes()}, set(), faults)


def test_an_export_that_is_stopped_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    with closing(TarTarget(path)) as target:
        target.put(RECORDS[0])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
