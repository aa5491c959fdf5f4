"""What is kept somewhere, as rows for a person: everything but its text. Knows no places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvcomm.wire.status import size

__all__ = ["HEAD", "Group", "Row", "Wanted", "summed"]

HEAD = f"{'key':<34}{'tokens':>8}{'bytes':>12}{'age':>10}{'uses':>6}  tenant, producer, fingerprint"


@dataclass(frozen=True)
class Row:
    """One object. None: who was asked does not know."""

    key: str
    tokens: int
    tenant: str
    producer: str
    fingerprint: str
    cost_ms: float | None
    nbytes: int | None = None
    uses: int | None = None
    age_s: float | None = None  # since it was written

    def line(self) -> str:
        known = [
            "-" if self.nbytes is None else size(self.nbytes),
            "-" if self.age_s is None else _age(self.age_s),
            "-" if self.uses is None else str(self.uses),
        ]
        names = ", ".join(name or "-" for name in (self.tenant, self.producer, self.fingerprint[:12]))
        return f"{self.key:<34}{self.tokens:>8}{known[0]:>12}{known[1]:>10}{known[2]:>6}  {names}"


@dataclass(frozen=True)
class Group:
    """Objects of one tenant and one model."""

    tenant: str
    fingerprint: str
    objects: int
    tokens: int
    nbytes: int
    uses: int


@dataclass(frozen=True)
class Wanted:
    """Which objects; None and "": all."""

    tenant: str | None = None
    fingerprint: str = ""  # the beginning of it

    def __call__(self, tenant: str, fingerprint: str) -> bool:
        return self.tenant in (None, tenant) and fingerprint.startswith(self.fingerprint)


def summed(rows: Iterable[Row]) -> list[Group]:
    """By tenant and model; rows of a folder."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        parts.setdefault((row.tenant, row.fingerprint), []).append(row)
    return [
        Group(*names, len(part), sum(r.tokens for r in part), sum(r.nbytes or 0 for r in part), sum(r.uses or 0 for r in part))
        for names, part in sorted(parts.items())
    ]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
