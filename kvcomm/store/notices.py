"""Small values that hosts leave for each other, to find text that another one has. Knows nothing of what they say.

A value travels under a checksum that covers its name: one that was altered, or came back under another name, is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Protocol

import xxhash

from kvcomm.errors import InputError

__all__ = ["MAX_NOTE", "MAX_NOTES", "Noticeboard", "check_names", "check_notes", "seal", "unseal"]

MAX_NOTE = 64 << 10  # bytes of one value
MAX_NOTES = 4096  # of one call
_NAME = 128  # characters
_HEX = frozenset("0123456789abcdef")
_DIGEST = struct.Struct("<Q")


class Noticeboard(Protocol):
    """Values of at most 64 KiB by names in hexadecimal, at most 4096 a call. Kept as long as the tier likes: hints, not facts.

    Both raise InputError for names and values that are none, and CacheFault where the tier cannot be reached.
    """

    def put_notes(self, notes: Mapping[str, bytes]) -> None:
        """Leave these values; a name's earlier value is replaced. Some may be lost where the tier is full."""

    def get_notes(self, names: Sequence[str]) -> dict[str, bytes]:
        """Those of these notes that are there and intact. One round trip where the tier can."""


def check_names(names: Sequence[str]) -> None:
    """Raise InputError for what is no name, and for too many."""
    if len(names) > MAX_NOTES:
        raise InputError(f"{len(names)} notes in one call; at most {MAX_NOTES}: split the call")
    for name in names:
        if not 0 < len(name) <= _NAME or not _HEX.issuperset(name):
            raise InputError(f"a note's name is {name[:_NAME]!r}; 1 to {_NAME} characters of 0-9 and a-f were expected")


def check_notes(notes: Mapping[str, bytes]) -> None:
    """Raise InputError for names or values that cannot be left."""
    check_names(list(notes))
    for name, value in notes.items():
        if len(value) > MAX_NOTE:
            raise InputError(f"the note {name} has {len(value)} bytes; at most {MAX_NOTE}")


def seal(name: str, value: bytes) -> bytes:
    """The value as it travels: its checksum in front."""
    return _DIGEST.pack(_digest(name, value)) + value


def unseal(name: str, sealed: bytes | None) -> bytes | None:
    """The value, or None where this is not what was sealed under `name`."""
    if sealed is None or not _DIGEST.size <= len(sealed) <= MAX_NOTE + _DIGEST.size:
        return None
    value = sealed[_DIGEST.size :]
    return value if _DIGEST.unpack_from(sealed)[0] == _digest(name, value) else None


def _digest(name: str, value: bytes) -> int:
    return xxhash.xxh3_64_intdigest(f"kvcomm note {name}\0".encode() + value)
