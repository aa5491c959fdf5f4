"""The log of anchors: against a plain list as its model, killed, damaged, full, and moved by snapshots.

Run as a script with a folder as its argument, this file is the server that is killed: see `crash`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcomm.anchors import base
from kvcomm.anchors.entry import Entry, Layout, checksum, pack_manifest
from kvcomm.errors import CacheFault, InputError
from kvcomm.store.journal import Journal, read
from kvcomm.wire import anchor_log, anchor_shelf
from kvcomm.wire.anchor_entry import MAX_DOCUMENT, pack_entry, unpack_entry
from kvcomm.wire.anchor_log import (
    DAMAGED,
    DISK,
    DUPLICATE,
    JOURNAL,
    MALFORMED,
    MISSING,
    OTHER_TENANT,
    TOO_LARGE,
    AnchorLog,
)

Packed = tuple[bytes, bytes]


def packed(i: int, slot: str = "s", fingerprint: str = "f", tenant: str = "", nbytes: int = 100) -> Packed:
    """Entry and document of anchor number i. The log does not look into documents, so these bytes are as good as any."""
    document = i.to_bytes(4, "little") * (nbytes // 4)
    layout = Layout("raw", (4, 4), (4, 4))
    key = checksum(f"{i} {slot} {fingerprint} {tenant}".encode())
    entry = Entry(key, slot, fingerprint, tenant, layout, layout, checksum(document), len(document))
    return pack_entry(entry), document


def key_of(each: Packed) -> str:
    return unpack_entry(each[0]).key


def added(log: AnchorLog, *numbers: int, **options: Any) -> list[Packed]:
    out = [packed(i, **options) for i in numbers]
    for each in out:
        assert log.add(options.get("tenant", ""), *each)["kept"]
    return out


def content(log: AnchorLog) -> list[Packed]:
    return list(log.documents())


class Replica:
    """What somebody knows who follows a log of one tenant's model: as `since` says, and nothing else."""

    def __init__(self, fingerprint: str = "f", tenant: str = "") -> None:
        self.fingerprint, self.tenant = fingerprint, tenant
        self.version = 0
        self.anchors: dict[str, Packed] = {}
        self.snapshots = 0

    def page(self, log: AnchorLog) -> bool:
        """One reply; are there more?"""
        reply = log.since(self.tenant, self.fingerprint, self.version)
        assert 0 <= reply["version"] < 1 << 63
        assert msgpack.unpackb(msgpack.packb(reply)) == reply
        if reply["snapshot"]:
            self.snapshots += 1
            self.anchors = {key: each for key, each in self.anchors.items() if key in reply["keys"]}
        for key in reply["removed"]:
            self.anchors.pop(key, None)
        for entry, document in reply["added"]:
            self.anchors[unpack_entry(entry).key] = (entry, document)
        self.version = reply["version"]
        return bool(reply["more"])

    def sync(self, log: AnchorLog) -> Replica:
        while self.page(log):
            pass
        return self

    def has(self) -> set[str]:
        return set(self.anchors)


# --- what is kept ------------------------------------------------------------------------------------------------------------


def test_life_of_an_anchor() -> None:
    log, one = AnchorLog(), packed(1)
    answer = log.add("", *one)
    assert answer == {"kept": True, "reason": None, "version": log.stats().version}
    again = log.add("", *one)
    assert again == {"kept": False, "reason": DUPLICATE, "version": answer["version"]}
    assert content(log) == [one]
    stats = log.stats()
    assert (stats.anchors, stats.nbytes, stats.added, stats.refused) == (1, sum(map(len, one)), 1, {DUPLICATE: 1})
    assert log.remove("", "f", key_of(one))
    assert not log.remove("", "f", key_of(one))
    assert log.stats().version > answer["version"]
    assert log.stats().removed == 1
    log.check_integrity()


def test_its_reasons_are_the_pools() -> None:
    assert (DUPLICATE, TOO_LARGE) == (base.DUPLICATE, base.TOO_LARGE)


def test_only_the_own_tenant_s_anchors_are_taken() -> None:
    log = AnchorLog()
    assert log.add("b", *packed(1, tenant="a"))["reason"] == OTHER_TENANT
    assert not content(log)


