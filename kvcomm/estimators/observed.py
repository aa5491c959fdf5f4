"""What an anchor observed, unpacked: so that estimators which keep sums, not anchors, can take back what they learned."""

from __future__ import annotations

from kvcomm.anchors.anchor import Anchor
from kvcomm.codecs import codec, unpack
from kvcomm.plain import PlainKV

__all__ = ["observed"]


def observed(anchor: Anchor) -> tuple[PlainKV, PlainKV]:
    """Base and deviation, as `learn` was given them. Raises InputError for a codec that `kvcomm.codecs` does not know."""
    return unpack(codec(anchor.base.codec), anchor.base), unpack(codec(anchor.deviation.codec), anchor.deviation)
