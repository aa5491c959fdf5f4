"""Fuzzing of the wire: `decode` in this process, steered by coverage (atheris, where there is a build of it), and `attack` on a
running server, over its socket. Both end with the number of frames and with exit status 0, or say what broke.

    python tests/wire/fuzz.py decode --frames 1000000
    python tests/wire/fuzz.py serve /tmp/kv.sock &
    python tests/wire/fuzz.py attack /tmp/kv.sock --frames 5000
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from types import FunctionType, ModuleType
from typing import Any

import msgpack

from kvcomm.store.slabs import SlabStore
from kvcomm.wire import flights, session
from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address
from kvcomm.wire.library import Library
from kvcomm.wire.server import Server

# Where there is no build of it: the same mutations, without a guide.
atheris: Any = import_module("atheris") if find_spec("atheris") else None

TENANT, TOKEN = "fuzz", "t"
SLOWEST = 5.0  # s that one frame may take
LONGEST = 1 << 12  # bytes of a frame that is mutated; larger ones are made on purpose
KEY = "0123456789abcdef" * 2
IDS = struct.pack("<40i", *range(40))

HELLO = p.Hello(p.VERSION, "0", TENANT, TOKEN, KEY)
VALID: tuple[p.Request, ...] = (
    p.Find("f", IDS, 1.5, 0.0, kv=True, ms_per_mib=None),
    p.Find("f", IDS, None, 1e300, kv=False, ms_per_mib=None),
    p.Get([KEY, KEY[::-1]]),
    p.Has([KEY]),
    p.Reserve(KEY, 5000, 1.0),
    p.Commit(1),
    p.Put(KEY),
    p.Release([1, 2, 1 << 40], [1, 0]),
    p.Remove([KEY], damaged=True),
    p.Land(1),
    p.Awaited(1),
    p.Stats(),
    p.List("", 10),
    p.List(KEY, 10),
    p.Anchors("f", 0),
    p.AddAnchor(b"", b""),
)
SPLINTERS = (  # of msgpack: claims of size, nesting, extensions, what is no text, numbers at the edges
    *(head + b"\xff\xff\xff\xff" for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")),
    *(head + b"\xff\xff" for head in (b"\xdc", b"\xde", b"\xda", b"\xc5", b"\xc8")),
    *(head + b"\x00\xff\xff\xff" for head in (b"\xdd", b"\xdf")),
    b"\x91" * 600,
    b"\x81\xa1k" * 300,
    b"\xd4\x01\x00",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xc7\x00\x05",
    b"\xc1",
    b"\xa2\xff\xfe",
    b"\xa3\xed\xa0\x80",
    *map(msgpack.packb, (float("nan"), float("inf"), -float("inf"), 1e308, -1, -(1 << 63), (1 << 64) - 1, 1 << 63, 0)),
    *map(msgpack.packb, (None, True, "", b"", [], {}, [[]], {"op": "get"}, "a" * 5000, [KEY] * 3, [KEY[:31]], [1, -1], [1.0])),
)


def malformed(payload: bytes) -> bool:
    """Does the protocol refuse it? Whatever else it may raise is a bug."""
    try:
        request = p.request_of(payload)
    except p.Malformed as fault:
        if len(str(fault)) > 1000:
            raise AssertionError("an error's text is as long as what was sent") from fault
        return True
    assert p.request_of(p.pack_request(request)) == request
    return False


def large() -> dict[str, bytes]:
    """Payloads of the largest size, by what they claim, nest and repeat; all malformed."""
    room = p.MAX_PAYLOAD
    claim = struct.pack(">BI", 0xDD, room - 100_000)
    numbers = b"\x83\xa2op\xa7release\xa4lost\x90\xa7numbers\xdd"
    contents = {
        "nested claims": b"\x81\xa2op" + claim * 20_000 + b"\xc0" * room,
        "one claim": b"\x81\xa2op" + claim + b"\xc0" * room,
        "numbers": numbers + struct.pack(">I", (room - 100) // 9) + b"\xcf\x7f" * room,
        "empty lists": numbers + struct.pack(">I", room - 100) + b"\x90" * room,
        "empty maps": numbers + struct.pack(">I", room - 100) + b"\x80" * room,
        "keys": p.pack_request(p.Get([KEY] * (room // 30))),
        "text": b"\x81\xa2op\xdb" + struct.pack(">I", room - 100) + "\N{BUG}".encode() + b"a" * room,
        "bytes": b"\x81\xa2op\xc6" + struct.pack(">I", room - 8) + b"a" * room,
        "and more": p.pack_request(p.Stats()) + b"\x90" * room,
        "a map and more": b"\x81\xa2op\xdd" + struct.pack(">I", room - 100) + b"\xc0" * room,
        "pairs": b"\xdf" + struct.pack(">I", room // 3) + b"\xa1a\xc0" * room,
        "zeros": b"\0" * room,
    }
    return {what: payload[:room] for what, payload in contents.items()}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Another payload, made of this one."""
    out = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(8):
            case 0 if out:
                out[at % len(out)] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at % len(out)] = rng.randrange(256)
            case 2:
                del out[at : at + rng.randrange(1, 9)]
            case 3:
                out[at:at] = rng.choice(SPLINTERS)
            case 4:
                splinter = rng.choice(SPLINTERS)
                out[at : at + len(splinter)] = splinter
            case 5:
                other = p.pack_request(rng.choice(VALID))
                out[at:] = other[rng.randrange(len(other)) :]
            case 6:
                out = bytearray(_changed_field(bytes(out), rng))
            case _:
                out = out[:at]
    return bytes(out)


