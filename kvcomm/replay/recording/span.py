"""One call of a model as it is written down: an OpenTelemetry GenAI span, on a line of its own.

A line is a whole OTLP-JSON document, which is what the OpenTelemetry Collector's file exporter writes too: a file can be
appended to at any time, and whatever happens to its end, every whole line can be read. Knows nothing of files or of APIs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from kvcomm._version import __version__

__all__ = ["PROBLEM", "Attribute", "Record", "Redact"]

Attribute = str | bool | int | float | Sequence[str]
Redact = Callable[[str], str]

PROBLEM = "kvcomm.record.problem"
"""The attribute that says why something of a call is not in the file."""

CLIENT, ERROR = 3, 2  # OTLP's numbers for the kind of a span and for its status


@dataclass(frozen=True)
class Record:
    """One call. Messages are as the semantic conventions have them: `{role, parts: [{type, ...}]}`, and perhaps `name`."""

    operation: str  # chat, text_completion
    session: str
    agent: str
    started_ns: int  # since the epoch
    ended_ns: int
    model: str = ""
    instructions: Sequence[Mapping[str, Any]] = ()  # parts that came beside the messages
    messages: Sequence[Mapping[str, Any]] = ()
    answers: Sequence[Mapping[str, Any]] = ()  # one per choice
    tools: Sequence[Any] = ()  # as they were offered
    attributes: Mapping[str, Attribute] = field(default_factory=dict)  # whatever is no text of the call
    error: str = ""  # what kind, where the call failed
    reason: str = ""  # in words; may quote the call

    def redacted(self, redact: Redact) -> Record:
        """With every text mapped by `redact`; roles, types, ids and names stay. Raises what `redact` raises."""
        return replace(
            self,
            instructions=[_part(part, redact) for part in self.instructions],
            messages=[_message(message, redact) for message in self.messages],
            answers=[_message(message, redact) for message in self.answers],
            tools=[_tool(tool, redact) for tool in self.tools],
            reason=_texts(self.reason, redact) if self.reason else "",
        )

    def bare(self, problem: str) -> Record:
        """Without any text; `problem` says why."""
        attributes = {**self.attributes, PROBLEM: problem}
        return replace(self, instructions=(), messages=(), answers=(), tools=(), reason="", attributes=attributes)

    def line(self) -> bytes:
        """The document, its newline included."""
        scope = {"name": "kvcomm.record", "version": __version__}
        resource = {"attributes": _attributes({"service.name": "kvcomm"})}
        spans = [{"resource": resource, "scopeSpans": [{"scope": scope, "spans": [self._span()]}]}]
        return json.dumps({"resourceSpans": spans}, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"

    def _span(self) -> dict[str, Any]:
        said: dict[str, Attribute] = {
            "gen_ai.operation.name": self.operation,
            "gen_ai.conversation.id": self.session,
            "gen_ai.agent.name": self.agent,
        }
        if self.model:
            said["gen_ai.request.model"] = self.model
        for name, value in {
            "gen_ai.system_instructions": self.instructions,
            "gen_ai.input.messages": self.messages,
            "gen_ai.output.messages": self.answers,
            "gen_ai.tool.definitions": self.tools,
        }.items():
            if value:
                said[name] = json.dumps(list(value), ensure_ascii=False)
        if reasons := [answer["finish_reason"] for answer in self.answers if "finish_reason" in answer]:
            said["gen_ai.response.finish_reasons"] = reasons
        if self.error:
            said["error.type"] = self.error
        return {
            "traceId": blake2b(self.session.encode("utf-8", "replace"), digest_size=16).hexdigest(),  # a session is a trace
            "spanId": os.urandom(8).hex(),
            "name": f"{self.operation} {self.model}".strip(),
            "kind": CLIENT,
            "startTimeUnixNano": str(self.started_ns),
            "endTimeUnixNano": str(self.ended_ns),
            "attributes": _attributes({**said, **self.attributes}),
            "status": {"code": ERROR, "message": self.reason} if self.error else {},
        }


def _attributes(values: Mapping[str, Attribute]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in values.items()]


def _value(value: Attribute) -> dict[str, Any]:
    """As OTLP-JSON types it: whole numbers are text there."""
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}


def _message(message: Mapping[str, Any], redact: Redact) -> dict[str, Any]:
    return {**message, "parts": [_part(part, redact) for part in message["parts"]]}


def _part(part: Mapping[str, Any], redact: Redact) -> dict[str, Any]:
    return {key: value if key in ("id", "name", "type") else _texts(value, redact) for key, value in part.items()}


def _tool(tool: Any, redact: Redact) -> Any:
    if not isinstance(tool, Mapping):
        return _texts(tool, redact)
    return {
        key: value
        if key in ("name", "type") and isinstance(value, str)
        else _tool(value, redact)
        if key == "function"
        else _texts(value, redact)
        for key, value in tool.items()
    }


def _texts(value: Any, redact: Redact) -> Any:
    """Every text in a value of JSON mapped, keys left alone. Raises TypeError where `redact` returns no text."""
    if isinstance(value, str):
        if not isinstance(mapped := redact(value), str):
            raise TypeError(f"a {type(mapped).__name__} instead of a text")
        return mapped
    if isinstance(value, Mapping):
        return {key: _texts(item, redact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_texts(item, redact) for item in value]
    return value
