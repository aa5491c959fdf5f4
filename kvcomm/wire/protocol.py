"""What goes over the wire: frames of msgpack with a length in front, and the requests that they hold. Knows no sockets.

| "KV" 2, version 1, 0 1, payload bytes 4, body bytes 8 | payload: msgpack | body |

K/V travels in a body only where the other side shares no memory with the server (TCP). A client speaks first, with `Hello`; it
then gets one reply per request, in order, but for `Release` and `Land`, which have none. What does not parse is a `Malformed`:
whoever hears it says so and hangs up.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

import msgpack

from kvcomm.errors import KVCommError
from kvcomm.segments import KEY

__all__ = [
    "FD",
    "MAX_BODY",
    "MAX_HELLO",
    "MAX_LISTED",
    "MAX_PAYLOAD",
    "PREFIX",
    "REQUESTS",
    "VERSION",
    "AddAnchor",
    "Anchors",
    "Awaited",
    "Commit",
    "Find",
    "Get",
    "Has",
    "Hello",
    "Land",
    "List",
    "Malformed",
    "Put",
    "Release",
    "Remove",
    "Request",
    "Reserve",
    "Stats",
    "frame",
    "lengths",
    "pack_request",
    "reply_of",
    "request_of",
]

VERSION = 1
MAX_PAYLOAD = 16 << 20  # bytes
MAX_HELLO = 1 << 16  # bytes of the first one, which anybody may send
MAX_BODY = 1 << 40  # bytes; whoever reads one knows a narrower limit
MAX_KEYS = 1 << 16  # keys in one request
MAX_LISTED = 1000  # segments in one reply
MAX_TOKENS = 1 << 21
MAX_TEXT = 1 << 12  # characters of a name
MAX_FIELDS = 16  # of a request
PREFIX = struct.Struct("<2sBBIQ")
FD = b"F"  # the byte that the descriptor of the server's memory comes with, in front of the first reply at a Unix socket
_MAGIC = b"KV"


class Malformed(KVCommError):
    """Bytes that are no frame, or a frame that is no request or reply."""


@dataclass(frozen=True)
class Request:
    """What a client asks. Subclasses name their fields; every field is checked when a request is read."""

    op: ClassVar[str]
    replied: ClassVar[bool] = True

    def check(self) -> str | None:
        """What is wrong with the values of its fields, whose types are right; None where nothing is."""
        return None


@dataclass(frozen=True)
class Hello(Request):
    """The first request. Binds the connection to a tenant; a token where the server wants one. `client`: chosen at random, the
    same on all connections of one client of a process.
    """

    op: ClassVar[str] = "hello"
    protocol: int
    kvcomm: str
    tenant: str
    token: str
    client: str

    def check(self) -> str | None:
        return None if KEY.fullmatch(self.client) else f"{self.client[:40]!r} names no client"


@dataclass(frozen=True)
class Find(Request):
    """Where is the text of this prompt known? Found K/V is leased to the client until `Release`."""

    op: ClassVar[str] = "find"
    fingerprint: str
    ids: bytes  # int32, little-endian
    ms_per_token: float | None  # what computing a token costs the client; None: not measured yet
    wait_ms: float  # for others who are computing the same text, at most
    kv: bool  # False: over TCP headers alone
    ms_per_mib: float | None  # what a MiB took the client to receive lately; None: not measured, or not to be judged by

    def check(self) -> str | None:
        if not self.ids or len(self.ids) % 4 or len(self.ids) // 4 > MAX_TOKENS:
            return f"{len(self.ids)} bytes of token ids"
        return "a negative time" if min(self.wait_ms, self.ms_per_token or 0, self.ms_per_mib or 0) < 0 else None


@dataclass(frozen=True)
class Get(Request):
    """K/V by key, leased; what is not here is left out."""

    op: ClassVar[str] = "get"
    keys: list[str]

    def check(self) -> str | None:
        return _bad_keys(self.keys)


@dataclass(frozen=True)
class Has(Request):
    """Which of these are in memory?"""

    op: ClassVar[str] = "has"
    keys: list[str]

    def check(self) -> str | None:
        return _bad_keys(self.keys)


@dataclass(frozen=True)
class Reserve(Request):
    """Memory for a record that the client will write and then `Commit`."""

    op: ClassVar[str] = "reserve"
    key: str
    nbytes: int
    cost_ms: float | None

    def check(self) -> str | None:
        return _bad_keys([self.key]) or (None if 0 < self.nbytes <= MAX_BODY else f"{self.nbytes} bytes")


@dataclass(frozen=True)
class Commit(Request):
    """What was reserved is written. (What never will be is released.)"""

    op: ClassVar[str] = "commit"
    number: int  # of the reservation


@dataclass(frozen=True)
class Put(Request):
    """A record, in the body."""

    op: ClassVar[str] = "put"
    key: str

    def check(self) -> str | None:
        return _bad_keys([self.key])


@dataclass(frozen=True)
class Release(Request):
    """These leases and reservations of this process are not needed any more, nor what a reply handed out that did not arrive:
    the last one of a connection, of which the client has heard fewer. Not replied to; it may be said again.
    """

    op: ClassVar[str] = "release"
    replied: ClassVar[bool] = False
    numbers: list[int]
    lost: list[int]  # connection, how many replies have arrived on it, connection, ...

    def check(self) -> str | None:
        return f"{len(self.lost)} numbers, which are no pairs" if len(self.lost) % 2 else None


@dataclass(frozen=True)
class Remove(Request):
    """Forget these. `damaged`: a client found that they are not what was written."""

    op: ClassVar[str] = "remove"
    keys: list[str]
    damaged: bool

    def check(self) -> str | None:
        return _bad_keys(self.keys)


@dataclass(frozen=True)
class Land(Request):
    """What a prompt computed is kept now, or never will be. Not replied to."""

    op: ClassVar[str] = "land"
    replied: ClassVar[bool] = False
    flight: int


@dataclass(frozen=True)
class Awaited(Request):
    """Does anybody wait for what this prompt computes?"""

    op: ClassVar[str] = "awaited"
    flight: int


@dataclass(frozen=True)
class AddAnchor(Request):
    """An anchor for the pool: its line in a manifest, and its document (kvcomm.anchors.record) in `document`."""

    op: ClassVar[str] = "add_anchor"
    entry: bytes
    document: bytes


@dataclass(frozen=True)
class Anchors(Request):
    """What has changed in the pool since `version`, of this fingerprint."""

    op: ClassVar[str] = "anchors"
    fingerprint: str
    version: int


@dataclass(frozen=True)
class Stats(Request):
    """What the server holds and has done."""

    op: ClassVar[str] = "stats"


@dataclass(frozen=True)
class List(Request):
    """The tenant's segments in the order of their keys: those behind `after` ("": from the first on), at most `count`."""

    op: ClassVar[str] = "list"
    after: str
    count: int

    def check(self) -> str | None:
        return _bad_keys([self.after] if self.after else [])


