"""KV in the memory of several hosts, by Mooncake. Knows nothing of deadlines for whole calls: see `Guarded`.

Mooncake's client runs in a process of its own (`_mooncake_child`): its calls hang for up to half a minute when the master does,
its `setup` stops every thread of its process for up to a minute and a half, and a process that ends during a call crashes. Data
goes through files of memory. What a host contributed is lost when its process ends, everything when the master does.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import socket
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

from kvcomm.errors import InputError
from kvcomm.segments import Segment
from kvcomm.store._child import Child
from kvcomm.store.base import Kept
from kvcomm.store.deadline import SLOWEST
from kvcomm.store.notices import check_names, check_notes, seal, unseal
from kvcomm.store.record import DAMAGED, Bytes, Record, empty
from kvcomm.store.remote import FULL, PEER_LOST, Census, RemoteFault, RemoteStore

__all__ = ["BEING_WRITTEN", "MooncakeStore"]

BEING_WRITTEN = (
    "being-written"  # why put kept nothing: another writer began it, and may have died; Mooncake waits half a minute
)
LIBRARIES = ("libibverbs.so.1", "libcurl.so.4", "libnuma.so.1")  # what its wheel does not bring, also for TCP
APT = "libibverbs1 libcurl4 libnuma1"
SEGMENT_BYTES = 256 << 20
LOCAL_BYTES = 16 << 20  # Mooncake's own buffer, which whole transfers do not use
REMEMBERED = 4096  # objects that `segments` asks for
REMEMBERED_TOKENS = 1 << 24  # of them all

_MISSING, _NOT_READY, _NO_SPACE, _TRANSFER = -704, -703, -200, -800  # ErrorCode of Mooncake
_SERVICE = {-900: "unreachable", -901: "timeout"}  # of the master; all others are of one object
_OBJECT = {_TRANSFER: PEER_LOST, -600: "replaced", -706: "in-use", -707: "evicted-while-read"}


class MooncakeStore(RemoteStore):
    """Records and notes of a Mooncake cluster under `namespace`, which has `segment_bytes` of this host's memory.

    There is no list of a cluster: `segments` and `stats` are of the last 4096 objects that this store put or found. Mooncake
    evicts what was not used for longest when its memory is full.
    """

    name = "mooncake"

    def __init__(
        self,
        master: str,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        host: str | None = None,
        namespace: str = "",
        timeout_s: float = 2.0,
    ) -> None:
        """`master`: host:port. `host`: this machine's address for the others, by default the one it has towards the master.
        Connects when first used; a segment of 0 bytes makes a client that contributes nothing.
        """
        found = re.fullmatch(r"(.+):(\d{1,5})", master)
        if not found or not 0 < int(found[2]) < 65536:
            raise InputError(f"the master of Mooncake is {master!r}; host:port was expected, as 10.0.0.5:50051")
        if segment_bytes < 0 or not timeout_s > 0:
            raise InputError(f"segment_bytes {segment_bytes}, timeout_s {timeout_s}; at least 0, and above 0")
        if not re.fullmatch(r"[\w.-]{0,64}", namespace, re.ASCII):
            raise InputError(f"the namespace is {namespace!r}; up to 64 letters, digits, dots, lines and dashes are possible")
        if importlib.util.find_spec("mooncake") is None:
            raise InputError("a Mooncake tier needs the package mooncake: pip install 'kvcomm[mooncake]'")
        missing = [library for library in LIBRARIES if not _loads(library)]
        if missing:
            raise InputError(f"Mooncake's client needs {', '.join(missing)}: as root, apt-get install -y {APT}")
        super().__init__()
        self._prefix, self._segment_bytes, self._timeout_s = f"kvcomm:1:{namespace}", segment_bytes, timeout_s
        setup = {
            "do": "setup",
            "master": master,
            "host": host or _own_address(found[1].strip("[]"), int(found[2])),
            "segment": segment_bytes,
            "local": LOCAL_BYTES,
            "timeout_s": timeout_s / 2,
        }
        self._child = Child(self.name, Path(__file__).with_name("_mooncake_child.py"), setup)
        self._seen: OrderedDict[str, tuple[Segment, int]] = OrderedDict()  # with bytes; the one used last at the end
        self._seen_tokens = 0
        self._lock = Lock()

    def put_record(self, record: Record) -> Kept:
        key = record.key
        if self.has([key]):
            self._remember(record)
            return Kept(stored=True)
        (code,) = self._put({self._name(key): record.data}, replace=False)
        if code == _NO_SPACE:
            return self.counts.refused(FULL)
        if code in {_MISSING, _NOT_READY}:
            return self.counts.refused(BEING_WRITTEN)
        if code in _OBJECT:  # its place was at a host that is gone: the next put is given another one
            return self.counts.refused(_OBJECT[code])
        self._check(code)
        self._remember(record)
        return Kept(stored=True)

    def get_records(self, keys: Iterable[str]) -> dict[str, Record]:
        keys = list(dict.fromkeys(keys))
        values = self._get([self._name(key) for key in keys])
        found: dict[str, Record] = {}
        for key, value in zip(keys, values, strict=True):
            if value is None:
                continue
            record = Record(value)
            if self.counts.sound(record, key):
                found[key] = record
                self._remember(record)
            else:
                self.remove(key)
        self.counts.looked_up(len(found), len(keys))
        return found

    def has(self, keys: Iterable[str]) -> set[str]:
        keys = list(dict.fromkeys(keys))
        if not keys:
            return set()
        codes = self._ask({"do": "has", "keys": [self._name(key) for key in keys]})["codes"]
        self._check(min(codes))
        return {key for key, code in zip(keys, codes, strict=True) if code == 1}

    def remove(self, key: str) -> bool:
        (code,) = self._ask({"do": "remove", "keys": [self._name(key)]})["codes"]
        self._forget(key)
        if code in {_MISSING, _NOT_READY}:
            return False
        self._check(code)
        return True

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        check_notes(notes)
        sealed = {f"{self._prefix}:n:{name}": seal(name, value) for name, value in notes.items()}
        for code in self._put(sealed, replace=True) if sealed else ():
            if code in _SERVICE:
                self._check(code)
            elif code < 0:
                self.counts.refused(_OBJECT.get(code, FULL))

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        check_names(names)
        names = list(dict.fromkeys(names))
        found = {}
        for name, sealed in zip(names, self._get([f"{self._prefix}:n:{name}" for name in names]), strict=True):
            value = None if sealed is None else unseal(name, sealed.tobytes())
            if value is not None:
                found[name] = value
            elif sealed is not None:
                self.counts.fault(DAMAGED)
        return found

    def census(self) -> Census:
        """The limit is what this store contributes; others may hold more."""
        seen = self._still()
        return Census(len(seen), sum(nbytes for _, nbytes in seen), self._segment_bytes)

    def segments(self) -> list[Segment]:
        return [segment for segment, _ in self._still()]

    def close(self) -> None:
        """Its segment is given back: what lies there is lost."""
        self._child.close()

    def _put(self, values: Mapping[str, Any], *, replace: bool) -> list[int]:
        """0 or what is wrong, for each; a value under a name that is there is replaced, or not looked at."""
        sizes = [len(value) for value in values.values()]
        offsets = [*accumulate(sizes, initial=0)][:-1]
        fd = os.memfd_create("kvcomm-mooncake")
        try:
            for offset, value in zip(offsets, values.values(), strict=True):
                _write(fd, value, offset)
            ask = {"do": "put", "keys": list(values), "offsets": offsets, "sizes": sizes, "nbytes": sum(sizes)}
            codes: list[int] = self._ask({**ask, "replace": replace}, fd, sum(sizes))["codes"]
        finally:
            os.close(fd)
        return codes

    def _get(self, names: list[str]) -> list[Bytes | None]:
        """Values in memory of their own; None where there is none, and where its host is gone, which is counted."""
        if not names:
            return []
        reply, fd = self._child.call({"do": "get", "keys": names}, None, self._timeout_s)
        try:
            self._told(reply)
            values: list[Bytes | None] = []
            for code, offset in zip(reply["codes"], reply["offsets"], strict=True):
                values.append(_read(fd, code, offset) if fd is not None and code > 0 else None)
                if code in _SERVICE:
                    self._check(code)
                elif code < 0 and code not in {_MISSING, _NOT_READY}:
                    self.counts.fault(_OBJECT.get(code, f"mooncake{code}"))
            return values
        finally:
            if fd is not None:
                os.close(fd)

    def _ask(self, request: dict[str, Any], fd: int | None = None, nbytes: int = 0) -> dict[str, Any]:
        reply, _ = self._child.call(request, fd, self._timeout_s + nbytes / SLOWEST)
        return self._told(reply)

    def _told(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "error" in reply:
            raise RemoteFault(self.name, reply["error"], reply["text"])
        return reply

    def _check(self, code: int) -> None:
        """Raise RemoteFault for a code of Mooncake that is an error."""
        if code < 0:
            raise RemoteFault(self.name, _SERVICE.get(code, "error"), f"Mooncake answers {code}")

    def _remember(self, record: Record) -> None:
        segment = record.segment
        with self._lock:
            self._drop(segment.key)
            self._seen[segment.key] = (segment, record.nbytes)
            self._seen_tokens += _tokens(segment)
            while len(self._seen) > REMEMBERED or self._seen_tokens > REMEMBERED_TOKENS:
                self._drop(next(iter(self._seen)))

    def _forget(self, key: str) -> None:
        with self._lock:
            self._drop(key)

    def _drop(self, key: str) -> None:
        if key in self._seen:
            self._seen_tokens -= _tokens(self._seen.pop(key)[0])

    def _still(self) -> list[tuple[Segment, int]]:
        """Of what this store has seen, what is there."""
        with self._lock:
            seen = dict(self._seen)
        there = self.has(seen)
        return [found for key, found in seen.items() if key in there]

    def _name(self, key: str) -> str:
        return f"{self._prefix}:r:{key}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _tokens(segment: Segment) -> int:
    return len(segment.ids) + len(segment.context)


def _own_address(host: str, port: int) -> str:
    """This machine's address on the way to `host`; nothing is sent. Its loopback where there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(address)
            return str(s.getsockname()[0])
    except OSError:
        return "127.0.0.1"


def _write(fd: int, value: Any, offset: int) -> None:
    view = memoryview(value)
    while view.nbytes:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _read(fd: int, nbytes: int, offset: int) -> Bytes:
    target = empty(nbytes)
    view = target.data
    while view.nbytes:
        done = os.preadv(fd, [view], offset)
        assert done, f"a file of memory ends {view.nbytes} bytes early"
        view, offset = view[done:], offset + done
    return target