def _changed_field(data: bytes, rng: random.Random) -> bytes:
    """One field left out, added, doubled, or with the value of another type."""
    try:
        fields = msgpack.unpackb(data)
        pairs = [(msgpack.packb(name), msgpack.packb(value)) for name, value in fields.items()]
    except Exception:  # noqa: BLE001  # no msgpack any more
        return data
    at = rng.randrange(len(pairs) + 1)
    match rng.randrange(4):
        case 0:
            pairs[at : at + 1] = []
        case 1:
            pairs.insert(at, (rng.choice((b"\xa1x", b"\xa2op", b"\x01", b"\xc0", b"\x90")), rng.choice(SPLINTERS)))
        case 2:
            pairs.append(rng.choice(pairs) if pairs else (b"\xa2op", b"\xc0"))
        case _:
            pairs[at : at + 1] = [(name, rng.choice(SPLINTERS)) for name, _ in pairs[at : at + 1]]
    head = bytes([0x80 | len(pairs)]) if len(pairs) < 16 else b"\xde" + struct.pack(">H", len(pairs))
    return head + b"".join(name + value for name, value in pairs)


# -- in this process ---------------------------------------------------------------------------------------------------------


class _Wire:
    """In place of a StreamWriter: what a session says."""

    def __init__(self) -> None:
        self.said = bytearray()

    def write(self, data: bytes) -> None:
        self.said += data

    async def drain(self) -> None: ...

    def close(self) -> None: ...


class Decoder:
    """What is done with every input: it is a payload, a reply, a prefix, and a conversation behind a greeting."""

    def __init__(self) -> None:
        self.frames: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._server = Server(Library(SlabStore(1 << 20)), {TENANT: TOKEN})
        self._greeting = p.frame(p.pack_request(HELLO))

    def __call__(self, data: bytes) -> None:
        began = monotonic()
        self.frames["malformed" if malformed(data) else "requests"] += 1
        with suppress(p.Malformed):
            assert isinstance(p.reply_of(data), dict)
        prefix = data[: p.PREFIX.size].ljust(p.PREFIX.size, b"\0")
        with suppress(p.Malformed):
            payload, body = p.lengths(prefix, 1 << 20)
            assert payload <= p.MAX_PAYLOAD
            assert body <= 1 << 20
        if self.frames.total() % 8 == 0:
            self._loop.run_until_complete(self._conversation(data))
        assert monotonic() - began < SLOWEST, f"{len(data)} bytes took {monotonic() - began:.1f} s"

    async def _conversation(self, data: bytes) -> None:
        """A frame of these bytes, and the bytes themselves as what follows it."""
        reader, writer = asyncio.StreamReader(), _Wire()
        reader.feed_data(self._greeting + p.frame(data) + data)
        reader.feed_eof()
        faults = self._server.counters.faults
        await session.Session(self._server, reader, writer, None, 0).run()  # type: ignore[arg-type]  # what it uses of one
        replies = list(_replies(bytes(writer.said)))
        if malformed(data):
            assert replies[-1].get("error") == "malformed", replies
        assert len(self._server.flights) == 0
        assert self._server.counters.faults == faults, replies


