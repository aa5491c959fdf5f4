"""The responses API: what was asked and answered, as messages of the semantic conventions.

A streamed answer is put together into the shape of one that was not, also where the stream was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvcomm.replay.recording.chat import parts
from kvcomm.replay.recording.shapes import sequence, table, text

__all__ = ["answers", "messages", "whole"]

ENDS = ("response.completed", "response.incomplete", "response.failed")


def messages(given: object) -> list[dict[str, Any]]:
    """The prompt: a text, or items."""
    if isinstance(given, str):
        return [{"role": "user", "parts": parts(given)}]
    found = []
    for item in map(table, sequence(given)):
        kind, said = text(item.get("type")) or "message", _parts(item)
        role = {"function_call_output": "tool", "custom_tool_call_output": "tool", "message": text(item.get("role")) or "user"}
        found.append({"role": role.get(kind, "assistant"), "parts": said})
    return found


def answers(response: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One message with everything that the model wrote, in order; none where it wrote nothing."""
    items = [table(item) for item in sequence(response.get("output"))]
    if not items:
        return []
    status = text(response.get("status"))
    reason = text(table(response.get("incomplete_details")).get("reason")) or {"completed": "stop"}.get(status, status)
    said = [part for item in items for part in _parts(item)]
    return [{"role": "assistant", "parts": said, **({"finish_reason": reason} if reason else {})}]


def whole(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer that was streamed in these; `error` where one of them says so."""
    response: dict[str, Any] = {}
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        kind, at = text(event.get("type")), event.get("output_index")
        response |= table(event.get("response"))
        if kind in ENDS and response.get("output"):
            return response
        if kind == "error" or "error" in event:
            response["error"] = table(event.get("error")) or {k: v for k, v in event.items() if k != "type"}
        elif kind in ("response.output_item.added", "response.output_item.done") and isinstance(at, int):
            items[at] = dict(table(event.get("item")))
        elif isinstance(at, int) and text(event.get("delta")):
            _add(items.setdefault(at, {}), kind, event["delta"])
    return {**response, "output": [items[at] for at in sorted(items)]}


def _add(item: dict[str, Any], kind: str, delta: str) -> None:
    """A piece of an item that is still being written."""
    if kind == "response.output_text.delta":
        item["content"] = [{"type": "output_text", "text": _text(item.get("content")) + delta}]
    elif kind in ("response.reasoning_text.delta", "response.reasoning_summary_text.delta"):
        item |= {"type": "reasoning", "content": [{"type": "reasoning_text", "text": _text(item.get("content")) + delta}]}
    elif kind == "response.function_call_arguments.delta":
        item |= {"type": "function_call", "arguments": text(item.get("arguments")) + delta}


def _parts(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts that an item is, of a prompt or of an answer."""
    kind = text(item.get("type")) or "message"
    if kind == "message":
        return parts(item.get("content"))
    if kind == "reasoning":
        return [{"type": "reasoning", "content": _text(item.get("content")) or _text(item.get("summary"))}]
    known = text(item.get("call_id"))
    if kind in ("function_call", "custom_tool_call"):
        wrote = text(item.get("arguments")) or text(item.get("input"))
        return [{"type": "tool_call", "id": known, "name": text(item.get("name")), "arguments": wrote}]
    if kind in ("function_call_output", "custom_tool_call_output"):
        return [{"type": "tool_call_response", "id": known, "response": _text(item.get("output"))}]
    return [{"type": kind}]


def _text(content: object) -> str:
    return "".join(part["content"] for part in parts(content) if part["type"] == "text")
