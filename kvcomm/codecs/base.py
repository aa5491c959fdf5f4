"""The contract of a codec: how a base KV or a deviation is kept small. Knows nothing of anchors, stores or models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from kvcomm.plain import PlainKV

__all__ = ["Codec", "Kind", "Packed", "PackedKV", "pack", "unpack"]

Kind = Literal["keys", "values"]


@dataclass(frozen=True, eq=False)
class Packed:
    """One matrix [tokens, channels], packed."""

    tokens: int
    channels: int
    parts: Mapping[str, Tensor]  # what the codec needs to unpack it; written to files as they are

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.parts.values())


@dataclass(frozen=True, eq=False)
class PackedKV:
    """A PlainKV, packed layer by layer."""

    codec: str  # name of the codec that can unpack it
    keys: tuple[Packed, ...]
    values: tuple[Packed, ...]

    @property
    def tokens(self) -> int:
        return self.keys[0].tokens

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in (*self.keys, *self.values))


class Codec(Protocol):
    """Packs matrices. Stateless: what was packed anywhere can be unpacked anywhere by a codec of the same name."""

    @property
    def name(self) -> str:
        """Identity with every parameter that unpacking depends on, such as `int4`."""
        ...

    def pack(self, x: Tensor, kind: Kind) -> Packed:
        """`x` [tokens, channels], finite, any floating dtype, tokens >= 1; it is not kept and not changed."""
        ...

    def unpack(self, packed: Packed) -> Tensor:
        """float32 [tokens, channels], close to what was packed."""
        ...


def pack(codec: Codec, kv: PlainKV) -> PackedKV:
    return PackedKV(
        codec.name, tuple(codec.pack(x, "keys") for x in kv.keys), tuple(codec.pack(x, "values") for x in kv.values)
    )


def unpack(codec: Codec, packed: PackedKV) -> PlainKV:
    """Raises AssertionError for what another codec packed."""
    assert packed.codec == codec.name, f"packed by {packed.codec}, not by {codec.name}"
    return PlainKV(tuple(map(codec.unpack, packed.keys)), tuple(map(codec.unpack, packed.values)))
