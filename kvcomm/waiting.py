"""Whose moved text waits for anchors, and which requests are computed for their sake. Knows token ids, never KV.

Where texts are prefilled alone, moved text is computed and leaves anchors behind, until they say what a new context changes.
From then on it is served with them; now and then a request is computed all the same, to look at how things really are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence

from kvcomm.config import Config
from kvcomm.segments import Plan, Span

__all__ = ["Waiting", "longest"]

LESSONS = 8  # spans learned from one request


class Waiting:
    """Mutable; one request at a time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tenants: set[str] = set()  # whose moved text waits
        self._asked: Counter[str] = Counter()  # by tenant: requests that could be served with anchors

    def expect_alone(self, tenant: str) -> None:
        """Texts of this tenant are computed alone: from now on its moved text waits for anchors."""
        self._tenants.add(tenant)

    def waits(self, tenant: str, known: Iterable[Span]) -> bool:
        """Whether moved text of this tenant, of which these spans are some, is served with anchors or not at all."""
        if any(span.segment.alone for span in known):
            self._tenants.add(tenant)
        return self._config.anchors == "all" or tenant in self._tenants

    def due(self, tenant: str) -> bool:
        """Asked once per request that waits: whether it is time to compute one; every (1 / `explore`)th is."""
        self._asked[tenant] += 1
        return self._config.explore > 0 and self._asked[tenant] % round(1 / self._config.explore) == 0

    def lessons(self, plan: Plan, known: Sequence[Span], tenant: str, kept: Container[str]) -> list[Span]:
        """Those of the `known` spans of a prompt, whose segments are still `kept`, that `plan` leaves to be computed behind
        nothing approximate.
        """
        if not self.waits(tenant, known) or any(span.rung != "exact" for span in plan.spans):
            return []
        served = {span.start for span in plan.spans}
        return [span for span in known if span.start not in served and span.segment.key in kept]


def longest(lessons: Iterable[Span]) -> list[Span]:
    """As many as one request is worth."""
    return sorted(lessons, key=lambda span: -span.tokens)[:LESSONS]
