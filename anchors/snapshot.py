"""A pool's anchors in a folder: written atomically, each once, verified when read. Uses are not kept, ages are.

    manifest.msgpack             what is committed; replaced whole, last, when everything that it names is on the disk
    <checksum>.safetensors       one anchor each, named for its content, never changed
    others of that form          left by a killed writer: never read, removed by the next save

A folder belongs to one pool: saving another into it replaces what it held. As it holds token ids, a new one is private.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kvcomm.anchors.pool import AnchorPool
from kvcomm.anchors.record import Entry, decode, encode, layouts, pack_manifest, unpack_manifest
from kvcomm.errors import CacheFault, InputError

__all__ = ["DAMAGED", "MISSING", "OTHER_FINGERPRINT", "Loaded", "Saved", "load", "save"]

DAMAGED = "damaged"  # truncated or altered
MISSING = "missing"
OTHER_FINGERPRINT = "other-fingerprint"  # of another model than was asked for

MANIFEST = "manifest.msgpack"
PART = "manifest.part"
OURS = re.compile(r"[0-9a-f]{32}\.safetensors|manifest\.part")


@dataclass(frozen=True)
class Saved:
    """What `save` did."""

    anchors: int  # committed now
    written: int  # of those, anchors that were not in the folder before
    written_bytes: int


@dataclass(frozen=True)
class Loaded:
    """What `load` did."""

    anchors: int  # taken into the pool; some may have been evicted for later ones
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason, of this module or the pool's -> anchors not taken in


def save(pool: AnchorPool, folder: str | os.PathLike[str]) -> Saved:
    """Commit what `pool` holds at one moment; killed at any point, the folder holds this commit or the one before.

    A damaged manifest is replaced. Raises InputError for another version's, which is left as it is, and OSError as the system.
    """
    root = Path(folder)
    _make(root)
    with _locked(root, exclusive=True) as descriptor:
        try:
            before = _manifest(root)
        except CacheFault:
            before = []  # load cannot read it either
        _clean(root, before)  # first, so that what killed writers left cannot fill the disk
        entries, written = _write_new(pool, root, before)
        os.fsync(descriptor)
        _write(root / PART, pack_manifest(entries))
        os.replace(root / PART, root / MANIFEST)
        os.fsync(descriptor)
        _clean(root, entries)
    return Saved(len(entries), len(written), sum(entry.nbytes for entry in written))


def load(pool: AnchorPool, folder: str | os.PathLike[str], fingerprint: str | None = None) -> Loaded:
    """Add what was last committed to `pool`, the oldest first; nothing where nothing was. One damaged anchor costs no other.

    With a `fingerprint`, only that model's. A damaged file is removed, so that the next save writes its anchor anew.
    Raises CacheFault for a damaged manifest and InputError for another version's.
    """
    root = Path(folder)
    if not root.exists():
        return Loaded(0)
    dropped: Counter[str] = Counter()
    taken = 0
    with _locked(root, exclusive=False):
        for entry in _manifest(root):
            reason = OTHER_FINGERPRINT if fingerprint not in (None, entry.fingerprint) else _restore(pool, root, entry)
            if reason is None:
                taken += 1
            else:
                dropped[reason] += 1
    return Loaded(taken, dict(dropped))


def _restore(pool: AnchorPool, root: Path, entry: Entry) -> str | None:
    """Why one anchor was not taken in; None when it was."""
    path = _path(root, entry)
    try:
        anchor = decode(entry, path.read_bytes())
    except FileNotFoundError:
        return MISSING
    except CacheFault:
        with suppress(OSError):  # a folder that may only be read
            path.unlink()
        return DAMAGED
    return pool.add(anchor).reason


def _write_new(pool: AnchorPool, root: Path, before: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Entries of all anchors, and of those that had to be written. Packed otherwise than before counts as new."""
    with os.scandir(root) as files:
        sizes = {file.name: file.stat().st_size for file in files}
    there = {entry.key: entry for entry in before if sizes.get(_path(root, entry).name) == entry.nbytes}
    entries, written = [], []
    for anchor in pool.anchors():
        entry = there.get(anchor.key)
        if entry is None or (entry.base, entry.deviation) != layouts(anchor):
            entry, data = encode(anchor)
            _write(_path(root, entry), data)
            written.append(entry)
        entries.append(entry)
    return entries, written


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _clean(root: Path, entries: Sequence[Entry]) -> None:
    """Remove files of ours that are not committed."""
    keep = {_path(root, entry).name for entry in entries}
    for name in os.listdir(root):
        if OURS.fullmatch(name) and name not in keep:
            (root / name).unlink()


def _manifest(root: Path) -> list[Entry]:
    try:
        return unpack_manifest((root / MANIFEST).read_bytes())
    except FileNotFoundError:
        return []
    except CacheFault as fault:
        raise CacheFault(f"{root}: {fault}; save a pool into this folder to replace it, or remove the folder") from fault
    except InputError as fault:
        raise InputError(f"{root}: {fault}; use another folder, or remove this one") from fault


def _path(root: Path, entry: Entry) -> Path:
    return root / f"{entry.checksum}.safetensors"


def _make(root: Path) -> None:
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError as fault:
        raise InputError(f"{root} is a file; a snapshot needs a folder") from fault


@contextmanager
def _locked(root: Path, *, exclusive: bool) -> Iterator[int]:
    """The folder's descriptor, while nobody saves (exclusive: nor loads). The system unlocks when the process ends, however."""
    import fcntl  # here, so that a system without it can import the package

    try:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError as fault:
        raise InputError(f"{root} is a file; a snapshot needs a folder") from fault
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield descriptor
    finally:
        os.close(descriptor)