def test_a_tenant_cannot_keep_another_ones_anchor_out() -> None:
    """By taking its key first."""
    log, (entry, document) = AnchorLog(), packed(1, tenant="a")
    taken = pack_entry(replace(unpack_entry(entry), tenant="b"))
    assert log.add("b", taken, document)["kept"]
    assert log.add("a", entry, document)["kept"]
    assert Replica(tenant="a").sync(log).anchors == {key_of((entry, document)): (entry, document)}


def test_a_document_is_what_its_entry_says() -> None:
    log, (entry, document) = AnchorLog(), packed(1)
    for other in (document[:-1], document[:-1] + b"x", b""):
        assert log.add("", entry, other)["reason"] == DAMAGED
    assert not content(log)


ENTRY = unpack_entry(packed(1)[0])


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"\xc1",
        b"x" * (1 << 17),
        packed(1)[0][:-1],
        pack_manifest([]),
        pack_manifest([ENTRY, ENTRY]),
        *(
            pack_manifest([replace(ENTRY, **{name: value})])  # type: ignore[arg-type]  # what they are is tested
            for name, value in (
                ("key", "../../etc/passwd"),
                ("key", 7),
                ("key", "٣" * 32),
                ("slot", None),
                ("slot", "s" * 5000),
                ("fingerprint", 1.5),
                ("tenant", ["t"]),
                ("checksum", "x"),
                ("nbytes", "100"),
                ("nbytes", True),
                ("base", Layout("raw", ("4",), (4,))),  # type: ignore[arg-type]
                ("deviation", Layout(7, (4,), (4,))),  # type: ignore[arg-type]
            )
        ),
    ],
)
def test_what_is_no_entry_is_refused(entry: bytes) -> None:
    with pytest.raises(CacheFault):
        unpack_entry(entry)
    log = AnchorLog()
    assert log.add("", entry, packed(1)[1])["reason"] == MALFORMED
    assert log.stats().refused == {MALFORMED: 1}


def test_what_cannot_be_kept_evicts_nothing() -> None:
    small = sum(map(len, packed(1)))
    log = AnchorLog(limit_bytes=3 * small)
    added(log, 1, 2)
    assert log.add("", *packed(3, nbytes=4 * small))["reason"] == TOO_LARGE
    assert AnchorLog(limit_bytes=MAX_DOCUMENT * 2).add("", *packed(3, nbytes=MAX_DOCUMENT + 4))["reason"] == TOO_LARGE
    assert AnchorLog(limit_bytes=0).add("", *packed(3))["reason"] == TOO_LARGE
    assert len(content(log)) == 2


@pytest.mark.parametrize(("options", "text"), [({"limit_bytes": -1}, "-1"), ({"per_slot": 0}, "per_slot is 0")])
def test_unusable_bounds(options: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=text):
        AnchorLog(**options)  # type: ignore[arg-type]  # a test's own


def test_whoever_has_most_makes_room() -> None:
    """A tenant that floods the log costs its own anchors first, never those of one that has less."""
    size = sum(map(len, packed(10)))
    log = AnchorLog(limit_bytes=10 * (size + 1), per_slot=100)  # an entry with a tenant's name has a byte more
    few = added(log, *range(10, 14), tenant="a")
    added(log, *range(20, 60), tenant="b")
    assert Replica(tenant="a").sync(log).has() == set(map(key_of, few))
    assert len(Replica(tenant="b").sync(log).anchors) == 6
    many = added(log, *range(60, 70), tenant="a")
    assert Replica(tenant="a").sync(log).has() == set(map(key_of, many[-5:]))
    assert len(Replica(tenant="b").sync(log).anchors) == 5
    log.check_integrity()


def test_a_large_newcomer_may_evict_all_others() -> None:
    """Also those of tenants that have less than it will have."""
    log = AnchorLog(limit_bytes=1000)
    added(log, 1, tenant="a")
    added(log, 2, tenant="b", nbytes=700)
    assert [unpack_entry(entry).tenant for entry, _ in content(log)] == ["b"]
    log.check_integrity()


# --- following ---------------------------------------------------------------------------------------------------------------


