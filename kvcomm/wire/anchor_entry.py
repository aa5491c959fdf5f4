"""An anchor's line in a manifest, as it travels and is kept: a manifest of one, under its own checksum and version."""

from __future__ import annotations

from kvcomm.anchors.entry import Entry, Layout, pack_manifest, unpack_manifest
from kvcomm.errors import CacheFault, InputError
from kvcomm.segments import KEY
from kvcomm.wire import protocol as p

__all__ = ["MAX_DOCUMENT", "MAX_ENTRY", "pack_entry", "unpack_entry"]

MAX_ENTRY = 1 << 16  # bytes
MAX_DOCUMENT = p.MAX_PAYLOAD - (4 << 20)  # bytes; whatever stands beside one in a reply has the rest


def pack_entry(entry: Entry) -> bytes:
    return pack_manifest([entry])


def unpack_entry(data: bytes) -> Entry:
    """Every field is of its type and form. Raises CacheFault for what is no entry, or of another version."""
    if len(data) > MAX_ENTRY:
        raise CacheFault(f"an entry of {len(data)} bytes; at most {MAX_ENTRY} are read")
    try:
        (entry,) = unpack_manifest(data)
    except (InputError, ValueError) as fault:
        raise CacheFault(f"no entry of one anchor: {fault}") from fault
    names = (entry.slot, entry.fingerprint, entry.tenant)
    if not all(isinstance(name, str) and len(name) <= p.MAX_TEXT for name in names):
        raise CacheFault("the names of an entry are no texts")
    if not all(isinstance(digest, str) and KEY.fullmatch(digest) for digest in (entry.key, entry.checksum)):
        raise CacheFault("the key or the checksum of an entry is not 32 digits of 0-9a-f")
    if type(entry.nbytes) is not int or not all(map(_sound, (entry.base, entry.deviation))):
        raise CacheFault(f"entry {entry.key} says nothing usable of its document")
    return entry


def _sound(layout: Layout) -> bool:
    return all(type(channels) is int for channels in (*layout.keys, *layout.values))
