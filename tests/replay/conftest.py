"""Runs of made-up agents, and the same runs written in every format that is read."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvcomm.replay.calls import Call, Message

Write = Callable[[Sequence[Call]], bytes]

WORDS = "the river of stones, (over) seven hills; where? nobody-knows: 12 boats and 345 oars!\nlie {asleep} under äöü".split(
    " "
)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def group_chat(session: str, rng: random.Random, rounds: int = 6, agents: int = 3, words: int = 40) -> list[Call]:
    """Everybody hears everything; an agent reads its own words as the assistant's, those of others under their names."""
    names = [f"agent-{i}" for i in range(agents)]
    roles = {name: Message("system", f"You are {name}. {sentence(rng, words)}") for name in names}
    said: list[tuple[str, str]] = [("user", sentence(rng, words))]
    calls = []
    for i in range(rounds):
        name = names[i % agents]
        heard = [Message("assistant" if who == name else "user", text, "" if who == name else who) for who, text in said]
        output = sentence(rng, words)
        calls.append(
            Call(session, name, (roles[name], *heard), output, id=f"{session}-{i}", started=1.7e9 + i, ended=1.7e9 + i + 0.5)
        )
        said.append((name, output))
    return calls


@pytest.fixture
def calls() -> list[Call]:
    rng = random.Random(3)
    return [c for session in ("one", "two") for c in group_chat(session, rng)]


def _openai(m: Message) -> dict[str, Any]:
    return {"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {})


def _parts(m: Message) -> dict[str, Any]:
    return {"role": m.role, "parts": [{"type": "text", "content": m.content}]} | ({"name": m.name} if m.name else {})


def _iso(seconds: float | None) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds or 0.0, UTC).isoformat().replace("+00:00", "Z")


def _lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def by_hand(calls: Sequence[Call]) -> bytes:
    return _lines(
        [
            {
                "session_id": c.session,
                "agent": c.agent,
                "messages": [_openai(m) for m in c.messages],
                "output": c.output,
                "timestamp": 1e3 * (c.started or 0),
            }
            for c in calls
        ]
    )


def aiperf(calls: Sequence[Call]) -> bytes:
    """No agents and no outputs, as AIPerf has it."""
    return _lines(
        [
            {
                "session_id": f"{c.session}#{c.agent}",
                "messages": [_openai(m) for m in c.messages],
                "output_length": 9,
                "timestamp": i,
            }
            for i, c in enumerate(calls)
        ]
    )


def _span(c: Call, attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        "trace_id": f"trace-{c.session}",
        "span_id": c.id,
        "parent_span_id": None,
        "name": "chat m",
        "start_time": _iso(c.started),
        "end_time": _iso(c.ended),
        "attributes": {
            "gen_ai.operation.name": "chat",
            "gen_ai.conversation.id": c.session,
            "gen_ai.agent.name": c.agent,
            **attributes,
        },
    }


def _genai(c: Call) -> dict[str, Any]:
    """As strings, system instructions apart, messages of parts: the newest convention."""
    system, *rest = c.messages
    return _span(
        c,
        {
            "gen_ai.system_instructions": json.dumps([{"type": "text", "content": system.content}]),
            "gen_ai.input.messages": json.dumps([_parts(m) for m in rest]),
            "gen_ai.output.messages": json.dumps([_parts(Message("assistant", c.output))]),
        },
    )


def otel_parts(calls: Sequence[Call]) -> bytes:
    """The file shape of inference-perf, one document over many lines."""
    return json.dumps({"trace_id": "t", "span_count": len(calls), "spans": [_genai(c) for c in calls]}, indent=1).encode()


def otel_content(calls: Sequence[Call]) -> bytes:
    """Lists, not strings; {role, content}; `gen_ai.output.text`; a list of traces, the spans in a line each."""
    spans = [
        _span(c, {"gen_ai.input.messages": [_openai(m) for m in c.messages], "gen_ai.output.text": c.output}) for c in calls
    ]
    return json.dumps([{"trace_id": "t", "spans": [s]} for s in spans]).encode()


def otlp(calls: Sequence[Call]) -> bytes:
    """One export request per line, as the collector's file exporter writes; a session's calls backwards."""
    rows = []
    for c in sorted(calls, key=lambda c: (c.session, -(c.started or 0))):
        span = _genai(c)
        rows.append(
            {
                "resourceSpans": [
                    {
                        "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "s"}}]},
                        "scopeSpans": [
                            {
                                "scope": {"name": "x"},
                                "spans": [
                                    {
                                        "traceId": span["trace_id"],
                                        "spanId": span["span_id"],
                                        "startTimeUnixNano": str(int(1e9 * (c.started or 0))),
                                        "attributes": [
                                            {"key": k, "value": {"stringValue": v}} for k, v in span["attributes"].items()
                                        ],
                                    }
                                ],
                            }
                        ],
                    }
                ]
            }
        )
    return _lines(rows)


