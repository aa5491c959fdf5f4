"""A segment and its KV as bytes: what every tier outside of a process's own tensors keeps. Knows nothing of where it lies.

| prefix 32                                    | header, zeros up to a multiple of 64 | tensors, each at a multiple of 64 |
| magic 8, header bytes 4, 0 4, all bytes 8, digest 8 |

The digest is of the prefix before it and of the header; the header (msgpack) has one of every block of 1 MiB behind it. So each
byte is under a checksum (XXH3, 64 bits: against accidents, not against forgers), and so is what the bytes mean.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgpack
import numpy as np
import numpy.typing as npt
import xxhash

from kvcomm.errors import CacheFault
from kvcomm.segments import Segment, SegmentKV

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["BLOCK", "DAMAGED", "OTHER_KEY", "OTHER_VERSION", "PREFIX", "Draft", "Record", "Unreadable", "empty", "header_end"]

DAMAGED = "damaged"  # truncated, altered, or no record at all
OTHER_VERSION = "other-version"  # a record, of a format that this version does not read
OTHER_KEY = "other-key"  # sound, but not the record of this key: other text, context, model or tenant

BLOCK = 1 << 20  # bytes under one checksum
MOST_TOKENS = 1 << 21  # of a segment, and of what stood in front of it
SMALL = 1 << 16  # bytes of a header that is read at once
MOST_TENSORS = 1 << 12
MOST_TEXT = 1 << 14  # bytes of a name
MOST_FIELDS = 32  # of a header
ALIGN = 64
VERSION = 1
_MAGIC = b"KVCOMM"
_PREFIX = struct.Struct("<6sHIIQ")  # magic, version, bytes of the header, 0, bytes of it all
_DIGEST = struct.Struct("<Q")
_START = PREFIX = _PREFIX.size + _DIGEST.size

Bytes = npt.NDArray[np.uint8]


class Unreadable(CacheFault):
    """A stored record that cannot be used; `reason` is a constant of this module."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(f"{reason}: {text}")
        self.reason = reason


