"""A file of named numpy arrays: written whole or not at all, versioned, checksummed. Knows nothing of what they mean.

| magic 8 | header length 8 | header: JSON | arrays, one behind the other | BLAKE2b of all before: 32 |
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from threading import get_ident
from typing import Any

import numpy as np
import numpy.typing as npt

from kvcomm.errors import CacheFault, InputError

__all__ = ["Arrays", "read_arrays", "write_arrays"]

Arrays = dict[str, npt.NDArray[Any]]

_MAGIC = b"KVCARRAY"
_VERSION = 1
_DIGEST = 32  # bytes


def write_arrays(
    path: str | os.PathLike[str], facts: Mapping[str, int | float | str], arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Replace the file at `path`; a reader, or a crash at any moment, sees the old file or the new one. Raises OSError."""
    target = Path(path)
    parts = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    head = {
        "version": _VERSION,
        "facts": dict(facts),
        "arrays": [{"name": name, "dtype": a.dtype.str, "shape": a.shape} for name, a in parts.items()],
    }
    header = json.dumps(head).encode()
    part = target.with_name(f".{target.name}.{os.getpid()}.{get_ident()}.part")
    digest = blake2b(digest_size=_DIGEST)
    pieces: list[Any] = [
        _MAGIC,
        len(header).to_bytes(8, "little"),
        header,
        *(a.reshape(-1).view(np.uint8) for a in parts.values()),
    ]
    try:
        with part.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Arrays]:
    """What `write_arrays` was given; the arrays are read-only.

    Raises InputError when there is no readable file, CacheFault when it is not one of these, truncated, altered or of another
    version.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise InputError(f"{os.fspath(path)} cannot be read: {e.strerror}") from e
    body = memoryview(data)[:-_DIGEST]
    if data[:8] != _MAGIC:
        raise CacheFault(f"{os.fspath(path)} ({len(data)} bytes) does not begin like an index file")
    if blake2b(body, digest_size=_DIGEST).digest() != data[-_DIGEST:]:
        raise CacheFault(f"{os.fspath(path)} ({len(data)} bytes) is truncated or altered: its checksum is another one")
    start = 16 + int.from_bytes(body[8:16], "little")
    head = json.loads(bytes(body[16:start]))
    if head["version"] != _VERSION:
        raise CacheFault(f"{os.fspath(path)} has format {head['version']}; this version reads {_VERSION}")
    arrays: Arrays = {}
    for entry in head["arrays"]:
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        count = int(np.prod(shape, dtype=np.int64))
        arrays[entry["name"]] = np.frombuffer(body, dtype, count, start).reshape(shape)
        start += count * dtype.itemsize
    return head["facts"], arrays
