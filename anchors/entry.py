"""What an anchor's document must be, and manifests of such entries in msgpack. Reads no document, and needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from hashlib import blake2b
from typing import NamedTuple

import msgpack

from kvcomm.errors import CacheFault, InputError

__all__ = ["VERSION", "Entry", "Layout", "checksum", "pack_manifest", "unpack_manifest"]

VERSION = 1  # of manifest and documents; a change of either is a new version
FORMAT = "kvcomm-anchors"


class Layout(NamedTuple):
    """What a packed K/V's tensors mean."""

    codec: str
    keys: tuple[int, ...]  # channels per layer
    values: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One anchor in the manifest."""

    key: str
    slot: str
    fingerprint: str
    tenant: str
    base: Layout
    deviation: Layout
    checksum: str  # of the document
    nbytes: int  # of the document


def checksum(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def pack_manifest(entries: Iterable[Entry]) -> bytes:
    body = msgpack.packb([astuple(entry) for entry in entries])
    return bytes(msgpack.packb({"format": FORMAT, "version": VERSION, "checksum": checksum(body), "entries": body}))


def unpack_manifest(data: bytes) -> list[Entry]:
    """Raises CacheFault for what is no whole manifest, and InputError for one of another version."""
    try:
        outer = msgpack.unpackb(data)
        if outer["format"] != FORMAT:
            raise ValueError(f"format {outer['format']!r}")
        version, body = outer["version"], outer["entries"]
        if version != VERSION:
            raise InputError(f"version {version} of the snapshot's format; this kvcomm reads version {VERSION}")
        if checksum(body) != outer["checksum"]:
            raise ValueError("the checksum does not fit")
        return [_entry(*fields) for fields in msgpack.unpackb(body)]
    except InputError:
        raise
    except Exception as fault:  # msgpack raises many kinds, and altered bytes may be of any type
        raise CacheFault(f"the snapshot's manifest is damaged ({fault!r})") from fault


def _entry(
    key: str, slot: str, fingerprint: str, tenant: str, base: list[object], deviation: list[object], checksum: str, nbytes: int
) -> Entry:
    return Entry(key, slot, fingerprint, tenant, _to_layout(*base), _to_layout(*deviation), checksum, nbytes)


def _to_layout(codec: object, keys: object, values: object) -> Layout:
    assert isinstance(codec, str) and isinstance(keys, list) and isinstance(values, list)
    return Layout(codec, tuple(keys), tuple(values))
