"""What a running server says of itself: asked for, and told to a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvcomm.wire import protocol as p
from kvcomm.wire.address import Address
from kvcomm.wire.transport import Connection

__all__ = ["ask", "lines", "size"]


def ask(address: Address, tokens: Mapping[str, str] | None = None, *, deadline_s: float = 5.0) -> dict[str, Any]:
    """`Server.status()` of the server at `address`, the same for every tenant: the first of `tokens` asks. Raises Unreachable
    where none answers, InputError where it refuses us.
    """
    tenant, token = next(iter((tokens or {}).items()), ("", ""))
    connection = Connection(address, tenant, token=token, deadline_s=deadline_s)
    try:
        return connection.call(p.Stats())[0]
    finally:
        connection.close()


def lines(address: Address, status: Mapping[str, Any]) -> list[str]:
    """The same for a terminal."""
    c = status["counters"]
    now = ("connections", "processes", "leases", "reservations", "flights", "waiting_calls")
    out = [
        f"kvcomm {status['kvcomm']} at {address}, process {status['pid']}, up {_time(status['uptime_s'])}",
        ", ".join(f"{status[name]} {name.replace('_', ' ')}" for name in now),
        "",
        f"{'tier':<10}{'objects':>10}{'bytes':>12}{'limit':>12}{'hits':>10}{'misses':>10}{'evicted':>10}",
    ]
    for name, tier in status["tiers"].items():
        limit = size(tier["limit_bytes"]) if tier["limit_bytes"] else "-"
        out.append(
            f"{name:<10}{tier['objects']:>10}{size(tier['nbytes']):>12}{limit:>12}"
            f"{tier['hits']:>10}{tier['misses']:>10}{tier['evicted']:>10}"
        )
    for kind in ("refused", "faults"):
        for name, tier in status["tiers"].items():
            out += [f"  {name} {kind}: {reason} {count}" for reason, count in sorted(tier[kind].items())]
    requests = ", ".join(f"{op} {count}" for op, count in sorted(c["requests"].items()))
    others = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in c.items() if name != "requests")
    return [*out, "", f"requests: {requests or 'none'}", f"since the start: {others}"]


def size(nbytes: int) -> str:
    """Bytes, for a person."""
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def _time(seconds: float) -> str:
    minutes = int(seconds) // 60
    return f"{seconds:.0f} s" if not minutes else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
