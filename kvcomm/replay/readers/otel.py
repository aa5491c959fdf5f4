"""OpenTelemetry spans of generative AI: OTLP-JSON, the exporters' own JSON, and the files that inference-perf replays.

Attributes (`gen_ai.input.messages`, `gen_ai.system_instructions`, `gen_ai.output.messages` or `.text`), the event
`gen_ai.client.inference.operation.details` that may carry them, and the events of older conventions, one per message. Spans of
agents, tools and workflows are no calls, but name the agent and conversation of the calls inside them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvcomm.replay.calls import Call, Message
from kvcomm.replay.readers.base import Around, BadRecord, Record
from kvcomm.replay.readers.content import decoded, message, messages, name_in, seconds, text

__all__ = ["OTel", "Span", "plain"]

IN = ("gen_ai.input.messages", "gen_ai.prompt", "gen_ai.request.messages", "gen_ai.input.text")
OUT = ("gen_ai.output.messages", "gen_ai.output.text", "gen_ai.completion", "gen_ai.response.text")
OLD = ("system", "user", "assistant", "tool")  # gen_ai.<role>.message
DETAILS = "gen_ai.client.inference.operation.details"  # the event that has a whole call, of a span or as a log record
LOGGED = (
    "body",
    "eventName",
    "event_name",
    "timeUnixNano",
    "time_unix_nano",
    "observedTimeUnixNano",
    "observed_time_unix_nano",
)
CALL = ("chat", "text_completion", "generate_content")
WHOLE = re.compile(r"-?[0-9]{1,19}")
NO_CALL = ("embeddings", "execute_tool", "create_agent", "invoke_agent", "invoke_workflow", "retrieval")


class Span:
    """One span, whichever of the spellings its exporter has."""

    def __init__(self, record: Record) -> None:
        context = record.get("context")
        where = context if isinstance(context, Mapping) else record
        self.trace = name_in(where, "trace_id", "traceId")
        self.id = name_in(where, "span_id", "spanId")
        self.parent = name_in(record, "parent_span_id", "parentSpanId", "parent_id", "parentId") or None
        self.started = _when(record, "start_time", "startTime", "startTimeUnixNano", "start_time_unix_nano", "timeUnixNano")
        self.ended = _when(record, "end_time", "endTime", "endTimeUnixNano", "end_time_unix_nano")
        self.attributes = plain(record.get("attributes"))
        events = record.get("events")
        self.events = [e for e in events if isinstance(e, Mapping)] if isinstance(events, list) else []

    @property
    def session(self) -> str:
        return name_in(self.attributes, "gen_ai.conversation.id", "session.id", "gen_ai.session.id")

    @property
    def agent(self) -> str:
        return name_in(
            self.attributes, "gen_ai.agent.name", "agent.name", "graph.node.name", "gen_ai.agent.id", "graph.node.id"
        )

    def around(self) -> list[Around]:
        """What it says about the calls inside it, if it has a name for them to say so."""
        return [Around(self.trace, self.id, self.parent, self.session, self.agent)] if self.id else []

    def call(self, prompt: tuple[Message, ...], output: str | None, where: str) -> Call:
        return Call(
            session=self.session,
            agent=self.agent,
            messages=prompt,
            output=output or "",
            answered=output is not None,
            id=self.id,
            parent=self.parent,
            started=self.started,
            ended=self.ended,
            where=where,
            extra={"trace": self.trace, "model": name_in(self.attributes, "gen_ai.request.model", "llm.model_name")},
        )


class OTel:
    name = "otel"

    def fits(self, record: Record) -> bool:
        return isinstance(record.get("attributes"), Mapping | list) and bool(
            {"span_id", "spanId", "context", "trace_id", "traceId"} & record.keys()
        )

    def read(self, record: Record, where: str) -> Sequence[Call | Around]:
        span = Span(record)
        said = dict(span.attributes)
        logged = any(k in record for k in LOGGED)
        if logged:
            named = name_in(record, "eventName", "event_name") or name_in(said, "event.name")
            if named.startswith("gen_ai.") and named != DETAILS:
                raise BadRecord(f"a log record of {named}: of log records only {DETAILS} is read")
            span.parent = span.id  # that it was logged in, and whose names are its own
        for event in span.events:
            if event.get("name") == DETAILS:
                said.update(plain(event.get("attributes")))
        prompt = next((messages(said[k], k) for k in IN if said.get(k) is not None), ())
        answer = next((_answer(said[k], k) for k in OUT if said.get(k) is not None), None)
        old_prompt, old_answer = _old_events(span.events)
        prompt, answer = prompt or old_prompt or _indexed(said), answer if answer is not None else old_answer
        operation = said.get("gen_ai.operation.name")
        if operation in CALL and not prompt:
            why = said.get("kvcomm.record.problem", "most instrumentations record them only when told to")
            raise BadRecord(f"a call ({operation}) without its messages: {why}")
        if operation in NO_CALL or not prompt:
            return [] if logged else span.around()
        told = said.get("gen_ai.system_instructions")
        if told is not None:
            body = decoded(told)
            prompt = (Message("system", text(body)), *prompt)
        return [span.call(prompt, answer, where), *([] if logged else span.around())]


def plain(attributes: Any) -> dict[str, Any]:
    """Attributes as a mapping: OTLP has a list of {key, value: {stringValue: ...}}."""
    if isinstance(attributes, Mapping):
        return {k: _value(v) for k, v in attributes.items()}
    if attributes is None:
        return {}
    if not isinstance(attributes, list):
        raise BadRecord(f"attributes is a {type(attributes).__name__}")
    return {a["key"]: _value(a.get("value")) for a in attributes if isinstance(a, Mapping) and isinstance(a.get("key"), str)}


def _value(value: Any) -> Any:
    if not isinstance(value, Mapping) or len(value) != 1:
        return value
    (kind, inner), *_ = value.items()
    if kind in ("stringValue", "string_value", "boolValue", "bool_value", "doubleValue", "double_value"):
        return inner
    if kind in ("intValue", "int_value"):
        return int(inner) if isinstance(inner, str) and WHOLE.fullmatch(inner) else inner
    if kind in ("arrayValue", "array_value") and isinstance(inner, Mapping) and isinstance(inner.get("values"), list):
        return [_value(v) for v in inner["values"]]
    if kind in ("kvlistValue", "kvlist_value") and isinstance(inner, Mapping):
        return plain(inner.get("values"))
    return value


def _when(record: Record, *keys: str) -> float | None:
    """Seconds. In nanoseconds where the key says so, or where a number is as large as one of these."""
    key = next((k for k in keys if record.get(k) is not None), "")
    found = seconds(record.get(key))
    return found if found is None or (found < 1e14 and "nano" not in key.lower()) else found * 1e-9


def _answer(value: Any, key: str) -> str:
    value = decoded(value)
    if isinstance(value, str):
        return text(value)
    return "\n".join(m.content for m in messages(value, key))


def _old_events(events: Sequence[Record]) -> tuple[tuple[Message, ...], str | None]:
    """Events named gen_ai.<role>.message and gen_ai.choice, or gen_ai.content.prompt and .completion."""
    prompt: list[Message] = []
    answer: str | None = None
    for event in events:
        name, said = event.get("name"), plain(event.get("attributes"))
        body = event.get("body")
        said = {**said, **plain(body)} if isinstance(body, Mapping) else said
        for role in OLD:
            if name == f"gen_ai.{role}.message":
                prompt.append(message({"role": role, **_unpacked(said, "content", "tool_calls")}, name))
        if name == "gen_ai.choice":
            inner = _unpacked(said, "message").get("message", said)
            one = message(inner if isinstance(inner, Mapping) else {"content": inner}, "gen_ai.choice").content
            answer = one if answer is None else f"{answer}\n{one}"
        elif name == "gen_ai.content.prompt" and "gen_ai.prompt" in said:
            prompt += messages(said["gen_ai.prompt"], name)
        elif name == "gen_ai.content.completion" and "gen_ai.completion" in said:
            answer = _answer(said["gen_ai.completion"], name)
    return tuple(prompt), answer


def _unpacked(values: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {k: decoded(v) if k in keys else v for k, v in values.items()}


def _indexed(said: Mapping[str, Any]) -> tuple[Message, ...]:
    """Attributes gen_ai.prompt.0.role, gen_ai.prompt.0.content, ..., as OpenLLMetry writes them."""
    found: list[Message] = []
    while any(f"gen_ai.prompt.{len(found)}.{k}" in said for k in ("role", "content")):
        start = f"gen_ai.prompt.{len(found)}."
        found.append(message({k: said.get(start + k) for k in ("role", "content") if said.get(start + k) is not None}))
    return tuple(found)