class Draft:
    """A record to be written: how large it is, and into which memory is the caller's choice."""

    def __init__(self, segment: Segment, kv: SegmentKV) -> None:
        """`kv` has passed `check_kv`. Nothing is copied yet."""
        self.segment, self.key, self._tensors = segment, segment.key, (*kv.keys, *kv.values)
        self._payload = sum(_aligned(t.nbytes) for t in self._tensors)
        kinds = groupby((_name(t), t.shape[0], t.shape[2]) for t in self._tensors)
        self._head: dict[str, Any] = {
            "key": segment.key,
            "fingerprint": segment.fingerprint,
            "tenant": segment.tenant,
            "producer": segment.producer,
            "exact": segment.exact,
            "length": segment.length,
            "alone": segment.alone,
            "cost_ms": segment.cost_ms,
            "ids": np.ascontiguousarray(segment.ids, dtype="<i4").tobytes(),
            "context": np.ascontiguousarray(segment.context, dtype="<i4").tobytes(),
            "kv_length": kv.length,
            "runs": [(len(list(alike)), *kind) for kind, alike in kinds],  # of tensors: how many, dtype, heads, dim
            "digests": bytes(_DIGEST.size * -(-self._payload // BLOCK)),
        }
        self._start = _aligned(_START + len(msgpack.packb(self._head)))
        self.nbytes = self._start + self._payload

    def write(self, target: Bytes) -> Record:
        """Fills `target` [nbytes], writable, at an address that is a multiple of 64; it belongs to the record from here on."""
        import torch

        assert target.nbytes == self.nbytes, f"{target.nbytes} bytes for a record of {self.nbytes}"
        payload, offset = target[self._start :], 0
        for t in self._tensors:
            torch.frombuffer(payload, dtype=t.dtype, count=t.numel(), offset=offset).view(t.shape).copy_(t.detach())
            end = offset + _aligned(t.nbytes)
            payload[offset + t.nbytes : end] = 0
            offset = end
        header = msgpack.packb({**self._head, "digests": _digests(payload)})
        target[: self._start] = 0
        prefix = _PREFIX.pack(_MAGIC, VERSION, len(header), 0, self.nbytes)
        target[: len(prefix)] = np.frombuffer(prefix, np.uint8)
        target[_START : _START + len(header)] = np.frombuffer(header, np.uint8)
        target[len(prefix) : _START] = np.frombuffer(_DIGEST.pack(_header_digest(target[: self._start])), np.uint8)
        return Record(target)


@dataclass(frozen=True, eq=False)
class Record:
    """The bytes of one stored segment, never written to. `head` and what builds on it raise Unreadable where they are not."""

    data: Bytes  # whoever made it keeps the memory as it is for as long as this array lives

    @classmethod
    def of(cls, segment: Segment, kv: SegmentKV) -> Record:
        """In memory of its own."""
        draft = Draft(segment, kv)
        return draft.write(empty(draft.nbytes))

    @classmethod
    def begun(cls, beginning: bytes, nbytes: int) -> Record:
        """One of `nbytes` of which no more than `beginning` is known: for its header. The rest is zeros."""
        data = np.zeros(max(nbytes, len(beginning)), np.uint8)  # zeros that nobody touches take no memory
        data[: len(beginning)] = np.frombuffer(beginning, np.uint8)
        return cls(data)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def key(self) -> str:
        return str(self.head["key"])

    @property
    def tenant(self) -> str:
        return str(self.head["tenant"])

    @property
    def fingerprint(self) -> str:
        return str(self.head["fingerprint"])

    @cached_property
    def head(self) -> dict[str, Any]:
        """The header, under its checksum; the tensors are not looked at."""
        data = self.data
        if data.nbytes < _START:
            raise Unreadable(DAMAGED, f"{data.nbytes} bytes are too few for a record")
        magic, version, size, zero, nbytes = _PREFIX.unpack(data[: _PREFIX.size].tobytes())
        if magic != _MAGIC:
            raise Unreadable(DAMAGED, "it does not begin like a record")
        if version != VERSION:
            raise Unreadable(OTHER_VERSION, f"format {version}; this version reads {VERSION}")
        start = _aligned(_START + size)
        if nbytes != data.nbytes or start > data.nbytes or zero:
            raise Unreadable(DAMAGED, f"{data.nbytes} bytes of a record of {nbytes}")
        (digest,) = _DIGEST.unpack(data[_PREFIX.size : _START].tobytes())
        if digest != _header_digest(data[:start]):
            raise Unreadable(DAMAGED, "the header's checksum is another one")
        return _understood(data[_START : _START + size].tobytes(), data.nbytes - start)

    @cached_property
    def segment(self) -> Segment:
        """Raises Unreadable where the header's key is not that of what it says."""
        head = self.head
        ids, context = (np.frombuffer(head[name], "<i4") for name in ("ids", "context"))
        segment = Segment(
            ids,
            context,
            head["fingerprint"],
            head["tenant"],
            head["producer"],
            head["exact"],
            head["length"],
            head["alone"],
            head["cost_ms"],
        )
        if segment.key != head["key"]:
            raise Unreadable(OTHER_KEY, f"it says {head['key']} and holds {segment.key}")
        return segment

    def verify(self, key: str | None = None) -> Record:
        """Itself, after every byte was compared with its checksum. Raises Unreadable: `DAMAGED`, `OTHER_VERSION`, and
        `OTHER_KEY` where it is not the record of `key`.
        """
        if key is not None and self.segment.key != key:
            raise Unreadable(OTHER_KEY, f"{self.segment.key} in place of {key}")
        if _digests(self.data[self._start :]) != self.head["digests"]:
            raise Unreadable(DAMAGED, f"a block of {self.key} has another checksum")
        return self

    def kv(self) -> SegmentKV:
        """Views of `data`, to be read and never written; they keep it alive. Nothing is verified: call `verify` first."""
        return self._kv

    @cached_property
    def _kv(self) -> SegmentKV:
        import torch

        _read_only_is_meant()
        payload, tokens, offset = self.data[self._start :], len(self.head["ids"]) // 4, 0
        tensors: list[Tensor] = []
        for count, name, heads, dim in self.head["runs"]:
            size = _SIZES[name]
            step = _aligned(heads * tokens * dim * size) // size
            shape, strides = (count, heads, tokens, dim), (step, tokens * dim, dim, 1)
            whole = torch.frombuffer(payload, dtype=_dtype(name))
            tensors += whole.as_strided(shape, strides, offset // size).unbind()  # in one step: a model has many layers
            offset += count * step * size
        half = len(tensors) // 2
        return SegmentKV(tuple(tensors[:half]), tuple(tensors[half:]), self.segment.start, self.head["kv_length"])

    @cached_property
    def _start(self) -> int:
        return _aligned(_START + _PREFIX.unpack(self.data[: _PREFIX.size].tobytes())[2])


def header_end(prefix: bytes) -> int:
    """How many bytes from the beginning on `Record.begun` needs, as these first `PREFIX` of them say; they may be wrong."""
    return _aligned(_START + _PREFIX.unpack_from(prefix)[2]) if len(prefix) >= PREFIX else len(prefix)


def empty(nbytes: int) -> Bytes:
    """Uninitialised memory for a record, at an address that is a multiple of 64."""
    raw = np.empty(nbytes + ALIGN, dtype=np.uint8)
    skip = -raw.ctypes.data % ALIGN
    return raw[skip : skip + nbytes]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _header_digest(region: Bytes) -> int:
    """Of the prefix without its digest, and of the header with the zeros behind it."""
    h = xxhash.xxh3_64(region[: _PREFIX.size].data)
    h.update(region[_START:].data)
    return h.intdigest()


def _digests(payload: Bytes) -> bytes:
    view = payload.data
    return b"".join(_DIGEST.pack(xxhash.xxh3_64_intdigest(view[a : a + BLOCK])) for a in range(0, payload.nbytes, BLOCK))


@cache
def _read_only_is_meant() -> None:
    """torch warns once per process of tensors over memory that cannot be written to; here that is what is wanted."""
    import torch

    memory = np.zeros(1, np.uint8)
    memory.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(memory, dtype=torch.uint8)


_SIZES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}  # bytes; what KV may be
_TYPES: dict[str, Any] = {
    "key": str,
    "fingerprint": str,
    "tenant": str,
    "producer": str,
    "exact": bool,
    "length": int,
    "alone": bool,
    "cost_ms": (int, float, type(None)),
    "ids": bytes,
    "context": bytes,
    "kv_length": int,
    "runs": list,
    "digests": bytes,
}


def _understood(header: bytes, payload: int) -> dict[str, Any]:
    """What a header says of `payload` bytes of tensors. Raises Unreadable where that is no KV of its tokens."""
    try:
        head = _fields(header)
        wrong = [name for name, kind in _TYPES.items() if not isinstance(head[name], kind)]
        tokens, tensors, end = len(head["ids"]) // 4, 0, 0
        for count, name, heads, dim in head["runs"]:
            if not all(type(number) is int and number > 0 for number in (count, heads, dim)):
                raise ValueError("a run of no tensors")
            tensors, end = tensors + count, end + count * _aligned(heads * tokens * dim * _SIZES[name])
        length = len(head["context"]) // 4 + tokens
    except Exception as fault:  # whatever it is made of
        raise Unreadable(DAMAGED, f"its header is no header: {type(fault).__name__} {str(fault)[:100]}") from fault
    digests = _DIGEST.size * -(-payload // BLOCK)
    odd = len(head["ids"]) % 4 or len(head["context"]) % 4 or tensors % 2 or tensors > MOST_TENSORS
    if wrong or odd or not end or end != payload or len(head["digests"]) != digests or head["kv_length"] < length:
        raise Unreadable(DAMAGED, f"its header does not describe {payload} bytes of KV of {tokens} tokens ({', '.join(wrong)})")
    return head


def _fields(header: bytes) -> dict[str, Any]:
    """Of a header that anybody may have written. A large one is read piece by piece: a list within lists of one byte each takes
    70 times its size. Raises whatever msgpack does, TypeError and ValueError.
    """
    if len(header) <= SMALL:
        return dict(msgpack.unpackb(header, max_ext_len=0))
    unpacker = msgpack.Unpacker(
        max_buffer_size=len(header),
        max_array_len=0,
        max_map_len=0,
        max_ext_len=0,
        max_str_len=MOST_TEXT,
        max_bin_len=4 * MOST_TOKENS,  # digests of 1 TiB take as much
    )
    unpacker.feed(header)
    fields: dict[str, Any] = {}
    for _ in range(_at_most(unpacker.read_map_header(), MOST_FIELDS)):
        name = unpacker.unpack()
        if name == "runs":
            runs = _at_most(unpacker.read_array_header(), MOST_TENSORS)
            fields[name] = [[unpacker.unpack() for _ in range(_at_most(unpacker.read_array_header(), 4))] for _ in range(runs)]
        else:
            fields[name] = unpacker.unpack()
    if unpacker.tell() != len(header):
        raise ValueError(f"it ends after {unpacker.tell()} of {len(header)} bytes")
    return fields


def _at_most(count: int, most: int) -> int:
    if count > most:
        raise ValueError(f"{count} of what there may be {most}")
    return count


def _name(t: Tensor) -> str:
    """Raises CacheFault for a type that records do not hold."""
    name = str(t.dtype).removeprefix("torch.")
    if name not in _SIZES:
        raise CacheFault(f"KV of type {name}; records hold {', '.join(_SIZES)}")
    return name


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
