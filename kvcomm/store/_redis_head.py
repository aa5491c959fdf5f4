"""What the value under a record's name begins with: how the record is cut, and who cut it."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

import xxhash

__all__ = ["HEAD_BYTES", "Head"]

_HEAD = struct.Struct("<8sQII")  # generation, bytes of the record, bytes of a chunk, 0
_DIGEST = struct.Struct("<Q")
HEAD_BYTES = _HEAD.size + _DIGEST.size


@dataclass(frozen=True)
class Head:
    """A record of `nbytes` in chunks of `chunk_bytes`, the last one shorter; the first one follows the head."""

    generation: bytes  # 8 random bytes: the chunks of no other put bear it
    nbytes: int
    chunk_bytes: int

    @classmethod
    def new(cls, nbytes: int, chunk_bytes: int) -> Head:
        return cls(os.urandom(8), nbytes, chunk_bytes)

    @property
    def chunks(self) -> int:
        return max(-(-self.nbytes // self.chunk_bytes), 1)

    def size(self, i: int) -> int:
        """Bytes of chunk `i`."""
        return min(self.nbytes - i * self.chunk_bytes, self.chunk_bytes)

    def pack(self, key: str) -> bytes:
        body = _HEAD.pack(self.generation, self.nbytes, self.chunk_bytes, 0)
        return body + _DIGEST.pack(_digest(key, body))

    @classmethod
    def unpack(cls, key: str, value: bytes) -> Head | None:
        """None where `value` does not begin with the head of the record `key`."""
        if len(value) < HEAD_BYTES:
            return None
        body = value[: _HEAD.size]
        if _DIGEST.unpack_from(value, _HEAD.size)[0] != _digest(key, body):
            return None
        generation, nbytes, chunk_bytes, _ = _HEAD.unpack(body)
        return cls(generation, nbytes, chunk_bytes) if chunk_bytes else None


def _digest(key: str, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(f"kvcomm head {key}\0".encode() + body)
