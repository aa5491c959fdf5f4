"""What one note on a noticeboard says: which segments hold a window of tokens. Knows nothing of where notes hang."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

import msgpack
import numpy as np
import xxhash

from kvcomm.errors import CacheFault
from kvcomm.segments import Ids, Segment
from kvcomm.store.winnowing import TOKENS

__all__ = ["SIGHTINGS", "Sighting", "digest", "note_names", "pack", "unpack"]

SIGHTINGS = 4  # of one note, the newest
_PERSON = b"kvcomm-note-1"


@dataclass(frozen=True)
class Sighting:
    """A segment that holds the window which names the note."""

    key: str
    nbytes: int  # of its record; 0: not known
    tokens: int
    start: int  # tokens in front of it when it was computed
    opening: int | None  # `digest` of those and its own first 8; None where its KV is not exact behind them

    @classmethod
    def of(cls, segment: Segment, nbytes: int) -> Sighting:
        opening = digest(np.concatenate([segment.context, segment.ids[:TOKENS]])) if segment.exact else None
        return cls(segment.key, nbytes, len(segment.ids), segment.start, opening)


def digest(ids: Ids) -> int:
    """64 bits; they rank, and prove nothing."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids, dtype="<i4").data)


def note_names(fingerprint: str, tenant: str, hashes: Iterable[int]) -> Iterator[str]:
    """Of each window hash, in order. Under another fingerprint or tenant a window has another name."""
    space = blake2b(f"{fingerprint}\0{tenant}".encode(), digest_size=32).digest()
    keyed = blake2b(key=space, digest_size=16, person=_PERSON)
    for hashed in hashes:
        h = keyed.copy()
        h.update(hashed.to_bytes(8, "little"))
        yield h.hexdigest()


def pack(sightings: Iterable[Sighting]) -> bytes:
    """A note's value."""
    return bytes(msgpack.packb([(bytes.fromhex(s.key), s.nbytes, s.tokens, s.start, s.opening) for s in sightings]))


def unpack(note: bytes) -> list[Sighting]:
    """Raises CacheFault for what `pack` cannot have written."""
    try:
        rows = msgpack.unpackb(note)
        sightings = [Sighting(key.hex(), *rest) for key, *rest in rows]
        numbers = [n for s in sightings for n in (s.nbytes, s.tokens, s.start, s.opening or 0)]
        if (
            len(rows) > SIGHTINGS
            or any(len(s.key) != 32 for s in sightings)
            or any(type(n) is not int or n < 0 for n in numbers)
        ):
            raise ValueError("a number or a key is none")
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException) as fault:
        raise CacheFault(f"a note of {len(note)} bytes cannot be read: {fault}") from fault
    return sightings