def old_events(calls: Sequence[Call]) -> bytes:
    """One event per message, and the agent's name on the span around the call, which comes later."""
    spans = []
    for c in calls:
        call = _span(c, {})
        del call["attributes"]["gen_ai.agent.name"]
        call["parent_span_id"] = f"around-{c.id}"
        call["events"] = [{"name": f"gen_ai.{m.role}.message", "attributes": _openai(m)} for m in c.messages]
        call["events"].append(
            {"name": "gen_ai.choice", "attributes": {"index": 0, "message": json.dumps({"content": c.output})}}
        )
        around = {**_span(c, {"gen_ai.operation.name": "invoke_agent"}), "span_id": f"around-{c.id}"}
        spans += [call, around]
    return json.dumps(spans).encode()


def _flattened(messages: Sequence[Message], key: str) -> dict[str, Any]:
    return {
        f"{key}.{i}.message.{name}": value
        for i, m in enumerate(messages)
        for name, value in (("role", m.role), ("content", m.content), ("name", m.name))
        if value
    }


def openinference_flat(calls: Sequence[Call]) -> bytes:
    return _lines(
        [
            _phoenix(
                c,
                _flattened(c.messages, "llm.input_messages")
                | _flattened([Message("assistant", c.output)], "llm.output_messages"),
            )
            for c in calls
        ]
    )


def openinference_list(calls: Sequence[Call]) -> bytes:
    spans = [
        _phoenix(
            c,
            {
                "llm.input_messages": [{f"message.{k}": v for k, v in _openai(m).items()} for m in c.messages],
                "llm.output_messages": [{"message.role": "assistant", "message.content": c.output}],
            },
        )
        for c in calls
    ]
    return json.dumps({"data": spans}, indent=2).encode()


def _phoenix(c: Call, attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "ChatCompletion",
        "context": {"trace_id": f"trace-{c.session}", "span_id": c.id},
        "parent_id": None,
        "start_time": _iso(c.started),
        "attributes": {"openinference.span.kind": "LLM", "session.id": c.session, "agent.name": c.agent, **attributes},
    }


def langsmith(calls: Sequence[Call]) -> bytes:
    kinds = {"system": "SystemMessage", "user": "HumanMessage", "assistant": "AIMessage"}
    runs = []
    for c in calls:
        listed = [
            {
                "lc": 1,
                "type": "constructor",
                "id": ["langchain", "schema", kinds[m.role]],
                "kwargs": {"content": m.content, "name": m.name},
            }
            for m in c.messages
        ]
        answer = {"lc": 1, "type": "constructor", "id": ["langchain", "schema", "AIMessage"], "kwargs": {"content": c.output}}
        runs.append(
            {
                "id": c.id,
                "trace_id": f"trace-{c.session}",
                "run_type": "llm",
                "name": "ChatOpenAI",
                "start_time": _iso(c.started).removesuffix("Z"),
                "inputs": {"messages": [listed]},
                "outputs": {"generations": [[{"text": c.output, "message": answer}]]},
                "extra": {"metadata": {"langgraph_node": c.agent, "thread_id": c.session}},
            }
        )
    return json.dumps({"runs": runs}).encode()


WRITERS: dict[str, Write] = {
    w.__name__: w
    for w in (by_hand, aiperf, otel_parts, otel_content, otlp, old_events, openinference_flat, openinference_list, langsmith)
}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Write:
    """Each format in turn."""
    return WRITERS[request.param]


@pytest.fixture
def hand() -> Write:
    return by_hand


@pytest.fixture
def chat() -> Callable[..., list[Call]]:
    return group_chat


@pytest.fixture
def recorded(tmp_path: Path, calls: list[Call]) -> Path:
    """The folder of recorded traces that KVCOMM_TRACES names; where there is none, a made-up trace of the same files."""
    if given := os.environ.get("KVCOMM_TRACES"):
        return Path(given)
    folder = tmp_path / "recorded" / "made-up"
    folder.mkdir(parents=True)
    (folder / "calls.jsonl").write_bytes(by_hand(calls))
    (folder / "aiperf_mooncake_messages.jsonl").write_bytes(aiperf(calls))
    (folder / "otel_genai_one_session.json").write_bytes(otel_parts([c for c in calls if c.session == "one"]))
    return folder.parent
