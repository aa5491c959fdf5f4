"""The process that talks to Mooncake for a `MooncakeStore`, run as a script: a call that hangs or crashes ends only this.

Reads requests from the socket whose descriptor is its argument, one at a time: 4 bytes of length (with a file of memory, where
data goes along), JSON. Imports nothing of kvcomm, which takes seconds to load. Ends when the other end of the socket does.
"""

from __future__ import annotations

import array
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
from contextlib import suppress
from typing import Any

GRACE_S = 3  # for giving back the segment, once nobody is left to ask
SETUP_S = 60  # no thread runs meanwhile: only a signal ends it
REST_S = 5.0  # for the rest of a message that has begun
PAGE = mmap.PAGESIZE
MISSING, RPC_FAIL = -704, -900  # as Mooncake says it

Reply = tuple[dict[str, Any], int | None]


class Memory:
    """A file of memory, mapped and registered for transfers while in use as a context manager."""

    def __init__(self, store: Any, fd: int, nbytes: int) -> None:
        self._store, self._fd, self._nbytes = store, fd, nbytes

    def __enter__(self) -> int:
        """The address."""
        self._map = mmap.mmap(self._fd, self._nbytes)
        self._pin = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._pin)
        self._store.register_buffer(self._address, self._nbytes)
        return self._address

    def __exit__(self, *_: object) -> None:
        self._store.unregister_buffer(self._address)
        del self._pin
        self._map.close()  # what came too late finds no memory any more


class Requests:
    """One method for each request."""

    def __init__(self) -> None:
        self._store: Any = None

    def setup(self, request: dict[str, Any], _: int | None) -> Reply:
        try:
            from mooncake.store import MooncakeDistributedStore  # type: ignore[import-untyped]
        except ImportError as e:
            return {"error": "missing", "text": str(e)}, None
        host, _, port = request["master"].rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=request["timeout_s"]).close()
        except OSError as e:  # setup would try for a minute and a half
            return {"error": "unreachable", "text": str(e)}, None
        signal.alarm(SETUP_S)
        store = MooncakeDistributedStore()
        code = store.setup(request["host"], "P2PHANDSHAKE", request["segment"], request["local"], "tcp", "", request["master"])
        signal.alarm(0)
        if code:
            return {"error": "setup", "text": f"setup returned {code}"}, None
        self._store = store
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it writes a line for every fault
        return {}, None

    def has(self, request: dict[str, Any], _: int | None) -> Reply:
        return {"codes": self._store.batch_is_exist(request["keys"])}, None

    def put(self, request: dict[str, Any], fd: int | None) -> Reply:
        """`codes`: 0 where an object of this name can be read now."""
        assert fd is not None
        keys, offsets, sizes = request["keys"], request["offsets"], request["sizes"]
        write = self._store.batch_upsert_from if request["replace"] else self._store.batch_put_from
        with Memory(self._store, fd, request["nbytes"]) as address:
            codes = write(keys, [address + offset for offset in offsets], sizes)
        there = self._store.batch_is_exist(keys)  # of an object whose writer was killed put says 0 as well
        return {
            "codes": [code or (0 if yes == 1 else min(yes, 0) or MISSING) for code, yes in zip(codes, there, strict=True)]
        }, None

    def get(self, request: dict[str, Any], _: int | None) -> Reply:
        """`codes`: a size, or what is wrong; `offsets` into the file of memory that comes along."""
        keys = request["keys"]
        codes = self._store.batch_is_exist(keys)
        there = [key for key, code in zip(keys, codes, strict=True) if code == 1]
        sizes = {key: size for key, found in self._store.batch_get_replica_desc(there).items() if (size := _size(found))}
        if there and not sizes and self._store.batch_is_exist(there[:1])[0] < 0:
            sizes, codes = {}, [RPC_FAIL] * len(keys)  # the master went away in between
        offsets, end = {}, 0
        for key, size in sizes.items():
            offsets[key], end = end, end + -(-size // PAGE) * PAGE
        answers: dict[str, int] = {}
        fd = None
        if sizes:
            fd = os.memfd_create("kvcomm-mooncake")
            os.ftruncate(fd, end)
            with Memory(self._store, fd, end) as address:
                read = self._store.batch_get_into(list(sizes), [address + offsets[key] for key in sizes], list(sizes.values()))
            answers = dict(zip(sizes, read, strict=True))
        codes = [answers.get(key, MISSING if code >= 0 else code) for key, code in zip(keys, codes, strict=True)]
        return {"codes": codes, "offsets": [offsets.get(key, 0) for key in keys]}, fd

    def remove(self, request: dict[str, Any], _: int | None) -> Reply:
        return {"codes": self._store.batch_remove(request["keys"], True)}, None  # also where somebody is reading it

    def close(self, _: dict[str, Any], __: int | None) -> Reply:
        signal.alarm(GRACE_S)  # nor does any thread here
        if self._store is not None:
            self._store.close()
        return {}, None


def _size(replicas: list[Any]) -> int:
    """Bytes of an object; 0 where no copy of it is in memory."""
    return next((r.get_memory_descriptor().buffer_descriptor.size for r in replicas if r.is_memory_replica()), 0)


def receive(sock: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """None at the end of the stream. Raises TimeoutError where nothing came, ConnectionError where a part did."""
    beginning, ancillary, _, _ = sock.recvmsg(4, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
    if not beginning:
        return None
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    fd = fds[0] if fds else None
    patience = sock.gettimeout()
    sock.settimeout(REST_S)
    try:
        beginning += _exactly(sock, 4 - len(beginning))
        body = _exactly(sock, struct.unpack("<I", beginning)[0])
    except OSError as e:
        if fd is not None:
            os.close(fd)
        raise ConnectionError(f"a message was cut off: {e}") from None
    finally:
        sock.settimeout(patience)
    return json.loads(body), fd


def _exactly(sock: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise ConnectionError("the other end is gone")
        data += piece
    return bytes(data)


def send(sock: socket.socket, message: dict[str, Any], fd: int | None) -> None:
    body = json.dumps(message).encode()
    beginning = struct.pack("<I", len(body))
    sent = sock.sendmsg([beginning], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd is not None else [])
    sock.sendall(beginning[sent:] + body)


def _end_with_parent(sock: socket.socket) -> None:
    """Also while a call hangs, holding the interpreter: a process of its own waits for either end, and kills what is left."""
    client = os.pidfd_open(os.getpid())
    if os.fork():
        os.close(client)
        return
    poll = select.poll()
    poll.register(client, select.POLLIN)
    poll.register(sock, select.POLLHUP | select.POLLRDHUP)
    poll.poll()
    poll.unregister(sock)
    if not poll.poll(GRACE_S * 1000):
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(client, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    _end_with_parent(sock)
    requests = Requests()
    while (message := receive(sock)) is not None:
        request, fd = message
        try:
            reply, back = getattr(requests, request["do"])(request, fd)
        except Exception as e:  # noqa: BLE001  # told to whoever asked
            reply, back = {"error": "unexpected", "text": f"{type(e).__name__}: {e}"}, None
        send(sock, reply, back)
        for used in (fd, back):
            if used is not None:
                os.close(used)
        if request["do"] == "close":
            break
    else:
        requests.close({}, None)
    os._exit(0)  # the library's own end may hang


if __name__ == "__main__":
    main()
