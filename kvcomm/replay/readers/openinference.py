"""OpenInference spans (Arize Phoenix, smolagents): messages as lists, or flattened into `llm.input_messages.0.message.role`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers.base import Around, BadRecord, Record
from kvcomm.replay.readers.content import decoded, message, messages, name_in
from kvcomm.replay.readers.otel import Span, plain

__all__ = ["OpenInference"]

IN, OUT = "llm.input_messages", "llm.output_messages"
KIND = "openinference.span.kind"
PLACE = re.compile(r"(\d{1,6})\.message\.(.+)")


class OpenInference:
    name = "openinference"

    def fits(self, record: Record) -> bool:
        attributes = record.get("attributes")
        if isinstance(attributes, list):
            return any(isinstance(a, Mapping) and str(a.get("key", "")).startswith((KIND, IN)) for a in attributes)
        return isinstance(attributes, Mapping) and (KIND in attributes or any(str(k).startswith(IN) for k in _flat(attributes)))

    def read(self, record: Record, where: str) -> Sequence[Call | Around]:
        span = Span(record)
        said = span.attributes = _flat(plain(record.get("attributes")))
        if said.get(KIND, "LLM") != "LLM":
            return span.around()
        prompt = _messages(said, IN) or _whole(said, "input.value")
        if not prompt:
            raise BadRecord("an LLM span without llm.input_messages and input.value")
        answer = _messages(said, OUT) or _whole(said, "output.value")
        said_something = answer or any(str(k).startswith(OUT) for k in said)
        return [span.call(prompt, "\n".join(m.content for m in answer) if said_something else None, where), *span.around()]


def _flat(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Phoenix nests what others join with dots: {"llm": {"input_messages": [...]}}."""
    out: dict[str, Any] = {}
    for key, value in attributes.items():
        if isinstance(value, Mapping) and key in ("llm", "openinference", "input", "output", "session", "agent", "graph"):
            inner = {f"{key}.{k}": v for k, v in value.items()}
            for k, v in inner.items():
                deeper = isinstance(v, Mapping) and k in ("openinference.span", "graph.node")
                out.update({f"{k}.{last}": x for last, x in v.items()} if deeper else {k: v})
        else:
            out[key] = value
    return out


def _messages(said: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    if said.get(key) is not None:
        listed = decoded(said[key])
        if not isinstance(listed, list):
            raise BadRecord(f"{key} is a {type(listed).__name__}, not a list of messages")
        return tuple(_message(m, f"{key}[{i}]") for i, m in enumerate(listed))
    places: dict[int, dict[str, Any]] = {}
    for name, value in said.items():
        if name.startswith(f"{key}.") and (match := PLACE.fullmatch(name, len(key) + 1)):
            places.setdefault(int(match[1]), {})[f"message.{match[2]}"] = value
    return tuple(_message(places[i], f"{key}.{i}") for i in sorted(places))


def _message(value: Any, what: str) -> Message:
    """{"message.role": ...}, {"message": {"role": ...}} or {"role": ...}; contents and tool calls may be numbered keys."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"{what} is a {type(value).__name__}, not a message")
    inner = value.get("message")
    fields = dict(inner) if isinstance(inner, Mapping) else {k.removeprefix("message."): v for k, v in value.items()}
    fields.setdefault("content", fields.get("contents"))
    if fields["content"] is None:
        fields["content"] = _numbered(fields, "contents.", ("message_content.text",))
    calls = fields.get("tool_calls")
    named = [_tool_call(c) for c in calls if isinstance(c, Mapping)] if isinstance(calls, list) else _tool_calls(fields)
    return message({**fields, "tool_calls": named}, what)


def _numbered(fields: Mapping[str, Any], start: str, ends: tuple[str, ...]) -> list[Any]:
    """Values of contents.0.message_content.text, contents.1..., in order."""
    found = [(k, v) for k, v in fields.items() if k.startswith(start) and k.endswith(ends)]
    return [v for _, v in sorted(found, key=lambda kv: (len(kv[0]), kv[0]))]


def _tool_calls(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = _numbered(fields, "tool_calls.", ("tool_call.function.name",))
    arguments = _numbered(fields, "tool_calls.", ("tool_call.function.arguments",))
    return [{"name": n, "arguments": a} for n, a in zip(names, arguments + [None] * len(names), strict=False)]


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    inner = call.get("tool_call")
    call = inner if isinstance(inner, Mapping) else {k.removeprefix("tool_call."): v for k, v in call.items()}
    function = call.get("function")
    if isinstance(function, Mapping):
        return {"name": name_in(function, "name"), "arguments": function.get("arguments")}
    return {"name": name_in(call, "function.name", "name"), "arguments": call.get("function.arguments", call.get("arguments"))}


def _whole(said: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """input.value or output.value: a text, or a request or answer as JSON."""
    value = decoded(said.get(key))
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if isinstance(value, str) and value:
        return (Message("user", value),)
    return messages(value, key) if isinstance(value, list | Mapping) and value else ()
