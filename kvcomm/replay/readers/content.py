"""Messages as text, in all the shapes that traces have them in: {role, content} and {role, parts}, a string or a list, JSON
in a string, tool calls of OpenAI, OpenTelemetry and LangChain. What is not text is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from kvcomm.replay.calls import Message
from kvcomm.replay.readers.base import BadRecord, clean

__all__ = ["decoded", "message", "messages", "name_in", "seconds", "text"]

ROLES = {"human": "user", "ai": "assistant", "model": "assistant", "function": "tool", "developer": "system"}
TEXT_KEYS = ("text", "content", "message_content.text", "response", "result", "output")  # of a part, the first that is there


def decoded(value: Any) -> Any:
    """What a string holds where it is JSON, as attributes of spans are; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def messages(value: Any, what: str = "messages") -> tuple[Message, ...]:
    """A list of messages, or one, or the text of one. Raises BadRecord for what is none of these."""
    value = decoded(value)
    if isinstance(value, str):
        return (Message("user", clean(value)),)
    if isinstance(value, Mapping):
        return (message(value),)
    if not isinstance(value, list):
        raise BadRecord(f"{what} is {_kind(value)}, not a list of messages")
    return tuple([message(m, f"{what}[{i}]") for i, m in enumerate(value)])


def message(value: Any, what: str = "message") -> Message:
    if isinstance(value, str):
        return Message("user", clean(value))
    if not isinstance(value, Mapping):
        raise BadRecord(f"{what} is {_kind(value)}, not a message")
    role = value.get("role", "")
    if not isinstance(role, str):
        raise BadRecord(f"{what}.role is {_kind(role)}, not a string")
    body = value.get("parts") if value.get("content") is None else value["content"]
    if not isinstance(body, str | list | Mapping | None):
        raise BadRecord(f"{what}.content is {_kind(body)}, not text")
    return Message(clean(ROLES.get(role, role)) or "user", text(body, value.get("tool_calls")), name_in(value, "name"))


def text(body: Any, tool_calls: Any = None) -> str:
    """The text of a message's body: a string, or parts, of which only the text and the tool calls count."""
    parts = [body] if isinstance(body, str) else [_part(p) for p in (body if isinstance(body, list) else [body])]
    if isinstance(tool_calls, list) and tool_calls:
        parts += [_tool_call(c) for c in tool_calls]
    return clean("\n".join(p for p in parts if p))


def name_in(values: Mapping[str, Any], *keys: str) -> str:
    """The first of `keys` that has a name; numbers are names too."""
    found = (values.get(k) for k in keys)
    return next((clean(str(v)) for v in found if isinstance(v, str | int) and not isinstance(v, bool) and v != ""), "")


def seconds(value: Any, unit: float = 1.0) -> float | None:
    """A number in units of so many seconds, or an ISO 8601 time, as seconds since the epoch; None for anything else."""
    if isinstance(value, str):
        try:
            when = datetime.fromisoformat(value)
            return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            try:
                value = float(value)
            except ValueError:
                return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = float(value) * unit if abs(value) < 1e300 else 0.0
    return number if 0 < number < 1e300 or number == 0 == value else None


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return ""
    if part.get("type") in ("tool_call", "tool_use", "function_call"):
        return _tool_call(part)
    found = next((part[k] for k in TEXT_KEYS if part.get(k) is not None), "")
    return found if isinstance(found, str) else text(found) if isinstance(found, list) else _json(found)


def _tool_call(call: Any) -> str:
    """One spelling for all formats: {"name": ..., "arguments": ...}."""
    if not isinstance(call, Mapping):
        return ""
    inner = call.get("function") if isinstance(call.get("function"), Mapping) else call
    assert isinstance(inner, Mapping)
    arguments: Iterable[Any] = (inner.get(k) for k in ("arguments", "args", "input"))
    given = next((decoded(a) for a in arguments if a is not None), None)
    return _json({"name": inner.get("name", ""), "arguments": given})


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):
        return ""


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