REQUESTS: dict[str, type[Request]] = {
    kind.op: kind
    for kind in (Hello, Find, Get, Has, Reserve, Commit, Put, Release, Remove, Land, Awaited, AddAnchor, Anchors, Stats, List)
}
_HINTS = {kind: {f.name: get_type_hints(kind)[f.name] for f in fields(kind)} for kind in REQUESTS.values()}


def frame(payload: bytes, body: int = 0) -> bytes:
    """The frame's first part; `body` bytes are to follow. Raises Malformed for a payload that nobody would read."""
    if len(payload) > MAX_PAYLOAD:
        raise Malformed(f"a payload of {len(payload)} bytes; at most {MAX_PAYLOAD} are read")
    return PREFIX.pack(_MAGIC, VERSION, 0, len(payload), body) + payload


def lengths(prefix: bytes, most: int = MAX_BODY, most_payload: int = MAX_PAYLOAD) -> tuple[int, int]:
    """Bytes of payload and body that follow a prefix. Raises Malformed, also where one has more than that."""
    magic, version, zero, payload, body = PREFIX.unpack(prefix)
    if magic != _MAGIC or zero:
        raise Malformed(f"{prefix[:4]!r} does not begin a frame")
    if version != VERSION:
        raise Malformed(f"version {version} of the protocol; this side speaks {VERSION}")
    if payload > most_payload or body > most:
        raise Malformed(f"a frame of {payload} + {body} bytes; at most {most_payload} + {most} are read")
    return payload, body


