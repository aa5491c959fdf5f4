"""The ways of serving that a replay compares, as differences from the engine's configuration. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from kvcomm.errors import InputError
from kvcomm.policy import Rule

__all__ = ["POLICIES", "Policy", "named"]


NO_ANCHORS = {"anchors": "off"}


@dataclass(frozen=True)
class Policy:
    """One way of serving every call of a trace."""

    name: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # fields of kvcomm.config.Config
    rule: Rule = "auto"


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy("dense", "every prompt computed; what the others are compared with", {"mode": "off"}),
            Policy("prefix", "exact prefixes alone, as a prefix cache reuses them", rule="exact"),
            Policy("rotate", "keys are rotated, nothing is repaired", {**NO_ANCHORS, "rung": "rotate", "max_recompute": 1.0}),
            Policy("boundary", "rotated, and the edges of moved text computed again", {**NO_ANCHORS, "rung": "boundary"}),
            Policy("anchor", "moved text waits for anchors, and is corrected where they say so", {"anchors": "all"}),
            Policy("auto", "what kvcomm does when nobody says anything"),
        )
    }
)  # fmt: skip


def named(names: str, offered: Sequence[str] = tuple(POLICIES)) -> tuple[Policy, ...]:
    """Policies of a comma-separated list, without repetition; `dense` comes first, asked for or not. Raises InputError for a
    name that is not `offered`.
    """
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in POLICIES:
            raise InputError(f"there is no policy {name!r}; use {', '.join(offered)}")
        if name not in offered:
            raise InputError(f"policy {name!r} is not to be had here; use {', '.join(offered)}")
    return tuple(POLICIES[name] for name in dict.fromkeys(["dense", *asked]))
