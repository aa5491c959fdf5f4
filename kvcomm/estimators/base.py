"""The contract of an estimator: which deviation a text will show behind a new context, judging from anchors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from kvcomm.anchors.anchor import Anchor
from kvcomm.plain import PlainKV
from kvcomm.segments import Ids

__all__ = ["Estimate", "Estimator", "Place"]


@dataclass(frozen=True, eq=False)
class Place:
    """A run about to be reused behind a context that its base KV does not know."""

    slot: str
    ids: Ids  # [tokens]
    source: PlainKV | Callable[[], PlainKV]  # [tokens]: the base, or what makes it where it is asked for
    context: Tensor  # float32 [c]: features of the text in front of it, as in Anchor
    first: int = 0  # index of the run's first token in its segment
    key: str = ""  # places of one key have one base, so that what follows from it alone can be kept; "": unknown

    @cached_property
    def base(self) -> PlainKV:
        return self.source if isinstance(self.source, PlainKV) else self.source()


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimated deviation and how far to trust it."""

    deviation: PlainKV | None  # [tokens]; None: nothing is to be added
    doubt: Tensor  # float32 [tokens] >= 0: expected size of the error that is left, in the units of K/V; ranks tokens only


class Estimator(Protocol):
    """Learns from anchors as they come; never refitted from scratch. Not thread safe: its pool serialises calls."""

    @property
    def name(self) -> str: ...

    def learn(self, anchor: Anchor, base: PlainKV, deviation: PlainKV) -> None:
        """Take one anchor in; `base` and `deviation` are its own, unpacked. Off the critical path."""
        ...

    def forget(self, anchor: Anchor) -> None:
        """Take back what `learn` took in from this anchor, as far as it is kept per anchor."""
        ...

    def estimate(self, place: Place) -> Estimate | None:
        """The deviation at `place`, any number of tokens; None where too little is known for a safe estimate."""
        ...