def pack_request(request: Request) -> bytes:
    """A request's payload."""
    packed: bytes = msgpack.packb({"op": request.op, **vars(request)})
    return packed


def request_of(payload: bytes) -> Request:
    """Raises Malformed for what is no request, whatever the bytes."""
    given = _fields(payload)
    op = given.pop("op", None)
    kind = REQUESTS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise Malformed(f"no request is called {str(op)[:40]!r}")
    hints = _HINTS[kind]
    if given.keys() != hints.keys():
        raise Malformed(f"{op} has {', '.join(sorted(hints)) or 'no fields'}; it came with {', '.join(sorted(given))[:200]}")
    for name, value in given.items():
        if not _is(value, hints[name]):
            raise Malformed(f"{op}: {name} is a {type(value).__name__}")
    request = kind(**given)
    if wrong := request.check():
        raise Malformed(f"{op}: {wrong}")
    return request


def reply_of(payload: bytes) -> dict[str, Any]:
    """A reply's fields; a refused request's reply has `error` and `text`. Raises Malformed for what is no reply."""
    try:
        given = msgpack.unpackb(payload, strict_map_key=True, max_ext_len=0)
    except Exception as fault:  # noqa: BLE001  # msgpack raises many kinds, some with all that it has read
        raise Malformed(f"{len(payload)} bytes that are no msgpack: {type(fault).__name__}") from None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise Malformed("not a map with names")
    return given


def _fields(payload: bytes) -> dict[str, Any]:
    """A request's. Read piece by piece: msgpack makes room for all that a list claims to have before it reads the first of it,
    and lists within lists could claim anything.
    """
    given: dict[str, Any] = {}
    try:
        unpacker = msgpack.Unpacker(
            max_buffer_size=len(payload), max_array_len=0, max_map_len=0, max_str_len=4 * MAX_TEXT, max_ext_len=0
        )
        unpacker.feed(payload)
        for _ in range(unpacker.read_map_header()):
            name = unpacker.unpack()
            if not isinstance(name, str) or name in given or len(given) == MAX_FIELDS:
                raise ValueError("not a map with names")
            given[name] = _value(unpacker, payload[unpacker.tell()])
        if unpacker.tell() != len(payload):
            raise ValueError(f"it ends after {unpacker.tell()}")
    except Exception as fault:  # noqa: BLE001  # msgpack raises many kinds
        raise Malformed(f"{len(payload)} bytes that are no request: {type(fault).__name__} {str(fault)[:100]}") from None
    return given


def _value(unpacker: Any, kind: int) -> Any:
    """The next one, whose first byte is `kind`: a list of what is none, or no list."""
    if kind & 0xF0 != 0x90 and kind not in (0xDC, 0xDD):
        return unpacker.unpack()
    count = unpacker.read_array_header()
    if count > MAX_KEYS:
        raise ValueError(f"a list of {count}")
    return [unpacker.unpack() for _ in range(count)]


def _is(value: object, hint: object) -> bool:
    """Is a value of the type that a field has? Numbers are finite and fit 64 bits, texts are not too long."""
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint == (float | None):
        return value is None or _is(value, float)
    if hint is str:
        return isinstance(value, str) and len(value) <= MAX_TEXT
    if hint is bytes:
        return isinstance(value, bytes)
    if hint == list[str]:
        return isinstance(value, list) and len(value) <= MAX_KEYS and all(_is(v, str) for v in value)
    assert hint == list[int], hint
    return isinstance(value, list) and len(value) <= MAX_KEYS and all(_is(v, int) for v in value)


def _bad_keys(keys: list[str]) -> str | None:
    return next((f"{key[:40]!r} is no key" for key in keys if not KEY.fullmatch(key)), None)