def test_increments_then_a_snapshot_for_whoever_was_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_shelf, "REMEMBERED", 3)
    log = AnchorLog(per_slot=3)
    near, away = Replica(), Replica()
    added(log, 1, 2)
    assert near.sync(log).has() == away.sync(log).has() == set(map(key_of, content(log)))
    assert (near.snapshots, away.snapshots) == (1, 1)
    for i in range(3, 10):
        added(log, i)
        near.sync(log)
        assert near.has() == set(map(key_of, content(log)))
    assert near.snapshots == 1, "it followed by increments"
    assert away.sync(log).anchors == near.anchors
    assert away.snapshots == 2


def test_nothing_new_costs_nothing() -> None:
    log = AnchorLog()
    added(log, 1)
    replica = Replica().sync(log)
    reply = log.since("", "f", replica.version)
    assert reply == {
        "snapshot": False,
        "keys": [],
        "removed": [],
        "added": [],
        "version": replica.version,
        "more": False,
    }


def test_rooms_do_not_cross() -> None:
    log = AnchorLog()
    for tenant in ("a", "b"):
        for fingerprint in ("f", "g"):
            added(log, 1, 2, tenant=tenant, fingerprint=fingerprint)
    for tenant in ("a", "b"):
        for fingerprint in ("f", "g"):
            entries = [unpack_entry(entry) for entry, _ in Replica(fingerprint, tenant).sync(log).anchors.values()]
            assert {(e.tenant, e.fingerprint) for e in entries} == {(tenant, fingerprint)}
            assert len(entries) == 2
    assert not Replica("f", "c").sync(log).anchors
    before = Replica("f", "a").sync(log)
    log.remove("b", "f", key_of(packed(1, tenant="b")))
    reply = log.since("a", "f", before.version)
    assert (reply["removed"], reply["added"], reply["snapshot"]) == ([], [], False)


def test_replies_are_paged() -> None:
    """Each at most 2 MiB, but for an anchor that is larger by itself; the log may change meanwhile."""
    log = AnchorLog()
    added(log, *range(9), nbytes=1 << 19)
    added(log, 10, nbytes=3 << 20)
    replica, pages = Replica(), 0
    while True:
        reply = log.since("", "f", replica.version)
        documents = [len(document) for _, document in reply["added"]]
        assert sum(documents) <= anchor_shelf.PAGE or len(documents) == 1
        more = replica.page(log)
        pages += 1
        if pages == 1:
            log.remove("", "f", key_of(packed(0, nbytes=1 << 19)))
            log.remove("", "f", key_of(packed(8, nbytes=1 << 19)))
        if not more:
            break
    assert pages == 4
    assert replica.has() == set(map(key_of, content(log)))


def test_versions_of_another_log_mean_nothing() -> None:
    one, two = AnchorLog(), AnchorLog()
    added(one, *range(5))
    added(two, *range(3, 9))
    replica = Replica().sync(one)
    assert replica.sync(two).has() == set(map(key_of, content(two)))
    assert replica.snapshots == 2
    for version in (1, one.stats().version + 1, (1 << 63) - 1):
        reply = one.since("", "f", version)
        assert (reply["snapshot"], len(reply["added"])) == (True, 5)


# --- on disk -----------------------------------------------------------------------------------------------------------------


def documents(folder: Path) -> list[Path]:
    return sorted((folder / "documents").iterdir())


def test_a_restart_changes_nothing(tmp_path: Path) -> None:
    log = AnchorLog(tmp_path / "a", per_slot=3)
    replica = Replica()
    added(log, 1, 2)
    replica.sync(log)
    added(log, *range(3, 8))
    before, version = content(log), log.stats().version
    log.close()
    log = AnchorLog(tmp_path / "a", per_slot=3)
    assert (content(log), log.stats().version) == (before, version)
    log.check_integrity()
    assert replica.sync(log).has() == set(map(key_of, before))
    assert replica.snapshots == 1, "it goes on with increments"
    added(log, 9)
    assert log.stats().version > version
    assert replica.sync(log).has() == set(map(key_of, content(log)))
    assert len(documents(tmp_path / "a")) == 3
    log.close()


