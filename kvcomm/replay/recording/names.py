"""Whose call a request is, and which session it belongs to: from what clients send anyway, else by rule (docs/record.md)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from kvcomm.replay.recording.shapes import sequence, table, text

__all__ = ["SESSION_HEADERS", "agent", "session"]

SESSION_HEADERS = ("x-session-id", "x-dynamo-session-id", "x-session-affinity", "x-correlation-id")


def session(request: Mapping[str, Any], headers: Mapping[str, str], own_header: str | None, default: str) -> str:
    """The first that there is: the header that the user named, `session_id`, `conversation`, a known header, `default`."""
    conversation = request.get("conversation")
    candidates: Sequence[object] = (
        headers.get(own_header.lower()) if own_header else None,
        request.get("session_id"),
        table(conversation).get("id") or conversation,
        *(headers.get(name) for name in SESSION_HEADERS),
    )
    return next(_said(candidates), default)


def agent(request: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
    """The first that there is: what is said to kvcomm, the name of the system message, a name made of the system prompt.

    The same system prompt gives the same name in every run; without one, all are called `agent`.
    """
    system = next((m for m in messages if m.get("role") in ("system", "developer")), {})
    candidates = (
        table(table(request.get("kv_transfer_params")).get("kvcomm")).get("agent"),
        table(request.get("vllm_xargs")).get("kvcomm_agent"),
        system.get("name"),
    )
    prompt = text(request.get("instructions")) or "".join(text(part.get("content")) for part in sequence(system.get("parts")))
    made = f"agent-{sha256(prompt.encode('utf-8', 'replace')).hexdigest()[:8]}" if prompt else "agent"
    return next(_said(candidates), made)


def _said(candidates: Iterable[object]) -> Iterator[str]:
    return (str(c) for c in candidates if isinstance(c, str | int) and not isinstance(c, bool) and str(c).strip())
