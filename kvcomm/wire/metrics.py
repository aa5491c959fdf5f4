"""What a server says of itself, as text for Prometheus, and the small HTTP responder that serves it.

Knows the fields of `Server.status()`, not how they come about. Whoever reaches the port reads numbers and names of tiers; no
text, no keys, no tenants.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

from kvcomm.errors import InputError

__all__ = ["Responder", "render"]

GAUGES = {
    "uptime_s": ("uptime_seconds", "Seconds since the server started."),
    "connections": ("connections", "Connections that are open."),
    "processes": ("processes", "Processes of this host that are connected, or hold a lease still."),
    "leases": ("leases", "Records handed out to processes of this host and not given back."),
    "reservations": ("reservations", "Places in memory that processes of this host are writing to."),
    "flights": ("flights", "Prompts being computed now that others may wait for."),
    "waiting_calls": ("waiting_calls", "Calls in the server's threads, or waiting for one."),
}
COUNTERS = {
    "connections": ("connections_made", "Connections made."),
    "malformed": ("malformed", "Connections ended because what came over them is no request."),
    "refused": ("refused", "Requests understood and not served."),
    "faults": ("faults", "Requests that failed by a fault of the server."),
    "damaged": ("damaged", "Records that a client found altered; they are removed."),
    "waited": ("waited", "Prompts that waited for text another one was computing."),
    "handed_out": ("handed_out", "Records handed out."),
    "handed_out_bytes": ("handed_out_bytes", "Bytes of the records handed out."),
}
TIER_GAUGES = {
    "objects": ("objects", "Objects that a tier keeps."),
    "nbytes": ("bytes", "Bytes that a tier keeps."),
    "limit_bytes": ("limit_bytes", "Bytes that a tier may keep; 0: not known."),
}
TIER_COUNTERS = {
    "hits": ("hits", "Objects that a tier was asked for and had."),
    "misses": ("misses", "Objects that a tier was asked for and did not have."),
    "evicted": ("evicted", "Objects that left a tier to make room."),
}
TIER_REASONS = {
    "refused": ("refused", "Objects that a tier did not take, by reason."),
    "faults": ("faults", "Objects of a tier that could not be used, and failures of the tier, by reason."),
}
ANCHOR_GAUGES = {
    "anchors": ("", "Anchors that are kept."),
    "nbytes": ("_bytes", "Bytes of anchors that are kept."),
    "limit_bytes": ("_limit_bytes", "Bytes of anchors that may be kept."),
}
ANCHOR_COUNTERS = {
    "added": ("added", "Anchors taken in."),
    "evicted": ("evicted", "Anchors that left to make room."),
}
ANCHOR_REASONS = {
    "refused": ("refused", "Anchors that were not taken in, by reason."),
    "faults": ("faults", "Anchors that were lost, and failures of their disk, by reason."),
}

MOST_HEAD = 8 << 10  # bytes of a request that are read
PATIENCE = 5.0  # s for a client to say what it wants, and to take the answer
CONNECTIONS = 32  # at once; more are hung up on

Labels = Mapping[str, str]
Samples = list[tuple[Labels, Any]]
Family = tuple[str, str, str, Samples]  # name, type, help, samples


def render(status: Mapping[str, Any]) -> str:
    """Prometheus text exposition format 0.0.4 of what `Server.status()` returned; fields that it does not know are left out."""
    lines: list[str] = []
    for name, kind, text, samples in _families(status):
        lines += [f"# HELP kvcomm_server_{name} {text}", f"# TYPE kvcomm_server_{name} {kind}"]
        for labels, value in samples:
            inside = ",".join(f'{label}="{_escaped(said)}"' for label, said in labels.items())
            lines.append(f"kvcomm_server_{name}{{{inside}}} {value}" if inside else f"kvcomm_server_{name} {value}")
    return "\n".join(lines) + "\n"


class Responder:
    """Answers GET and HEAD of `/metrics` and `/healthz`, a connection each. `status`: what `render` reads, asked each time."""

    def __init__(self, status: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        self._status = status
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> int:
        """Returns the port, which is another one where 0 was asked for. Raises InputError where that cannot be."""
        try:
            self._listener = await asyncio.start_server(self._connected, host, port, limit=MOST_HEAD)
        except (OSError, OverflowError) as fault:
            raise InputError(
                f"cannot serve metrics at {host}:{port}: {fault}; choose another port with --metrics-port"
            ) from fault
        found: int = self._listener.sockets[0].getsockname()[1]
        return found

    async def close(self) -> None:
        """Hangs up on everybody."""
        if self._listener is not None:
            self._listener.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) <= CONNECTIONS:
                async with asyncio.timeout(PATIENCE):
                    writer.write(await self._answer(reader))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.CancelledError):
            pass  # it has gone, is too slow, or the server ends
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        """The whole response to the next request."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, path, version = head.split(b"\r\n", 1)[0].decode("ascii").split(" ")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ValueError):
            return _response("400 Bad Request", "this is no request\n")
        if not version.startswith("HTTP/1."):
            return _response("400 Bad Request", "this server speaks HTTP/1.1\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "only GET and HEAD are answered\n", "Allow: GET, HEAD\r\n")
        code, text, kind = "404 Not Found", "there are /metrics and /healthz\n", "text/plain; charset=utf-8"
        match path.partition("?")[0]:
            case "/healthz":
                code, text = "200 OK", "ok\n"
            case "/metrics":
                try:
                    text = render(await self._status())
                    code, kind = "200 OK", "text/plain; version=0.0.4; charset=utf-8"
                except Exception:  # a fault of ours costs this request, not the server
                    logging.getLogger(__name__).exception("metrics cannot be told")
                    code, text = "500 Internal Server Error", "the server's log says why\n"
        return _response(code, text, kind=kind, body=method == "GET")


def _families(status: Mapping[str, Any]) -> Iterator[Family]:
    """Every metric, those without a sample included."""
    yield "info", "gauge", "The version of kvcomm.", [({"version": status["kvcomm"]}, 1)]
    for field, (name, text) in GAUGES.items():
        yield name, "gauge", text, [({}, status[field])] if field in status else []
    counters = status["counters"]
    requests = sorted(counters.get("requests", {}).items())
    yield "requests_total", "counter", "Requests, by kind.", [({"op": op}, count) for op, count in requests]
    for field, (name, text) in COUNTERS.items():
        yield f"{name}_total", "counter", text, [({}, counters[field])] if field in counters else []
    yield from _of_tiers(status["tiers"])
    yield from _of_anchors(status.get("anchors", {}))


def _of_tiers(tiers: Mapping[str, Any]) -> Iterator[Family]:
    for kind, end, table in (("gauge", "", TIER_GAUGES), ("counter", "_total", TIER_COUNTERS)):
        for field, (name, text) in table.items():
            yield f"tier_{name}{end}", kind, text, [({"tier": tier}, facts[field]) for tier, facts in tiers.items()]
    for field, (name, text) in TIER_REASONS.items():
        samples: Samples = [
            ({"tier": tier, "reason": reason}, count)
            for tier, facts in tiers.items()
            for reason, count in sorted(facts[field].items())
        ]
        yield f"tier_{name}_total", "counter", text, samples


def _of_anchors(facts: Mapping[str, Any]) -> Iterator[Family]:
    for field, (name, text) in ANCHOR_GAUGES.items():
        yield f"anchors{name}", "gauge", text, [({}, facts[field])] if field in facts else []
    for field, (name, text) in ANCHOR_COUNTERS.items():
        yield f"anchors_{name}_total", "counter", text, [({}, facts[field])] if field in facts else []
    for field, (name, text) in ANCHOR_REASONS.items():
        samples: Samples = [({"reason": reason}, count) for reason, count in sorted(facts.get(field, {}).items())]
        yield f"anchors_{name}_total", "counter", text, samples


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _response(code: str, text: str, more: str = "", *, kind: str = "text/plain; charset=utf-8", body: bool = True) -> bytes:
    data = text.encode()
    head = f"HTTP/1.1 {code}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n{more}\r\n"
    return head.encode("ascii") + (data if body else b"")