def test_the_journal_is_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchor_log, "SUMMED_UP", 10)
    log = AnchorLog(tmp_path, per_slot=3)
    replica = Replica()
    for i in range(100):
        added(log, i)
        if i == 50:
            replica.sync(log)
        assert len(read(tmp_path / "journal").entries) <= 2 * 3 + 10 + 1
    before, version = content(log), log.stats().version
    log.close()
    log = AnchorLog(tmp_path, per_slot=3)
    assert (content(log), log.stats().version) == (before, version)
    assert replica.sync(log).has() == set(map(key_of, before))
    assert replica.snapshots == 2, "what left before the journal was summed up is not known any more"
    log.check_integrity()
    log.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    log = AnchorLog(tmp_path / "a")
    with pytest.raises(InputError, match="another server"):
        AnchorLog(tmp_path / "a")
    log.close()
    AnchorLog(tmp_path / "a").close()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        AnchorLog(tmp_path / "file")


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("how", "reason"), [("altered", DAMAGED), ("cut", DAMAGED), ("gone", MISSING)])
def test_a_damaged_document_costs_its_anchor(tmp_path: Path, how: str, reason: str) -> None:
    """And replicas forget it too, who will hear of it when it is learned again."""
    log = AnchorLog(tmp_path)
    all_of_them = added(log, *range(5))
    replica = Replica().sync(log)
    log.close()
    victim = documents(tmp_path)[2]
    if how == "altered":
        damage(victim, 50)
    elif how == "cut":
        os.truncate(victim, 50)
    else:
        victim.unlink()
    log = AnchorLog(tmp_path)
    assert log.stats().faults == {reason: 1}
    assert content(log) == all_of_them[:2] + all_of_them[3:]
    assert replica.sync(log).has() == set(map(key_of, content(log)))
    assert log.add("", *all_of_them[2])["kept"]
    assert replica.sync(log).has() == set(map(key_of, all_of_them))
    log.check_integrity()
    log.close()
    log = AnchorLog(tmp_path)
    assert not log.stats().faults
    assert len(content(log)) == 5
    log.close()


def test_any_byte_of_the_journal_may_be_damaged(tmp_path: Path) -> None:
    """What is restored was committed, and is whole; whoever followed the log is told."""
    log = AnchorLog(tmp_path, per_slot=4)
    committed = added(log, *range(6))
    log.remove("", "f", key_of(committed[3]))
    replica = Replica().sync(log)
    final = content(log)
    log.close()
    journal = (tmp_path / "journal").read_bytes()
    files = {path: path.read_bytes() for path in documents(tmp_path)}
    for at in range(0, len(journal), 7):
        (tmp_path / "journal").write_bytes(journal[:at] + bytes([journal[at] ^ 0x10]) + journal[at + 1 :])
        for path, data in files.items():
            path.write_bytes(data)
        log = AnchorLog(tmp_path, per_slot=4)
        assert set(content(log)) <= set(committed)
        assert len(content(log)) >= len(final) - 1 or at < 32, "one entry is lost, or with the head all"
        assert log.stats().faults.keys() <= {JOURNAL, MISSING}
        assert log.stats().faults
        log.check_integrity()
        follower = Replica()
        follower.version, follower.anchors = replica.version, dict(replica.anchors)
        assert follower.sync(log).anchors == Replica().sync(log).anchors
        assert follower.snapshots
        log.close()


def test_a_journal_of_the_future_is_left_alone(tmp_path: Path) -> None:
    AnchorLog(tmp_path).close()
    journal = Journal(tmp_path / "journal", read(tmp_path / "journal"))
    journal.replace([("anchors", 2, 1, 0, "boot")])
    journal.close()
    before = (tmp_path / "journal").read_bytes()
    for _ in range(2):  # the lock is given back
        with pytest.raises(InputError, match="format 2"):
            AnchorLog(tmp_path)
    assert (tmp_path / "journal").read_bytes() == before


def test_lower_limits_hold_after_a_restart(tmp_path: Path) -> None:
    log = AnchorLog(tmp_path)
    all_of_them = added(log, *range(8))
    replica = Replica().sync(log)
    log.close()
    size = sum(map(len, all_of_them[0]))
    for options, left in (({"per_slot": 5}, 5), ({"limit_bytes": 2 * size}, 2), ({"limit_bytes": size - 1}, 0)):
        log = AnchorLog(tmp_path, **options)
        assert content(log) == all_of_them[8 - left :]
        log.check_integrity()
        assert replica.sync(log).has() == set(map(key_of, content(log)))
        assert len(documents(tmp_path)) == left
        log.close()