def _replies(said: bytes) -> Iterator[dict[str, object]]:
    at = 0
    while at < len(said):
        payload, body = p.lengths(said[at : at + p.PREFIX.size])
        at += p.PREFIX.size
        yield p.reply_of(said[at : at + payload])
        at += payload + body


def _watched(*modules: ModuleType) -> None:
    """Their functions and methods tell atheris where they are."""
    for module in modules:
        classes = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
        for function in [f for owner in (module, *classes) for f in vars(owner).values() if isinstance(f, FunctionType)]:
            if function.__code__.co_filename == module.__file__:
                atheris.instrument_func(function)


def decode(frames: int, seed: int) -> None:
    """Ends the process."""
    decoder = Decoder()

    def mutator(data: bytes, size: int, number: int) -> bytes:
        if number % 2 and data:
            return bytes(atheris.Mutate(data, size))
        return mutated(data, random.Random(number))[:size]

    def ended() -> None:
        print(f"{decoder.frames.total():,} frames: {dict(decoder.frames)}", flush=True)

    if atheris is None:
        rng = random.Random(seed)
        for _ in range(frames):
            decoder(mutated(p.pack_request(rng.choice((HELLO, *VALID))), rng)[:LONGEST])
        ended()
        return
    _watched(p, session, flights)
    with tempfile.TemporaryDirectory() as folder:
        for number, request in enumerate((HELLO, *VALID)):
            (Path(folder) / str(number)).write_bytes(p.pack_request(request))

        def one(data: bytes) -> None:
            decoder(data)
            if decoder.frames.total() >= frames:  # the last: libFuzzer ends the process without a word to Python
                ended()

        limits = [f"-timeout={SLOWEST:.0f}", "-rss_limit_mb=1024", f"-max_len={LONGEST}"]
        options = [f"-runs={frames}", f"-seed={seed}", *limits, "-verbosity=0", f"-artifact_prefix={folder}/"]
        atheris.Setup([sys.argv[0], folder, *options], one, custom_mutator=mutator)
        atheris.Fuzz()


# -- on a server -------------------------------------------------------------------------------------------------------------


