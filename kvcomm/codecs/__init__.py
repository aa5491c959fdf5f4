"""Codecs: how base KV and deviations are kept small. The contract in `base`, one codec per module, each found by its name."""

from __future__ import annotations

from kvcomm.codecs.base import Codec, Kind, Packed, PackedKV, pack, unpack
from kvcomm.codecs.int4 import Int4
from kvcomm.codecs.int8 import Int8
from kvcomm.codecs.lowrank import LowRank
from kvcomm.codecs.mixed import Mixed
from kvcomm.codecs.raw import Raw
from kvcomm.errors import InputError

__all__ = [
    "KNOWN",
    "Codec",
    "Int4",
    "Int8",
    "Kind",
    "LowRank",
    "Mixed",
    "Packed",
    "PackedKV",
    "Raw",
    "codec",
    "pack",
    "unpack",
]

KNOWN = (
    "raw",
    "int8[+sparse:<share>]",
    "int4[+sparse:<share>]",
    "lowrank:<rank>[+int8][+sparse:<share>]",
    "mixed:<share>[+int2]",
)  # names of codecs; shares are at least 0 and less than 1


def codec(name: str) -> Codec:
    """The codec of that name. Raises InputError for what is no name, with those that are."""
    try:
        return _parsed(name)
    except ValueError as e:  # InputError too: a number that the codec itself refuses
        raise InputError(f"{name!r} is no codec: {e}; known are {', '.join(KNOWN)}") from None


def _parsed(name: str) -> Codec:
    match [word.split(":") for word in name.split("+")]:
        case [["raw"]]:
            return Raw()
        case [["int8"]]:
            return Int8()
        case [["int8"], ["sparse", share]]:
            return Int8(float(share))
        case [["int4"]]:
            return Int4()
        case [["int4"], ["sparse", share]]:
            return Int4(float(share))
        case [["lowrank", rank]]:
            return LowRank(int(rank))
        case [["lowrank", rank], ["sparse", share]]:
            return LowRank(int(rank), float(share))
        case [["lowrank", rank], ["int8"]]:
            return LowRank(int(rank), int8=True)
        case [["lowrank", rank], ["int8"], ["sparse", share]]:
            return LowRank(int(rank), float(share), int8=True)
        case [["mixed", share]]:
            return Mixed(float(share))
        case [["mixed", share], ["int2"]]:
            return Mixed(float(share), bits=2)
    raise ValueError("no codec has such a name")