def test_after_the_machine_was_restarted_a_new_epoch_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have lost changes that replicas know of, without a trace."""
    log = AnchorLog(tmp_path)
    added(log, 1)
    replica = Replica().sync(log)
    log.close()
    monkeypatch.setattr("kvcomm.wire.anchor_folder._boot", lambda: "another")
    log = AnchorLog(tmp_path)
    assert len(replica.sync(log).anchors) == 1
    assert replica.snapshots == 2
    log.close()


@pytest.mark.parametrize(("where", "name"), [(Path, "write_bytes"), (Journal, "append")])
def test_a_full_disk_keeps_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: type, name: str) -> None:
    log = AnchorLog(tmp_path, per_slot=2)
    before, version = added(log, 1, 2), log.stats().version

    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(where, name, full)
        assert log.add("", *packed(3))["reason"] == DISK
    assert (content(log), log.stats().version) == (before, version)
    assert log.stats().faults == {DISK: 1}
    assert len(documents(tmp_path)) == 2
    log.check_integrity()
    added(log, 3)
    log.close()
    log = AnchorLog(tmp_path, per_slot=2)
    assert content(log) == [before[1], packed(3)]
    log.close()


def test_what_lies_in_the_folder_is_private_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        log = AnchorLog(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    added(log, 1, 2)
    log.close()
    folder = tmp_path / "a" / "b"
    assert (folder.stat().st_mode & 0o777, (folder / "journal").stat().st_mode & 0o777) == (0o700, 0o600)
    left = [folder / "documents" / name for name in ("00000000000f", "000000000010.part", "README", f"{7:012x}.txt")]
    for path in left:
        path.touch()
    strange = folder / "documents" / "0000000000ff"
    strange.mkdir()
    log = AnchorLog(folder)
    assert [path.exists() for path in left] == [False, False, True, True]
    assert strange.exists()
    assert len(content(log)) == 2
    log.close()


# --- killed ------------------------------------------------------------------------------------------------------------------


def crash(folder: Path) -> None:
    """Adds anchors of ten slots for ever, and says which are acknowledged."""
    log = AnchorLog(folder, per_slot=20)
    for i in range(1 << 30):
        assert log.add("", *packed(i, slot=str(i % 10), nbytes=2000))["kept"]
        sys.stdout.write(f"{i}\n")
        sys.stdout.flush()


@pytest.mark.parametrize("after", [1, 30, 400, 1500])
def test_a_killed_server_restores_what_it_acknowledged(tmp_path: Path, after: int) -> None:
    child = subprocess.Popen([sys.executable, __file__, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(after):
        assert child.stdout.readline(), "it ended by itself"
    child.send_signal(signal.SIGKILL)
    acknowledged = after + len(child.stdout.read().split())
    child.wait()
    child.stdout.close()
    log = AnchorLog(tmp_path, per_slot=20)
    found = {key_of(each) for each in content(log)}
    oldest = max(0, acknowledged - 200)
    expected = {key_of(packed(i, slot=str(i % 10), nbytes=2000)) for i in range(oldest, acknowledged)}
    started = {key_of(packed(i, slot=str(i % 10), nbytes=2000)) for i in (acknowledged, oldest)}
    assert found ^ expected <= started, "but for the one that was being added, and the one that left for it"
    assert not log.stats().faults
    assert len(documents(tmp_path)) == len(found)
    log.check_integrity()
    log.close()


# --- threads -----------------------------------------------------------------------------------------------------------------


def test_readers_follow_while_others_write(tmp_path: Path) -> None:
    log = AnchorLog(tmp_path, per_slot=5)
    stop, wrong = threading.Event(), list[Any]()

    def write(which: int) -> None:
        for i in range(120):
            each = packed(1000 * which + i, slot=str(i % 3))
            if not log.add("", *each)["kept"]:
                wrong.append(i)
            if i % 7 == 0:
                log.remove("", "f", key_of(each))

    def follow() -> None:
        replica = Replica()
        last = 0
        while not stop.is_set():
            replica.page(log)
            if replica.version < last or len(replica.anchors) > 16:
                wrong.append(replica.version)
            last = replica.version

    readers = [threading.Thread(target=follow) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(which,)) for which in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not wrong
    log.check_integrity()
    log.close()


# --- against a model ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What the model knows of one anchor."""

    each: Packed
    tenant: str
    fingerprint: str
    slot: str

    @property
    def nbytes(self) -> int:
        return len(self.each[0]) + len(self.each[1])