def serve(path: str) -> None:
    """A small server, until it is killed."""

    async def run() -> None:
        server = Server(Library(SlabStore(8 << 20)))
        await server.listen(Address(path=Path(path)))
        print("listening", flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


class Attacker:
    """Bad conversations with the server at `path`, each on a connection of its own."""

    def __init__(self, path: str, seed: int) -> None:
        self._path, self._rng = path, random.Random(seed)
        self.frames: Counter[str] = Counter()  # by what was done
        self.slowest = 0.0  # s until the server had answered, or hung up

    def attack(self, frames: int) -> None:
        kinds: tuple[Callable[[], None], ...] = (
            self.mutations,
            self.mutations,
            self.mutations,
            self.before_hello,
            self.second_hello,
            self.half_a_frame,
            self.wrong_prefix,
            self.pipelined_garbage,
            self.hang_up,
            self.noise,
        )
        for rare in (self.large, self.slow_drip):
            rare()
        while self.frames.total() < frames:
            self._rng.choice(kinds)()

    def mutations(self) -> None:
        """Requests with something changed, until one is malformed."""
        with self._greeted() as made:
            for _ in range(50):
                payload = mutated(p.pack_request(self._rng.choice(VALID)), self._rng)
                if malformed(payload) or p.request_of(payload).op == "hello":
                    self._refused(made, p.frame(payload), "mutated")
                    break
                request = p.request_of(payload)
                made.sendall(p.frame(payload))
                self.frames["mutated-valid"] += 1
                if request.replied:
                    began = monotonic()
                    _reply(made)
                    self.slowest = max(self.slowest, monotonic() - began)

    def before_hello(self) -> None:
        with self._connected() as made:
            self._refused(made, p.frame(p.pack_request(self._rng.choice(VALID))), "before-hello")

    def second_hello(self) -> None:
        with self._greeted() as made:
            self._refused(made, p.frame(p.pack_request(HELLO)), "second-hello")

    def half_a_frame(self) -> None:
        whole = p.frame(p.pack_request(self._rng.choice(VALID)))
        with self._greeted() as made:
            made.sendall(whole[: self._rng.randrange(1, len(whole))])
            made.shutdown(socket.SHUT_WR)
            assert _rest(made) == b"", "half a frame is answered"
            self.frames["half"] += 1

    def wrong_prefix(self) -> None:
        magic, version, zero, payload, body = b"KV", p.VERSION, 0, 10, 0
        match self._rng.randrange(6):
            case 0:
                magic = self._rng.randbytes(2).replace(b"KV", b"KW")
            case 1:
                version = self._rng.choice((0, 2, 255))
            case 2:
                zero = self._rng.randrange(1, 256)
            case 3:
                payload = self._rng.choice((p.MAX_PAYLOAD + 1, (1 << 32) - 1, 1 << 31))
            case 4:
                body = self._rng.choice((1, 1 << 20, (1 << 64) - 1))  # nobody sends bodies on a Unix socket
            case _:
                payload = 0
        with self._greeted() as made:
            self._refused(made, p.PREFIX.pack(magic, version, zero, payload, body), "wrong-prefix")

    def pipelined_garbage(self) -> None:
        with self._greeted() as made:
            made.sendall(p.frame(p.pack_request(p.Has([KEY]))) + b"\0" * 16 + self._rng.randbytes(100))
            assert "keys" in _reply(made)
            self._refused(made, b"", "pipelined")

    def hang_up(self) -> None:
        """In the middle of whatever the server does."""
        with self._greeted() as made:
            find = p.Find("f", self._rng.randbytes(4000), None, 100.0, kv=True, ms_per_mib=None)
            request = self._rng.choice((find, p.Stats(), p.List("", 9)))
            with suppress(ConnectionError):
                made.sendall(p.frame(p.pack_request(request)) * self._rng.choice((1, 3)))
            self.frames["hang-up"] += 1

    def noise(self) -> None:
        with self._connected() as made:
            self._refused(made, b"\0" + self._rng.randbytes(self._rng.randrange(15, 300)), "noise")

    def large(self) -> None:
        """As large as a frame may be."""
        for payload in large().values():
            with self._greeted() as made:
                self._refused(made, p.frame(payload), "large")

    def slow_drip(self) -> None:
        """A byte at a time is as good as all at once, and keeps nobody waiting."""
        with self._greeted() as made:
            for byte in p.frame(p.pack_request(p.Has([KEY]))):
                made.sendall(bytes([byte]))
            assert "keys" in _reply(made)
            self.frames["drip"] += 1

    # -- how ------------------------------------------------------------------------------------------------------------------

    def _connected(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(SLOWEST)
        made.connect(self._path)
        return made

    def _greeted(self) -> socket.socket:
        made = self._connected()
        made.sendall(p.frame(p.pack_request(HELLO)))
        byte, fds, _, _ = socket.recv_fds(made, 1, 1)
        assert (byte, len(fds)) == (p.FD, 1)
        os.close(fds[0])
        assert _reply(made)["protocol"] == p.VERSION
        return made

    def _refused(self, made: socket.socket, data: bytes, kind: str) -> None:
        """It is called malformed, and the server hangs up."""
        began = monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):  # it may have heard enough
            made.sendall(data)
        made.shutdown(socket.SHUT_WR) if not data else None
        reply = _reply(made)
        assert reply["error"] == "malformed", (reply, data[:200])
        assert _rest(made) == b"", "it goes on after a malformed frame"
        self.slowest = max(self.slowest, monotonic() - began)
        self.frames[kind] += 1


def _reply(made: socket.socket) -> dict[str, object]:
    payload, body = p.lengths(_exactly(made, p.PREFIX.size))
    assert not body
    return p.reply_of(_exactly(made, payload))


def _exactly(made: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = made.recv(count - len(data))
        assert piece, f"the server hung up after {len(data)} of {count} bytes"
        data += piece
    return data


def _rest(made: socket.socket) -> bytes:
    try:
        return made.recv(1)
    except ConnectionResetError:  # it hung up with something of ours unread
        return b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["decode", "serve", "attack"])
    parser.add_argument("path", nargs="?", help="of the server's socket")
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    if given.what == "decode":
        decode(given.frames, given.seed)
    elif given.what == "serve":
        serve(given.path)
    else:
        attacker = Attacker(given.path, given.seed)
        attacker.attack(given.frames)
        print(f"{attacker.frames.total():,} frames: {dict(attacker.frames)}; at most {attacker.slowest:.3f} s for one")


if __name__ == "__main__":
    main()