class AnchorLogModel(RuleBasedStateMachine):
    """`AnchorLog` beside a list of rows, the oldest first, through restarts; replicas that lag beside both."""

    limit, per_slot = 3000, 3

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(anchor_shelf, "REMEMBERED", 4)
        self.patch.setattr(anchor_shelf, "PAGE", 900)
        self.patch.setattr(anchor_log, "SUMMED_UP", 3)
        self.folder = tempfile.TemporaryDirectory()
        self.log = self.opened()
        self.rows: list[Row] = []
        self.version = self.log.stats().version
        self.replicas = {(f, t, n): Replica(f, t) for f in "fg" for t in "ab" for n in range(2)}

    def opened(self) -> AnchorLog:
        return AnchorLog(Path(self.folder.name), self.limit, self.per_slot)

    def teardown(self) -> None:
        self.log.close()
        self.patch.undo()
        self.folder.cleanup()

    @rule(
        i=st.integers(0, 9),
        slot=st.sampled_from("xy"),
        fingerprint=st.sampled_from("ffg"),
        tenant=st.sampled_from("aab"),
        nbytes=st.sampled_from((40, 200, 800, 3000)),
    )
    def add(self, i: int, slot: str, fingerprint: str, tenant: str, nbytes: int) -> None:
        row = Row(packed(i, slot, fingerprint, tenant, nbytes), tenant, fingerprint, slot)
        answer = self.log.add(tenant, *row.each)
        if row.nbytes > self.limit:
            assert answer["reason"] == TOO_LARGE
            return
        if key_of(row.each) in [key_of(other.each) for other in self.rows]:
            assert answer["reason"] == DUPLICATE
            return
        assert answer["kept"]
        slot_rows = [o for o in self.rows if (o.tenant, o.fingerprint, o.slot) == (tenant, fingerprint, slot)]
        if len(slot_rows) == self.per_slot:
            self.rows.remove(slot_rows[0])
        while sum(o.nbytes for o in (*self.rows, row)) > self.limit:
            has = {o.tenant: sum(other.nbytes for other in (*self.rows, row) if other.tenant == o.tenant) for o in self.rows}
            self.rows.remove(next(o for o in self.rows if has[o.tenant] == max(has.values())))
        self.rows.append(row)
        assert answer["version"] > self.version
        self.version = answer["version"]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        assert self.log.remove(row.tenant, row.fingerprint, key_of(row.each))
        self.rows.remove(row)
        assert self.log.stats().version > self.version
        self.version = self.log.stats().version

    @rule()
    def restart(self) -> None:
        self.log.close()
        self.log = self.opened()
        assert not self.log.stats().faults
        assert self.log.stats().version == self.version

    @rule(which=st.sampled_from([(f, t, n) for f in "fg" for t in "ab" for n in range(2)]))
    def one_page(self, which: tuple[str, str, int]) -> None:
        self.replicas[which].page(self.log)

    @rule(which=st.sampled_from([(f, t, n) for f in "fg" for t in "ab" for n in range(2)]))
    def sync(self, which: tuple[str, str, int]) -> None:
        """It holds what the model holds. Of a key that came back packed otherwise, the later packing."""
        replica = self.replicas[which].sync(self.log)
        rows = [row for row in self.rows if (row.fingerprint, row.tenant) == which[:2]]
        assert replica.anchors == {key_of(row.each): row.each for row in rows}

    @invariant()
    def agrees(self) -> None:
        self.log.check_integrity()
        assert content(self.log) == [row.each for row in self.rows]


TestAnchorLogModel = AnchorLogModel.TestCase
TestAnchorLogModel.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


if __name__ == "__main__":
    crash(Path(sys.argv[1]))
